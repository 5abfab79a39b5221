"""Packs what training with rounded products learned.

The packed model computes, code for code, what training evaluated: nothing is
calibrated anew.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qvit_jax import tree
from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops
from qvit_jax.quantization import qtensor
from qvit_jax.quantization.finite import check_finite, check_learned
from qvit_jax.quantization.hadamard import turn_blocks
from qvit_jax.quantization.methods.method import Method
from qvit_jax.quantization.packed import Packed, assemble
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan


def pack(
  method: Method,
  variables: Mapping[str, Any],
  plan: QuantPlan,
  ops: Ops,
  dtype: str,
) -> Packed:
  """Returns the integer model of what training evaluates.

  Args:
    method: Of the training.
    variables: 'params/...' and 'quant/...' to array.
    plan: Bits of every site.
    ops: Arithmetic of the training.
    dtype: Compute dtype of the training.

  Raises:
    QuantError: The method has no codes; or a parameter or a learned value is
      not finite, or a step not positive.
  """
  if method.pack is None:
    raise QuantError(
      'the model has no codes to pack; train it with a quant.recipe, or pack a '
      'float model with --mode=ptq'
    )
  params = _collection(variables, 'params')
  learned = _collection(variables, 'quant')
  check_finite(params)
  check_learned(learned)
  rest, quant, plans = method.pack(ops.core, params, learned, dtype)
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


def unpack(
  method: Method, packed: Packed, plan: QuantPlan, ops: Ops
) -> tuple[dict[str, Array], list[str]]:
  """Returns what training goes on from: variables by path, and lines about it.

  Kernels become the levels that their codes stand for. Their steps are taken
  over where training rounds the same kernel, turned alike, to as many bits.

  Args:
    method: Of the training.
    packed: A model of the same sites.
    plan: Bits of the training.
    ops: Arithmetic of the training.
  """
  flat = tree.flatten(packed.variables['params'])
  found = {f'params/{name}': x for name, x in flat.items()}
  kernels, kept = 0, 0
  for site in plan.sites:
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
      if method.takes_step(ops.core, site, kernel, block):
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
