"""Resolves a config for a mode and hands it to the mode's file."""

import dataclasses
import importlib
import os
from collections.abc import Iterable
from typing import Any

import jax

from qvit_jax import models, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.modes import Mode
from qvit_jax.modes.session import say
from qvit_jax.quantization import METHODS


def context_of(mode: Mode, config: Any) -> config_lib.Context:
  """Returns what a config is resolved for in a mode."""
  if mode.ignores_training and config.ptq.qat_specs:
    mode = dataclasses.replace(mode, ignores=mode.ignores_training)
  choices = {
    'model.name': models.FAMILIES,
    'quant.recipe': METHODS,
    'export.layout': weights.LAYOUTS,
  }
  return config_lib.Context(mode, METHODS, choices)


def run(
  mode: Mode,
  config: Any,
  workdir: str,
  *,
  overrides: Iterable[str] = (),
  page: Any = None,
) -> None:
  """See `modes.run`."""
  context = context_of(mode, config)
  resolved, notes = config_lib.resolve(
    config, context, overrides=overrides, page=page
  )
  if context.mode.ignores_field('mesh.data'):  # of a training on more devices
    mesh = {
      name: field.default
      for name, field in config_lib.FIELDS.items()
      if field.section == 'mesh'
    }
    resolved = config_lib.with_fields(resolved, mesh)
  if workdir:
    _join_processes()  # before anything asks JAX for its devices
  if mode.processes == 'one' and jax.process_count() > 1:
    raise ConfigError(f'--mode={mode.name} runs in one process; start it once')
  for note in notes:
    say(f'note: {note}')
  module, _, function = mode.run.partition(':')
  module = importlib.import_module(f'qvit_jax.modes.{module}')
  getattr(module, function)(resolved, config_lib.expand(workdir))


def _join_processes() -> None:
  """Joins the other processes of a run that was started as several.

  SLURM, Open MPI and cloud TPUs are recognised by JAX itself; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
  """
  several = any(
    int(os.environ.get(name, 1)) > 1
    for name in ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
  )
  if not several or jax.distributed.is_initialized():
    return
  own = {}
  if 'JAX_NUM_PROCESSES' in os.environ:
    own = {
      'coordinator_address': os.environ['JAX_COORDINATOR_ADDRESS'],
      'num_processes': int(os.environ['JAX_NUM_PROCESSES']),
      'process_id': int(os.environ['JAX_PROCESS_ID']),
    }
  jax.distributed.initialize(**own)
