"""A quantized model whose kernels are codes, ready to run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qvit_jax import tree
from qvit_jax.arithmetic.exact import parts_needed
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import qtensor
from qvit_jax.quantization.finite import check_finite, check_learned
from qvit_jax.quantization.integer_core import (
  MAX_PACKED_BITS,
  IntegerCore,
  SitePlan,
)
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


def assemble(
  params: dict[str, Any],
  quant: dict[str, Any],
  plans: dict[str, SitePlan],
  sites: Sequence[Site],
  dtype: str,
  granularity: str,
  *,
  rectify: Callable[..., Any] | None = None,
) -> Packed:
  """Returns the model of arrays by path.

  Args:
    params: What is no kernel.
    quant: Kernels, and scales of static activations.
    plans: How each product runs.
    sites: All products of the model.
    dtype: Compute dtype, and that of kernels that are left in float.
    granularity: Of the scales of activations, for the printed plan.
    rectify: Of queries and keys, where training had one.

  Raises:
    QuantError: An array is not finite, or a scale not positive.
  """
  check_finite(params)
  check_learned(quant)
  plans = dict(plans)
  for site in sites:
    plan, kernel = plans[site.path], quant.get(f'{site.path}/kernel')
    if isinstance(kernel, qtensor.QTensor) and plan.is_integer:
      taps = math.prod(site.window.size) if site.window else 1
      parts = parts_needed(np.asarray(kernel.codes), taps, plan.most)
      plans[site.path] = dataclasses.replace(plan, parts=parts)
  variables = {
    'params': tree.nest({n: jnp.asarray(x) for n, x in params.items()}),
    'quant': tree.nest(quant),
  }
  specs = tuple(
    QuantSpec(
      (plans[s.path].weights or _bits_of(quant[f'{s.path}/kernel'].dtype))
      if s.is_layer
      else None,
      plans[s.path].acts or _bits_of(dtype),
    )
    for s in sites
  )
  plan = QuantPlan(tuple(sites), specs, granularity)
  core = IntegerCore(tuple(plans.items()))
  execution, why = _execution(plans, sites)
  return Packed(
    variables, Ops(core=core, rectify=rectify), dtype, plan, execution, why
  )


def _bits_of(dtype: Any) -> int | None:
  """Returns the bits of what is not rounded; None for float32."""
  return None if jnp.dtype(dtype) == jnp.float32 else 16


def _execution(
  plans: dict[str, SitePlan], sites: Sequence[Site]
) -> tuple[str, str]:
  """Returns how the products run, and why not as integers."""
  reasons: dict[str, int] = {}
  for site in sites:
    plan = plans[site.path]
    if plan.weights is None and plan.acts is None:
      why = 'in float'
    elif plan.softmax != 'uniform':
      why = f'with {plan.softmax} softmax codes, which are no even steps'
    elif plan.acts is None:
      why = 'of packed weights, dequantized, with float activations'
    elif site.is_layer and plan.weights is None:
      why = 'of float weights with rounded activations'
    elif not plan.is_integer:
      why = f'of codes of over {MAX_PACKED_BITS} bits, which travel as float'
    else:
      continue
    reasons[why] = reasons.get(why, 0) + 1
  if not reasons:
    return 'integer', ''
  listed = ', '.join(f'{count} {why}' for why, count in reasons.items())
  return 'simulated', f'of {len(plans)} products: {listed}'
