"""Resolves a config for a mode and hands it to the mode's file."""

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

import jax

from qvit_jax import models, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import auto, own_config
from qvit_jax.export import engines
from qvit_jax.modes import Mode
from qvit_jax.modes.session import say
from qvit_jax.quantization import METHODS
from qvit_jax.training import processes


def context_of(mode: Mode, config: Any) -> config_lib.Context:
  """Returns what a config is resolved for in a mode."""
  if mode.ignores_training and config.ptq.qat_specs:
    mode = dataclasses.replace(mode, ignores=mode.ignores_training)
  if mode.ignores_measuring and config.export.format == 'onnx':
    mode = dataclasses.replace(mode, ignores=mode.ignores_measuring)
  choices = {
    'model.name': models.FAMILIES,
    'quant.recipe': METHODS,
    'export.layout': weights.LAYOUTS,
    'eval.engine': ('jax', *engines.ENGINES),
  }
  return config_lib.Context(mode, METHODS, models.FAMILIES, choices)


def run(
  mode: Mode,
  config: Any,
  workdir: str,
  *,
  overrides: Iterable[str] = (),
  page: Any = None,
  lines: Iterable[str] = (),
) -> None:
  """See `modes.run`."""
  context = context_of(mode, config)
  overrides, own = list(overrides), list(lines)
  if config_lib.flatten(config).get('model.size') == auto.SIZE:
    config_lib.check_fields(config, context)  # before they are compared
    if workdir:
      processes.join(config.mesh.timeout)  # it may ask JAX for its devices
    config, lines = auto.filled(
      config, workdir, trains=mode.trains, overrides=overrides,
      reads_data=not context.mode.ignores_field('data.source'),
    )  # fmt: skip
    for line in lines:
      say(f'auto      {line}')
    ignored = [name for name in auto.READ if context.mode.ignores_field(name)]
    overrides = [name for name in overrides if name not in ignored]
  resolved, notes = config_lib.resolve(
    config, context, overrides=overrides, page=page
  )
  if context.mode.ignores_field('mesh.data'):  # of a training on more devices
    mesh = {
      name: field.default
      for name, field in config_lib.FIELDS.items()
      if field.section == 'mesh' and name != 'mesh.timeout'
    }
    resolved = config_lib.with_fields(resolved, mesh)
  if workdir:
    # Before anything asks JAX for its devices.
    processes.join(resolved.mesh.timeout)
  if mode.processes == 'one' and jax.process_count() > 1:
    raise ConfigError(f'--mode={mode.name} runs in one process; start it once')
  if resolved.eval.engine != 'jax' and jax.process_count() > 1:
    raise ConfigError(
      f'eval.engine={resolved.eval.engine!r} runs in one process, but there '
      f'are {jax.process_count()}; start it once, or set '
      '--config.eval.engine=jax'
    )
  for line in (*own, *own_config.differences(mode, resolved, workdir)):
    say(f'config    {line}')
  for note in notes:
    say(f'note: {note}')
  module, _, function = mode.run.partition(':')
  module = importlib.import_module(f'qvit_jax.modes.{module}')
  with processes.blaming_others():
    getattr(module, function)(resolved, config_lib.expand(workdir))
