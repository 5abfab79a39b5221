"""Integers with their scales: what a packed kernel is.

Codes of 5 to 8 bits lie in int8; of 2 to 4 bits two lie in a byte. Scales are
one per output channel, or one per group of input channels and output channel.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from qvit_jax.errors import QuantError
from qvit_jax.quantization import numerics
from qvit_jax.quantization.finite import check_finite

_HALF_BYTE = 4


def pack_nibbles(codes: Int8[Array, 'i o']) -> UInt8[Array, 'half o']:
  """Returns codes from -8 to 7, two rows in a byte, the even row low.

  An odd number of rows is filled up with zeros.
  """
  codes = jnp.pad(codes, ((0, codes.shape[0] % 2), (0, 0)))
  nibbles = codes.astype(jnp.uint8) & 0xF  # two's complement
  return nibbles[::2] | (nibbles[1::2] << _HALF_BYTE)


def unpack_nibbles(
  packed: UInt8[Array, 'half o'], rows: int
) -> Int8[Array, 'i o']:
  """Returns the first `rows` rows of what `pack_nibbles` packed."""
  low, high = packed << _HALF_BYTE, packed
  both = jnp.stack([low, high], axis=1).reshape(-1, packed.shape[1])
  # An arithmetic shift brings the sign back.
  return (both.astype(jnp.int8) >> _HALF_BYTE)[:rows]


@flax.struct.dataclass
class QTensor:
  """A quantized matrix [i, o]: value = scale * code.

  Attributes:
    data: int8 [i, o], or uint8 [ceil(i / 2), o] with two codes in a byte.
    scale: float32 [g, o], one row for each group of input channels.
    bits: 2 to 8.
    rows: i.
    group: Successive input channels that share a scale; the last group may be
      shorter.
    is_odd: Whether k stands for the code 2 * k + 1 (StatsQ has no zero).
  """

  # Arrays, or what stands for them while JAX rebuilds the tree.
  data: Any
  scale: Any
  bits: int = flax.struct.field(pytree_node=False)
  rows: int = flax.struct.field(pytree_node=False)
  group: int = flax.struct.field(pytree_node=False)
  is_odd: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, int]:
    """Returns (i, o)."""
    return self.rows, self.data.shape[1]

  @property
  def codes(self) -> Int[Array, 'i o']:
    """Returns the integers, unpacked: int8, or int16 of odd codes."""
    stored = self.data
    if self.bits <= _HALF_BYTE:
      stored = unpack_nibbles(self.data, self.rows)
    return 2 * stored.astype(jnp.int16) + 1 if self.is_odd else stored

  @property
  def largest_code(self) -> int:
    """Returns a bound on the magnitude of the integers."""
    return 2 ** (self.bits if self.is_odd else self.bits - 1)

  def num_bytes(self) -> int:
    """Returns what codes and scales take."""
    return self.data.size + 4 * self.scale.size


def from_codes(
  codes: Float[Array, 'i o'],
  scale: Float[Array, 'g o'],
  bits: int,
  *,
  group: int = 0,
  is_odd: bool = False,
) -> QTensor:
  """Returns the QTensor of whole-numbered codes.

  Args:
    codes: From -2**(bits-1) to 2**(bits-1) - 1; odd ones up to 2**bits - 1.
    scale: One row for each group.
    bits: 2 to 8.
    group: Input channels that share a scale; 0: all of them.
    is_odd: Whether all codes are odd, so that a bit less says them.

  Raises:
    QuantError: Bits outside 2 to 8, scales that do not fit the groups, or NaN
      or infinity among either.
  """
  check_finite({'codes': codes, 'scales': scale})
  if not 2 <= bits <= 8:
    raise QuantError(f'{bits} bits cannot be packed; allowed are 2 to 8')
  rows, width = codes.shape
  group = min(group or rows, rows)
  wanted = (-(-rows // group), width)
  if scale.shape != wanted:
    raise QuantError(
      f'scales of shape {list(scale.shape)} do not fit {rows} x {width} codes '
      f'in groups of {group}; give {list(wanted)}'
    )
  data = ((codes - 1) / 2 if is_odd else codes).astype(jnp.int8)
  if bits <= _HALF_BYTE:
    data = pack_nibbles(data)
  return QTensor(data, scale.astype(jnp.float32), bits, rows, group, is_odd)


def quantize(
  w: Float[Array, 'i o'], bits: int, *, group: int = 0, search: bool = True
) -> QTensor:
  """Returns a matrix rounded to the nearest symmetric codes.

  Args:
    w: Kernel.
    bits: 2 to 8.
    group: Successive input channels that share a scale; 0: all of them.
    search: Whether scales minimise the squared error; else they cover the
      largest weight.

  Raises:
    QuantError: Bits outside 2 to 8, or a weight that is NaN or infinite.
  """
  check_finite({'kernel': w})
  if not 2 <= bits <= 8:
    raise QuantError(f'{bits} bits cannot be packed; allowed are 2 to 8')
  scale = group_scales(w, bits, group=group, search=search)
  full = spread_scales(scale, w.shape[0], group)
  codes = numerics.to_codes(w, full, jnp.zeros_like(full), bits, symmetric=True)
  return from_codes(codes, scale, bits, group=group)


def group_scales(
  w: Float[Array, 'i o'],
  bits: int,
  *,
  group: int = 0,
  search: bool = True,
  one: bool = False,
) -> Float[Array, 'g o']:
  """Returns one scale for each group of input channels; see `quantize`.

  Args:
    w: Kernel.
    bits: Of a code.
    group: See `quantize`.
    search: See `quantize`.
    one: Whether there is a single scale for the whole kernel, without groups,
      written once for each output channel.
  """
  rows, width = w.shape
  if one:
    scale = group_scales(w.reshape(-1, 1), bits, search=search)
    return jnp.broadcast_to(scale, (1, width))
  group = min(group or rows, rows)
  count = -(-rows // group)
  # Groups side by side: every one is a column of its own.
  columns = jnp.pad(w, ((0, count * group - rows), (0, 0)))
  columns = columns.reshape(count, group, width).transpose(1, 0, 2)
  columns = columns.reshape(group, -1)
  if search:
    scale = numerics.search_scale(columns, bits)
  else:
    most = jnp.abs(columns).max(axis=0, keepdims=True)
    scale, _ = numerics.scale_of(-most, most, bits, symmetric=True)
  return scale.reshape(count, width)


def spread_scales(
  scale: Float[Array, 'g o'], rows: int, group: int = 0
) -> Float[Array, 'i o']:
  """Returns the scale of every weight."""
  return jnp.repeat(scale, min(group or rows, rows), axis=0)[:rows]


def dequantize(q: QTensor) -> Float[Array, 'i o']:
  """Returns the float32 matrix that a QTensor stands for."""
  scale = spread_scales(q.scale, q.rows, q.group)
  return q.codes.astype(jnp.float32) * scale
