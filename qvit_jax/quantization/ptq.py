"""Applies a row to a float model: transform, calibrate, solve, pack. Row 4.

It is handed parameters and statistics and never runs the model itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qvit_jax import tree
from qvit_jax.errors import QuantError
from qvit_jax.ops import FloatCore, Ops, Site, Stream
from qvit_jax.quantization import calibrate, gptq, numerics, qtensor, rotate
from qvit_jax.quantization.integer_core import (
  MAX_PACKED_BITS,
  IntegerCore,
  SitePlan,
)
from qvit_jax.quantization.rows import STEM_ACTS, Row
from qvit_jax.quantization.spec import QuantPlan, QuantSpec


@dataclasses.dataclass
class Packed:
  """A quantized model, ready to run.

  Attributes:
    variables: Collections `params` and `quant`; no float copy of a packed
      kernel is among them.
    ops: The arithmetic they are for.
    dtype: Compute dtype of everything but the products.
    plan: Bits of every site.
    execution: 'float', 'simulated' or 'integer'.
    why: Why it is not integer; '' if it is.
  """

  variables: dict[str, Any]
  ops: Ops
  dtype: str
  plan: QuantPlan
  execution: str
  why: str = ''

  @property
  def site_plans(self) -> dict[str, SitePlan]:
    """How each product runs; empty for a float row."""
    return dict(getattr(self.ops.core, 'sites', ()))

  def num_bytes(self) -> int:
    """Returns the bytes of all arrays, scales included."""
    return tree.num_bytes(self.variables)


def transform(
  row: Row, params: dict[str, np.ndarray], stream: Stream, *, seed: int
) -> dict[str, np.ndarray]:
  """Returns parameters of the same function that are easier to round."""
  if 'rotate' not in row.solvers:
    return params
  return rotate.turn(rotate.fold_norms(params, stream), stream, seed=seed)


def apply_row(
  row: Row,
  params: dict[str, np.ndarray],
  sites: Sequence[Site],
  stats: dict[str, calibrate.SiteStats] | None,
  *,
  range_method: str,
) -> Packed:
  """Returns the model as a row wants it.

  Args:
    row: What to do.
    params: Path to float32 array, transformed for the row.
    sites: All products of the model.
    stats: What calibration saw of these parameters; None where the row needs
      nothing of it.
    range_method: Of `calibrate.RANGES`, for static activations.

  Raises:
    QuantError: Bits that cannot be packed; the site is named.
  """
  if row.weights is None and row.acts is None:
    return _float_row(row, params, sites)
  specs, plans = [], {}
  rest = dict(params)
  quant: dict[str, Any] = {}
  for site in sites:
    spec, plan = _site_plan(row, site)
    specs.append(spec)
    plans[site.path] = plan
    if site.is_layer:
      kernel = rest.pop(f'{site.path}/kernel').reshape(site.rhs_shape)
      packed, correction = _pack(row, site, jnp.asarray(kernel), stats)
      quant[f'{site.path}/kernel'] = packed
      if correction is not None:
        bias = rest[f'{site.path}/bias']
        rest[f'{site.path}/bias'] = bias + correction.reshape(bias.shape)
    if plan.is_static:
      quant |= _static_scales(site, plan, stats, range_method)
  variables = {
    'params': tree.nest({n: jnp.asarray(x) for n, x in rest.items()}),
    'quant': tree.nest(quant),
  }
  core = IntegerCore(tuple(plans.items()))
  granularity = 'per_tensor' if row.is_static else 'per_token'
  plan = QuantPlan(tuple(sites), tuple(specs), granularity)
  execution, why = _execution(row)
  return Packed(variables, Ops(core=core), 'float32', plan, execution, why)


def _float_row(row: Row, params, sites) -> Packed:
  dtype = jnp.dtype(row.dtype)
  bits = dtype.itemsize * 8
  spec = QuantSpec() if bits == 32 else QuantSpec(bits, bits)
  cast = {n: jnp.asarray(x).astype(dtype) for n, x in params.items()}
  return Packed(
    {'params': tree.nest(cast)},
    Ops(core=FloatCore()),
    row.dtype,
    QuantPlan(tuple(sites), (spec,) * len(sites), 'per_token'),
    'float',
    'a float row',
  )


def _execution(row: Row) -> tuple[str, str]:
  if row.acts is None:
    return 'simulated', 'packed weights are dequantized: products in float'
  if max(row.weights, row.acts) > MAX_PACKED_BITS:
    return 'simulated', f'codes of over {MAX_PACKED_BITS} bits travel as float'
  return 'integer', ''


def _site_plan(row: Row, site: Site) -> tuple[QuantSpec, SitePlan]:
  weights, acts = row.weights, row.acts
  if not site.is_layer:
    weights, acts = None, acts if row.attention else None
  elif acts and site.kind == 'conv':
    acts = max(acts, STEM_ACTS)
  is_static = row.is_static and acts is not None
  return QuantSpec(weights, acts), SitePlan(weights, acts, is_static)


def _pack(row: Row, site: Site, w, stats):
  """Returns (QTensor, or a float matrix on the grid; change of the bias)."""
  bits = row.weights
  try:
    if 'gptq' in row.solvers:
      scale = numerics.search_scale(w, bits)
      hessian = jnp.asarray(stats[site.path].hessian)
      codes = gptq.round_by_outputs(w, hessian, scale, bits=bits)
      if bits > MAX_PACKED_BITS:
        packed = codes * scale
      else:
        packed = qtensor.from_codes(codes, scale, bits)
    elif bits > MAX_PACKED_BITS:
      scale = numerics.search_scale(w, bits, steps=1)
      packed = numerics.round_to_grid(
        w, scale, jnp.zeros_like(scale), bits, symmetric=True
      )
    else:
      packed = qtensor.quantize(w, bits, group=row.group)
  except QuantError as error:
    raise QuantError(f'{site.path}: {error}') from error
  if 'bias_correction' not in row.solvers:
    return packed, None
  near = (
    qtensor.dequantize(packed)
    if isinstance(packed, qtensor.QTensor)
    else packed
  )
  return packed, np.asarray(stats[site.path].mean @ (w - near))


def _static_scales(site: Site, plan: SitePlan, stats, range_method: str):
  """Returns the collection's entries of a calibrated site."""
  entries = {}
  sides = {'lhs': stats[site.path].lhs}
  if not site.is_layer:
    sides['rhs'] = stats[site.path].rhs
  for side, operand in sides.items():
    low, high = calibrate.choose_range(operand, plan.acts, range_method)
    scale, zero = numerics.scale_of(
      jnp.float32(low), jnp.float32(high), plan.acts, symmetric=False
    )
    entries[f'{site.path}/{side}_scale'] = scale
    entries[f'{site.path}/{side}_zero'] = zero
  return entries
