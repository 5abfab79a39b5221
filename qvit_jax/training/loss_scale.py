"""Dynamic loss scaling, which float16 needs.

float16 has no number above 65504 and few below 6e-5: gradients are taken of
`scale` times the loss and divided by it afterwards. Where one of them is not
finite, the update is skipped and the scale halves; after `growth` finite
updates it doubles. Optax has no such transformation.

Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740,
section 3.2; the rule is that of NVIDIA's mixed precision guide and of
TensorFlow's and jmp's DynamicLossScale. Differs: there is no smallest scale,
because the loop ends a run whose scale falls below 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


class ScaledState(NamedTuple):
  """State of an optimizer under loss scaling.

  Attributes:
    scale: What the next loss is multiplied by.
    finite: Finite updates since the scale changed last.
    inner: State of the optimizer.
  """

  scale: Float[Array, '']
  finite: Int[Array, '']
  inner: Any


def all_finite(grads: Any) -> Bool[Array, '']:
  """Returns whether every number of a tree is finite."""
  return jnp.stack(
    [jnp.isfinite(x).all() for x in jax.tree.leaves(grads)]
  ).all()


def select(pick: Bool[Array, ''], new: Any, old: Any) -> Any:
  """Returns the tree `new` where `pick` holds, else `old`, bit for bit."""
  return jax.tree.map(lambda a, b: jnp.where(pick, a, b), new, old)


def dynamic(
  tx: optax.GradientTransformation, *, initial: float, growth: int
) -> optax.GradientTransformation:
  """Returns `tx` with a loss scale in its state.

  Its updates mean nothing where the gradients are not finite; `tx` then keeps
  its state, and the caller its parameters.

  Args:
    tx: The optimizer; sees gradients without the scale.
    initial: First scale; with a power of 2 scaling is exact.
    growth: Finite updates until the scale doubles.
  """

  def init(params):
    scale = jnp.asarray(initial, jnp.float32)
    return ScaledState(scale, jnp.zeros((), jnp.int32), tx.init(params))

  def update(grads, state, params=None):
    finite = all_finite(grads)
    updates, inner = tx.update(grads, state.inner, params)
    count = jnp.where(finite, state.finite + 1, 0)
    doubled = jnp.where(jnp.isinf(state.scale * 2), 1, 2) * state.scale
    grown = jnp.where(count >= growth, doubled, state.scale)
    return updates, ScaledState(
      scale=jnp.where(finite, grown, state.scale / 2),
      finite=jnp.where(count >= growth, 0, count),
      inner=select(finite, inner, state.inner),
    )

  return optax.GradientTransformation(init, update)


def value_and_grad(loss: Callable, opt_state: Any) -> Callable:
  """Returns f(trained, *rest) -> ((value, aux), gradient) of `loss`.

  The gradient is that of the loss itself, computed at the scale of `opt_state`
  where it has one.

  Args:
    loss: (trained, *rest) -> (value, aux).
    opt_state: State of the optimizer before the update.
  """
  if not isinstance(opt_state, ScaledState):
    return jax.value_and_grad(loss, has_aux=True)

  def scaled(trained, *rest):
    value, pullback, aux = jax.vjp(
      lambda trained: loss(trained, *rest), trained, has_aux=True
    )
    # The same as multiplying the loss, which therefore stays what it is.
    (grads,) = pullback(opt_state.scale.astype(value.dtype))
    return (value, aux), jax.tree.map(lambda g: g / opt_state.scale, grads)

  return scaled
