"""Whether statistics of norms change in a training, and what that takes."""

from collections.abc import Mapping
from typing import Any

import jax

from qvit_jax import models, tree
from qvit_jax.errors import ConfigError
from qvit_jax.models import batch_norm


def why_held(config: Any, shapes: dict[str, Any]) -> str:
  """Returns why a training leaves statistics as they are; '' if it does not.

  Or where there are none.

  Args:
    config: `train.trainable` is resolved.
    shapes: Of the model's collections.

  Raises:
    ConfigError: They are to be trained by gradients.
  """
  names = batch_norm.norms(tree.flatten(shapes))
  if not names:
    return ''
  statistics, trainable = models.statistics(config), config.train.trainable
  if any(n.partition('/')[0] == batch_norm.COLLECTION for n in trainable):
    raise ConfigError(
      f'train.trainable={tuple(trainable)} names {batch_norm.COLLECTION}, '
      'statistics that follow the images and get no gradient; leave them out'
    )
  if not statistics.changes(config.model):
    return ', '.join(f'{name}={x!r}' for name, x in statistics.held.items())
  starts = tuple(f'{name}/' for name in trainable)
  still = [n for n in names if not f'params/{n}/'.startswith(starts)]
  if not still:
    return ''
  return (
    f'train.trainable leaves {len(still)} of {len(names)} norms as they are, '
    f'such as {still[0]}'
  )


def lines(shapes: dict[str, Any], held: str) -> list[str]:
  """One line: what becomes of statistics, where there are any.

  Args:
    shapes: Of the model's collections.
    held: Of `why_held`.
  """
  count = len(batch_norm.norms(tree.flatten(shapes)))
  if not count:
    return []
  if held:
    return [f'statistics of {count} norms are held: {held}']
  return [
    f'statistics of {count} norms follow the batches, momentum '
    f'{batch_norm.MOMENTUM:g}'
  ]


def check(
  config: Any, mesh: jax.sharding.Mesh, changing: tuple[str, ...], held: str
) -> None:
  """Raises ConfigError where statistics cannot be had as a training asks.

  Args:
    config: A whole config.
    mesh: The devices.
    changing: Collections that change in training.
    held: Of `why_held`.
  """
  train = config.train
  parts = mesh.shape['data'] * mesh.shape['fsdp'] * train.accumulate
  if changing and train.batch_size // parts < 2:
    statistics = models.statistics(config)
    raise ConfigError(
      f'train.batch_size={train.batch_size} puts 1 image on a device at a time '
      '(over mesh.data, mesh.fsdp and train.accumulate), of which BatchNorm '
      f'gets no statistics worth the name; set --config.train.batch_size='
      f'{2 * parts} or more, or hold them with {flags(statistics.held)}'
    )
  if train.reestimate_batches and not changing:
    why = held or 'no norm of the model keeps statistics'
    raise ConfigError(
      f'train.reestimate_batches={train.reestimate_batches} would have no '
      f'effect: {why}; set --config.train.reestimate_batches=0'
    )


def flags(fields: Mapping[str, Any]) -> str:
  """Returns fields as one writes them on the command line."""
  return ' '.join(f'--config.{name}={x}' for name, x in fields.items())
