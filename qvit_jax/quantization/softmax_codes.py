"""Codes for attention weights, of which most are tiny and a few are not.

Both find their range in each row of the softmax by itself. Their levels are not
evenly spaced, so products with them are simulated in float.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.quantization.numerics import round_through

_TINY = 1e-12
_SPLITS = (1, 2, 3, 4, 5, 6)


def log2_levels(
  p: Float[Array, '... n'], bits: int, axis: int
) -> Float[Array, '... n']:
  """Returns p moved to powers of the square root of 2 below its row's largest.

  A value below the last level becomes 0.

  Args:
    p: Softmax output, >= 0.
    bits: Of a code: levels largest * 2**(-code / 2), codes 0 to 2**bits - 2.
    axis: The keys' axis.

  Source: Li et al. 2023, RepQ-ViT, arXiv:2212.08254, section 3.3. There the
    largest level is calibrated; here it is the row's own, and the last code
    stands for 0.
  """
  largest = jnp.maximum(p.max(axis=axis, keepdims=True), _TINY)
  last = 2**bits - 1
  codes = round_through(-2 * jnp.log2(jnp.maximum(p, _TINY) / largest))
  return jnp.where(codes < last, largest * jnp.exp2(-codes / 2), 0)


def twin_levels(
  p: Float[Array, '... n'], bits: int, axis: int
) -> Float[Array, '... n']:
  """Returns p moved to the nearer of a fine grid near 0 and a coarse one.

  One bit of a code says which grid, the others count its steps. The fine grid
  ends 2**-m below the row's largest value, with the m of 1 to 6 that has the
  least squared error in the row.

  Args:
    p: Softmax output, >= 0.
    bits: Of a code, >= 2.
    axis: The keys' axis.

  Source: Yuan et al. 2022, PTQ4ViT, arXiv:2111.12293, section 3.2. There m is
    calibrated for the whole tensor.
  """
  most = 2 ** (bits - 1) - 1
  coarse = jnp.maximum(p.max(axis=axis, keepdims=True), _TINY) / most
  best = jnp.full_like(coarse, jnp.inf)
  chosen = jnp.zeros_like(p)
  for shift in _SPLITS:
    fine = coarse * 2.0**-shift
    near = jnp.where(
      p <= most * fine,
      round_through(p / fine) * fine,
      round_through(p / coarse) * coarse,
    )
    error = jnp.square(near - p).sum(axis=axis, keepdims=True)
    chosen = jnp.where(error < best, near, chosen)
    best = jnp.minimum(error, best)
  return chosen


# Codes of attention weights by name, beside even steps.
LEVELS = {'log2': log2_levels, 'twin': twin_levels}
