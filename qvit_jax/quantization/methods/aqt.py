"""Straight-through products by Google's AQT; the only importer of aqt.

AQT's integer rule for b bits, which `tests/reference.py` repeats in NumPy:
scale s = absmax / (2**(b-1) - 1/2), code q = round(clip(x / s, -m, m)) with
m = 2**(b-1) - 1. Kernels share a scale along the contracted axis (one per
output channel); activations too (one per token), or over the whole tensor. In
the backward pass rounding counts as the identity and the other operand is the
quantized one.

With `backward_bits` the gradient that meets a quantized operand is rounded too,
stochastically: q = round(g / s + u), u uniform in [-1/2, 1/2), has the mean
g / s. Its scale, one along the contracted axes, is s = absmax / m: AQT's own
would clip the largest value, and the mean would be off.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from aqt.jax.v2 import calibration, stochastic_rounding, utils
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.numerics import int_numerics
from jaxtyping import Array, Float

from qvit_jax.arithmetic.products import Window, multiply, precision_of
from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops
from qvit_jax.quantization import numerics, qtensor
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.methods.aqt_convolution import (
  Rounding,
  aqt_convolution,
)
from qvit_jax.quantization.methods.method import BITS, Method
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan, QuantSpec

if not hasattr(jax.core, 'get_aval'):
  # aqtp 0.9.0 still asks jax.core for a name that jax 0.10 moved.
  jax.core.get_aval = jax.typeof


# Random numbers for stochastic rounding, of training alone.
STREAM = 'rounding'


@utils.flax_slots_kw_only_dataclass
class _Stochastic(int_numerics.IntSymmetric):
  """Stochastic rounding in float32: bf16 has no bits for the noise."""

  def vjp_fwd(self, x, context):
    """Returns what AQT's method does, of x in float32."""
    return int_numerics.IntSymmetric.vjp_fwd(
      self, x.astype(jnp.float32), context
    )


def _product(lhs, rhs, dimension_numbers, preferred_element_type, precision):
  """Returns `lax.dot_general` at the precision that its operands mean."""
  del precision  # AQT asks for the default, TF32 or bf16 on accelerators
  return jax.lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=precision_of(lhs, rhs),
    preferred_element_type=preferred_element_type,
  )


def _round_gradient(raw: Any, bits: int) -> None:
  """Makes a backward product (gradient . codes) one of integers."""
  gradient, codes = raw.dg_quantizer.lhs, raw.dg_quantizer.rhs
  gradient.numerics = _Stochastic(
    bits=bits, preserve_zero=True, preserve_max_val=True, clip=True,
    clip_gradient=False, round=True, dtype=jnp.int8,
    noise_fn=stochastic_rounding.JaxUniform(),
  )  # fmt: skip
  # AQT rounds the codes of the forward pass again; at scale 1 they stay.
  bound = codes.numerics.get_quant_bound()
  codes.calibration = functools.partial(
    calibration.ConstantCalibration, bound=bound
  )


def _aqt_dot_general(
  lhs_bits: int | None,
  rhs_bits: int | None,
  whole: tuple[bool, bool],
  backward_bits: int | None = None,
):
  """Returns AQT's dot_general.

  Args:
    lhs_bits: Of the left operand; None: float.
    rhs_bits: Of the right operand.
    whole: Which operands get one scale.
    backward_bits: Of gradients that meet a quantized operand; 8 or None.
  """
  config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
  dlhs = None if rhs_bits is None else backward_bits
  drhs = None if lhs_bits is None else backward_bits
  aqt_config.set_bits(config, lhs_bits, rhs_bits, dlhs, dlhs, drhs, drhs)
  for raw, bits in ((config.dlhs, dlhs), (config.drhs, drhs)):
    if bits is not None:
      _round_gradient(raw, bits)
  for raw in (config.fwd, config.dlhs, config.drhs):
    raw.dot_general = _product
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
  """Computes each product as its line in the plan says. See `ops.Core`.

  Attributes:
    plan: Bits of every site.
    backward_bits: Of gradients in backward products, 8, or 0: float. They are
      rounded where the caller of the model gives random numbers as the stream
      'rounding', which training does; evaluation has no backward pass.
  """

  plan: QuantPlan
  backward_bits: int = 0
  is_packed = False

  def __call__(self, module, site, lhs, rhs, dims):
    """See `ops.Core`."""
    spec: QuantSpec = self.plan.by_path[site.path]
    rhs_bits = spec.weights if site.is_layer else spec.acts
    rhs = rhs.astype(lhs.dtype)
    if spec.acts is None and rhs_bits is None:
      return multiply(lhs, rhs, dims)
    dtype = numerics.aqt_dtype(lhs.dtype)
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if isinstance(dims, Window):
      how = Rounding(dims, spec.acts, rhs_bits, self.plan.act_granularity)
      return aqt_convolution(how, lhs, rhs)
    per_tensor = self.plan.act_granularity == 'per_tensor'
    whole = per_tensor, per_tensor and not site.is_layer
    if self.backward_bits and module.has_rng(STREAM):
      aqt = _aqt_dot_general(spec.acts, rhs_bits, whole, self.backward_bits)
      aqt = aqt_config.set_context(aqt, module.make_rng(STREAM), None)
    else:
      aqt = _aqt_dot_general(spec.acts, rhs_bits, whole)
    return aqt(lhs, rhs, dims).astype(jnp.float32)

  def pack(self, params, learned, dtype):
    """See `method.Pack`."""
    del learned  # there is nothing besides parameters
    rest, kernels = pack_kernels(params, self.plan, dtype)
    return rest, kernels, _site_plans(self.plan)


def _site_plans(plan: QuantPlan) -> dict[str, SitePlan]:
  plans = {}
  for site, spec in zip(plan.sites, plan.specs, strict=True):
    weights = spec.weights if site.is_layer else None
    rounded = spec.acts or weights
    aqt = plan.act_granularity if rounded else ''
    plans[site.path] = SitePlan(weights, spec.acts, aqt=aqt)
  return plans


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


def _note(quant, ops: Ops, plan: QuantPlan) -> str:
  del ops, plan
  if not quant.backward_bits:
    return ''
  return f', backward products {quant.backward_bits} bit, stochastic'


def _make_ops(quant, plan: QuantPlan, hidden) -> Ops:
  del hidden
  windows = [
    site.path
    for site, spec in zip(plan.sites, plan.specs, strict=True)
    if site.window and (spec.weights or spec.acts)
  ]
  if quant.backward_bits and windows:
    raise QuantError(
      f'quant.backward_bits={quant.backward_bits} rounds products of matrices, '
      f'but {windows[0]} is a convolution (one of {len(windows)}); set '
      '--config.quant.backward_bits=0'
    )
  return Ops(core=AqtCore(plan, quant.backward_bits))


METHOD = Method(
  _make_ops,
  reads=(*BITS, 'quant.backward_bits'),
  granularities=('per_token', 'per_tensor'),
  pack=AqtCore.pack,
  note=_note,
)
