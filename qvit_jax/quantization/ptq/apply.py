"""Applies a row to a float model: transform, calibrate, solve, pack.

It is handed parameters and statistics and never runs the model itself.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import tree
from qvit_jax.errors import QuantError
from qvit_jax.ops import FloatCore, Ops, Pair, Site, Stream
from qvit_jax.quantization import hadamard, numerics, qtensor
from qvit_jax.quantization.finite import at_site, check_finite
from qvit_jax.quantization.integer_core import (
  MAX_PACKED_BITS,
  SitePlan,
)
from qvit_jax.quantization.packed import Packed, assemble
from qvit_jax.quantization.ptq.calibrate import SiteStats
from qvit_jax.quantization.ptq.ranges import choose_range
from qvit_jax.quantization.ptq.rows import Row
from qvit_jax.quantization.ptq.solvers import SOLVERS
from qvit_jax.quantization.spec import QuantPlan, QuantSpec


def transform(
  row: Row,
  params: dict[str, np.ndarray],
  stream: Stream | None,
  observe: Callable[[tuple[str, ...], dict], Mapping[str, SiteStats]],
  *,
  seed: int,
  pairs: Sequence[Pair] = (),
) -> dict[str, np.ndarray]:
  """Returns parameters of the same function that are easier to round.

  Args:
    row: Its transforms are applied in the order of `solvers.SOLVERS`.
    params: Path to float32 array.
    stream: Who writes to and reads from the residual stream. None: the model
      has none; `row_checks.check_model` has refused the rows that need it.
    observe: (transforms so far, parameters so far) -> statistics.
    seed: Of the rotations.
    pairs: Layers between which channels can be scaled; see `stream`.
  """
  done: tuple[str, ...] = ()
  for name in row.transforms:
    see = functools.partial(observe, done, params)
    places = pairs if SOLVERS[name].needs_pairs else stream
    params = SOLVERS[name].transform(params, places, see, seed)
    done = (*done, name)
  return params


def apply_row(
  row: Row,
  plans: dict[str, SitePlan],
  params: dict[str, np.ndarray],
  sites: Sequence[Site],
  stats: Mapping[str, SiteStats] | None,
) -> Packed:
  """Returns the model as a row wants it.

  Args:
    row: What to do.
    plans: Of `plans.plan_sites`; unused by float rows.
    params: Path to float32 array, transformed for the row.
    sites: All products of the model.
    stats: What calibration saw of these parameters; None where the row needs
      nothing of it.

  Raises:
    QuantError: Bits that cannot be packed, or values that are not finite; the
      site is named.
  """
  check_finite(params)
  if row.is_float:
    return _float_row(row, params, sites)
  rest = dict(params)
  quant: dict[str, Any] = {}
  for site in sites:
    plan = plans[site.path]
    if site.is_layer:
      kernel = rest.pop(f'{site.path}/kernel').reshape(site.rhs_shape)
      packed, correction = _pack(row, site, plan, jnp.asarray(kernel), stats)
      quant[f'{site.path}/kernel'] = packed
      if correction is not None:
        bias = _bias(rest, site.path)
        rest[f'{site.path}/bias'] = bias + correction.reshape(bias.shape)
    if plan.is_static:
      quant |= _static_scales(row, site, plan, stats)
  if row.dtype != 'float32':
    rest = {n: jnp.asarray(x).astype(row.dtype) for n, x in rest.items()}
  granularity = 'per_tensor' if row.is_static else 'per_token'
  return assemble(rest, quant, plans, sites, row.dtype, granularity)


def _bias(params: dict[str, np.ndarray], path: str) -> np.ndarray:
  name = f'{path}/bias'
  if name not in params:
    raise QuantError(
      f'{path} has no bias that bias_correction could change; fold the norm '
      'behind it into it, or leave bias_correction out of the row'
    )
  return params[name]


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


def _pack(row: Row, site: Site, plan: SitePlan, w, stats):
  """Returns (QTensor, or a float matrix; change of the bias or None)."""
  bits = plan.weights
  if bits is None:
    if plan.block:
      w = hadamard.turn_blocks(w.T, plan.block).T
    return w.astype(jnp.dtype(row.dtype)), None
  hessian = None
  if row.needs_hessians:
    # What the mean of the inputs makes of an error, the bias makes up for.
    seen = stats[site.path]
    hessian = jnp.asarray(seen.spread() if row.reads_means else seen.hessian)
  mean = stats[site.path].mean if row.reads_means else None
  if plan.block:
    w = hadamard.turn_blocks(w.T, plan.block).T
    if hessian is not None:
      half = hadamard.turn_blocks(hessian, plan.block)
      hessian = hadamard.turn_blocks(half.swapaxes(-1, -2), plan.block)
    if mean is not None:
      mean = np.asarray(hadamard.turn_blocks(jnp.asarray(mean), plan.block))
  with at_site(site.path):
    packed = round_kernel(row, w, hessian, bits)
  if mean is None:
    return packed, None
  near = (
    qtensor.dequantize(packed)
    if isinstance(packed, qtensor.QTensor)
    else packed
  )
  return packed, np.asarray(mean_output(mean, w - near))


def mean_output(mean, w):
  """Returns what a kernel makes of the mean of its inputs, [o].

  Args:
    mean: By row [i], or of each group [g, i].
    w: Kernel [i, o].
  """
  mean = jnp.atleast_2d(jnp.asarray(mean))
  parts = w.reshape(len(w), len(mean), -1)
  return jnp.einsum('gi,igo->go', mean, parts, precision='highest').ravel()


def round_kernel(row: Row, w, hessian, bits: int):
  """Returns a QTensor, or above 8 bits a float matrix on the grid.

  Args:
    row: Its solvers and its group.
    w: Kernel [i, o].
    hessian: X^T X of its inputs, where the row needs one: see
      `inputs.squares`.
    bits: Of a code.
  """
  if row.rounding or row.has_one_scale:
    search = not row.is_plain
    scale = qtensor.group_scales(
      w, bits, group=row.group, search=search, one=row.has_one_scale
    )
    full = qtensor.spread_scales(scale, w.shape[0], row.group)
    if row.rounding:
      codes = _by_groups(SOLVERS[row.rounding].rounds, w, hessian, full, bits)
    else:
      codes = numerics.to_codes(w, full, 0 * full, bits, symmetric=True)
    if bits > MAX_PACKED_BITS:
      return codes * full
    return qtensor.from_codes(codes, scale, bits, group=row.group)
  if bits > MAX_PACKED_BITS:
    scale = numerics.search_scale(w, bits, steps=1)  # the widest
    zero = jnp.zeros_like(scale)
    return numerics.round_to_grid(w, scale, zero, bits, symmetric=True)
  return qtensor.quantize(w, bits, group=row.group, search=not row.is_plain)


def _by_groups(rounds, w, hessian, scale, bits: int):
  """Returns codes by a solver, of each group or part by itself.

  Groups are a convolution's, parts are of the inputs: `inputs.parts_of`.
  """
  if hessian.ndim == 2:
    return rounds(w, hessian, scale, bits=bits)
  count, size = hessian.shape[:2]
  if count * size == len(w) and count > 1:
    cut = lambda x: x.reshape(count, size, -1)
    codes = jax.lax.map(
      lambda one: rounds(*one, bits=bits), (cut(w), hessian, cut(scale))
    )
    return codes.reshape(w.shape)
  cut = lambda x: x.reshape(size, count, -1).swapaxes(0, 1)
  codes = jax.vmap(functools.partial(rounds, bits=bits))(
    cut(w), hessian, cut(scale)
  )  # [g, i, o / g]
  return codes.swapaxes(0, 1).reshape(w.shape)


def _static_scales(row: Row, site: Site, plan: SitePlan, stats):
  """Returns the collection's entries of a calibrated site."""
  entries = {}
  for side, operand in static_operands(site, plan, stats[site.path]).items():
    even = is_even(site, side)
    ends = map(jnp.asarray, row_range(row, plan, operand, even=even))
    if even:
      scale, zero = numerics.even_scale_of(*ends, plan.acts)
    else:
      scale, zero = numerics.scale_of(*ends, plan.acts, symmetric=False)
    entries[f'{site.path}/{side}_scale'] = scale
    entries[f'{site.path}/{side}_zero'] = zero
  return entries


def static_operands(site: Site, plan: SitePlan, stats: SiteStats):
  """Returns {side: statistics} of the operands with calibrated scales."""
  if site.is_layer:
    return {'lhs': stats.lhs}
  if plan.softmax != 'uniform':  # whose codes find their range by themselves
    return {'rhs': stats.rhs}
  return {'lhs': stats.lhs, 'rhs': stats.rhs}


def is_even(site: Site, side: str) -> bool:
  """Returns whether static codes of an operand lie evenly about 0.

  Those of query, key and value do: runtimes that take a packed model run its
  attention in integers then. Softmax weights and the inputs of layers have
  another mean than 0.
  """
  return site.kind == 'qk' or (site.kind == 'av' and side == 'rhs')


def row_range(row: Row, plan: SitePlan, operand, *, even: bool):
  """Returns the (low, high) that a static row gives an operand's codes."""
  if row.clip is not None:
    return choose_range(
      operand, plan.acts, 'percentile', kept=row.clip, even=even
    )
  return choose_range(operand, plan.acts, row.range, even=even)
