"""Convolutions in the form that is fast where they run.

XLA's grouped convolution is 40 times as slow on CPUs as what it is for a
depthwise kernel: a few shifted copies of the image, each times one number a
channel. So a depthwise product has that form there, and gradients of its own;
accelerators get the library's. So it is with some dense products and gradients.
`lax.platform_dependent` chooses when a program is lowered, so that one exported
for another machine is right too.

Shapes: images [b, h, w, c], kernels [kh, kw, c] of a depthwise product.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qvit_jax.arithmetic.windows import Window

# Most rows that are added elementwise to one.
_CHAIN = 8
# Channels of an image; pixels of a small one; numbers gathered at once.
_FEW, _SMALL, _SEEN = 4, 16, 9 * 2**17


def convolve(
  x: Array,
  kernel: Array,
  window: Window,
  out_dtype: Any = None,
  precision: jax.lax.Precision | None = None,
) -> Array:
  """Returns x convolved with a kernel, [b, p, q, o].

  Args:
    x: [b, h, w, i].
    kernel: [kh, kw, i / groups, o], of the same dtype.
    window: How it slides.
    out_dtype: Of sums and result; the operands' by default.
    precision: Of products on accelerators.
  """
  channels, features = x.shape[-1], kernel.shape[-1]
  if window.groups == channels == features and channels > 1:
    return depthwise(x, kernel[:, :, 0], window, out_dtype, precision)
  is_point = window.size == (1, 1) == window.strides
  if is_point and window.groups == 1 and not any(map(any, window.padding)):
    return pointwise(x, kernel[0, 0], out_dtype, precision)
  if window.groups == 1:
    return dense(x, kernel, window, out_dtype, precision)
  return _library(
    x, kernel, window=window, out_dtype=out_dtype, precision=precision
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dense(
  x: Array, kernel: Array, window: Window, out_dtype: Any, precision: Any
) -> Array:
  """Returns x convolved with a kernel that every channel meets.

  Args:
    x: [b, h, w, i].
    kernel: [kh, kw, i, o], of the same dtype.
    window: How it slides; one group.
    out_dtype: Of sums and result; None: the operands'.
    precision: Of products on accelerators.
  """
  fields = dict(window=window, out_dtype=out_dtype, precision=precision)
  library = functools.partial(_library, **fields)
  if not _is_gathered(x, window):
    return library(x, kernel)
  gathered = functools.partial(_gathered, **fields)
  return jax.lax.platform_dependent(x, kernel, cpu=gathered, default=library)


def _is_gathered(x, window: Window) -> bool:
  """Returns whether XLA has no fast form of a dense product on CPUs.

  Where the kernel is larger than the image, and for strides over an image of
  few channels, the first layer of many models.
  """
  (height, width), channels = x.shape[1:3], x.shape[-1]
  is_larger = height < window.size[0] or width < window.size[1]
  return is_larger or (channels <= _FEW and window.strides != (1, 1))


def _dense_forward(x, kernel, window, out_dtype, precision):
  y = dense(x, kernel, window, out_dtype, precision)
  return y, (x, kernel)


def _dense_backward(window, out_dtype, precision, operands, cotangent):
  x, kernel = operands
  fields = dict(window=window, out_dtype=out_dtype, precision=precision)

  def library(x, kernel, cotangent):
    product = functools.partial(_library, **fields)
    return jax.vjp(product, x, kernel)[1](cotangent)

  def by_parts(x, kernel, cotangent):
    product = _gathered if _is_gathered(x, window) else _library
    product = functools.partial(product, kernel=kernel, **fields)
    return (
      *jax.vjp(product, x)[1](cotangent),
      _matrix_gradient(x, cotangent, window, kernel),
    )

  # The library's own gradient of the kernel has the image for a window.
  pixels = math.prod(cotangent.shape[1:3])
  on_cpu = by_parts if pixels > _SMALL or _is_gathered(x, window) else library
  return jax.lax.platform_dependent(
    x, kernel, cotangent, cpu=on_cpu, default=library
  )


dense.defvjp(_dense_forward, _dense_backward)


def _matrix_gradient(x, cotangent, window: Window, kernel):
  """Returns the gradient of a kernel [kh, kw, i, o].

  Of a few images after the other, so that what their pixels see stays in the
  cache.
  """
  b, (height, width) = len(x), cotangent.shape[1:3]
  matrix = math.prod(kernel.shape[:3]), kernel.shape[3]
  few = max(1, min(b, _SEEN // (height * width * matrix[0])))
  few = max(n for n in range(1, few + 1) if b % n == 0)
  # Images of one loop are not neighbours: a batch that is split over devices
  # stays split.
  x, cotangent = (
    a.reshape(few, b // few, *a.shape[1:]) for a in (x, cotangent)
  )

  # The left operand is copied to bring its pixels last: let it be the one of
  # fewer channels.
  is_turned = matrix[0] > matrix[1]

  def add(k, total):
    seen, given = (
      jax.lax.dynamic_index_in_dim(a, k, axis=1, keepdims=False)
      for a in (x, cotangent)
    )
    seen = jnp.concatenate([tap for _, tap in _taps(seen, window)], axis=-1)
    given = given.astype(seen.dtype)
    return total + jax.lax.dot_general(
      *((given, seen) if is_turned else (seen, given)),
      (((0, 1, 2), (0, 1, 2)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  total = jnp.zeros(matrix[::-1] if is_turned else matrix, jnp.float32)
  total = jax.lax.fori_loop(0, b // few, add, total)
  total = total.T if is_turned else total
  return total.reshape(kernel.shape).astype(kernel.dtype)


def _gathered(x, kernel, *, window: Window, out_dtype, precision):
  """Returns the product of what each pixel sees with the kernel's matrix."""
  seen = jnp.concatenate([seen for _, seen in _taps(x, window)], axis=-1)
  kernel = kernel.reshape(-1, kernel.shape[-1])
  return pointwise(seen, kernel, out_dtype, precision)


def _library(x, kernel, *, window: Window, out_dtype, precision):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window.strides,
    window.padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=window.groups,
    precision=precision,
    preferred_element_type=out_dtype,
  )


def _library_depthwise(x, kernel, *, window: Window, out_dtype, precision):
  return _library(
    x,
    kernel[:, :, None],
    window=window,
    out_dtype=out_dtype,
    precision=precision,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise(
  x: Array, kernel: Array, window: Window, out_dtype: Any, precision: Any
) -> Array:
  """Returns each channel of x convolved with a kernel of its own.

  Args:
    x: [b, h, w, c].
    kernel: [kh, kw, c], of the same dtype.
    window: How it slides; one group a channel.
    out_dtype: Of sums and result; None: the operands'.
    precision: Of products on accelerators.
  """
  fields = dict(window=window, out_dtype=out_dtype, precision=precision)
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(_shifted, window=window, out_dtype=out_dtype),
    default=functools.partial(_library_depthwise, **fields),
  )


def _forward(x, kernel, window, out_dtype, precision):
  y = depthwise(x, kernel, window, out_dtype, precision)
  return y, (x, kernel)


def _backward(window, out_dtype, precision, operands, cotangent):
  x, kernel = operands

  def library(x, kernel, cotangent):
    product = functools.partial(
      _library_depthwise,
      window=window,
      out_dtype=out_dtype,
      precision=precision,
    )
    return jax.vjp(product, x, kernel)[1](cotangent)

  def shifted(x, kernel, cotangent):
    return (
      _input_gradient(kernel, cotangent, window, x),
      _kernel_gradient(x, cotangent, window, kernel),
    )

  return jax.lax.platform_dependent(
    x, kernel, cotangent, cpu=shifted, default=library
  )


depthwise.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
  """Returns x in the dtype of sums."""
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(jnp.float32 if is_float else jnp.int32)


def _taps(
  x: Array, window: Window
) -> Iterator[tuple[tuple[int, int], Array]]:
  """Yields each place of the kernel and the pixels that it meets."""
  b, h, w, c = x.shape
  rows, columns = window.out_size(h, w)
  x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
  down, right = window.strides
  for i, j in itertools.product(*map(range, window.size)):
    end = i + (rows - 1) * down + 1, j + (columns - 1) * right + 1
    yield (i, j), jax.lax.slice(
      x, (0, i, j, 0), (b, *end, c), (1, down, right, 1)
    )


def _shifted(x, kernel, *, window: Window, out_dtype):
  """Returns the product as a sum of shifted images, each times its numbers."""
  kernel = _wide(kernel)
  y = sum(_wide(seen) * kernel[at] for at, seen in _taps(x, window))
  return y.astype(out_dtype or x.dtype)


def _input_gradient(kernel, cotangent, window: Window, x):
  """Returns the gradient of x.

  Pixels are done by their place modulo the stride, as only every stride-th
  number of the kernel meets such a pixel.
  """
  b, h, w, c = x.shape
  kernel = _wide(kernel)
  sides = []  # (size, stride, blocks of pixels, zeros before, after) of an axis
  for axis, n in enumerate((h, w)):
    size, stride = window.size[axis], window.strides[axis]
    blocks = -(-(n + sum(window.padding[axis])) // stride)
    before = (size - 1) // stride
    sides.append((size, stride, blocks, before))
  (_, down, rows, above), (_, right, columns, left) = sides
  pads = [
    (before, blocks - out)
    for (_, _, blocks, before), out in zip(
      sides, cotangent.shape[1:3], strict=True
    )
  ]
  cotangent = jnp.pad(cotangent, ((0, 0), *pads, (0, 0)))

  def phase(first: int, second: int):
    total = jnp.zeros((b, rows, columns, c), kernel.dtype)
    for i in range(first, window.size[0], down):
      for j in range(second, window.size[1], right):
        start = above - i // down, left - j // right
        end = start[0] + rows, start[1] + columns
        seen = cotangent[:, start[0] : end[0], start[1] : end[1]]
        total = total + _wide(seen) * kernel[i, j]
    return total

  lines = [
    jnp.stack([phase(i, j) for j in range(right)], axis=3)
    for i in range(down)
  ]  # [b, rows, columns, right, c] each
  y = jnp.stack(lines, axis=2).reshape(b, rows * down, columns * right, c)
  (top, _), (start, _) = window.padding
  return y[:, top : top + h, start : start + w].astype(x.dtype)


def _kernel_gradient(x, cotangent, window: Window, kernel):
  """Returns the gradient of a kernel [kh, kw, c]."""
  x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
  x = jax.lax.optimization_barrier(x)  # else it is padded anew for each slice
  bare = dataclasses.replace(window, padding=((0, 0), (0, 0)))
  found = [_pixel_sum(seen, cotangent) for _, seen in _taps(x, bare)]
  return jnp.stack(found).reshape(kernel.shape).astype(kernel.dtype)


def _pixel_sum(seen, given):
  """Returns the sum of seen * given over all pixels, [c].

  Left to itself XLA makes one loop of product and sum, which adds up a channel
  in memory. Elementwise sums of some rows stay in registers; the product with
  ones that adds up the rest cannot be put into their loop.
  """
  height, c = seen.shape[1], seen.shape[-1]
  parts = max(n for n in range(1, _CHAIN + 1) if height % n == 0)
  rows = height // parts
  total = sum(
    _wide(seen[:, i : i + rows]) * _wide(given[:, i : i + rows])
    for i in range(0, height, rows)
  )
  total = total.reshape(-1, c)
  return jnp.ones((len(total),), total.dtype) @ total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pointwise(x: Array, kernel: Array, out_dtype: Any, precision: Any) -> Array:
  """Returns the product of every pixel with a matrix.

  Args:
    x: [b, h, w, i].
    kernel: [i, o], of the same dtype.
    out_dtype: Of sums and result; None: the operands'.
    precision: Of products on accelerators.
  """
  return jax.lax.dot_general(
    x,
    kernel,
    (((3,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=out_dtype,
  )


def _pointwise_forward(x, kernel, out_dtype, precision):
  return pointwise(x, kernel, out_dtype, precision), (x, kernel)


def _pointwise_backward(out_dtype, precision, operands, cotangent):
  x, kernel = operands
  product = functools.partial(
    jax.lax.dot_general, precision=precision, preferred_element_type=out_dtype
  )
  dx = product(cotangent, kernel, (((3,), (1,)), ((), ())))
  # The left operand is copied to bring its pixels last: let it be the one of
  # fewer channels.
  pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
  if x.shape[-1] <= cotangent.shape[-1]:
    dk = product(x, cotangent, pixels)
  else:
    dk = product(cotangent, x, pixels).T
  return dx.astype(x.dtype), dk.astype(kernel.dtype)


pointwise.defvjp(_pointwise_forward, _pointwise_backward)
