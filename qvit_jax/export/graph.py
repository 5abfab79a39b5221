"""What a packed model computes, operation by operation, with its numbers.

The family draws the operations, the packed model has the codes. What can be
done to a layer's result beside its product (a gain that a norm became, the
factor of queries, LayerScale) is part of its scales and bias here, so that a
product is followed by nothing but its bias.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qvit_jax import models
from qvit_jax.models import Graph, Node
from qvit_jax.ops import Site
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.packed import Packed
from qvit_jax.quantization.qtensor import QTensor

# (scale, zero) of calibrated codes.
Codes = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Weights of a layer as a matrix [i, o].

  Attributes:
    codes: int8, or int16 where they do not fit; of a float kernel the float32
      values.
    scale: float32 [g, o], one row for each group of input channels; None: the
      kernel is float.
    bits: Of a code; 32 of a float kernel.
    group: Input channels that share a row of `scale`.
    shift: float32 [o] that every weight of a column has beside its code; None:
      none has.
  """

  codes: np.ndarray
  scale: np.ndarray | None
  bits: int
  group: int
  shift: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Product:
  """One product of the model.

  Attributes:
    site: Its address and shape.
    plan: How it runs.
    kernel: Of a layer; None of an attention product.
    bias: [o] of a layer.
    lhs: Calibrated codes of the left operand; None: dynamic, or float.
    rhs: The same of an attention product's right operand.
  """

  site: Site
  plan: SitePlan
  kernel: Kernel | None = None
  bias: np.ndarray | None = None
  lhs: Codes | None = None
  rhs: Codes | None = None


@dataclasses.dataclass(frozen=True)
class Program:
  """What a packed model computes.

  Attributes:
    nodes: Operations in order; see `models.graph`.
    products: By path.
    arrays: Every other array of the model, by path, float32.
    image_size: Pixels of a side.
    output: The value of the last operation.
  """

  nodes: tuple[Node, ...]
  products: dict[str, Product]
  arrays: dict[str, np.ndarray]
  image_size: int
  output: str

  def readers(self, value: str) -> list[Node]:
    """Returns the operations that read a value."""
    return [node for node in self.nodes if value in node.inputs]


def program(config: Any, packed: Packed, *, merges: bool = True) -> Program:
  """Returns what a model computes.

  Args:
    config: Of a model without norms that can be folded.
    packed: Its numbers; of a float model those of `FloatCore`.
    merges: Whether factors behind a layer are part of it.

  Raises:
    ExportError: The family does not say what its models compute.
  """
  graph = models.draw(
    config, rectify=getattr(packed.ops.rectify, 'form', '')
  )
  flat = {
    f'{collection}/{path}': x
    for collection in ('params', 'quant')
    for path, x in _flatten(packed.variables.get(collection, {})).items()
  }
  nodes, gains = _merged(graph, flat) if merges else (graph.nodes, {})
  products = {
    site.path: _product(site, packed, flat, gains.get(site.path))
    for site in packed.plan.sites
  }
  arrays = {
    path.partition('/')[2]: _float(x)
    for path, x in flat.items()
    if not isinstance(x, QTensor)
  }
  output = nodes[-1].output
  return Program(
    tuple(nodes), products, arrays, config.model.image_size, output
  )


def _flatten(node: dict[str, Any]) -> dict[str, Any]:
  """Returns arrays and packed kernels by path."""
  found = {}
  for name, child in node.items():
    if isinstance(child, dict):
      found |= {f'{name}/{path}': x for path, x in _flatten(child).items()}
    else:
      found[name] = child
  return found


def _float(x: Any) -> np.ndarray:
  return np.asarray(jnp.asarray(x).astype(jnp.float32))


def _merged(
  graph: Graph, flat: dict[str, Any]
) -> tuple[list[Node], dict[str, np.ndarray]]:
  """Returns nodes without scales behind layers, and these by layer."""
  gains, renamed, nodes = {}, {}, []
  by_output = {node.output: node for node in graph.nodes}
  for node in graph.nodes:
    inputs = tuple(renamed.get(x, x) for x in node.inputs)
    before = by_output.get(node.inputs[0])
    if (
      node.kind == 'scale'
      and before is not None
      and before.kind in ('dense', 'conv')
      and len(graph.readers(before.output)) == 1
    ):
      gain = node.facts.get('factor')
      if gain is None:
        gain = _float(flat[f'params/{node.path}'])
      gains[before.path] = np.asarray(gain, np.float32)
      renamed[node.output] = before.output
      continue
    nodes.append(dataclasses.replace(node, inputs=inputs))
  return nodes, gains


def _product(
  site: Site, packed: Packed, flat: dict[str, Any], gain: np.ndarray | None
) -> Product:
  """Returns a product; `gain` multiplies all that a layer gives."""
  plan = packed.site_plans.get(site.path, SitePlan())
  codes = {}
  for side in ('lhs', 'rhs'):
    names = [f'quant/{site.path}/{side}_{n}' for n in ('scale', 'zero')]
    if names[0] in flat:
      codes[side] = tuple(_float(flat[name]) for name in names)
  if not site.is_layer:
    return Product(site, plan, **codes)
  kernel = flat.get(f'quant/{site.path}/kernel')
  if kernel is None:
    kernel = flat[f'params/{site.path}/kernel'].reshape(site.rhs_shape)
  get = lambda name: flat.get(f'quant/{site.path}/{name}')
  width = site.rhs_shape[1]
  bias = np.zeros(width, np.float32)
  if f'params/{site.path}/bias' in flat:
    bias = _float(flat[f'params/{site.path}/bias']).reshape(width)
  total = np.ones(width, np.float32)
  if get('gain') is not None:
    total = _float(get('gain')).reshape(width)
    if get('offset') is not None:
      bias = bias + _float(get('offset')).reshape(width) * total
  if gain is not None:
    total, bias = total * gain, bias * gain
  made = _halved(_times(_kernel(kernel), total))
  return Product(site, plan, made, bias, **codes)


def _kernel(x: Any) -> Kernel:
  if not isinstance(x, QTensor):
    return Kernel(_float(x), None, 32, len(x))
  return Kernel(np.asarray(x.codes), np.asarray(x.scale), x.bits, x.group)


def _times(kernel: Kernel, gain: np.ndarray) -> Kernel:
  """Returns a kernel whose columns are multiplied; scales stay positive."""
  if (gain == 1).all():
    return kernel
  if kernel.scale is None:
    return dataclasses.replace(kernel, codes=kernel.codes * gain)
  sign = np.sign(gain).astype(np.int16)
  codes = kernel.codes.astype(np.int16) * sign
  size = np.where(gain == 0, 1, np.abs(gain)).astype(np.float32)
  return dataclasses.replace(
    kernel, codes=_narrow(codes), scale=kernel.scale * size
  )


def _narrow(codes: np.ndarray) -> np.ndarray:
  """Returns codes as int8 where they fit."""
  fits = codes.min() >= -128 and codes.max() <= 127
  return codes.astype(np.int8 if fits else np.int16)


def _halved(kernel: Kernel) -> Kernel:
  """Returns a kernel of odd codes of nine bits as codes of eight and a shift.

  2 * k + 1 steps are k double steps and one.
  """
  codes = kernel.codes
  if codes.dtype != np.int16 or len(kernel.scale) > 1 or not (codes % 2).all():
    return kernel
  return dataclasses.replace(
    kernel, codes=(codes >> 1).astype(np.int8), scale=2 * kernel.scale,
    shift=kernel.scale[0],
  )  # fmt: skip
