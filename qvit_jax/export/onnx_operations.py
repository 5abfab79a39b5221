"""Operations of a program in ONNX, and the order in which they are written."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from qvit_jax.export import graph, onnx_pixels, onnx_products, onnx_rows
from qvit_jax.export.onnx_file import EXACT, OPTIONS, Writer
from qvit_jax.models import IMAGES, Node
from qvit_jax.models.convs import window_shares
from qvit_jax.quantization.methods import qvit

BATCH = 'batch'
_BYTE = 8
_CEILING = 6
_ACTIVATIONS = ('relu', 'relu6')

# {path of a convolution: (smallest, largest) of what it gives}
Ranges = Mapping[str, tuple[float, float]]


def activation(program: graph.Program, node: Node) -> Node | None:
  """Returns the ReLU behind a convolution, if one alone reads it."""
  readers = program.readers(node.output)
  is_one = len(readers) == 1 and readers[0].kind in _ACTIVATIONS
  return readers[0] if is_one else None


def next_codes(
  program: graph.Program, value: str
) -> tuple[graph.Codes, int] | None:
  """Returns the codes and bits by which the next convolution reads a value."""
  for node in program.readers(value):
    if node.kind == 'max_pool':
      return next_codes(program, node.output)
    if node.kind == 'conv':
      p = program.products[node.path]
      if p.lhs is not None and p.plan.acts and not p.plan.clip:
        return p.lhs, p.plan.acts
  return None


def _is_wide(p: graph.Product) -> bool:
  is_integer = p.plan.acts and p.kernel is not None
  return is_integer and onnx_rows.is_wide(p.kernel.codes)


class Translation:
  """What is known while a program is written."""

  def __init__(
    self, program: graph.Program, profile: str, ranges: Ranges
  ):
    self.program, self.profile = program, profile
    self.w = Writer('qvit_jax', nibbles=profile == 'weight_only')
    self.values: dict[str, str] = {}
    # Pixels of values that are images, [b, c, h, w] here.
    self.sizes: dict[str, tuple[int, int]] = {}
    self.ranges = ranges

  def model(self, facts: dict[str, str], data: Any = None) -> Any:
    """Returns the ModelProto.

    Args:
      facts: What it says of itself, beside its profile.
      data: Section of a config by which pixels are prepared; None: they are.
    """
    program, w = self.program, self.w
    size = program.image_size
    if data is not None:
      self.values[IMAGES] = onnx_pixels.prepared(w, size, data, BATCH)
    else:
      shape = (BATCH, size, size, 3)
      self.values[IMAGES] = w.input(IMAGES, np.float32, shape)
    for node in program.nodes:
      w.path = node.path or node.output.replace(':', '_')
      inputs = [self.values[x] for x in node.inputs]
      self.values[node.output] = getattr(self, f'_{node.kind}')(node, *inputs)
    w.path = ''
    classes = program.products[program.nodes[-1].path].site.rhs_shape[1]
    w.output(self.values[program.output], 'logits', (BATCH, classes))
    return self._made(facts)

  def products(self) -> Any:
    """Returns the ModelProto of all products by themselves."""
    w = self.w
    for node in self.program.nodes:
      p = self.program.products.get(node.path)
      if p is None or node.kind not in ('dense', 'conv', 'product'):
        continue
      w.path, names = node.path, [f'{node.path}:lhs']
      shapes = [p.site.lhs_shape]
      if not p.site.is_layer:
        names += [f'{node.path}:rhs']
        shapes += [p.site.rhs_shape]
      x = [
        w.input(name, np.float32, (BATCH, *shape))
        for name, shape in zip(names, shapes, strict=True)
      ]
      if node.kind == 'product':
        y = onnx_products.attention(w, *x, p)
      elif node.kind == 'dense':
        y = onnx_products.layer(w, *x, p)
      else:
        y = onnx_products.layer(w, w.transpose(*x, 0, 3, 1, 2), p)
        y = w.transpose(y, 0, 2, 3, 1)
      w.output(y, node.path, None)
    return self._made({})

  def _made(self, facts: dict[str, str]) -> Any:
    """Returns the ModelProto of what was written, with what it needs."""
    needs = {}
    is_static = self.profile == 'qdq'
    if is_static and any(map(_is_wide, self.program.products.values())):
      needs[OPTIONS] = json.dumps(EXACT)
    return self.w.model({'profile': self.profile, **needs, **facts})

  # Operations, by the names of `models.graph`.

  def _patches(self, node: Node, x: str) -> str:
    w, p = self.w, node.facts['patch']
    n = self.program.image_size // p
    x = w.reshape(x, (0, n, p, n, p * 3))
    x = w.transpose(x, 0, 1, 3, 2, 4)
    return w.reshape(x, (0, n * n, p * p * 3))

  def _dense(self, node: Node, x: str) -> str:
    return onnx_products.layer(self.w, x, self.program.products[node.path])

  def _conv(self, node: Node, x: str) -> str:
    product = self.program.products[node.path]
    if node.inputs[0] == IMAGES:
      x = self.w.transpose(x, 0, 3, 1, 2)
    y = onnx_products.layer(self.w, x, product)
    height, width, _ = product.site.lhs_shape
    size = product.site.window.out_size(height, width)
    self.sizes[node.output] = size
    if activation(self.program, node) is None:
      y = self._as_bytes(node.path, node.output, y, -np.inf, np.inf)
    return y

  def _relu(self, node: Node, x: str) -> str:
    return self._activate(node, x, np.inf)

  def _relu6(self, node: Node, x: str) -> str:
    return self._activate(node, x, _CEILING)

  def _activate(self, node: Node, x: str, most: float) -> str:
    before = node.inputs[0]
    maker = next(n for n in self.program.nodes if n.output == before)
    if maker.kind == 'conv':
      self.sizes[node.output] = self.sizes[before]
      return self._as_bytes(maker.path, node.output, x, 0, most)
    return self._bounded(x, 0, most)

  def _bounded(self, x: str, least: float, most: float) -> str:
    if least == -np.inf:
      return x
    if most == np.inf:
      return self.w.node('Relu', x)
    ends = (self.w.constant(end) for end in (least, most))
    return self.w.node('Clip', x, *ends)

  def _as_bytes(
    self, path: str, value: str, x: str, least: float, most: float
  ) -> str:
    """Returns what a convolution gives, cut to bounds, at its next levels.

    Bounds that the levels imply are left out: integer kernels have them.
    """
    w, product = self.w, self.program.products[path]
    if self.profile != 'qdq' or not product.plan.acts:
      return self._bounded(x, least, most)
    found = next_codes(self.program, value)
    if found is None and path in self.ranges:
      low, high = (np.clip(end, least, most) for end in self.ranges[path])
      low, high = min(low, 0), max(high, 1e-12)
      scale = np.float32((high - low) / (2**_BYTE - 1))
      found = (scale, np.round(-low / scale)), _BYTE
    if found is None:
      return self._bounded(x, least, most)
    codes, bits = found
    scale, zero = (float(np.ravel(c)[0]) for c in codes)
    last = (2**bits - 1 - zero) * scale
    is_implied = zero == 0 and last <= most * (1 + 1e-5) and bits == _BYTE
    if not is_implied:
      # Bytes at once: a bound between them would make the kernel float.
      x = onnx_products.coded(w, x, codes, _BYTE)
      x = self._bounded(x, least, most)
    return onnx_products.coded(w, x, codes, bits)

  def _product(self, node: Node, a: str, b: str) -> str:
    w, p = self.w, self.program.products[node.path]
    y = onnx_products.attention(w, a, b, p)
    if node.facts['of'] == 'qk':
      return y
    y = w.transpose(y, 0, 2, 1, 3)
    _, heads, dim = p.site.rhs_shape
    return w.reshape(y, (0, 0, heads * dim))

  def _norm(self, node: Node, x: str) -> str:
    scale, bias = (
      self.w.constant(self.program.arrays[f'{node.path}/{name}'])
      for name in ('scale', 'bias')
    )
    return self.w.node(
      'LayerNormalization', x, scale, bias, axis=-1,
      epsilon=node.facts['epsilon'],
    )  # fmt: skip

  def _tokens(self, node: Node, x: str) -> str:
    w, arrays = self.w, self.program.arrays
    first = [arrays[path] for path in node.facts['paths']]
    count, added = sum(t.shape[1] for t in first), 0
    if first:
      width = first[0].shape[-1]
      patches = node.facts['patches']
      added = np.concatenate([*first, np.zeros((1, patches, width))], axis=1)
      pads = w.constant((0, count, 0, 0, 0, 0), np.int64)
      x = w.node('Pad', x, pads)
    if node.facts['position']:
      added = added + arrays[node.facts['position']]
    return w.node('Add', x, w.constant(added))

  def _probe(self, node: Node, x: str) -> str:
    w, probe = self.w, self.program.arrays[node.path]
    batch = w.cut(w.node('Shape', x), 0, 0, 1)
    rest = w.constant(probe.shape[1:], np.int64)
    shape = w.node('Concat', batch, rest, axis=0)
    return w.node('Expand', w.constant(probe), shape)

  def _rotate(self, node: Node, x: str) -> str:
    w, by = self.w, node.facts['angles'][:, None]
    half = by.shape[-1]
    cos, sin = w.constant(np.cos(by)), w.constant(np.sin(by))
    left, right = w.cut(x, -1, 0, half), w.cut(x, -1, half, None)
    times = lambda a, b: w.node('Mul', a, b)
    turned = (
      w.node('Sub', times(left, cos), times(right, sin)),
      w.node('Add', times(right, cos), times(left, sin)),
    )
    return w.node('Concat', *turned, axis=-1)

  def _rectify(self, node: Node, x: str) -> str:
    w, facts = self.w, node.facts
    gamma, beta = (
      w.constant(self.program.arrays[f'{node.path}/{facts["name"]}_{name}'])
      for name in ('gamma', 'beta')
    )
    is_paper = facts['form'] == 'paper'
    axes = (1, 3) if is_paper else (3,)
    x = w.node('Sub', x, w.reduce('ReduceMean', x, *axes))
    var = w.reduce('ReduceMean', w.node('Mul', x, x), *axes)
    size = w.node('Sqrt', w.node('Add', var, w.constant(qvit.EPSILON)))
    if is_paper:
      x = w.node('Add', x, beta)
      return w.node('Div', x, w.node('Mul', gamma, size))
    x = w.node('Div', w.node('Mul', x, gamma), size)
    return w.node('Add', x, beta)

  def _scale(self, node: Node, x: str) -> str:
    factor = node.facts.get('factor')
    if factor is None:
      factor = self.program.arrays[node.path]
    return self.w.node('Mul', x, self.w.constant(factor))

  def _add(self, node: Node, a: str, b: str) -> str:
    for x in node.inputs:
      if x in self.sizes:
        self.sizes[node.output] = self.sizes[x]
    return self.w.node('Add', a, b)

  def _multiply(self, node: Node, a: str, b: str) -> str:
    return self.w.node('Mul', a, b)

  def _gelu(self, node: Node, x: str) -> str:
    return self.w.node('Gelu', x)

  def _gelu_tanh(self, node: Node, x: str) -> str:
    return self.w.node('Gelu', x, approximate='tanh')

  def _quick_gelu(self, node: Node, x: str) -> str:
    w = self.w
    inside = w.node('Mul', x, w.constant(1.702))
    return w.node('Mul', x, w.node('Sigmoid', inside))

  def _silu(self, node: Node, x: str) -> str:
    return self.w.node('Mul', x, self.w.node('Sigmoid', x))

  def _softmax(self, node: Node, x: str) -> str:
    return self.w.node('Softmax', x, axis=-1)

  def _heads(self, node: Node, x: str) -> str:
    return self.w.reshape(x, (0, 0, node.facts['count'], -1))

  def _cut(self, node: Node, x: str) -> str:
    return self.w.cut(x, 1, node.facts['start'], node.facts['stop'])

  def _token(self, node: Node, x: str) -> str:
    return self.w.node('Gather', x, self.w.constant(0, np.int64), axis=1)

  def _mean(self, node: Node, x: str) -> str:
    axes = (2, 3) if node.inputs[0] in self.sizes else (1,)
    return self.w.reduce('ReduceMean', x, *axes, keepdims=0)

  def _join(self, node: Node, a: str, b: str) -> str:
    return self.w.node('Concat', a, b, axis=-1)

  def _max_pool(self, node: Node, x: str) -> str:
    height, width = self.sizes[node.inputs[0]]
    self.sizes[node.output] = height // 2, width // 2
    return self.w.node('MaxPool', x, kernel_shape=(2, 2), strides=(2, 2))

  def _windows_mean(self, node: Node, x: str) -> str:
    w, size = self.w, node.facts['size']
    height, width = self.sizes[node.inputs[0]]
    if width != size:
      x = w.node('MatMul', x, w.constant(window_shares(width, size)))
    if height != size:
      x = w.node('MatMul', w.constant(window_shares(height, size).T), x)
    self.sizes[node.output] = size, size
    return x

  def _flatten(self, node: Node, x: str) -> str:
    return self.w.reshape(self.w.transpose(x, 0, 2, 3, 1), (0, -1))
