"""What is exported for runtimes: a packed file, or a run of any recipe.

Every form of `--mode=export` finds its arrays here. Those for runtimes take
`subject`: a model without norms that can be folded, with the arithmetic and
the variables that our own evaluation would run.
"""

import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.errors import ExportError
from qvit_jax.experiment import (
  cards,
  checks,
  in_engines,
  sources,
  statistics,
)
from qvit_jax.experiment.model import Model, folded
from qvit_jax.quantization import METHODS
from qvit_jax.quantization.methods.packing import pack
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import files, runs

# What `--mode=export` may leave in its folder; one form at a time.
_FILES = (
  'model.safetensors', 'model.npz', 'model.packed.safetensors', 'model.onnx',
  'model.stablehlo', 'config.json', 'preprocessor_config.json',
)  # fmt: skip


def put(target: pathlib.Path, content: bytes) -> None:
  """Writes an exported file, and its folder where there is none.

  Raises:
    ExportError: The disk does not take it. What was there before stays.
  """
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(target, content)
  except OSError as error:
    raise ExportError(files.cannot_write(target, error)) from error


def conclude(
  config: Any,
  target: pathlib.Path,
  model: Model,
  parity: dict[str, Any],
  beside: Collection[str] = (),
  **library: Any,
) -> None:
  """Writes parity.json and README.md; removes what another form has left.

  Args:
    config: Resolved for `--mode=export`.
    target: What was exported, in WORKDIR/export.
    model: Of what it is.
    parity: How it compares, beside its name and size.
    beside: Names of files that belong to it.
    library: Of `cards.write_export`.
  """
  found = {'file': target.name, 'bytes': target.stat().st_size, **parity}
  files.write_json(target.with_name('parity.json'), found)
  for name in _FILES:
    if name != target.name and name not in beside:
      target.with_name(name).unlink(missing_ok=True)
  place = target.parent.parent
  cards.write_export(config, place, target, model, found, **library)


def subject(
  config: Any, place: pathlib.Path, say: Callable[[str], None]
) -> tuple[Any, Packed]:
  """Returns the model to export: its config, norms folded, and its arrays.

  `models.build_model(config, packed.ops)` applied to `packed.variables` is
  what our own evaluation computes, in `packed.dtype`. `execution` of a float
  run is 'float', and its core a `FloatCore`.

  Args:
    config: Resolved for `--mode=export`.
    place: The workdir.
    say: Prints a line.

  Raises:
    QvitError: There is nothing to export, or it is damaged or of another
      model.
  """
  if packed := sources.open_packed(config):
    say(f'start     {runs.open_run(config.checkpoint.path).origin}')
    return Model(config, packed).config, packed
  model = Model(config)
  if model.method.quantizes:
    _, _, packed = packed_run(model, place, say)
    return folded(model.config), packed
  params, _ = float_arrays(model, place, say)
  named = {weights.full_path(name): x for name, x in params.items()}
  params = statistics.folded_params(model.config, tree.nest(named))
  config = folded(model.config)
  return config, in_engines.float_packed(config, params)


def packed_run(
  model: Model, place: pathlib.Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], runs.Run, Packed]:
  """Returns what a quantized run evaluates: arrays by path, run, packed.

  Raises:
    CheckpointError: There is no checkpoint, or one of other bits.
  """
  config = model.config
  run = runs.open_run(config.checkpoint.path or str(place))
  checks.check_same(model, run, same_plan=True)
  variables = run.read_evaluated(runs.own_device())
  say(f'start     {run.place}')
  packed = pack(
    model.method, variables, model.plan, model.ops, config.model.dtype,
    statistics=models.statistics(config),
  )  # fmt: skip
  return variables, run, packed


def float_arrays(
  model: Model, place: pathlib.Path, say: Callable[[str], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the parameters by path, and what else is known of them.

  Raises:
    ExportError: There is nothing to export, or not for this model.
  """
  config = model.config
  source = sources.find(config, place)
  path, has_own = source.path, runs.has_steps(place)
  if source == sources.Source('run', str(place)) and not has_own:
    raise ExportError(
      f'{place} holds no checkpoint to export; train there first, or set '
      '--config.checkpoint.path= or --config.weights.path='
    )
  params, report = weights.read_weights(path, model.shapes)
  if report.reinitialised:
    why = next(iter(report.reinitialised.values()))
    advice = 'train first (--mode=train)'
    if theirs := re.match(r'(\d+) classes there', why):
      advice += f' or set --config.model.num_classes={theirs[1]}'
    raise ExportError(
      f'{path} brings no {", ".join(report.reinitialised)}: {why}; {advice}'
    )
  report.notes += checks.compare_facts(report, config)
  for line in report.lines():
    say(f'start     {line}')
  if has_own and config.weights.path:
    say('note: there is a checkpoint, so weights.path is not read')
  there = report.facts.get('norm_eps', config.model.norm_eps)
  if there != config.model.norm_eps:
    raise ExportError(
      f'{path} was trained with norm_eps={there:g}, the model here has '
      f'{config.model.norm_eps:g}; set --config.model.norm_eps={there:g}'
    )
  return params, report.facts


def check_unpacked(config: Any) -> None:
  """Raises ExportError where a packed file is to be written as weights."""
  if METHODS[config.quant.recipe].is_packed:
    raise ExportError(
      f'export.format={config.export.format!r} is written of a run, but '
      f'quant.recipe={config.quant.recipe!r} means a packed file; set '
      '--config.export.format=stablehlo, or --config.quant.recipe= to that of '
      'a run'
    )
