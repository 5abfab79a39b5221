"""Products with packed kernels that are not trained.

Kernels stay packed in memory: each is dequantized where it is used, and once
more for the gradient of the layer's input, instead of being kept in between.
"""

import dataclasses
from collections.abc import Sequence

import jax

from qvit_jax.arithmetic.products import multiply
from qvit_jax.ops import Site
from qvit_jax.quantization.qtensor import QTensor, dequantize
from qvit_jax.quantization.spec import QuantPlan, QuantSpec

BITS = {'int8': 8, 'int4': 4}


@dataclasses.dataclass(frozen=True)
class FrozenCore:
  """Reads packed kernels from the collection `quant`. See `ops.Core`."""

  is_packed = True

  def __call__(self, module, site: Site, lhs, rhs, dims):
    """See `ops.Core`; kernels in `params` and attention are float."""
    if rhs is not None:
      return multiply(lhs, rhs.astype(lhs.dtype), dims)

    @jax.checkpoint
    def product(x, kernel: QTensor):
      return multiply(x, dequantize(kernel).astype(x.dtype), dims)

    return product(lhs, module.get_variable('quant', 'kernel'))


def plan_frozen(
  sites: Sequence[Site], bits: int, trained: Sequence[str]
) -> QuantPlan:
  """Returns the plan of packed kernels.

  Args:
    sites: All products of the model.
    bits: Of every kernel.
    trained: Layers whose kernels stay in float.
  """
  packed = [s.is_layer and s.path not in trained for s in sites]
  specs = tuple(QuantSpec(bits if p else None) for p in packed)
  return QuantPlan(tuple(sites), specs, 'per_token')
