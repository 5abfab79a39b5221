"""Products whose rows find their ranges as they run, for onnxruntime.

Rows of a product are rows of a matrix. Each finds its scale and zero, and is
written as unsigned bytes around 128: MatMulIntegerToFloat multiplies them as
integers, and the row's scale comes behind it. Codes of 8 bits less their zeros
take nine, so what 128 is beside the zero is added behind the product.
"""

import numpy as np

from qvit_jax.export.graph import Product
from qvit_jax.export.onnx_file import CONTRIB, Writer

_BYTE, _HALF = 8, 128  # bits; the middle of an unsigned byte
_TINY = 1e-12  # as in `numerics`: the least step of a constant row


def layer(w: Writer, x: str, p: Product) -> str:
  """Returns a layer's result, [..., o].

  Args:
    w: What it is written to.
    x: Its input [..., i], turned and clipped.
    p: The layer.
  """
  rows, width = p.site.rhs_shape
  x = w.reshape(x, (-1, rows))
  codes, scale, zero = _rows(w, x, p)
  one = w.constant(1)
  y = w.node(
    'MatMulIntegerToFloat', codes, w.constant(p.kernel.codes, np.int8), one,
    w.constant(p.kernel.scale[0]), w.constant(_HALF, np.uint8),
    w.constant(np.zeros(width), np.int8), domain=CONTRIB,
  )  # fmt: skip
  if zero:
    sums = p.kernel.codes.astype(np.int64).sum(axis=0) * p.kernel.scale[0]
    rest = w.node('Sub', w.constant(_HALF), zero)
    y = w.node('Add', y, w.node('Mul', rest, w.constant(sums)))
  if p.kernel.shift is not None:
    total = w.reduce('ReduceSum', w.cast(codes, np.float32), -1)
    zero = w.node('Mul', zero or w.constant(_HALF), w.constant(rows))
    total = w.node('Sub', total, zero)
    y = w.node('Add', y, w.node('Mul', total, w.constant(p.kernel.shift)))
  y = w.node('Add', w.node('Mul', y, scale), w.constant(p.bias))
  return w.reshape(y, (-1, *p.site.lhs_shape[:-1], width))


def attention(w: Writer, a: str, b: str, p: Product) -> str:
  """Returns an attention product; see `onnx_products.attention`."""
  turn = lambda x: w.transpose(x, 0, 1, 3, 2)
  b = turn(b)  # rows of what is summed over
  if p.plan.acts >= _BYTE and not p.plan.aqt:
    (a, a_scale), (b, b_scale) = (_centered(w, x, p.plan.acts) for x in (a, b))
    y = w.node('MatMul', a, turn(b))
  else:
    pairs = []
    for x, shape in zip((a, b), _shapes(p), strict=True):
      codes, scale, _ = _rows(w, w.reshape(x, (-1, shape[-1])), p)
      if p.plan.aqt != 'per_tensor':
        scale = w.reshape(scale, (-1, *shape[:-1], 1))
      pairs.append((w.reshape(codes, (-1, *shape)), scale))
    (a, a_scale), (b, b_scale) = pairs
    half = w.constant(_HALF, np.uint8)
    y = w.cast(w.node('MatMulInteger', a, turn(b), half, half), np.float32)
  y = w.node('Mul', y, a_scale)
  if p.plan.aqt != 'per_tensor':
    b_scale = turn(b_scale)
  return w.node('Mul', y, b_scale)


def _shapes(p: Product) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns both operands' shapes with what is summed over last, per image."""
  m, k, d = p.site.rhs_shape
  if p.site.kind == 'qk':
    return (k, p.site.lhs_shape[0], d), (k, m, d)
  return p.site.lhs_shape, (k, d, m)


def _range(w: Writer, x: str, bits: int) -> tuple[str, str]:
  """Returns scale and zero of the last axis, as `numerics.scale_of`."""
  none = w.constant(0)
  low = w.node('Min', w.reduce('ReduceMin', x, -1), none)
  high = w.node('Max', w.reduce('ReduceMax', x, -1), none)
  width = w.node('Sub', high, low)
  scale = w.node('Div', width, w.constant(2**bits - 1))
  scale = w.node('Max', scale, w.constant(_TINY))
  zero = w.node('Round', w.node('Div', w.node('Neg', low), scale))
  return scale, zero


def _rows(w: Writer, x: str, p: Product) -> tuple[str, str, str]:
  """Returns codes around 128, the rows' scales [m, 1] and zeros, if any.

  Zeros are '' where codes less their zeros fit into a byte, so that 128 stands
  for 0; else the codes are those of `numerics`, from 0.

  Args:
    w: What it is written to.
    x: [m, i].
    p: The product.
  """
  bits = p.plan.acts
  if p.plan.aqt:
    return (*_aqt_rows(w, x, p), '')
  scale, zero = _range(w, x, bits)
  flat = lambda x: w.reshape(x, (-1,))
  if bits >= _BYTE:
    codes = w.node(
      'QuantizeLinear', x, flat(scale), w.cast(flat(zero), np.uint8), axis=0
    )
    return codes, scale, zero
  none = w.node('Mul', flat(zero), w.constant(0))
  half = w.cast(w.node('Add', none, w.constant(_HALF)), np.uint8)
  codes = w.node('QuantizeLinear', x, flat(scale), half, axis=0)
  # A range whose ends lie halfway between levels has one level too many.
  last = w.node('Sub', w.constant(_HALF + 2**bits - 1), zero)
  return w.node('Min', codes, w.cast(last, np.uint8)), scale, ''


def _aqt_rows(w: Writer, x: str, p: Product) -> tuple[str, str]:
  """Returns codes around 128 and scales, as `numerics.aqt_codes`."""
  axes = (-1,) if p.plan.aqt == 'per_token' else (0, 1)
  most = w.reduce('ReduceMax', w.node('Abs', x), *axes)
  none = w.node('Equal', most, w.constant(0))
  most = w.node('Where', none, w.constant(1), most)
  bits = p.plan.acts
  scale = w.node('Div', most, w.constant(2 ** (bits - 1) - 0.5))
  last = 2 ** (bits - 1) - 1
  x = w.node('Mul', x, w.node('Reciprocal', scale))
  x = w.node('Clip', x, w.constant(-last), w.constant(last))
  half = w.constant(_HALF, np.uint8)
  return w.node('QuantizeLinear', x, w.constant(1), half), scale


def _centered(w: Writer, x: str, bits: int) -> tuple[str, str]:
  """Returns code - zero in float and the scale, of the last axis."""
  scale, zero = _range(w, x, bits)
  codes = w.node('Round', w.node('Div', x, scale))
  first = w.node('Neg', zero)
  last = w.node('Sub', w.constant(2**bits - 1), zero)
  return w.node('Min', w.node('Max', codes, first), last), scale
