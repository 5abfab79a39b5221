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
  """Returns X^T X of what a kernel meets, [i, i] or [g, i, i].

  Of a large image not every window is taken.

  Args:
    x: Input of a layer.
    dims: Of its product.
  """
  if not isinstance(dims, Window):
    x = x.reshape(-1, x.shape[-1])
    return jnp.matmul(x.T, x, precision='highest')
  seen = patches(x, _sparser(dims, x.shape[1:3]))
  if dims.groups == 1:
    seen = seen.reshape(-1, seen.shape[-1])
    return jnp.matmul(seen.T, seen, precision='highest')
  return jnp.einsum('bpqgi,bpqgj->gij', seen, seen, precision='highest')


def _sparser(window: Window, size: tuple[int, int]) -> Window:
  """Returns a window that stops at no more than about `_WINDOWS` places."""
  places = math.prod(window.out_size(*size))
  step = math.ceil(math.sqrt(places / _WINDOWS))
  strides = tuple(step * stride for stride in window.strides)
  return dataclasses.replace(window, strides=strides)
