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
  # Unsigned where signed ones would be cut; see `is_wide`.
  kernel, around, kind = p.kernel.codes, 0, np.int8
  if is_wide(kernel):
    kernel, around, kind = kernel.astype(np.int16) + _HALF, _HALF, np.uint8
  y = w.node(
    'MatMulIntegerToFloat', codes, w.constant(kernel, kind), w.constant(1),
    w.constant(p.kernel.scale[0]), w.constant(_HALF, np.uint8),
    w.constant(np.full(width, around), kind), domain=CONTRIB,
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
  y = w.reshape(w.node('Mul', y, scale), (-1, *p.site.lhs_shape[:-1], width))
  # Last, so that onnxruntime sees a bias before an activation or a sum.
  return w.node('Add', y, w.constant(p.bias))


def attention(w: Writer, a: str, b: str, p: Product) -> str:
  """Returns an attention product, [b, k, n, m] or [b, k, n, d].

  Operands are coded as the model has them, so that bytes are turned and not
  floats.

  Args:
    w: What it is written to.
    a: Queries [b, n, k, d], or attention weights [b, k, n, m].
    b: Keys, or values, [b, m, k, d].
    p: The product.
  """
  # How operands are turned, and the axis that is summed over in each.
  if p.site.kind == 'qk':
    sides = ((a, (0, 2, 1, 3), -1, False), (b, (0, 2, 3, 1), -1, False))
  else:
    sides = ((a, (), -1, True), (b, (0, 2, 1, 3), 1, False))
  is_wide = p.plan.acts >= _BYTE and not p.plan.aqt
  found = []
  for x, turn, axis, is_positive in sides:
    if p.plan.aqt:
      codes, scale = _aqt(w, x, p, axis)
    else:
      code = _centered if is_wide else _bytes
      codes, scale = code(w, x, p.plan.acts, axis, is_positive=is_positive)
    if turn:
      codes = w.transpose(codes, *turn)
      if p.plan.aqt != 'per_tensor':
        scale = w.transpose(scale, *turn)
    found.append((codes, scale))
  (a, a_scale), (b, b_scale) = found
  if is_wide:
    y = w.node('MatMul', a, b)
  else:
    half = w.constant(_HALF, np.uint8)
    y = w.cast(w.node('MatMulInteger', a, b, half, half), np.float32)
  return w.node('Mul', w.node('Mul', y, a_scale), b_scale)


def is_wide(kernel: np.ndarray) -> bool:
  """Returns whether products of a kernel's codes and bytes may be cut.

  x86 without VNNI multiplies an unsigned byte by a signed one and adds two such
  products in 16 bits (VPMADDUBSW). Unsigned kernels have another instruction.
  """
  return 2 * 255 * int(np.abs(kernel.astype(np.int16)).max()) > 2**15 - 1


def _range(
  w: Writer, x: str, bits: int, axis: int, *, is_positive: bool = False
) -> tuple[str, str]:
  """Returns scale and zero of an axis, as `numerics.scale_of`.

  Where no number is below 0, the zero is 0 and not returned: ''.
  """
  width, low = w.reduce('ReduceMax', x, axis), ''
  if not is_positive:
    low = w.node('Relu', w.node('Neg', w.reduce('ReduceMin', x, axis)))
    width = w.node('Add', w.node('Relu', width), low)
  scale = w.node('Div', width, w.constant(2**bits - 1))
  scale = w.node('Clip', scale, w.constant(_TINY))
  return scale, low and w.node('Round', w.node('Div', low, scale))


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
    return (*_aqt(w, x, p, -1), '')
  scale, zero = _range(w, x, bits, -1)
  flat = lambda x: w.reshape(x, (-1,))
  if bits >= _BYTE:
    codes = w.node(
      'QuantizeLinear', x, flat(scale), w.cast(flat(zero), np.uint8), axis=0
    )
    return codes, scale, zero
  half = w.filled(w.node('Shape', flat(scale)), _HALF, np.uint8)
  codes = w.node('QuantizeLinear', x, flat(scale), half, axis=0)
  return _cut(w, codes, zero, bits), scale, ''


def _cut(w: Writer, codes: str, zero: str, bits: int) -> str:
  """Returns codes around 128 without the level that is one too many.

  A range whose ends lie halfway between levels has one.
  """
  last = w.node('Sub', w.constant(_HALF + 2**bits - 1), zero)
  return w.node('Min', codes, w.cast(last, np.uint8))


def _bytes(
  w: Writer, x: str, bits: int, axis: int, *, is_positive: bool
) -> tuple[str, str]:
  """Returns codes around 128, of less than 8 bits, and the scale of an axis."""
  scale, zero = _range(w, x, bits, axis, is_positive=is_positive)
  codes = w.node(
    'QuantizeLinear', w.node('Div', x, scale), w.constant(1),
    w.constant(_HALF, np.uint8),
  )  # fmt: skip
  return _cut(w, codes, zero, bits) if zero else codes, scale


def _aqt(w: Writer, x: str, p: Product, axis: int) -> tuple[str, str]:
  """Returns codes around 128 and the scale of an axis, or of all of them.

  As `numerics.aqt_codes`.
  """
  axes = (axis,) if p.plan.aqt == 'per_token' else ()
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


def _centered(
  w: Writer, x: str, bits: int, axis: int, *, is_positive: bool
) -> tuple[str, str]:
  """Returns code - zero in float and the scale, of an axis."""
  scale, zero = _range(w, x, bits, axis, is_positive=is_positive)
  codes = w.node('Round', w.node('Div', x, scale))
  if zero:
    last = w.node('Sub', w.constant(2**bits - 1), zero)
    codes = w.node('Min', w.node('Max', codes, w.node('Neg', zero)), last)
  return codes, scale
