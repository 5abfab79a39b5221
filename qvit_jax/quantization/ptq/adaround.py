"""Learns for each weight whether it is rounded up or down.

Source: Nagel et al. 2020, AdaRound, arXiv:2004.10568, sections 3.2 and 3.3. The
reconstruction error of a linear layer needs its inputs only through X^T X, so
no input is kept.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qvit_jax.quantization import numerics
from qvit_jax.quantization.ptq.solver import Solver

# The paper's stretched sigmoid.
_LOW, _HIGH = -0.1, 1.1
_WARM_UP = 0.2  # share of the steps without regularizer
_BETAS = 20.0, 2.0
_WEIGHT = 0.01


def _share_up(v):
  return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


@functools.partial(jax.jit, static_argnames=('bits', 'steps'))
def round_by_reconstruction(
  w: Float[Array, 'i o'],
  hessian: Float[Array, 'i i'],
  scale: Float[Array, 'i o'],
  *,
  bits: int,
  steps: int = 500,
  lr: float = 0.02,
) -> Float[Array, 'i o']:
  """Returns symmetric codes next to w / scale with a small output error.

  Args:
    w: Kernel.
    hessian: X^T X of the layer's inputs; any positive multiple will do.
    scale: Distance of two levels of every weight, fixed beforehand.
    bits: Of a code.
    steps: Of Adam.
    lr: Its learning rate.

  Returns:
    Whole floats from -m to m, m = 2**(bits-1) - 1.
  """
  first, last = numerics.code_range(bits, symmetric=True)
  down = jnp.floor(w / scale)
  rest = jnp.clip(w / scale - down, 0.01, 0.99)
  # Starts where the soft codes are the weights themselves.
  start = -jnp.log((_HIGH - _LOW) / (rest - _LOW) - 1)
  nearest = jnp.clip(jnp.round(w / scale), first, last)
  codes_of = lambda up: jnp.clip(down + up, first, last)

  # On accelerators a plain product of float32 keeps 8 or 10 bits.
  weigh = lambda delta: jnp.matmul(hessian, delta, precision='highest')

  def output_error(codes):
    delta = codes * scale - w
    return (delta * weigh(delta)).sum()

  # In units of what plain rounding costs, one layer is like another.
  unit = jnp.maximum(output_error(nearest), 1e-20)

  def loss(v, beta, weight):
    up = _share_up(v)
    undecided = (1 - jnp.abs(2 * up - 1) ** beta).mean()
    return output_error(codes_of(up)) / unit + weight * undecided

  chain = optax.adam(lr)

  def step(i, carry):
    v, memory = carry
    done = jnp.maximum(i / steps - _WARM_UP, 0) / (1 - _WARM_UP)
    beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * 0.5 * (
      1 + jnp.cos(jnp.pi * done)
    )
    weight = jnp.where(i < _WARM_UP * steps, 0.0, _WEIGHT * w.shape[0])
    moves, memory = chain.update(jax.grad(loss)(v, beta, weight), memory)
    return optax.apply_updates(v, moves), memory

  v, _ = jax.lax.fori_loop(0, steps, step, (start, chain.init(start)))
  codes = codes_of(jnp.round(_share_up(v)))
  # Never worse than rounding to the nearest, channel by channel.
  channel = lambda c: ((c * scale - w) * weigh(c * scale - w)).sum(0)
  return jnp.where(channel(codes) < channel(nearest), codes, nearest)


SOLVER = Solver(rounds=round_by_reconstruction)
