"""Products of codes of up to 8 bits, each in the form its hardware runs best.

On a CPU codes travel as float numbers (`exact`): of bf16 where it multiplies
them, else of float32, to which XLA would widen them. Elsewhere they are int8
and their sums int32: what the integer units of accelerators take. All are
exact, so the results are equal bit for bit.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from qvit_jax.arithmetic import host
from qvit_jax.arithmetic.exact import exact_dot
from qvit_jax.arithmetic.products import Dims, Window, patches, spread

_CARRIER = jnp.bfloat16  # holds every whole number up to 256
_BF16 = ('avx512_bf16', 'amx_bf16', 'bf16')  # of x86 and ARM


@dataclasses.dataclass(frozen=True)
class Whole:
  """Whole numbers of one operand, and how int8 holds them.

  Attributes:
    numbers: In any type that holds them.
    most: Bound on their magnitude, up to 256.
    shift: numbers - shift are from -128 to 127. With the operand's axes, of
      which those that are summed over have length 1; leading ones may lack.
    is_odd: Whether all of them are odd, up to 255: then (numbers - 1) / 2 are
      what int8 holds, and there is no shift.
  """

  numbers: Any
  most: int
  shift: Any = None
  is_odd: bool = False


jax.tree_util.register_dataclass(
  Whole, data_fields=('numbers', 'shift'), meta_fields=('most', 'is_odd')
)


def integer_dot(lhs: Whole, rhs: Whole, dims: Dims, parts: int = 0):
  """Returns the exact product in float32.

  Args:
    lhs: Activations; an image for a window.
    rhs: A kernel as a matrix, or activations.
    dims: One axis is contracted, or a window.
    parts: See `exact.exact_dot`.
  """
  carrier = _CARRIER if host.has(*_BF16) else jnp.float32
  return jax.lax.platform_dependent(
    lhs,
    rhs,
    cpu=lambda a, b: exact_dot(
      a.numbers.astype(carrier), b.numbers.astype(carrier), dims,
      a.most * b.most, parts,
    ),
    default=lambda a, b: int8_dot(a, b, dims).astype(jnp.float32),
  )


def carried(numbers):
  """Returns whole numbers of up to 8 bits in a float type that holds them."""
  return numbers.astype(_CARRIER)


def int8_dot(lhs: Whole, rhs: Whole, dims: Dims):
  """Returns the same product as int32, from operands of int8.

  With numbers = factor * codes + shift of both operands, the sum over k of
  their products has four terms, of which only the first multiplies codes with
  codes; the others need the sums of each operand's codes.

  A convolution multiplies what each pixel sees. Where every channel has a
  kernel of its own there is nothing to sum over but a window: its products are
  added up as int32 without a matrix product, which would be one of 9 x 1.

  Args:
    lhs: See `integer_dot`.
    rhs: See `integer_dot`.
    dims: See `integer_dot`.
  """
  if isinstance(dims, Window):
    if 1 < dims.groups == lhs.numbers.shape[-1]:
      return _depthwise(lhs, rhs, dims)
    return _convolution(lhs, rhs, dims)
  ndim = lhs.numbers.ndim + rhs.numbers.ndim - 2 - len(dims[1][0])
  sides = []  # (codes, factor, shift or None) of both operands
  for side, x in enumerate((lhs, rhs)):
    codes, factor, shift = _codes(x)
    if shift is not None:
      shift = spread(shift, dims, side, ndim)
    sides.append((codes, factor, shift))
  (a, times, above), (b, others, beside) = sides
  y = times * others * jax.lax.dot_general(
    a, b, dims, preferred_element_type=jnp.int32
  )  # fmt: skip
  ((axis,), (other,)), _ = dims
  if beside is not None:
    y += times * beside * spread(_sums(a, axis), dims, 0, ndim)
  if above is not None:
    y += others * above * spread(_sums(b, other), dims, 1, ndim)
  if above is not None and beside is not None:
    y += a.shape[axis] * above * beside
  return y


def _codes(x: Whole):
  """Returns (int8, factor, shift or None): x = factor * codes + shift."""
  numbers = x.numbers
  if x.is_odd and x.most > 128:
    one = jnp.ones((1,) * numbers.ndim, jnp.int32)
    return ((numbers.astype(jnp.int32) - 1) >> 1).astype(jnp.int8), 2, one
  if x.shift is None:
    return numbers.astype(jnp.int8), 1, None
  shift = x.shift.astype(jnp.int32)
  lack = numbers.ndim - shift.ndim
  shift = shift.reshape((1,) * lack + shift.shape)
  return (numbers.astype(jnp.int32) - shift).astype(jnp.int8), 1, shift


def _sums(codes, axis: int):
  return codes.sum(axis=axis, keepdims=True, dtype=jnp.int32)


def _seen(lhs: Whole, window: Window):
  """Returns what each pixel sees, [b, p, q, g, k], as `Whole`.

  Zeros are put around the numbers, not around their codes.
  """
  seen = patches(lhs.numbers.astype(jnp.int16), window)
  shift = lhs.shift
  if shift is not None:  # of each image, or of all
    shift = shift.reshape(-1, 1, 1, 1, 1)
  return dataclasses.replace(lhs, numbers=seen, shift=shift)


def _convolution(lhs: Whole, rhs: Whole, window: Window):
  """Returns [b, p, q, o] of an image and a kernel matrix."""
  seen, w = _seen(lhs, window), rhs.numbers
  if window.groups == 1:
    seen = jax.tree.map(lambda x: x[..., 0, :], seen)
    return int8_dot(seen, rhs, (((3,), (0,)), ((), ())))
  w = w.reshape(len(w), window.groups, -1)
  kernel = dataclasses.replace(rhs, numbers=w)
  y = int8_dot(seen, kernel, (((4,), (0,)), ((3,), (1,))))  # [g, b, p, q, o]
  y = jnp.moveaxis(y, 0, 3)
  return y.reshape(*y.shape[:3], -1)


def _depthwise(lhs: Whole, rhs: Whole, window: Window):
  """Returns [b, p, q, o] where each channel has a kernel of its own."""
  seen = patches(lhs.numbers.astype(jnp.int16), window)  # [b, p, q, c, k]
  w = rhs.numbers.astype(jnp.int32)
  w = w.reshape(math.prod(window.size), seen.shape[3], -1)  # [k, c, o / c]
  y = sum(seen[..., i, None].astype(jnp.int32) * w[i] for i in range(len(w)))
  return y.reshape(*y.shape[:3], -1)
