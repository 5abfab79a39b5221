"""Adapters on disk: one safetensors file each, without the base. Row 10.

Its tensors are what was trained; its header says of which base, by a digest,
and with which config, which tells where that base came from.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from qvit_jax import tree, weights
from qvit_jax.errors import CheckpointError, ConfigError
from qvit_jax.experiment import Experiment

_FORMAT = 1
_KEY = 'qvit_jax_adapter'


def path_of(config: Any, workdir: pathlib.Path) -> pathlib.Path:
  """Returns the file that `lora.path` and `lora.name` mean."""
  folder = config.lora.path and pathlib.Path(config.lora.path).expanduser()
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
  arrays = {
    name: np.ascontiguousarray(np.asarray(x))
    for name, x in tree.flatten(variables).items()
  }
  kept = ('architecture', 'base', 'class_names', 'config', 'plan', 'step')
  header = {'format': _FORMAT} | {name: facts[name] for name in kept}
  weights.save_weights(
    arrays, path, form='safetensors', metadata={_KEY: json.dumps(header)}
  )
  return path.stat().st_size


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns ({path: array}, what the file says of itself).

  Raises:
    CheckpointError: There is no such file, or it holds no adapter of ours.
    WeightsError: It is damaged.
  """
  if not path.is_file():
    there = sorted(p.stem for p in path.parent.glob('*.safetensors'))
    raise CheckpointError(
      f'{path.parent} holds no adapter {path.stem!r}; it holds '
      f'{", ".join(there) or "none"}: set --config.lora.name= to one of them, '
      'or --config.lora.path= to another folder'
    )
  source = weights.open_source(path)
  try:
    facts = json.loads(weights.read_metadata(path)[_KEY])
  except (KeyError, ValueError) as error:
    raise CheckpointError(
      f'{path} is no adapter of ours; give a file that training with lora.rank '
      'wrote'
    ) from error
  if facts['format'] > _FORMAT:
    raise CheckpointError(
      f'{path} has format {facts["format"]}, this version reads up to '
      f'{_FORMAT}; update qvit_jax'
    )
  return {n: e.read() for n, e in source.entries.items()}, facts


def place(
  experiment: Experiment, arrays: dict[str, np.ndarray], origin: Any
) -> dict[str, Any]:
  """Returns the arrays of a file where the model wants them, nested.

  Raises:
    CheckpointError: They are not those of the model's adapters.
  """
  wanted = tree.flatten(experiment.model.kept(experiment.abstract_variables()))
  lines = tree.differences(
    {name: tree.describe(x) for name, x in wanted.items()},
    {name: tree.describe(x) for name, x in arrays.items()},
  )
  if lines:
    raise CheckpointError(
      f'{origin} is of another model: {"; ".join(lines[:4])}; use the config '
      'it was trained with'
    )
  return tree.nest(
    {n: jax.device_put(x, wanted[n].sharding) for n, x in arrays.items()}
  )


def check_base(
  experiment: Experiment, facts: dict[str, Any], origin: Any
) -> None:
  """Checks that adapters lie on the base that they were trained beside.

  Raises:
    CheckpointError: It is another one.
  """
  here, there = experiment.base_digest, facts['base']
  if here == there:
    return
  section = facts['config']
  source = section['weights']['path'] or section['checkpoint']['path']
  where = f'that came from {source}' if source else 'random from its seed'
  raise CheckpointError(
    f'{origin} holds adapters for the base {there} ({where}), but the base '
    f'here is {here}; give weights.path or checkpoint.path the one it was '
    'made for'
  )
