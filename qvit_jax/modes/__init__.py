"""What `--mode` may be: one function each; knows nothing of flags."""

import importlib
import os
from collections.abc import Iterable
from typing import Any

import jax

from qvit_jax import models
from qvit_jax.config import resolve as config_lib
from qvit_jax.modes.session import say


def run(
  mode: str, config: Any, workdir: str, *, overrides: Iterable[str] = ()
) -> None:
  """Validates the config and does what the mode says.

  Args:
    mode: A key of MODES.
    config: A ConfigDict built on configs/common.py.
    workdir: Where to write; may be '' for `sites`.
    overrides: Fields that the command line sets.

  Raises:
    QvitError: The user's input is wrong.
    Preempted: A signal stopped the run after saving.
  """
  overrides = list(overrides)
  notes = config_lib.validate(config, mode=mode, overrides=overrides)
  models.family(config)  # refuses names that no model has
  if 'weights.path' in overrides and 'weights.required' not in overrides:
    config.weights.required = True  # who names weights wants these
  if mode != 'sites':
    _join_processes()  # before anything asks JAX for its devices
  for note in notes:
    say(f'note: {note}')
  module, _, function = MODES[mode].partition(':')
  module = importlib.import_module(f'qvit_jax.modes.{module}')
  getattr(module, function)(config, workdir)


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


MODES: dict[str, str] = {
  'train': 'train:train',
  'eval': 'eval:evaluate',
  'sites': 'sites:sites',
  'benchmark': 'benchmark:benchmark',
  'export': 'export:export',
  'merge_lora': 'merge_lora:merge_lora',
  'ptq': 'ptq:ptq',
  'sensitivity': 'sensitivity:sensitivity',
  'predict': 'predict:predict',
}
