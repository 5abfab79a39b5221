"""Mode `compare`: several runs or files side by side, on one page."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.evaluation import fixed, metrics, timing
from qvit_jax.experiment import own_config, parity, sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.modes import MODES, runner, session
from qvit_jax.modes.session import say
from qvit_jax.report import comparison
from qvit_jax.report import rows as report
from qvit_jax.store import files, runs

_BATCH, _ROUNDS = 16, 5  # images that are timed at once, and how often
_KEPT = ('loss', 'top1', 'top1_interval', 'top5', 'f1_macro', 'num_examples')


@dataclasses.dataclass(frozen=True)
class _Opened:
  """One of those that are compared.

  Attributes:
    path: As it was given.
    experiment: Of its model and its data.
    run: Normalised images -> logits.
  """

  path: str
  experiment: Experiment
  run: Callable[[Any], Any]


def compare(config: Any, workdir: str) -> None:
  """Evaluates, times and tests what `compare.runs` names; writes a page.

  Raises:
    ConfigError: Fewer than two are named, or one twice.
    QvitError: One is no model, or is damaged.
  """
  paths = config.compare.runs
  if len(set(paths)) < 2 or len(set(paths)) < len(paths):
    raise ConfigError(
      f'compare.runs={paths!r} has to name two different runs or more; set '
      "--config.compare.runs=\"('runs/a', 'runs/b')\""
    )
  with session.opened(workdir) as place:
    say('mode      compare')
    opened = [_open(path) for path in paths]
    found = [_evaluated(one) for one in opened]
    rows = [row for row, _, _ in found]
    first, *others = found
    for row, logits, labels in others:
      same = all(row[key] == first[0][key] for key in report.OF)
      row['paired'] = metrics.paired(logits, first[1], labels) if same else None
    _time(opened, rows)
    result = {
      'environment': report.environment(), 'rows': rows,
      'differences': _differences(opened), 'curves': _curves(paths),
    }  # fmt: skip
    files.write_json(place / 'compare.json', result)
    page = comparison.write(place / 'compare.html', result)
    for row in rows:
      say(comparison.line(row))
    say(f'page in {page}')


def _open(path: str) -> _Opened:
  page, place, _ = own_config.loaded(path)
  context = runner.context_of(MODES['eval'], page)
  config, _ = config_lib.resolve(page, context)
  packed = sources.open_packed(config)
  experiment = Experiment(config, training=False, packed=packed)
  variables, lines = sources.evaluated(experiment, place)
  say(f'run       {path}: {lines[0]}')
  apply = experiment.model.module.apply
  whole, given = fixed.split(variables)
  program = jax.jit(lambda given, images: apply(whole(given), images))
  return _Opened(path, experiment, lambda images: program(given, images))


def _evaluated(one: _Opened) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
  """Returns a row, the logits and the labels of its own evaluation split."""
  experiment = one.experiment
  labels, found = parity.logits_of(experiment, {'run': one.run})
  numbers = parity.metrics_of(found['run'], labels)
  row = {
    'run': one.path, 'model': experiment.model.title,
    'bits': experiment.model.bits, **experiment.data.evaluated,
    **{key: numbers[key] for key in _KEPT},
    'size_bytes': experiment.model.size_bytes(), 'paired': None,
  }  # fmt: skip
  return row, found['run'], labels


def _time(opened: Sequence[_Opened], rows: list[dict[str, Any]]) -> None:
  """Adds latency_ms of a batch to the rows, timed in turns."""
  rng, calls = np.random.default_rng(0), {}
  for one in opened:
    size = one.experiment.config.model.image_size
    images = rng.standard_normal((_BATCH, size, size, 3), np.float32)
    images = jax.device_put(images)
    calls[one.path] = lambda run=one.run, images=images: run(images)
  times = timing.interleave(calls, rounds=_ROUNDS)
  for row in rows:
    spread = timing.spread(times[row['run']])
    row['latency_ms'] = {k: 1e3 * v for k, v in spread.items()}
    row['latency_batch'] = _BATCH


def _differences(opened: Sequence[_Opened]) -> list[dict[str, Any]]:
  """Returns the fields of the configs that are not the same in all.

  A packed file has that of what it was made of, but for the recipe.
  """
  configs = []
  for one in opened:
    here = config_lib.flatten(config_lib.to_json(one.experiment.config))
    stored = config_lib.flatten(runs.open_run(one.path).config or {})
    recipe = {'quant.recipe': here['quant.recipe']}
    configs.append(here | stored | recipe)
  return [
    {'field': name, 'values': [config[name] for config in configs]}
    for name in configs[0]
    if any(config[name] != configs[0][name] for config in configs)
  ]


def _curves(paths: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the evaluations of those that are workdirs of trainings."""
  found = []
  for path in paths:
    metrics_file = pathlib.Path(path) / 'metrics.jsonl'
    if not metrics_file.is_file():
      continue
    lines = map(json.loads, metrics_file.read_text('utf-8').splitlines())
    points = [line for line in lines if line['split'] == 'eval']
    found.append({
      'run': path,
      'steps': [line['step'] for line in points],
      'loss': [line['loss'] for line in points],
      'top1': [line['top1'] for line in points],
    })  # fmt: skip
  return found
