"""What a training run is at one moment. Row 6."""

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
    ema: Moving average of the trainable collections; {} when off.
  """

  step: Any
  variables: dict[str, Any]
  opt_state: Any
  ema: dict[str, Any]

  @property
  def evaluated(self) -> dict[str, Any]:
    """The variables to evaluate: averaged ones where there are any."""
    return {**self.variables, **self.ema}


def split_collections(
  variables: dict[str, Any], trainable: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (collections that get gradients, the others).

  Raises:
    ConfigError: A named collection is not in the model.
  """
  for name in trainable:
    if name not in variables:
      raise ConfigError(
        f'train.trainable names {name!r}, but the model has only '
        f'{", ".join(variables)}; choose from these'
      )
  train = {k: v for k, v in variables.items() if k in trainable}
  return train, {k: v for k, v in variables.items() if k not in trainable}


def make_state(
  variables: dict[str, Any],
  *,
  tx: optax.GradientTransformation,
  trainable: tuple[str, ...],
  ema: bool,
) -> TrainState:
  """Returns the state before the first update."""
  train, _ = split_collections(variables, trainable)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    variables=variables,
    opt_state=tx.init(train),
    # A copy, because the step donates both to the next state.
    ema=jax.tree.map(jnp.copy, train) if ema else {},
  )
