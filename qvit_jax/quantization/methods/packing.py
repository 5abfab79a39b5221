"""Packs what training with rounded products learned.

The packed model computes, code for code, what training evaluated: nothing is
calibrated anew.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax import tree
from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops
from qvit_jax.quantization import numerics, qtensor
from qvit_jax.quantization.hadamard import turn_blocks
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.methods.aqt import AqtCore
from qvit_jax.quantization.methods.learned_core import GELU_CLIP, LearnedCore
from qvit_jax.quantization.packed import Packed, assemble
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan


def pack(
  variables: Mapping[str, Any], plan: QuantPlan, ops: Ops, dtype: str
) -> Packed:
  """Returns the integer model of what training evaluates.

  Args:
    variables: 'params/...' and 'quant/...' to array.
    plan: Bits of every site.
    ops: Arithmetic of the training.
    dtype: Compute dtype of the training.

  Raises:
    QuantError: The arithmetic has no codes.
  """
  params = _collection(variables, 'params')
  if isinstance(ops.core, AqtCore):
    rest, quant = pack_kernels(params, plan, dtype)
    plans = _aqt_plans(plan)
  elif isinstance(ops.core, LearnedCore):
    rest, quant, plans = _learned(
      params, _collection(variables, 'quant'), ops.core, dtype
    )
  else:
    raise QuantError(
      'the model has no codes to pack; train it with a quant.recipe, or pack a '
      'float model with --mode=ptq'
    )
  return assemble(
    rest, quant, plans, plan.sites, dtype, plan.act_granularity,
    rectify=ops.rectify,
  )  # fmt: skip


def _collection(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
  start = f'{name}/'
  return {
    path.removeprefix(start): jnp.asarray(x)
    for path, x in variables.items()
    if path.startswith(start)
  }


def _aqt_plans(plan: QuantPlan) -> dict[str, SitePlan]:
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


def _learned(params, learned, core: LearnedCore, dtype: str):
  """Returns (other parameters, collection `quant`, plans) of learned steps."""
  rest, quant, plans = dict(params), {}, {}
  plan = core.plan
  for site, spec in zip(plan.sites, plan.specs, strict=True):
    weights = spec.weights if site.is_layer else None
    clip = GELU_CLIP if site.path in core.clipped else 0.0
    block = core.block(site)
    is_static = spec.acts is not None and plan.act_granularity != 'per_token'
    plans[site.path] = SitePlan(
      weights, spec.acts, is_static=is_static, block=block, clip=clip
    )
    if site.is_layer:
      name = f'{site.path}/kernel'
      w = rest.pop(name).reshape(site.rhs_shape)
      if block:
        w = turn_blocks(w.T, block).T
      quant[name] = w.astype(dtype)
      if weights:
        coder = lsq.Coder(weights, core.kernels, is_signed=True)
        step = learned.get(f'{site.path}/kernel_step')
        zero = jnp.zeros(())
        codes, worth = lsq.encode(w, step, zero, coder)
        quant[name] = qtensor.from_codes(
          codes,
          worth.reshape(1, -1),
          weights,
          is_odd=core.kernels == 'statsq',
        )
    if is_static:
      for side in ('lhs',) if site.is_layer else ('lhs', 'rhs'):
        start = f'{site.path}/{side}'
        step = learned[f'{start}_step']
        quant[f'{start}_scale'] = jnp.maximum(step, lsq.LEAST)
        quant[f'{start}_zero'] = jnp.round(learned[f'{start}_zero'])
  quant |= {
    path: x
    for path, x in learned.items()
    if path.endswith(('_gamma', '_beta'))  # of rectified queries and keys
  }
  return rest, quant, plans


def unpack(
  packed: Packed, plan: QuantPlan, ops: Ops
) -> tuple[dict[str, Array], list[str]]:
  """Returns what training goes on from: variables by path, and lines about it.

  Kernels become the levels that their codes stand for. Their steps are taken
  over where training rounds the same kernel, turned alike, to as many bits.

  Args:
    packed: A model of the same sites.
    plan: Bits of the training.
    ops: Arithmetic of the training.
  """
  flat = tree.flatten(packed.variables['params'])
  found = {f'params/{name}': x for name, x in flat.items()}
  core, kernels, kept = ops.core, 0, 0
  learns = isinstance(core, LearnedCore) and core.kernels == 'step'
  for site, spec in zip(plan.sites, plan.specs, strict=True):
    if not site.is_layer:
      continue
    kernel = functools.reduce(
      lambda node, key: node[key],
      site.path.split('/'),
      packed.variables['quant'],
    )['kernel']
    block = packed.site_plans[site.path].block
    w = kernel
    if isinstance(kernel, QTensor):
      w = qtensor.dequantize(kernel)
      kernels += 1
      if learns and (kernel.bits, len(kernel.scale), kernel.is_odd, block) == (
        spec.weights, 1, False, core.block(site)
      ):  # fmt: skip
        found[f'quant/{site.path}/kernel_step'] = kernel.scale[0]
        kept += 1
    w = w.astype(jnp.float32)
    if block:
      w = turn_blocks(w.T, block).T
    found[f'params/{site.path}/kernel'] = w
  return found, [
    f'kernels: {kernels} from their codes, {kept} with the steps of these; '
    'other steps are found anew'
  ]
