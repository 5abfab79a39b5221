"""Scales, rounding and clipping: pure functions.

Every quantizer here is affine: x is near scale * (code - zero), with integer
codes from 0 to 2**bits - 1, or from -m to m with m = 2**(bits-1) - 1 and zero 0
(symmetric). Source of the formulas: Jacob et al. 2018, arXiv:1712.05877,
section 2.1; Nagel et al. 2021, arXiv:2106.08295, section 2.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Below it a channel is constant and any scale will do.
_TINY = 1e-12


@jax.custom_jvp
def round_through(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """Returns the nearest whole numbers, half to even; the gradient is 1.

  The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).
  """
  return jnp.round(x)


@round_through.defjvp
def _round_through_jvp(primals, tangents):
  return jnp.round(primals[0]), tangents[0]


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
  """Returns the smallest and the largest code."""
  if symmetric:
    most = 2 ** (bits - 1) - 1
    return -most, most
  return 0, 2**bits - 1


def scale_of(
  low: Float[Array, '*s'],
  high: Float[Array, '*s'],
  bits: int,
  *,
  symmetric: bool,
) -> tuple[Float[Array, '*s'], Float[Array, '*s']]:
  """Returns (scale, zero) of a quantizer that covers [low, high] and 0.

  Args:
    low: Smallest values, in the units of x.
    high: Largest values.
    bits: Of a code.
    symmetric: Whether zero is fixed at code 0.

  Returns:
    scale: Distance of two levels; > 0.
    zero: The code of x = 0, a whole number.
  """
  first, last = code_range(bits, symmetric=symmetric)
  if symmetric:
    most = jnp.maximum(jnp.abs(low), jnp.abs(high))
    scale = jnp.maximum(most / last, _TINY)
    return scale, jnp.zeros_like(scale)
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  scale = jnp.maximum((high - low) / (last - first), _TINY)
  return scale, round_through(-low / scale)


def even_scale_of(
  low: Float[Array, '*s'], high: Float[Array, '*s'], bits: int
) -> tuple[Float[Array, '*s'], Float[Array, '*s']]:
  """Returns (scale, zero) of codes from 0 that lie evenly about x = 0.

  Less its zero such a code is a signed number of `bits` bits, which other
  runtimes multiply without a zero point.

  Args:
    low: Smallest values, in the units of x.
    high: Largest values.
    bits: Of a code.

  Returns:
    scale: That of symmetric codes; > 0.
    zero: 2**(bits-1).
  """
  scale, zero = scale_of(low, high, bits, symmetric=True)
  return scale, zero + 2 ** (bits - 1)


def to_codes(
  x: Float[Array, '...'],
  scale: Float[Array, '...'],
  zero: Float[Array, '...'],
  bits: int,
  *,
  symmetric: bool,
) -> Float[Array, '...']:
  """Returns the nearest codes, as whole floats; half goes to even."""
  return centered_codes(x, scale, zero, bits, symmetric=symmetric) + zero


def centered_codes(
  x: Float[Array, '...'],
  scale: Float[Array, '...'],
  zero: Float[Array, '...'],
  bits: int,
  *,
  symmetric: bool,
) -> Float[Array, '...']:
  """Returns `to_codes` less the zero: whole numbers, 0 where x is."""
  first, last = code_range(bits, symmetric=symmetric)
  # Clipped before it is rounded: a gradient is 1 up to the last level.
  return round_through(jnp.clip(x / scale, first - zero, last - zero))


def from_codes(
  codes: Float[Array, '...'],
  scale: Float[Array, '...'],
  zero: Float[Array, '...'],
) -> Float[Array, '...']:
  """Returns the values that codes stand for."""
  return (codes - zero) * scale


def round_to_grid(
  x: Float[Array, '...'],
  scale: Float[Array, '...'],
  zero: Float[Array, '...'],
  bits: int,
  *,
  symmetric: bool,
) -> Float[Array, '...']:
  """Returns x moved to the nearest level: quantized and dequantized."""
  codes = to_codes(x, scale, zero, bits, symmetric=symmetric)
  return from_codes(codes, scale, zero)


def aqt_dtype(dtype: Any) -> Any:
  """Returns the dtype of scales and sums around AQT's integers.

  That of the operands, but float32 for float16: four products of 8-bit codes
  may pass its largest number, 65504.
  """
  return jnp.dtype('float32' if dtype == jnp.float16 else dtype)


def aqt_codes(
  x: Float[Array, '...'], bits: int, axes: tuple[int, ...] | None
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Returns (codes, scale) by the rule of `aqt_core`, in the dtype of x.

  Step by step what AQT does, so that the codes are its codes, bit for bit: in
  bf16 only under `jit`, where XLA rounds between other steps than without.

  Args:
    x: Activations or a kernel.
    bits: Of the codes, from -m to m with m = 2**(bits-1) - 1.
    axes: Over which a scale is shared; None: all.
  """
  most = jnp.abs(x).max(axis=axes, keepdims=True)
  scale = jnp.where(most == 0, 1, most) / (2 ** (bits - 1) - 0.5)
  inverse = 1 / scale
  inverse = jnp.where(jnp.isinf(inverse), 1, inverse)
  first, last = code_range(bits, symmetric=True)
  return jnp.round(jnp.clip(x * inverse, first, last)), scale


@functools.partial(jax.jit, static_argnames=('bits', 'steps', 'least'))
def search_scale(
  w: Float[Array, 'i o'], bits: int, *, steps: int = 80, least: float = 0.35
) -> Float[Array, '1 o']:
  """Returns the symmetric scale per column with the smallest squared error.

  Candidates shrink the column's absolute maximum by equal steps down to
  `least` of it (the OMSE search: Choukroun et al. 2019, arXiv:1902.06822).
  """
  widest, zero = scale_of(
    w.min(axis=0, keepdims=True),
    w.max(axis=0, keepdims=True),
    bits,
    symmetric=True,
  )

  def attempt(carry, share):
    best, chosen = carry
    near = round_to_grid(w, widest * share, zero, bits, symmetric=True)
    error = jnp.square(near - w).sum(axis=0, keepdims=True)
    chosen = jnp.where(error < best, widest * share, chosen)
    return (jnp.minimum(error, best), chosen), None

  start = jnp.full_like(widest, jnp.inf), widest
  shares = jnp.linspace(1.0, least, steps)
  return jax.lax.scan(attempt, start, shares)[0][1]
