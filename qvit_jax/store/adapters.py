"""Adapters on disk: one safetensors file each, without the base.

Its tensors are what was trained; its header says of which base, by a digest,
and with which config, which tells where that base came from.
"""

import pathlib
from typing import Any

import numpy as np

from qvit_jax import tree
from qvit_jax.errors import CheckpointError, ConfigError
from qvit_jax.store import tensors

_FORMAT = 1
KEY = 'qvit_jax_adapter'


def path_of(config: Any, workdir: pathlib.Path) -> pathlib.Path:
  """Returns the file that `lora.path` and `lora.name` mean."""
  folder = config.lora.path and pathlib.Path(config.lora.path)
  return (folder or workdir / 'adapters') / f'{config.lora.name}.safetensors'


def check_free(config: Any, workdir: pathlib.Path) -> None:
  """Raises ConfigError where a new run would end by replacing an adapter."""
  path = path_of(config, workdir)
  if path.exists():
    raise ConfigError(
      f'lora.name={config.lora.name!r} is taken: {path} is of another run; '
      'choose another name, or delete that file'
    )


def save(path: pathlib.Path, variables: Any, facts: dict[str, Any]) -> int:
  """Writes what was trained; returns the bytes of the file.

  Args:
    path: Where to.
    variables: Collections, or parts of them.
    facts: Metadata of the checkpoint that they are of.

  Raises:
    ExportError: The disk does not take it.
  """
  kept = ('architecture', 'base', 'class_names', 'config', 'plan', 'step')
  header = {'format': _FORMAT} | {name: facts[name] for name in kept}
  return tensors.save_described(tree.flatten(variables), path, KEY, header)


def check_there(path: pathlib.Path) -> None:
  """Raises CheckpointError where there is no adapter of this name."""
  if not path.is_file():
    there = sorted(p.stem for p in path.parent.glob('*.safetensors'))
    raise CheckpointError(
      f'{path.parent} holds no adapter {path.stem!r}; it holds '
      f'{", ".join(there) or "none"}: set --config.lora.name= to one of them, '
      'or --config.lora.path= to another folder'
    )


def read_header(path: pathlib.Path) -> dict[str, Any]:
  """Returns what an adapter's file says of itself.

  Raises:
    CheckpointError: There is no such file, or it holds no adapter of ours.
    WeightsError: It is damaged.
  """
  check_there(path)
  tensors.read(path)  # says more of a damaged file
  try:
    facts = tensors.read_header(path, KEY)
  except KeyError as error:
    raise CheckpointError(
      f'{path} is no adapter of ours; give a file that training with lora.rank '
      'wrote'
    ) from error
  if facts['format'] > _FORMAT:
    raise CheckpointError(
      f'{path} has format {facts["format"]}, this version reads up to '
      f'{_FORMAT}; update qvit_jax'
    )
  return facts


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns ({path: array}, what the file says of itself).

  Raises:
    CheckpointError: There is no such file, or it holds no adapter of ours.
    WeightsError: It is damaged.
  """
  facts = read_header(path)
  return tensors.read_described(path, KEY)[0], facts
