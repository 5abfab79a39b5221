"""Exact products of whole numbers, by float arithmetic.

Sums in float32 are exact below 2**24. Longer ones are cut into pieces and added
as int32, so results are those of integer hardware, bit for bit.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax.arithmetic.products import (
  Dims,
  Window,
  patches,
  precision_of,
  raw_product,
)

_EXACT = 2**24  # whole numbers below are exact in float32
_COLUMNS = 256  # of a kernel that are looked at together


def whole_product(lhs, rhs, dims: Dims):
  """Returns the product of whole numbers in float32, exact below 2**24.

  A convolution is the library's on a CPU alone. Elsewhere it is a product of
  matrices of what each pixel sees: a library that chooses Winograd's form
  multiplies fractions.

  Args:
    lhs: Whole numbers, in any float type that holds them.
    rhs: The same.
    dims: See `products.Dims`.
  """
  if not isinstance(dims, Window):
    return raw_product(lhs, rhs, dims, jnp.float32)
  return jax.lax.platform_dependent(
    lhs,
    rhs,
    cpu=lambda x, w: raw_product(
      x.astype(jnp.float32), w.astype(jnp.float32), dims
    ),
    default=lambda x, w: product_of_patches(x, w, dims),
  )


def product_of_patches(x, w, window: Window):
  """Returns the convolution as a product of matrices, in float32.

  Args:
    x: [b, h, w, i].
    w: Kernel as a matrix.
    window: How it slides.
  """
  seen = patches(x, window)  # [b, p, q, g, k]
  w = w.reshape(len(w), window.groups, -1)
  y = jnp.einsum(
    'bpqgk,kgo->bpqgo', seen, w, precision=precision_of(seen, w),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  return y.reshape(*y.shape[:3], -1)


def exact_dot(lhs, rhs, dims: Dims, largest: int, parts: int = 0):
  """Returns the exact product of two arrays of whole numbers, in float32.

  Args:
    lhs: Whole numbers, in any float type that holds them.
    rhs: The same.
    dims: One axis is contracted, or a window.
    largest: Bound on |lhs| * |rhs|, elementwise.
    parts: Into how many pieces sums have to be cut, where somebody has looked
      (`parts_needed`); 0: as many as the largest numbers need.
  """
  taps, size = 1, rhs.shape[0]
  if isinstance(dims, Window):
    taps = math.prod(dims.size)
    size = size // taps
  else:
    ((axis,), (other,)), _ = dims
    size = lhs.shape[axis]
  count = parts or _worst(size, taps * largest)
  if count == 1:
    return whole_product(lhs, rhs, dims)
  summed = jnp.zeros((), jnp.int32)
  for low, high in _pieces(size, count):
    if isinstance(dims, Window):
      pair = _channels(lhs, dims.groups, low, high), _rows(rhs, taps, low, high)
    else:
      pair = (
        jax.lax.slice_in_dim(lhs, low, high, axis=axis),
        jax.lax.slice_in_dim(rhs, low, high, axis=other),
      )
    summed = summed + whole_product(*pair, dims).astype(jnp.int32)
  return summed.astype(jnp.float32)


def parts_needed(codes: np.ndarray, taps: int, most: int) -> int:
  """Returns into how few pieces `exact_dot` may cut sums with a kernel.

  A power of two: pieces of pieces, so that parts of a kernel can be looked at
  one after the other.

  Args:
    codes: Whole numbers [i, o], a kernel as a matrix.
    taps: Pixels of its window; 1 of a matrix.
    most: Bound on the magnitude of what it is multiplied with.
  """
  size, count = len(codes) // taps, 1
  for start in range(0, codes.shape[1], _COLUMNS):
    part = np.abs(codes[:, start : start + _COLUMNS].astype(np.int32))
    reach = part.reshape(taps, size, -1).sum(axis=0)
    reach = np.concatenate([0 * reach[:1], reach.cumsum(axis=0)])
    while count < size and any(
      int((reach[high] - reach[low]).max()) * most >= _EXACT
      for low, high in _pieces(size, count)
    ):
      count = min(2 * count, size)
  return count


def _worst(size: int, largest: int) -> int:
  """Returns the pieces of `size` numbers whose sums stay exact for sure."""
  return math.ceil(size / max(1, (_EXACT - 1) // largest))


def _pieces(size: int, count: int) -> list[tuple[int, int]]:
  edges = [size * i // count for i in range(count + 1)]
  return list(zip(edges, edges[1:], strict=False))


def _channels(x, groups: int, low: int, high: int):
  """Returns input channels low to high of each group of an image."""
  lead = x.shape[:-1]
  return x.reshape(*lead, groups, -1)[..., low:high].reshape(*lead, -1)


def _rows(w, taps: int, low: int, high: int):
  """Returns what a kernel matrix has for these channels."""
  width = w.shape[1]
  return w.reshape(taps, -1, width)[:, low:high].reshape(-1, width)
