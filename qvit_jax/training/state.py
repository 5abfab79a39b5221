"""What a training run is at one moment."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

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
    ConfigError: A named collection or part is not in the model.
  """
  train: dict[str, Any] = {}
  rest = dict(variables)
  for name in trainable:
    first, _, inner = name.partition('/')
    if first not in rest:
      raise ConfigError(
        f'train.trainable names {name!r}, but the model has only '
        f'{", ".join(variables)}; choose from these'
      )
    if inner:
      part, rest[first] = split_collections(rest[first], (inner,))
      train = join_collections(train, {first: part})
    else:
      train[first] = rest.pop(first)
  return train, rest


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
