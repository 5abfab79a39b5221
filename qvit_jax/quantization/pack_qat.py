"""Packs what AQT trained: parameters and a plan become integers. Row 4."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.quantization import numerics, qtensor
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.ptq import Packed, assemble
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan


def pack(params: dict[str, Any], plan: QuantPlan, dtype: str) -> Packed:
  """Returns the integer model of what training with `aqt_core` evaluates.

  Args:
    params: Path to float32 array.
    plan: Bits of every site.
    dtype: Compute dtype of the training.
  """
  rest, quant = pack_kernels(params, plan, dtype)
  plans = {}
  for site, spec in zip(plan.sites, plan.specs, strict=True):
    weights = spec.weights if site.is_layer else None
    rounded = spec.acts or weights
    aqt = plan.act_granularity if rounded else ''
    plans[site.path] = SitePlan(weights, spec.acts, aqt=aqt)
  return assemble(rest, quant, plans, plan.sites, dtype, plan.act_granularity)


def pack_kernels(
  params: dict[str, Any], plan: QuantPlan, dtype: str
) -> tuple[dict[str, Any], dict[str, QTensor | Array]]:
  """Returns (parameters that are no kernels, kernels), by path.

  Kernels that the plan leaves in float have the compute dtype. See `pack`.
  """
  rest, kernels = dict(params), {}
  for site, spec in zip(plan.sites, plan.specs, strict=True):
    if site.is_layer:
      name = f'{site.path}/kernel'
      w = jnp.asarray(rest.pop(name)).reshape(site.rhs_shape)
      kernels[name] = _convert(w, spec.weights, dtype)
  return rest, kernels


@functools.partial(jax.jit, static_argnums=(1, 2))  # see `numerics.aqt_codes`
def _convert(
  w: Float[Array, 'i o'], bits: int | None, dtype: str
) -> QTensor | Array:
  w = w.astype(dtype)  # which products see, and so do their scales
  if bits is None:
    return w
  codes, scale = numerics.aqt_codes(
    w.astype(numerics.aqt_dtype(w.dtype)), bits, (0,)
  )
  return qtensor.from_codes(codes, scale, bits)
