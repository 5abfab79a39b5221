"""What a training run is at one moment."""

import difflib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qvit_jax import tree
from qvit_jax.errors import ConfigError


@flax.struct.dataclass
class TrainState:
  """Everything that the next update depends on, besides config and data.

  Random draws are functions of (seed, step), so no key is kept.

  Attributes:
    step: int32, updates done.
    variables: Collections of the model: 'params' and whatever a recipe adds.
    opt_state: Optax state of the trainable collections.
    ema: Moving average of the trainable collections, and of those that change
      without gradients: statistics that go with averaged weights are those of
      the same updates, in the same shares; {} when off.
  """

  step: Any
  variables: dict[str, Any]
  opt_state: Any
  ema: dict[str, Any]

  @property
  def evaluated(self) -> dict[str, Any]:
    """The variables to evaluate: averaged ones where there are any."""
    return join_collections(self.variables, self.ema)


def split_collections(
  variables: dict[str, Any], trainable: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (what gets gradients, the rest), nested as before.

  Args:
    variables: Collections of the model.
    trainable: Collections, or parts of them such as 'params/head'.

  Raises:
    ConfigError: A named collection or part is not in the model, or was named
      before.
  """
  train: dict[str, Any] = {}
  rest = dict(variables)
  for name in trainable:
    try:
      part, rest = _take(rest, name.split('/'))
    except KeyError as error:
      raise ConfigError(_no_such(name, variables, trainable)) from error
    train = join_collections(train, part)
  return train, rest


def _take(
  variables: dict[str, Any], path: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what lies at a path, and all else; KeyError: nothing does."""
  first, *inner = path
  rest = dict(variables)
  found = rest.pop(first)
  if inner:
    if not isinstance(found, dict):
      raise KeyError(inner[0])
    found, rest[first] = _take(found, inner)
  return {first: found}, rest


def _no_such(
  name: str, variables: dict[str, Any], trainable: tuple[str, ...]
) -> str:
  """Returns what is wrong with a name, and which is nearest."""
  known = set(variables)
  for path in tree.flatten(variables):
    parts = path.split('/')
    known |= {'/'.join(parts[:i]) for i in range(1, len(parts) + 1)}
  if name in known:
    return (
      f'train.trainable={tuple(trainable)} names {name!r} twice, or as a part '
      'of what it names before; leave one of them out'
    )
  near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
  return (
    f'train.trainable names {name!r}, but the model has only '
    f'{", ".join(variables)}; choose from these or from their parts, of which '
    f'{near!r} is the nearest'
  )


def join_collections(
  variables: dict[str, Any], others: dict[str, Any]
) -> dict[str, Any]:
  """Returns variables with `others`, which may be parts, in their places."""
  joined = dict(variables)
  for name, value in others.items():
    is_inner = isinstance(value, dict) and name in joined
    joined[name] = join_collections(joined[name], value) if is_inner else value
  return joined


def make_state(
  variables: dict[str, Any],
  *,
  tx: optax.GradientTransformation,
  trainable: tuple[str, ...],
  ema: bool,
  changing: tuple[str, ...] = (),
) -> TrainState:
  """Returns the state before the first update.

  Args:
    variables: Collections of the model.
    tx: The optimizer.
    trainable: Collections, or parts of them, that get gradients.
    ema: Whether averages are kept.
    changing: Collections that the model changes in training.
  """
  train, rest = split_collections(variables, trainable)
  averaged = train | {name: rest[name] for name in changing}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    variables=variables,
    opt_state=tx.init(train),
    # A copy, because the step donates both to the next state.
    ema=jax.tree.map(jnp.copy, averaged) if ema else {},
  )
