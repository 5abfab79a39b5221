"""Straight-through products by Google's AQT. Row 4; the only importer of aqt.

AQT's integer rule for b bits, which `tests/reference.py` repeats in NumPy:
scale s = absmax / (2**(b-1) - 1/2), code q = round(clip(x / s, -m, m)) with
m = 2**(b-1) - 1. Kernels share a scale along the contracted axis (one per
output channel); activations too (one per token), or over the whole tensor. In
the backward pass rounding counts as the identity and the other operand is the
quantized one.
"""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp
from aqt.jax.v2 import config as aqt_config

from qvit_jax.ops import dot_general
from qvit_jax.quantization.spec import QuantPlan, QuantSpec

if not hasattr(jax.core, 'get_aval'):
  # aqtp 0.9.0 still asks jax.core for a name that jax 0.10 moved.
  jax.core.get_aval = jax.typeof


def _aqt_dot_general(lhs_bits: int | None, rhs_bits: int | None, whole: tuple):
  """Returns AQT's dot_general; `whole` says which operands get one scale."""
  config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
  aqt_config.set_bits(config, lhs_bits, rhs_bits, None, None, None, None)
  quantizer = config.fwd.dg_quantizer
  for side, bits, per_tensor in (
    (quantizer.lhs, lhs_bits, whole[0]),
    (quantizer.rhs, rhs_bits, whole[1]),
  ):
    if bits is None:
      continue
    # Codes of fewer bits travel as int8 too: XLA has no kernels for int4 on
    # CPU, and a mixed int8 x int4 product falls back to slow int32.
    side.numerics.dtype = jnp.int8
    if per_tensor:
      side.calib_shared_axes = 'per_tensor'
  # The usual straight-through estimator: gradients see the quantized operands.
  aqt_config.set_use_fwd_quant(
    config, rhs_bits is not None, lhs_bits is not None
  )
  return config


@dataclasses.dataclass(frozen=True)
class AqtCore:
  """Computes each product as its line in the plan says. See `ops.Core`."""

  plan: QuantPlan
  is_packed = False

  def __call__(self, module, site, lhs, rhs, dims):
    """See `ops.Core`."""
    spec: QuantSpec = self.plan.by_path[site.path]
    rhs_bits = spec.weights if site.is_layer else spec.acts
    rhs = rhs.astype(lhs.dtype)
    if spec.acts is None and rhs_bits is None:
      return dot_general(lhs, rhs, dims)
    per_tensor = self.plan.act_granularity == 'per_tensor'
    aqt = _aqt_dot_general(
      spec.acts, rhs_bits, (per_tensor, per_tensor and not site.is_layer)
    )
    return aqt(lhs, rhs, dims).astype(jnp.float32)
