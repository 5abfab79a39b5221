"""Sums over what a kernel meets in the inputs of its layer.

The kernel of a convolution meets the pixels of one window and one group of
channels, in the order of the rows of its matrix; the zeros around the image are
among them.
"""

import dataclasses
import math

import jax.numpy as jnp

from qvit_jax.arithmetic.products import Window, patches

# Windows of an image whose squares are summed, at most about: neighbours are
# alike, and a part of them says as much.
_WINDOWS = 1024
# Inputs whose squares are one matrix; of more, parts of them have one each.
_INPUTS = 8192


def sum_rows(x, dims):
  """Returns the sum of what a kernel meets, [i] or [g, i], and of how many.

  Args:
    x: Input of a layer.
    dims: Of its product.
  """
  if not isinstance(dims, Window):
    x = x.reshape(-1, x.shape[-1])
    return x.sum(axis=0), len(x)
  # Of the images first: no window of each is made.
  seen = patches(x.sum(axis=0, keepdims=True), dims)
  _, height, width, groups, rows = seen.shape
  total = seen.sum(axis=(0, 1, 2))
  count = len(x) * height * width
  return total.reshape((groups, rows) if groups > 1 else (rows,)), count


def squares(x, dims):
  """Returns sums over what a kernel meets: of squares, of values, of ones.

  Of a large image not every window is taken.

  Args:
    x: Input of a layer.
    dims: Of its product.

  Returns:
    (X^T X, sum of the rows of X, how many): [i, i] and [i]; of g groups
    [g, i, i] and [g, i]; of n parts (`parts_of`) [n, i / n, i / n] and
    [n, i / n].
  """
  if isinstance(dims, Window):
    seen = patches(x, _sparser(dims, x.shape[1:3]))
    seen = seen.reshape(-1, *seen.shape[3:])  # [n, g, i]
    if dims.groups > 1:
      square = jnp.einsum('ngi,ngj->gij', seen, seen, precision='highest')
      return square, seen.sum(axis=0), len(seen)
    x = seen
  x = x.reshape(-1, x.shape[-1])
  if (parts := parts_of(x.shape[1])) > 1:
    x = x.reshape(len(x), parts, -1)
    square = jnp.einsum('ngi,ngj->gij', x, x, precision='highest')
    return square, x.sum(axis=0), len(x)
  return jnp.matmul(x.T, x, precision='highest'), x.sum(axis=0), len(x)


def parts_of(size: int) -> int:
  """Returns into how many parts the inputs of a layer are cut for squares."""
  least = -(-size // _INPUTS)
  return next(n for n in range(least, size + 1) if size % n == 0)


def _sparser(window: Window, size: tuple[int, int]) -> Window:
  """Returns a window that stops at no more than about `_WINDOWS` places."""
  places = math.prod(window.out_size(*size))
  step = math.ceil(math.sqrt(places / _WINDOWS))
  strides = tuple(step * stride for stride in window.strides)
  return dataclasses.replace(window, strides=strides)
