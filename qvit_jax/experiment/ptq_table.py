"""What `--mode=ptq` runs: every row, packed, measured beside float."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models
from qvit_jax.config import resolve as config_lib
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError, DivergedError
from qvit_jax.evaluation import fixed, timing
from qvit_jax.evaluation.metrics import (
  EvalSums,
  compare_logits,
  paired,
  summarize,
)
from qvit_jax.experiment import (
  calibration,
  cards,
  engine_times,
  findings,
  sensitivity,
)
from qvit_jax.experiment.calibration import Calibration, build_model, nest
from qvit_jax.experiment.engine_times import EngineTimes
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.quantization.packed import Packed
from qvit_jax.quantization.ptq import apply as ptq
from qvit_jax.quantization.ptq import calibrate, compare, plans
from qvit_jax.quantization.ptq.row_checks import (
  check_groups,
  check_model,
  scale_notes,
  solver_notes,
)
from qvit_jax.quantization.ptq.rows import Row, parse_row
from qvit_jax.quantization.ptq.tune import tune
from qvit_jax.quantization.spec import QuantPlan, QuantSpec
from qvit_jax.report import page
from qvit_jax.report import rows as report
from qvit_jax.store import artifacts, files

# Images for the noise of each product, and how many are held at once.
_NOISE_IMAGES, _NOISE_BATCH = 32, 8
_BASELINE, _RIVAL = 'fp32', 'bf16'
_ACTIVATIONS = 'activation_stats.json'


@dataclasses.dataclass
class _Measured:
  """Logits of every evaluated image, and how a batch is run for timing."""

  packed: Packed
  logits: np.ndarray
  run: Callable[[], Any]
  memory: dict[str, int | None]


class Table:
  """The rows of one float model."""

  def __init__(
    self,
    experiment: Experiment,
    params: dict[str, Any],
    place: pathlib.Path,
    say: Callable[[str], None],
  ):
    """Takes the model's float parameters, as host arrays by path.

    Raises:
      ConfigError: Rows or calibration ask for what is not there.
    """
    config = experiment.config
    self.experiment, self.config, self.say = experiment, config, say
    self.params, self.place = params, place
    self.stream, self.pairs = models.stream(config), models.pairs(config)
    self.rows = [self._parse(name) for name in config.ptq.rows]
    names = [row.name for row in self.rows]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
      raise ConfigError(
        f'ptq.rows names {", ".join(sorted(twice))} twice; leave one out'
      )
    steps = config.ptq.tune_steps
    usual = config_lib.FIELDS['ptq.tune_steps'].default
    if steps != usual and not any('tune' in row.solvers for row in self.rows):
      raise ConfigError(
        f'ptq.tune_steps={steps} would have no effect: no row of ptq.rows has '
        'the solver tune; add w4a4+gptq+tune, or leave ptq.tune_steps out'
      )
    self.sites = experiment.model.plan.sites
    check_model(self.rows, self.sites, self.stream, self.pairs)
    self.products = sensitivity.products(config, self.sites)
    self.qat = [
      findings.qat_row(path, config, experiment.data.evaluated)
      for path in config.ptq.qat_runs
    ]
    # Points of accuracy against bits by training, of whoever measured them.
    self.curve: list[dict[str, Any]] = []
    self.calibration = Calibration(
      experiment,
      place,
      say,
      hessians=any(row.needs_hessians for row in self.rows),
      is_read=not all(row.is_float for row in self.rows),
    )
    self._stats: dict[tuple[str, ...], dict[str, calibrate.SiteStats]] = {}
    # Rows of an earlier run count only if they are of the same weights.
    self._digest = calibration.digest(params)
    self._done: dict[str, dict[str, Any]] = {}
    # Once for all rows: labels of the evaluated images, pictures of the report.
    self._labels = np.zeros(0, np.int32)
    self._histograms: list[dict[str, Any]] | None = None
    for note in (
      *check_groups(self.rows, self.sites),
      *scale_notes(self.rows, self.sites, config.ptq.scales),
      *solver_notes(self.rows, self.sites, self.stream),
    ):
      say(f'note: {note}')
    for line in self._rule_lines():
      say(line)
    self._check_mixed()
    self.engines = EngineTimes(config, self.calibration.batches)
    if config.ptq.engines and not self.engines.names:
      say(f'note: {engine_times.NONE}')

  def _parse(self, name: str) -> Row:
    return parse_row(
      name,
      has_stream=self.stream is not None,
      ranges=self.config.ptq.range,
    )

  def _check_mixed(self) -> None:
    """Refuses choices, budgets and a damaged file before hours of rows."""
    sensitivity.ranked(self.place, self._digest)
    if any(row.mixed == 'mixed_sensitivity' for row in self.rows):
      sensitivity.Sensitivity(
        self.experiment, self.params, self.place, self.say
      )

  def _rule_lines(self) -> list[str]:
    """Returns what says which rules reach which rows."""
    lines, stem = [], ''
    for row in self.rows:
      stem = stem or self.products.stem_line(row.default)
    if stem:
      lines.append(f'rule: {stem}, in rows of fewer bits')
    if self.products.rules:
      count = len(self.products.rules)
      floats = [row.name for row in self.rows if row.is_float]
      rest = f'; {", ".join(floats)} stay float' if floats else ''
      lines.append(f'rules: {count} of quant.rules in every row{rest}')
    return lines

  def run(self) -> list[dict[str, Any]]:
    """Runs every row that results.json does not hold yet; returns all."""
    self._done = done = self._done_rows()
    known = {
      name: self._measure(self._pack(self._parse(name)))
      for name in (_BASELINE, _RIVAL)
    }
    base = known[_BASELINE].logits
    if not np.isfinite(base).all() or not base.any():
      raise DivergedError(
        'the float logits are zero or not finite, so no row can be compared '
        'with them; start from a trained checkpoint'
      )
    rivals = {'float': known[_BASELINE], 'bf16': known[_RIVAL]}
    baseline = self._row(self._parse(_BASELINE), known[_BASELINE], rivals, None)
    finished = []
    for index, row in enumerate(self.rows):
      if row.name in done:
        finished.append(done[row.name])
        self.say(f'row {index + 1}/{len(self.rows)}  {row.name}: done before')
        continue
      started = time.monotonic()
      seconds = None
      if row.name not in known:
        packed = self._pack(row)
        seconds = time.monotonic() - started
        found = self._measure(packed)
      else:  # measured above, as what rows are compared with
        found = known[row.name]
      finished.append(self._row(row, found, rivals, seconds))
      self._write(baseline, finished)
      self.say(self._line(index, finished[-1]))
    found = self._write(baseline, finished)
    cards.write_table(
      self.place / 'artifacts', self.experiment.model, finished,
      found['environment'], self.experiment.data.class_names,
    )  # fmt: skip
    path = page.write(self.place, found)
    if self._histograms is None:
      self.say(
        f'no {_ACTIVATIONS} is written: no row reads statistics of the model '
        'as it is; int8_static does'
      )
    self.say(f'report in {path}')
    return finished

  def _done_rows(self) -> dict[str, dict[str, Any]]:
    """Returns the rows of an earlier run of the same config."""
    old = files.read_json(self.place / 'results.json', 'table of rows') or {}
    digests = old.get('row_digest'), old.get('weights_digest')
    # Other weights: trained further since.
    if digests != (self._row_digest(), self._digest):
      return {}
    return {
      row['name']: row
      for row in [*old['rows'], *old.get('other_rows', ())]
      if self._is_whole(row)
    }

  def _is_whole(self, row: dict[str, Any]) -> bool:
    """Returns whether a row's file is there and its name means the same."""
    parsed = self._parse(row['name'])
    path = self._artifact(parsed)
    return (
      row['method'] == self._method(parsed)
      and path.is_file()
      and path.stat().st_size == row['artifact_bytes']
      and set(self.engines.names) <= set(row.get('engines') or {})
    )

  def _row_digest(self) -> str:
    """Returns the digest of everything that a row's numbers depend on."""
    config = config_lib.to_json(self.config)
    # More of them may be asked for later.
    for field in ('rows', 'engines', 'qat_runs', 'qat_specs', 'qat_seeds'):
      config['ptq'].pop(field)
    data = self.experiment.data  # files change, and TFDS sets
    config |= {'evaluated': data.evaluated, 'files': data.digest}
    return report.config_digest(config)

  def _write(self, baseline, rows) -> dict[str, Any]:
    content = report.results(config_lib.to_json(self.config), baseline, rows)
    names = {row['name'] for row in rows}
    content |= {
      # Of an earlier run, not asked for or not reached yet.
      'other_rows': [r for n, r in self._done.items() if n not in names],
      'row_digest': self._row_digest(),
      'weights_digest': self._digest,
      'model': self.experiment.model.title,
      'class_names': list(self.experiment.data.class_names),
      'qat': self.qat,
      'curve': self.curve,
      'histograms': self._drawn(),
      'sensitivity': sensitivity.ranked(self.place, self._digest),
    }
    files.write_json(self.place / 'results.json', content)
    return content

  def _drawn(self) -> list[dict[str, Any]]:
    """Returns the histograms, made when there are statistics of them."""
    if self._histograms is None:
      stats = self._plain_stats()
      if stats is None:
        return []
      static = {
        row: self._plan_row(row, self.params)
        for row in self.rows
        if row.is_static and not row.transforms
      }
      self._histograms = findings.histograms(
        self.config, static, self.sites, self.stream, stats
      )
      path = self.place / _ACTIVATIONS
      found = findings.activation_stats(self.sites, stats)
      files.write_json(path, found)
      self.say(f'activations of {len(found)} sites in {path}')
    return self._histograms

  def _method(self, row: Row) -> str:
    return row.method(plans.row_notes(row, self.products))

  def _plain_stats(self) -> dict[str, calibrate.SiteStats] | None:
    """Returns what was seen of the untransformed model; None: no row is static.

    A row that transforms it read this before, unless it only turns it.
    """
    if any(row.is_static for row in self.rows):
      return self._observe((), self.params)
    return self._stats.get(())

  # One row.

  def pack(self, name: str) -> Packed:
    """Returns the model of a row, without measuring it."""
    return self._pack(self._parse(name))

  def _pack(self, row: Row) -> Packed:
    """Returns the row's model as it comes back from its file."""
    params = self._transformed(row)
    sites = {}
    if not row.is_float:
      sites = plans.plan_sites(row, self._plan_row(row, params), self.stream)
    stats = None
    if row.needs_calibration:
      stats = self._observe(row.transforms, params)
    packed = ptq.apply_row(row, sites, params, self.sites, stats)
    if 'tune' in row.solvers:
      packed = tune(
        lambda ops: build_model(self.config, ops, row.dtype),
        packed, nest(params), self.calibration.images(),
        steps=self.config.ptq.tune_steps, seed=self.config.seed,
        progress=self.say,
      )  # fmt: skip
    path = self._artifact(row)
    architecture = models.architecture(self.config)
    names = self.experiment.data.class_names
    artifacts.save(
      packed, path, architecture, class_names=names,
      config=config_lib.to_json(self.config),
    )  # fmt: skip
    return artifacts.load(path, self.sites, architecture)

  def _transformed(self, row: Row) -> dict[str, np.ndarray]:
    return ptq.transform(
      row, self.params, self.stream, self._observe, seed=self.config.seed,
      pairs=self.pairs,
    )  # fmt: skip

  def _plan_row(self, row: Row, params) -> QuantPlan:
    chosen = None
    if row.mixed == 'mixed_sensitivity':
      table = sensitivity.measure(
        self.experiment, self.params, self.place, self.say
      )
      chosen = sensitivity.assign(self.config, self.sites, table)
    return plans.plan_row(row, self.products, params, chosen)

  def _artifact(self, row: Row) -> pathlib.Path:
    return self.place / 'artifacts' / f'{row.name}.safetensors'

  def _observe(self, done, params) -> dict[str, calibrate.SiteStats]:
    if done not in self._stats:
      self._stats[done] = self.calibration.observe(done, params)
    return self._stats[done]

  def _measure(self, packed: Packed) -> _Measured:
    config = self.config
    model = build_model(config, packed.ops, packed.dtype)
    data, size = config.data, config.model.image_size
    split = self.experiment.data.eval
    source = jax.tree.map(jnp.asarray, split.source)

    whole, given = fixed.split(packed.variables)
    apply = lambda given, images: model.apply(whole(given), images)

    @jax.jit
    def forward(given, source, batch):
      images, labels = preprocess.gather(source, batch)
      images = preprocess.prepare_eval(images, data=data, size=size)
      return apply(given, images), labels

    parts: list[list[np.ndarray]] = [[], []]
    for host, mask in self._eval_batches():
      for part, x in zip(parts, forward(given, source, host), strict=True):
        part.append(np.asarray(x)[mask])
    logits, self._labels = map(np.concatenate, parts)
    images = jax.random.normal(
      jax.random.key(0), (config.ptq.latency_batch, size, size, 3)
    )
    compiled, _ = timing.compile_timed(jax.jit(apply), given, images)
    return _Measured(
      packed,
      logits,
      lambda: compiled(given, images),
      timing.memory(compiled),
    )

  def _eval_batches(self) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields (host batch, which of its images count)."""
    split = self.experiment.data.eval
    batch = min(self.config.eval.batch_size, split.size)
    for host in split.eval_batches(batch=batch, rows=slice(0, batch)):
      yield host, np.asarray(host['mask']) > 0

  def _row(
    self, row: Row, found: _Measured, rivals: dict[str, _Measured], seconds
  ) -> dict[str, Any]:
    path, base, labels = self._artifact(row), rivals['float'], self._labels
    packed = found.packed
    sums = EvalSums.zeros(self.config.model.num_classes).add(
      jnp.asarray(found.logits),
      jnp.asarray(labels),
      jnp.ones(len(found.logits)),
    )
    metrics = summarize(jax.device_get(sums))
    engines = self.engines.open(packed, base.packed)
    times = timing.interleave(
      {'row': found.run, **{name: m.run for name, m in rivals.items()}}
      | engines.calls,
      rounds=self.config.ptq.rounds,
    )
    spread = timing.spread(times['row'])
    speedup = {
      name: timing.ratio(times[name], times['row'])['median'] for name in rivals
    }
    compared = compare_logits(found.logits, base.logits)
    full = 4 * sum(x.size for x in self.params.values())
    sites = self._site_rows(row, packed)
    # The bits of its name, unless rules make them others.
    bits = QuantSpec() if self.products.rules else row.default
    return report.make_row(
      name=row.name,
      **self.experiment.data.evaluated,
      method=self._method(row),
      weight_bits=bits.weights or packed.plan.bits('weights'),
      act_bits=bits.acts or packed.plan.bits('acts'),
      size_bytes=packed.num_bytes(),
      artifact_bytes=path.stat().st_size,
      compression=full / packed.num_bytes(),
      bops=packed.plan.bops(),
      macs=packed.plan.macs(),
      latency_ms={k: 1e3 * v for k, v in spread.items()},
      images_per_second=self.config.ptq.latency_batch / spread['median'],
      speedup=speedup['float'],
      speedup_bf16=speedup['bf16'],
      peak_memory_bytes=found.memory['peak'],
      execution=packed.execution,
      why=packed.why,
      sites=sites,
      seconds=seconds,
      **metrics,
      engines=engines.facts(times),
      paired=paired(found.logits, base.logits, labels),
      agreement=compared['agreement'],
      sqnr_db=compared['sqnr_db'],
      **findings.collapse(metrics | compared, base.logits, labels, sites),
    )

  def _site_rows(self, row: Row, packed: Packed):
    """Returns bits and noise of every product; None for a float row."""
    if row.is_float:
      return None
    params = self._transformed(row)
    images = (
      batch[start : start + _NOISE_BATCH]
      for batch in self.calibration.batches(
        min(_NOISE_IMAGES, self.config.ptq.calibration_examples)
      )
      for start in range(0, len(batch), _NOISE_BATCH)
    )
    noise = compare.site_sqnr(
      lambda ops, dtype: build_model(self.config, ops, dtype),
      packed, nest(params), images,
    )  # fmt: skip
    return [
      {
        'path': site.path,
        'kind': site.kind,
        'weights': spec.weights,
        'acts': spec.acts,
        'sqnr_db': noise[site.path],
      }
      for site, spec in zip(packed.plan.sites, packed.plan.specs, strict=True)
    ]

  def _line(self, index: int, row: dict[str, Any]) -> str:
    sqnr = '-' if row['sqnr_db'] is None else f'{row["sqnr_db"]:.1f}'
    return (
      f'row {index + 1}/{len(self.rows)}  {row["name"]:22} top1 '
      f'{row["top1"]:.4f}  agreement {row["agreement"]:.4f}  SQNR {sqnr} dB  '
      f'{row["artifact_bytes"] / 1e6:.2f} MB ({row["compression"]:.2f}x)  '
      f'{row["latency_ms"]["median"]:.1f} ms ({row["speedup"]:.2f}x)  '
      f'{row["execution"]}' + ('  COLLAPSED' if row['collapsed'] else '')
      + ''.join(map('  {}'.format, engine_times.texts(row['engines'])))
    )
