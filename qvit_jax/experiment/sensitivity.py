"""What `--mode=sensitivity` measures: each site alone at each spec.

The table is the input of the search for bits in `mixed_precision`.
"""

import collections
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import DivergedError
from qvit_jax.evaluation.metrics import compare_logits
from qvit_jax.experiment import calibration
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import qtensor
from qvit_jax.quantization.finite import at_site, check_finite
from qvit_jax.quantization.ptq import mixed_precision, plans
from qvit_jax.quantization.ptq.switch_core import SwitchCore, switches
from qvit_jax.quantization.spec import QuantSpec
from qvit_jax.report import rows as report
from qvit_jax.store import files

_FILE = 'sensitivity.json'
# What decides the images; augmentation is of training alone.
_DATA = ('source', 'name', 'dir', 'train_split', 'mean', 'std', 'resize')
# What has to be equal for an earlier table to be gone on with.
_SAME = ('config_digest', 'weights_digest', 'examples', 'choices')


def measure(
  experiment: Experiment,
  params: dict[str, np.ndarray],
  place: pathlib.Path,
  say: Callable[[str], None],
) -> dict[str, Any]:
  """Returns the table of `ptq.choices`, which is also PLACE/sensitivity.json.

  The file is written after every site. A later call with the same weights,
  data, examples and choices measures only what it does not hold.

  Args:
    experiment: Built for training, with quant.recipe 'none'.
    params: Path to float32 array.
    place: The workdir.
    say: Called with a line for each site.

  Raises:
    QuantError: A choice is malformed, 'float' or given twice, no assignment
      keeps the budget, or a parameter is not finite.
    ConfigError: More images are asked for than there are.
    DivergedError: The float model gives no numbers to compare with.
  """
  return Sensitivity(experiment, params, place, say).run()


class Sensitivity:
  """The effect of every site alone on the logits of one float model."""

  def __init__(
    self,
    experiment: Experiment,
    params: dict[str, np.ndarray],
    place: pathlib.Path,
    say: Callable[[str], None],
  ):
    """See `measure`."""
    config = experiment.config
    self.experiment, self.config, self.say = experiment, config, say
    self.path = place / _FILE
    self.sites = experiment.model.plan.sites
    self.plans = plans.plan_choices(
      config.ptq.choices, products(config, self.sites)
    )
    self.examples = config.ptq.sensitivity_examples
    calibration.check_count(
      experiment, 'ptq.sensitivity_examples', self.examples
    )
    # Bytes and operations are known now: not after an hour that a budget is
    # too small.
    nothing = {'noise': 0.0}
    nowhere = {'spec': dict.fromkeys(self.plans, nothing)}
    rows = [{'path': site.path, **nowhere} for site in self.sites]
    assign(config, self.sites, {'choices': list(self.plans), 'sites': rows})
    self.host = params
    self.params = jax.tree.map(jnp.asarray, params)
    self._programs: dict[int | None, Callable[..., jax.Array]] = {}

  def run(self) -> dict[str, Any]:
    """Measures what the file does not hold yet; returns the whole table."""
    if rules := self.config.quant.rules:
      self.say(
        f'rules: {len(rules)} of quant.rules; sites that they match have the '
        'bits of the rule at every choice'
      )
    table = self._open()
    done = {row['path'] for row in table['sites']}
    if done:
      self.say(f'{len(done)} of {len(self.sites)} sites done before')
    if len(done) == len(self.sites):
      return table
    # Kept for all sites: decoding them again would take longer than they do.
    images, labels = zip(
      *calibration.prepared(self.experiment, self.examples), strict=True
    )
    check_finite(self.host)
    base = self._logits(images, self.params, None, None)
    if not np.isfinite(base).all() or not base.any():
      raise DivergedError(
        'the float logits are zero or not finite, so nothing can be compared '
        'with them; start from a trained checkpoint'
      )
    right = base.argmax(axis=1) == np.concatenate(labels)[: self.examples]
    table['float'] = {'top1': float(right.mean())}
    width = max(len(site.path) for site in self.sites)
    for index, site in enumerate(self.sites):
      if site.path in done:
        continue
      found = self._site(site, images, base)
      row = {'path': site.path, 'kind': site.kind, 'macs': site.macs}
      table['sites'].append({**row, 'spec': found})
      files.write_json(self.path, table)
      shown = '  '.join(f'{k} {_decibels(v)} dB' for k, v in found.items())
      count = f'{index + 1:{len(str(len(self.sites)))}}/{len(self.sites)}'
      self.say(f'site {count}  {site.path:{width}}  {shown}')
    return table

  def _open(self) -> dict[str, Any]:
    """Returns the table of an earlier run, or one without sites."""
    config = config_lib.to_json(self.config)
    matters = {
      'architecture': models.architecture(self.config),
      'data': {name: config['data'][name] for name in _DATA},
      'seed': config['seed'],
    }
    if self.experiment.data.digest:  # not of sets that cannot change
      matters['data_digest'] = self.experiment.data.digest
    fresh = {
      'environment': report.environment(),
      'config_digest': report.config_digest(matters),
      'weights_digest': calibration.digest(self.host),
      'examples': self.examples,
      'choices': list(self.plans),
      'rules': [list(rule) for rule in self.config.quant.rules],
      'sites': [],
    }
    keys = (*_SAME, 'sites')
    old = files.read_json(self.path, 'table of sites', keys)
    if old is None:
      return fresh
    old = {'rules': [], **old}  # which did not count once
    if all(old[name] == fresh[name] for name in (*_SAME, 'rules')):
      return old
    self.say(f'{self.path.name} is of another model, data or choices: anew')
    return fresh

  def _site(
    self, site: Site, images: Sequence[jax.Array], base: np.ndarray
  ) -> dict[str, dict[str, float | None]]:
    """Returns what each choice does at one site."""
    name = f'{site.path}/kernel'
    by_bits: dict[int, jax.Array] = {}
    by_spec: dict[QuantSpec, dict[str, float | None]] = {}
    specs = {text: plan.by_path[site.path] for text, plan in self.plans.items()}
    for spec in specs.values():
      # Choices may mean the same here: products have no weights.
      if spec in by_spec:
        continue
      params = self.params
      if spec.weights:
        if spec.weights not in by_bits:
          by_bits[spec.weights] = _round_kernel(
            site, params[name], spec.weights
          )
        params = {**params, name: by_bits[spec.weights]}
      logits = base
      if spec != QuantSpec():
        on = site.path if spec.acts else None
        logits = self._logits(images, params, spec.acts, on)
      by_spec[spec] = compare_logits(logits, base)
    return {text: by_spec[spec] for text, spec in specs.items()}

  def _logits(
    self,
    images: Sequence[jax.Array],
    params: dict[str, jax.Array],
    bits: int | None,
    on: str | None,
  ) -> np.ndarray:
    """Returns the logits with the activations of one site at some bits."""
    if bits not in self._programs:
      ops = Ops(core=SwitchCore(bits))
      model = calibration.build_model(self.config, ops, 'float32')
      self._programs[bits] = jax.jit(model.apply)
    variables = {
      'params': tree.nest(params),
      'switch': switches(self.sites, on),
    }
    logits = [self._programs[bits](variables, x) for x in images]
    return np.concatenate(jax.device_get(logits))[: self.examples]


def _round_kernel(site: Site, kernel: jax.Array, bits: int) -> jax.Array:
  """Returns a kernel on the levels that packing would round it to."""
  with at_site(site.path):
    packed = qtensor.quantize(kernel.reshape(site.rhs_shape), bits)
  return qtensor.dequantize(packed).reshape(kernel.shape)


# What the table is for.


def products(config: Any, sites: Sequence[Site]) -> plans.Products:
  """Returns a model's products with the rules of its config."""
  stem = models.family(config).stem
  return plans.Products(tuple(sites), stem, config.quant.rules)


def ranked(place: pathlib.Path, weights_digest: str) -> dict[str, Any] | None:
  """Returns the first choice of a table, most sensitive site first.

  Args:
    place: The workdir.
    weights_digest: Of the weights that it has to be of.

  Returns:
    {'spec': choice, 'sites': [{path, kind, macs, sqnr_db, agreement, kl,
    noise}]}; None where there is no such table.

  Raises:
    ConfigError: Its file is damaged.
  """
  path, what = place / _FILE, 'table of sites'
  table = files.read_json(path, what, ('sites', 'choices'))
  if table is None or table.get('weights_digest') != weights_digest:
    return None
  keys = ('path', 'kind', 'macs')
  try:
    first = table['choices'][0]
    sites = [
      {key: row[key] for key in keys} | row['spec'][first]
      for row in _sort(table)
    ]
  except files.UNREADABLE as error:
    raise files.damaged(path, what, error) from error
  return {'spec': first, 'sites': sites}


def _sort(table: dict[str, Any]) -> list[dict[str, Any]]:
  first = table['choices'][0]
  return sorted(table['sites'], key=lambda row: -row['spec'][first]['noise'])


def assign(
  config: Any, sites: Sequence[Site], table: dict[str, Any]
) -> dict[str, QuantSpec]:
  """Returns the spec of each site with the least noise under the budget.

  Args:
    config: Its `ptq` has the budget; where it has none, bytes halfway between
      the smallest and the largest choice for all sites count.
    sites: All of the model.
    table: Of `measure`.

  Raises:
    QuantError: No assignment keeps the budget; names the smallest possible.
  """
  return _search(config, sites, table)[0]


def _search(
  config: Any, sites: Sequence[Site], table: dict[str, Any]
) -> tuple[dict[str, QuantSpec], str]:
  """Returns what `assign` does and a line that says what it takes."""
  choices = plans.plan_choices(table['choices'], products(config, sites))
  noise = {
    row['path']: {text: row['spec'][text]['noise'] for text in choices}
    for row in table['sites']
  }
  options = mixed_precision.make_options(choices, noise)
  sums = lambda chosen: (
    mixed_precision.total(options, chosen, k) for k in ('cost', 'bytes', 'bops')
  )
  most = config.ptq.budget_mb * 1e6 or None
  limit = config.ptq.budget_gbops * 1e9 or None
  if most is None and limit is None:
    _, sizes, _ = zip(
      *(sums(dict.fromkeys(options, text)) for text in choices), strict=True
    )
    most = (min(sizes) + max(sizes)) // 2
  chosen = mixed_precision.choose(options, budget_bytes=most, budget_bops=limit)
  cost, size, bops = sums(chosen)
  line = (
    f'{size / 1e6:.6g} MB of kernels'
    + (f' (budget {most / 1e6:.6g})' if most else '')
    + f', {bops / 1e9:.6g} GBOPs an image'
    + (f' (budget {limit / 1e9:.6g})' if limit else '')
    + f', noise {cost:.3g} in sum'
  )
  specs = {
    site.path: choices[chosen[site.path]].by_path[site.path] for site in sites
  }
  return specs, line


def describe(
  config: Any, sites: Sequence[Site], table: dict[str, Any]
) -> list[str]:
  """Returns lines: the sites, most sensitive first, and rules for a config.

  Raises:
    QuantError: No assignment keeps the budget; names the smallest possible.
  """
  specs, line = _search(config, sites, table)
  counts = collections.Counter(map(str, specs.values()))
  listed = ', '.join(f'{n} sites {spec}' for spec, n in counts.items())
  return [
    *_ranking(table, specs),
    f'chosen: {line}; {listed}',
    'for a config with quant.recipe=aqt:',
    '  config.quant.rules = (',
    *(
      f"    (r'{pattern}', '{spec}'),"
      for pattern, spec in mixed_precision.make_rules(specs)
    ),
    '  )',
  ]


def _ranking(table: dict[str, Any], specs: dict[str, QuantSpec]) -> list[str]:
  """Returns the sites by the noise of the first choice, as aligned text."""
  first = table['choices'][0]
  lines = [
    ('', 'site', 'kind', 'MACs', f'agree {first}', f'KL {first}',
     *(f'{text} dB' for text in table['choices']), 'chosen')
  ]  # fmt: skip
  for place, row in enumerate(_sort(table)):
    worst = row['spec'][first]
    lines.append((
      str(place + 1), row['path'], row['kind'], f'{row["macs"]:,}',
      f'{worst["agreement"]:.3f}', f'{worst["kl"]:.2e}',
      *(_decibels(row['spec'][text]) for text in table['choices']),
      str(specs[row['path']]),
    ))  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  left = (1, 2, len(widths) - 1)  # words; the rest are numbers
  return [
    '  '.join(
      cell.ljust(w) if i in left else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]


def _decibels(found: dict[str, float | None]) -> str:
  sqnr = found['sqnr_db']
  return '-' if sqnr is None else f'{sqnr:.1f}'
