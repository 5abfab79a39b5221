"""AQT's product from packed codes: how a trained model runs packed.

The same steps in the same order and dtype as behind `aqt_core`, so that a
packed model computes what its training evaluated.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from qvit_jax.arithmetic.products import multiply, spread
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
    dims: Dimension numbers; one axis is contracted.
    integer_dot: (lhs, rhs, dims, bound on |lhs| * |rhs|, bound on their sum or
      0) -> exact product of whole numbers, in float32.
  """
  dtype = numerics.aqt_dtype(lhs.dtype)
  lhs = lhs.astype(dtype)
  left, right = dims[0] if plan.aqt == 'per_token' else (None, None)
  scales = {}
  if plan.acts:
    lhs, scales[0] = numerics.aqt_codes(lhs, plan.acts, left)
  if isinstance(rhs, QTensor):
    rhs, scales[1] = rhs.codes, rhs.scale.astype(dtype)
  elif plan.acts and not site.is_layer:
    rhs, scales[1] = numerics.aqt_codes(rhs.astype(dtype), plan.acts, right)
  if len(scales) == 2:
    # Codes of up to 8 bits are exact in bf16.
    lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    most = 2 ** (plan.acts - 1)
    largest = most * 2 ** ((plan.weights or plan.acts) - 1)
    y = integer_dot(lhs, rhs, dims, largest, plan.reach * most)
    y = y.astype(jnp.int32)  # as AQT's, else XLA skips rounding to bf16 below
  else:
    y = multiply(lhs, rhs.astype(dtype), dims)
  y = y.astype(dtype)
  for side, scale in scales.items():
    y = y * spread(scale, dims, side, y.ndim)
  return y.astype(jnp.float32)
