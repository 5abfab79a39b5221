"""Accuracy against bits by training: which runs, their points."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from qvit_jax import models
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import calibration, sources
from qvit_jax.experiment.model import Model
from qvit_jax.quantization import METHODS
from qvit_jax.quantization.spec import QuantSpec, parse_spec, stem_rule
from qvit_jax.report import rows as report
from qvit_jax.store import files
from qvit_jax.store.runs import Finished, finished, no_results

# What a run's accuracy does not depend on. Its weights have a digest.
_INERT_SECTIONS = ('weights', 'checkpoint', 'ptq', 'export', 'log', 'mesh')
_INERT_FIELDS = (
  'data.dir', 'data.workers', 'data.resident_mib', 'eval.batch_size',
)  # fmt: skip
# What says which images are evaluated, beside the folder.
_EVALUATED = (
  'data.source', 'data.name', 'data.eval_split', 'data.holdout',
  'eval.num_examples',
)  # fmt: skip
_RECORD = 'point.json'


@dataclasses.dataclass(frozen=True)
class Run:
  """One training of the curve.

  Attributes:
    spec: Bits of layers and attention products, 'wXaY'.
    config: Of --mode=train; what it starts from is not set yet.
  """

  spec: str
  config: Any

  @property
  def name(self) -> str:
    """Its folder in WORKDIR/qat."""
    return f'{self.spec}_seed{self.config.seed}'


def plan(config: Any, check: Callable[[Any], Any]) -> list[Run]:
  """Returns the runs that `ptq.qat_specs` and `ptq.qat_seeds` ask for.

  Args:
    config: As the user gave it: `train.trainable` not resolved.
    check: Raises ConfigError where a config cannot train.

  Raises:
    ConfigError: A spec is unknown, lacks a half or stands there twice, or the
      config cannot train.
  """
  specs = []
  for text in config.ptq.qat_specs:
    spec = parse_spec(text, field='ptq.qat_specs')
    if not (spec.weights and spec.acts):
      raise ConfigError(
        f'ptq.qat_specs: {text!r} gives no bits to '
        f'{"activations" if spec.weights else "weights"}; write wXaY, such as '
        'w4a4'
      )
    if spec in specs:
      raise ConfigError(
        f'ptq.qat_specs names {spec} twice; leave one out (for more runs of '
        'it raise ptq.qat_seeds)'
      )
    specs.append(spec)
  if specs and not METHODS[config.quant.recipe].quantizes:
    names = [name for name, method in METHODS.items() if method.quantizes]
    raise ConfigError(
      f'ptq.qat_specs={tuple(config.ptq.qat_specs)} asks for training, but '
      f'quant.recipe={config.quant.recipe!r} trains no bits; set '
      f'--config.quant.recipe={" or ".join(names)}'
    )
  runs = []
  for spec in specs:
    own = _training_config(config, spec, check)
    for i in range(config.ptq.qat_seeds):
      seeded = config_lib.with_fields(own, {'seed': config.seed + i})
      runs.append(Run(str(spec), seeded))
  return runs


def _training_config(
  config: Any, spec: QuantSpec, check: Callable[[Any], Any]
) -> Any:
  own = config_lib.with_fields(
    config,
    {'quant.default': str(spec), 'quant.attention': f'a{spec.acts}'},
  )
  check(own)
  own = Model(own).config  # rules that match nothing; what 'auto' trains
  stem = models.family(own).stem
  if not any(re.search(pattern, stem) for pattern, _ in own.quant.rules):
    rules = (*own.quant.rules, _stem_rule(stem, spec))
    own = config_lib.with_fields(own, {'quant.rules': rules})
  return own


def _stem_rule(stem: str, spec: QuantSpec) -> tuple[str, str]:
  """Returns the rule that gives the stem the bits it has in rows of PTQ."""
  pattern, bits = stem_rule(stem, spec)
  return pattern, str(bits)


def measure(
  runs: Sequence[Run],
  config: Any,
  *,
  params: dict[str, np.ndarray],
  place: pathlib.Path,
  train: Callable[[Any, str], None],
  say: Callable[[str], None],
  evaluated: dict[str, Any],
) -> list[dict[str, Any]]:
  """Trains what is not finished yet; returns the point of every run.

  Args:
    runs: From `plan`.
    config: Of the table: what it started from is what the runs start from.
    params: What it started from, by path.
    place: The table's workdir; runs lie in `place`/qat.
    train: --mode=train; goes on where its workdir stopped.
    say: Prints a line.
    evaluated: What the table's numbers are of; see `Data.evaluated`.

  Raises:
    ConfigError: `place`/qat holds a run of other settings, weights or images.
    Preempted: A signal came; the run is saved.
  """
  digest = calibration.digest(params)
  records = [_record(place / 'qat' / run.name, run, digest) for run in runs]
  for run, record in zip(runs, records, strict=True):
    of = record['point'] or {}
    if any(of.get(key) not in (None, evaluated[key]) for key in evaluated):
      raise ConfigError(
        f'{place / "qat" / run.name} was evaluated on other images than '
        f'{evaluated["split"]!r} of {evaluated["data"]["name"]} has now; '
        'delete that folder or choose another workdir'
      )
  points = []
  for index, (run, record) in enumerate(zip(runs, records, strict=True)):
    here, own = place / 'qat' / run.name, run.config
    label = f'qat {index + 1}/{len(runs)} {run.spec} seed {own.seed}'
    before = 'done before, ' if record['point'] else ''
    if not before:
      say(label)
      own = config_lib.with_fields(own, _start(config, place))
      files.open_workdir(str(here))
      files.write_json(here / _RECORD, record)
      train(own, str(here))
      (record['point'],) = given([str(here)])
      files.write_json(here / _RECORD, record)
    point = record['point']
    points.append(point)
    say(
      f'{label}: {before}top1 {point["top1_last"]:.4f} at the last evaluation '
      f'(step {point["step_last"]}), {point["top1_best"]:.4f} at the best'
    )
  return points


def _start(config: Any, place: pathlib.Path) -> dict[str, str]:
  """Returns the fields that name what the table started from."""
  source = sources.find(config, place)
  if source.kind == 'weights':  # with the commit it is pinned to
    return {'weights.path': source.path}
  return {'checkpoint.path': source.path, 'weights.path': ''}


def _record(here: pathlib.Path, run: Run, digest: str) -> dict[str, Any]:
  """Returns what is known of a run: {'settings', 'weights_digest', 'point'}.

  Raises:
    ConfigError: The folder's run is another one.
  """
  wanted = _settings(config_lib.to_json(run.config))
  fresh = {'settings': wanted, 'weights_digest': digest, 'point': None}
  advice = 'delete that folder or choose another workdir'
  found = files.read_json(
    here / _RECORD, 'record of a run', tuple(fresh), advice=advice
  )
  if found is None:
    return fresh
  there = found['settings']
  for name, value in wanted.items():
    if there.get(name) != value:
      raise ConfigError(
        f'{here} was trained with {name}={there.get(name)!r}, not {value!r}; '
        f'set it back, {advice}'
      )
  if found['weights_digest'] != digest:
    raise ConfigError(f'{here} was trained from other float weights; {advice}')
  return found


def _settings(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that a run's accuracy depends on."""
  counts = {'ptq.range'} if config['quant'].get('calibration_path') else set()
  return {
    name: value
    for name, value in config_lib.flatten(config).items()
    if name in counts
    or (name.split('.')[0] not in _INERT_SECTIONS and name not in _INERT_FIELDS)
  }


def _absolute(path: str) -> str:
  is_local = path and '://' not in path
  # Older versions kept ~ in a run's config.
  expanded = pathlib.Path(config_lib.expand(path))
  return str(expanded.absolute()) if is_local else path


def _reads_alike(run: dict[str, Any], config: Any) -> bool:
  """Returns whether a run evaluated what a config evaluates."""
  here = config_lib.flatten(config_lib.to_json(config))
  there = config_lib.flatten(run)
  return all(there.get(name) == here[name] for name in _EVALUATED)


def given(
  paths: Sequence[str],
  *,
  config: Any = None,
  say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """Returns the points of finished training runs: last and best evaluation.

  A workdir without config.json or metrics.jsonl has none.

  Args:
    paths: Workdirs whose results.json is that of a quantized training.
    config: Of the table; points of other splits are left out, with a note.
    say: Prints a line.

  Raises:
    CheckpointError: One holds no results, or damaged ones.
  """
  points = []
  for path in paths:
    place, found = pathlib.Path(path), finished(path)
    trained = found.config
    if trained is None or not found.evaluations:
      continue
    if config and not _reads_alike(trained, config):
      say(
        f'note: {path} was trained beside another evaluation split, so it has '
        'no point on the curve'
      )
      continue
    try:
      points.append(_point(place.name, found))
    except files.UNREADABLE as error:
      raise no_results(path, error) from error
  return points


def _point(name: str, found: Finished) -> dict[str, Any]:
  """Returns the point of one finished training."""
  trained, row, evaluations = found.config, found.row, found.evaluations
  last = evaluations[-1]
  best = max(evaluations, key=lambda line: (line['top1'], line['step']))
  settings, quant = _settings(trained), trained['quant']
  along = ['seed', 'quant.default']  # what differs along a curve
  if quant['default'].endswith(quant['attention']):
    along.append('quant.attention')
  for field in along:
    settings.pop(field)
  family = models.family(ml_collections.ConfigDict(trained))
  bits = parse_spec(quant['default'], field='quant.default')
  stem = _stem_rule(family.stem, bits)
  rules = settings['quant.rules']
  settings['quant.rules'] = [rule for rule in rules if rule != [*stem]]
  # Runs that began with other weights are no seeds of one training.
  for section in ('weights', 'checkpoint'):
    settings[f'{section}.path'] = _absolute(trained[section]['path'])
  return {
    'name': name,
    'spec': quant['default'],
    'recipe': quant['recipe'],
    **{key: row.get(key) for key in report.OF},
    'seed': trained['seed'],
    'settings': report.config_digest(settings)[:8],
    'weight_bits': row['weight_bits'],
    'act_bits': row['act_bits'],
    'top1_last': last['top1'],
    'step_last': last['step'],
    'top1_best': best['top1'],
    'step_best': best['step'],
  }
