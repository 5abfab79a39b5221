"""Convolutions with AQT's codes and straight-through gradients.

AQT's own convolution multiplies int8 (for which XLA has no fast form on a CPU,
and none at all on a GPU) or float values; the codes here are AQT's, see
`numerics.aqt_codes`, and are multiplied exactly. The steps are those of a
packed model (`aqt_product`), in the same order, so that it computes what its
training evaluated.

In the backward pass rounding counts as the identity and the other operand is
the quantized one, as for AQT's products of matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qvit_jax.arithmetic.exact import exact_dot
from qvit_jax.arithmetic.products import Window, multiply, raw_product
from qvit_jax.quantization import numerics
from qvit_jax.quantization.aqt_product import code_axes, scaled_product


@dataclasses.dataclass(frozen=True)
class Rounding:
  """How the operands of a convolution are rounded; hashable.

  Attributes:
    window: How the kernel slides.
    acts: Bits of the image; None: float.
    weights: Bits of the kernel; None: float.
    granularity: 'per_token', a scale for each image, or 'per_tensor'.
  """

  window: Window
  acts: int | None
  weights: int | None
  granularity: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def aqt_convolution(how: Rounding, x, w):
  """Returns the convolution of the rounded operands, in float32.

  Args:
    how: What is rounded.
    x: Images [b, h, w, i], in the dtype of scales and sums.
    w: Kernel as a matrix, in the same dtype.
  """
  (x, x_scale), (w, w_scale) = _codes(how, x, w)
  scales = {
    side: scale
    for side, scale in enumerate((x_scale, w_scale))
    if scale is not None
  }
  dtype, dot = x.dtype, multiply
  if len(scales) == 2:
    largest = 2 ** (how.acts - 1) * 2 ** (how.weights - 1)
    # Codes of up to 8 bits are exact in bf16.
    dot = lambda x, w, window: exact_dot(
      x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), window, largest
    )
  return scaled_product(x, w, scales, how.window, dtype, dot)


def _codes(how: Rounding, x, w):
  """Returns ((codes, scale), ...), or (values, None) of a float operand."""
  axes, _ = code_axes(how.granularity, how.window)
  return tuple(
    (operand, None)
    if bits is None
    else numerics.aqt_codes(operand, bits, shared)
    for operand, bits, shared in ((x, how.acts, axes), (w, how.weights, (0,)))
  )


def _forward(how: Rounding, x, w):
  return aqt_convolution(how, x, w), (x, w)


def _backward(how: Rounding, saved, cotangent):
  levels = [
    x if scale is None else x * scale for x, scale in _codes(how, *saved)
  ]
  _, pullback = jax.vjp(
    lambda x, w: raw_product(x, w, how.window), *levels
  )
  return pullback(cotangent.astype(levels[0].dtype))


aqt_convolution.defvjp(_forward, _backward)
