"""Products: a matrix product or a convolution, and what scales do to them.

A layer's kernel is a matrix [i, o] for every core, solver and packer. For a
convolution i counts height, width and the input channels of one group, in that
order, so that the matrix is the kernel [kh, kw, i, o] with its first three
axes made one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.arithmetic.convolutions import convolve
from qvit_jax.arithmetic.windows import Window

DotDims = tuple[tuple[Any, Any], tuple[Any, Any]]


# What a core is handed: dimension numbers of `lax.dot_general`, or a window
# over lhs [b, h, w, i] whose kernel is a matrix.
Dims = DotDims | Window


def precision_of(*operands: Array) -> jax.lax.Precision | None:
  """Returns the precision of a product: float32 operands mean float32.

  Accelerators multiply float32 as TF32 (GPU) or bf16 (TPU) unless they are
  asked for more; half-width operands are exact as they are.
  """
  wide = any(x.dtype == jnp.float32 for x in operands)
  return jax.lax.Precision.HIGHEST if wide else None


def raw_product(lhs: Array, rhs: Array, dims: Dims, out_dtype=None) -> Array:
  """Returns lhs . rhs with autodiff's own gradients.

  Args:
    lhs: Activations; [b, h, w, i] for a window.
    rhs: Of the same dtype; a matrix for a window.
    dims: See `Dims`.
    out_dtype: Of sums and result; the operands' by default.
  """
  precision = precision_of(lhs, rhs)
  if not isinstance(dims, Window):
    return jax.lax.dot_general(
      lhs, rhs, dims, precision=precision, preferred_element_type=out_dtype
    )
  kernel = rhs.reshape(dims.kernel_shape(rhs.shape))
  return convolve(lhs, kernel, dims, out_dtype, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(lhs: Array, rhs: Array, dims: Dims) -> Array:
  """Returns the product accumulated in float32, for operands of one dtype.

  Left to itself, autodiff of a bf16 product with a float32 result multiplies
  float32 cotangents by bf16 operands, off the fast path of the hardware. Here
  the cotangent is cast to the operands' dtype first; in float32 nothing
  changes.
  """
  return raw_product(lhs, rhs, dims, jnp.float32)


def _forward(lhs, rhs, dims):
  return multiply(lhs, rhs, dims), (lhs, rhs)


def _backward(dims, operands, cotangent):
  _, pullback = jax.vjp(lambda lhs, rhs: raw_product(lhs, rhs, dims), *operands)
  return pullback(cotangent.astype(operands[0].dtype))


multiply.defvjp(_forward, _backward)


def shared_axes(dims: Dims, side: int) -> tuple[int, ...]:
  """Returns the axes of an operand that one scale must cover.

  Those that are summed over; windows overlap, so that for the left operand of
  a convolution they are all but the batch.

  Args:
    dims: See `Dims`.
    side: 0 for the left operand, 1 for the right one.
  """
  if isinstance(dims, Window):
    return (0,) if side else (1, 2, 3)
  return tuple(dims[0][side])


def spread(scale: Array, dims: Dims, side: int, ndim: int) -> Array:
  """Returns the scale of one operand with the axes of the product.

  Args:
    scale: With the operand's axes; those of `shared_axes` have length 1.
    dims: See `Dims`.
    side: 0 for the left operand, 1 for the right one.
    ndim: Of the product: batch axes, the left's own, the right's own.
  """
  if isinstance(dims, Window):  # [b, 1, 1, 1] or [1, o]
    return scale
  (axis,), batch = dims[0][side], dims[1][side]
  own = [i for i in range(scale.ndim) if i != axis and i not in batch]
  scale = scale.transpose(*batch, *own, axis)[..., 0]
  cut = len(batch) if side else scale.ndim
  others = (1,) * (ndim - scale.ndim)
  return scale.reshape(*scale.shape[:cut], *others, *scale.shape[cut:])


def patches(x: Float[Array, 'b h w i'], window: Window) -> Array:
  """Returns what each output pixel sees, [b, h, w, groups, kh * kw * i / g].

  The last axis has the order of a kernel matrix's rows.
  """
  b, h, w, channels = x.shape
  x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
  rows, columns = window.out_size(h, w)
  seen = [
    jax.lax.slice(
      x,
      (0, i, j, 0),
      (
        b,
        i + (rows - 1) * window.strides[0] + 1,
        j + (columns - 1) * window.strides[1] + 1,
        channels,
      ),
      (1, *window.strides, 1),
    )
    for i in range(window.size[0])
    for j in range(window.size[1])
  ]
  x = jnp.stack(seen, axis=3)  # [b, h, w, kh * kw, i]
  g = window.groups
  x = x.reshape(b, rows, columns, len(seen), g, channels // g)
  return x.swapaxes(3, 4).reshape(b, rows, columns, g, -1)
