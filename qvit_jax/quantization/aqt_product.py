"""AQT's product from packed codes: how a trained model runs packed.

The same steps in the same order and dtype as behind `aqt_core`, so that a
packed model computes what its training evaluated.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from qvit_jax.arithmetic.integers import Whole
from qvit_jax.arithmetic.products import multiply, shared_axes, spread
from qvit_jax.ops import Site
from qvit_jax.quantization import numerics
from qvit_jax.quantization.qtensor import QTensor


def aqt_product(
  plan: Any, site: Site, lhs, rhs, dims, integer_dot: Callable[..., Any]
):
  """Returns lhs . rhs in float32. See `ops.Core`.

  Args:
    plan: The `SitePlan`.
    site: What is computed.
    lhs: Activations.
    rhs: Packed or float kernel, or the activations of an attention product.
    dims: Dimension numbers of which one axis is contracted, or a window.
    integer_dot: (lhs, rhs, dims, pieces of their sum or 0) -> exact product of
      two `Whole`, in float32.
  """
  dtype = numerics.aqt_dtype(lhs.dtype)
  lhs = lhs.astype(dtype)
  left, right = code_axes(plan.aqt, dims)
  scales = {}
  if plan.acts:
    lhs, scales[0] = numerics.aqt_codes(lhs, plan.acts, left)
  if isinstance(rhs, QTensor):
    rhs, scales[1] = rhs.codes, rhs.scale.astype(dtype)
  elif plan.acts and not site.is_layer:
    rhs, scales[1] = numerics.aqt_codes(rhs.astype(dtype), plan.acts, right)
  if len(scales) == 2:
    most = 2 ** ((plan.weights or plan.acts) - 1)
    dot = lambda lhs, rhs, dims: integer_dot(
      Whole(lhs, plan.most), Whole(rhs, most), dims, plan.cuts
    )
  else:
    dot = multiply
  return scaled_product(lhs, rhs, scales, dims, dtype, dot)


def code_axes(granularity: str, dims):
  """Returns the axes that share a scale, of both operands; None: all."""
  if granularity == 'per_token':
    return shared_axes(dims, 0), shared_axes(dims, 1)
  return None, None


def scaled_product(
  lhs, rhs, scales: dict[int, Any], dims, dtype, dot: Callable[..., Any]
):
  """Returns lhs . rhs times scales, as AQT computes it, in float32.

  Args:
    lhs: Codes where there is a scale of side 0, else values in `dtype`.
    rhs: The same of side 1.
    scales: Of the operands that are codes, by side.
    dims: See `aqt_product`.
    dtype: Of scales and sums.
    dot: (lhs, rhs, dims) -> product in float32, exact of two codes.
  """
  if len(scales) == 2:
    y = dot(lhs, rhs, dims)
    y = y.astype(jnp.int32)  # as AQT's, else XLA skips rounding to bf16 below
  else:
    y = dot(lhs, rhs.astype(dtype), dims)
  y = y.astype(dtype)
  for side, scale in scales.items():
    y = y * spread(scale, dims, side, y.ndim)
  return y.astype(jnp.float32)
