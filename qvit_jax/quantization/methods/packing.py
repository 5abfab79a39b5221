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
from qvit_jax.models.batch_norm import Statistics, without_norms
from qvit_jax.ops import Ops
from qvit_jax.quantization import qtensor
from qvit_jax.quantization.finite import check_finite, check_learned
from qvit_jax.quantization.hadamard import turn_blocks
from qvit_jax.quantization.methods.method import Method
from qvit_jax.quantization.packed import Packed, assemble
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan

# {layer path: (gain, shift) of what stands behind it}
Outputs = dict[str, tuple[Array, Array]]


def pack(
  method: Method,
  variables: Mapping[str, Any],
  plan: QuantPlan,
  ops: Ops,
  dtype: str,
  *,
  statistics: Statistics | None = None,
) -> Packed:
  """Returns the integer model of what training evaluates.

  Args:
    method: Of the training.
    variables: 'params/...', 'quant/...' and statistics of norms to array.
    plan: Bits of every site.
    ops: Arithmetic of the training.
    dtype: Compute dtype of the training.
    statistics: Of the family. Kernels keep the codes and scales that they were
      trained with: norms become a gain and a bias of each output channel.

  Raises:
    QuantError: The method has no codes; or a parameter or a learned value is
      not finite, or a step not positive.
  """
  if method.pack is None:
    raise QuantError(
      'the model has no codes to pack; train it with a quant.recipe, or pack a '
      'float model with --mode=ptq'
    )
  outputs: Outputs = {}
  if statistics:
    variables, outputs = without_norms(statistics, variables)
  params = _collection(variables, 'params')
  learned = _collection(variables, 'quant')
  check_finite(params)
  check_learned(learned)
  rest, quant, plans = method.pack(ops.core, params, learned, dtype)
  put_outputs(rest, quant, outputs)
  return assemble(
    rest, quant, plans, plan.sites, dtype, plan.act_granularity,
    rectify=ops.rectify,
  )  # fmt: skip


def put_outputs(
  params: dict[str, Any], quant: dict[str, Any], outputs: Outputs
) -> None:
  """Puts what norms did to layers' outputs into a packed model's arrays.

  A layer then computes (product + offset) * gain + bias.

  Args:
    params: Those that are no kernels, by path; changed.
    quant: The collection `quant` by path; changed.
    outputs: Of `without_norms`.
  """
  for layer, (gain, shift) in outputs.items():
    quant[f'{layer}/gain'] = gain
    if f'{layer}/bias' in params:
      quant[f'{layer}/offset'] = params[f'{layer}/bias']
    params[f'{layer}/bias'] = shift


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
    node = functools.reduce(
      lambda node, key: node[key],
      site.path.split('/'),
      packed.variables['quant'],
    )
    kernel, gain = node['kernel'], node.get('gain')
    block = packed.site_plans[site.path].block
    w = kernel
    if isinstance(kernel, QTensor):
      w = qtensor.dequantize(kernel)
      kernels += 1
      # A gain may be negative, which no step is.
      takes = method.takes_step(ops.core, site, kernel, block)
      if gain is None and takes:
        found[f'quant/{site.path}/kernel_step'] = kernel.scale[0]
        kept += 1
    w = w.astype(jnp.float32)
    if block:
      w = turn_blocks(w.T, block).T
    if gain is not None:
      w, bias = w * gain, f'params/{site.path}/bias'
      found[bias] = found[bias] + node.get('offset', 0) * gain
    found[f'params/{site.path}/kernel'] = w
  return found, [
    f'kernels: {kernels} from their codes, {kept} with the steps of these; '
    'other steps are found anew'
  ]
