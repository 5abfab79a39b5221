"""Rounds a kernel so that its outputs, not its weights, stay.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323, algorithm 1. Inputs are
taken in descending order of their energy, H's diagonal ("act-order" of the
authors' code).

Where a kernel has as few inputs as a 3 x 3 depthwise convolution, every way to
round each weight up or down is tried as well, and the better one is kept.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qvit_jax.quantization import numerics
from qvit_jax.quantization.ptq.solver import Solver

# Inputs up to which all roundings are tried: 2**9 of a 3 x 3 window.
_FEW = 9


def round_kernel(
  w: Float[Array, 'i o'],
  hessian: Float[Array, 'i i'],
  scale: Float[Array, 'i o'],
  *,
  bits: int,
) -> Float[Array, 'i o']:
  """Returns the better codes of the two searches; see `round_by_outputs`."""
  codes = round_by_outputs(w, hessian, scale, bits=bits)
  if len(w) > _FEW:
    return codes
  return best_of_all(w, hessian, scale, codes, bits=bits)


@functools.partial(jax.jit, static_argnames=('bits',))
def best_of_all(
  w: Float[Array, 'i o'],
  hessian: Float[Array, 'i i'],
  scale: Float[Array, 'i o'],
  codes: Float[Array, 'i o'],
  *,
  bits: int,
) -> Float[Array, 'i o']:
  """Returns the codes of least squared error of the outputs.

  Args:
    w: Kernel of few inputs.
    hessian: X^T X of the layer's inputs.
    scale: Distance of two levels of every weight.
    codes: A first guess, which stays where nothing is better.
    bits: Of a code.

  Returns:
    Of all 2**i ways to round the weights of a column down or up, and the first
    guess, the best.
  """
  ups = np.array(list(itertools.product((0, 1), repeat=len(w))), np.float32)
  most = 2 ** (bits - 1) - 1
  near = jnp.clip(jnp.floor(w / scale) + ups[:, :, None], -most, most)
  near = jnp.concatenate([codes[None], near])  # [n, i, o]
  errors = near * scale - w
  loss = jnp.einsum(
    'nio,ij,njo->no', errors, hessian, errors, precision='highest'
  )
  best = jnp.argmin(loss, axis=0)  # the first of equals
  return jnp.take_along_axis(near, best[None, None], axis=0)[0]


@functools.partial(jax.jit, static_argnames=('bits', 'block'))
def round_by_outputs(
  w: Float[Array, 'i o'],
  hessian: Float[Array, 'i i'],
  scale: Float[Array, 'i o'],
  *,
  bits: int,
  damping: float = 0.01,
  block: int = 128,
) -> Float[Array, 'i o']:
  """Returns symmetric codes whose product with the inputs is near x . w.

  Args:
    w: Kernel.
    hessian: X^T X of the layer's inputs; any positive multiple will do.
    scale: Distance of two levels of every weight, fixed beforehand.
    bits: Of a code.
    damping: Share of the mean diagonal that is added to the diagonal.
    block: Input channels between two updates of the remaining kernel.

  Returns:
    Whole floats from -m to m, m = 2**(bits-1) - 1.
  """
  size, width = w.shape
  mean = jnp.mean(jnp.diagonal(hessian))
  dead = jnp.diagonal(hessian) <= 0  # inputs that were never anything but 0
  hessian = hessian + jnp.diag(jnp.where(dead, mean, damping * mean) + 1e-20)
  order = jnp.argsort(-jnp.diagonal(hessian))
  w, scale = w[order], scale[order]
  hessian = hessian[order][:, order]
  # Rows of the upper factor of H^-1 are what the algorithm needs.
  lower = jnp.linalg.cholesky(hessian)
  inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(size))
  upper = jnp.linalg.cholesky(inverse).T  # H^-1 = upper^T . upper
  block = min(block, size)
  pad = -size % block
  upper = jnp.pad(upper, ((0, pad), (0, pad)))
  upper = upper + jnp.diag(jnp.arange(size + pad) >= size)
  w = jnp.pad(w, ((0, pad), (0, 0)))
  scale = jnp.pad(scale, ((0, pad), (0, 0)), constant_values=1)

  def one_block(start, carry):
    w, codes = carry
    at = start * block
    part = jax.lax.dynamic_slice(w, (at, 0), (block, width))
    steps = jax.lax.dynamic_slice(scale, (at, 0), (block, width))
    factor = jax.lax.dynamic_slice(upper, (at, at), (block, block))

    def one_row(i, inner):
      part, done, errors = inner
      row = part[i]
      code = numerics.to_codes(
        row, steps[i], jnp.zeros_like(row), bits, symmetric=True
      )
      error = (row - code * steps[i]) / factor[i, i]
      # Rows after i take over what rounding row i has changed.
      later = jnp.arange(block) > i
      part = part - jnp.where(later, factor[i], 0)[:, None] * error[None]
      return part, done.at[i].set(code), errors.at[i].set(error)

    zeros = jnp.zeros((block, width), w.dtype)
    part, done, errors = jax.lax.fori_loop(
      0, block, one_row, (part, zeros, zeros)
    )
    rows = jax.lax.dynamic_slice(upper, (at, 0), (block, size + pad))
    after = jnp.arange(size + pad) >= at + block
    # On accelerators a plain product of float32 keeps 8 or 10 bits.
    w = w - jnp.matmul(
      jnp.where(after, rows, 0).T, errors, precision='highest'
    )
    return w, jax.lax.dynamic_update_slice(codes, done, (at, 0))

  _, codes = jax.lax.fori_loop(
    0, (size + pad) // block, one_block, (w, jnp.zeros_like(w))
  )
  return jnp.zeros((size, width), w.dtype).at[order].set(codes[:size])


SOLVER = Solver(rounds=round_kernel)
