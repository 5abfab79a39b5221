"""Learned steps: the math of LSQ, LSQ+ and StatsQ, and their product.

A learned quantizer maps x to whole numbers c = round(clip(x / s, first - z,
last - z)), which stand for s * c: s is the step and z the zero point, rounded
straight through. `coded_product` multiplies the codes, exactly, and applies the
steps to the result, so that training computes what the packed model will.

Source: Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2; Bhalgat et al.
2020 (LSQ+), arXiv:2004.09576, section 3. Differs: the offset of LSQ+ is -s * z
with a whole z, as in Q-ViT (Li et al. 2022, arXiv:2210.06707), so that a
product of codes stays one of integers. StatsQ: Liu et al. 2023,
arXiv:2302.02210, section 4.1.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.arithmetic.exact import whole_product
from qvit_jax.arithmetic.products import Dims, multiply, raw_product, spread
from qvit_jax.quantization import numerics

# A step below it stands for a dead operand; its gradient still passes.
LEAST = 1e-8
_SHARES = 24  # tried sizes of a range, for each end


@dataclasses.dataclass(frozen=True)
class Coder:
  """How one operand becomes codes; hashable.

  Attributes:
    bits: 2 to 8.
    method: 'step' (learned step and zero point), 'statsq', or 'dynamic' (step
      and zero point of the values at hand, which pass every gradient on).
    is_signed: Whether codes go from -2**(bits-1) instead of from 0.
    has_zero: Whether the zero point is learned; else it says whether the codes
      stand for negative values, see `fixed_zero`.
    share: What the gradients of step and zero point are multiplied by.
  """

  bits: int
  method: str = 'step'
  is_signed: bool = False
  has_zero: bool = True
  share: float = 1.0

  @property
  def ends(self) -> tuple[int, int]:
    """The smallest and the largest code, before the zero point."""
    if self.is_signed:
      return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
    return 0, 2**self.bits - 1


def gradient_share(count: int, coder: Coder) -> float:
  """Returns 1 / sqrt(count * largest code), the gradient scale of LSQ.

  Args:
    count: Elements (of one image, for activations) that share a step.
    coder: Its codes.

  Source: Esser et al. 2020, section 2.2.
  """
  return 1 / math.sqrt(count * max(1, coder.ends[1]))


def encode(
  x: Float[Array, '...'],
  step: Float[Array, '...'] | None,
  zero: Float[Array, '...'] | None,
  coder: Coder,
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Returns (codes minus zero point, what one code is worth), both float32.

  Args:
    x: Values.
    step: Distance of two levels, broadcast to x; unused by 'statsq'.
    zero: Zero point, made whole here (`whole_zero`); unused by 'statsq'.
    coder: How.
  """
  x = x.astype(jnp.float32)
  if coder.method == 'statsq':
    return _statsq(x, coder.bits)
  step, zero = jnp.maximum(step, LEAST), whole_zero(zero, coder)
  first, last = coder.ends
  return jnp.round(jnp.clip(x / step, first - zero, last - zero)), step


def whole_zero(zero: Float[Array, '*s'], coder: Coder) -> Float[Array, '*s']:
  """Returns the code that stands for 0: the nearest one to a zero point.

  Bounded by the codes there are. Beyond them no value could be 0, and a code
  minus the zero point could be larger than the dtype of products holds exactly.
  """
  return jnp.clip(jnp.round(zero), *coder.ends)


def _statsq(w, bits: int):
  """Odd codes 2 * k + 1 of half a level: no code stands for zero."""
  half = 2 ** (bits - 1)
  size = statsq_size(w)
  inside = jnp.clip(w / size, -1, 1 - 1e-6)
  codes = 2 * jnp.round(inside * half - 0.5) + 1
  # Beyond the ends rounding would leave the grid by one.
  return jnp.clip(codes, 1 - 2 * half, 2 * half - 1), size / (2 * half)


def statsq_size(w: Float[Array, 'i o']) -> Float[Array, '1 o']:
  """Returns twice the mean magnitude of each output channel."""
  return jnp.maximum(2 * jnp.abs(w).mean(axis=0, keepdims=True), LEAST)


def _is_inside(x, step, zero, coder: Coder):
  """Returns where the gradient passes."""
  if coder.method == 'statsq':
    return jnp.abs(x) <= statsq_size(x)
  if coder.method == 'dynamic':
    return jnp.ones_like(x)
  first, last = coder.ends
  ratio, zero = x / jnp.maximum(step, LEAST), whole_zero(zero, coder)
  return (first - zero <= ratio) & (ratio <= last - zero)


@functools.partial(jax.jit, static_argnames=('coder', 'axes', 'has_zero'))
def fit(
  x: Float[Array, '...'],
  coder: Coder,
  axes: tuple[int, ...],
  *,
  has_zero: bool,
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Returns the (step, zero) whose rounding errs least on x.

  The ends of the range are searched one after the other among shares of the
  extremes (OMSE: Choukroun et al. 2019, arXiv:1902.06822), which LSQ+ proposes
  for the start (Bhalgat et al. 2020, section 3.3) and LSQ does without.

  Args:
    x: A first batch, or a kernel.
    coder: Of method 'step'.
    axes: That share a step; they stay with length 1.
    has_zero: Whether the zero point is free; else it makes the codes signed
      where x has negative values, and unsigned where not.
  """
  x = x.astype(jnp.float32)
  low = jnp.minimum(x.min(axis=axes, keepdims=True), 0)
  high = jnp.maximum(x.max(axis=axes, keepdims=True), 0)
  if has_zero:
    of_range = lambda low, high: numerics.scale_of(
      low, high, coder.bits, symmetric=False
    )
    low, high = _search(x, (low, high), coder, axes, of_range)
    return of_range(low, high)
  zero, levels = fixed_zero(low, coder)

  def symmetric(low, high):
    del low
    return jnp.maximum(high / levels, LEAST), zero

  most = jnp.maximum(-low, high)
  _, most = _search(x, (most, most), coder, axes, symmetric)
  return symmetric(most, most)


def fixed_zero(
  low: Float[Array, '*s'], coder: Coder
) -> tuple[Float[Array, '*s'], Float[Array, '*s']]:
  """Returns (zero point, codes above it) where no zero point is learned.

  Args:
    low: Smallest values; codes are signed where they are negative.
    coder: Of method 'step'.
  """
  _, last = coder.ends
  zero = jnp.zeros_like(low)
  if not coder.is_signed:
    zero = jnp.where(low < -1e-5, 2.0 ** (coder.bits - 1), zero)
  return zero, jnp.where(zero > 0, 1.0 * (last // 2), last)


def _search(x, ends, coder: Coder, axes, of_range):
  """Returns the shrunk (low, high) of the least squared error."""

  def error(low, high):
    step, zero = of_range(low, high)
    codes, worth = encode(x, step, zero, coder)
    return jnp.square(codes * worth - x).sum(axis=axes, keepdims=True)

  best = error(*ends)
  for side in (1, 0, 1):

    def attempt(carry, share, start=ends, side=side):
      best, kept = carry
      tried = [*start]
      tried[side] = start[side] * share
      now = error(*tried)
      kept = jnp.where(now < best, tried[side], kept)
      return (jnp.minimum(now, best), kept), None

    shares = jnp.linspace(1.0, 0.1, _SHARES)
    (best, kept), _ = jax.lax.scan(attempt, (best, ends[side]), shares)
    ends = (ends[0], kept) if side else (kept, ends[1])
  return ends


@dataclasses.dataclass(frozen=True)
class Product:
  """A product and the coders of its operands; None leaves one in float.

  Attributes:
    dims: Dimension numbers of `lax.dot_general`, or a window.
    lhs: Of the left operand.
    rhs: Of the right operand.
    dtype: Of the products of the gradient; None: that of the left operand.
  """

  dims: Dims
  lhs: Coder | None
  rhs: Coder | None
  dtype: Any = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def coded_product(
  product: Product, lhs: Any, rhs: Any, left: Any, right: Any
) -> Float[Array, '...']:
  """Returns lhs . rhs of the rounded operands, in float32.

  The gradient is the straight-through one: of x it is that of the product
  where x is within the range, else 0; of the step, per element, the rounding
  error in steps where x is inside and the last code outside; of the zero point
  -step outside, but none that would move it further beyond the codes. Only the
  operands are kept for it and codes are made again, so that training needs no
  more memory than in float; its products run in `product.dtype`.

  Args:
    product: What is multiplied and rounded how.
    lhs: Activations in the compute dtype.
    rhs: Float32 kernel [i, o], or activations.
    left: (step, zero) of `lhs` with its axes or fewer, or None.
    right: The same of `rhs`.
  """
  (a, _), (b, _) = _codes(product, lhs, rhs, left, right)
  exact = product.lhs is not None and product.rhs is not None
  carrier = jnp.bfloat16 if exact else lhs.dtype
  times = whole_product if exact else multiply
  y = times(a.astype(carrier), b.astype(carrier), product.dims)
  for worth in _worth(product, lhs, rhs, left, right):
    y = y * worth
  return y


def _codes(product: Product, lhs, rhs, left, right):
  """Returns ((codes, worth or None) of each operand)."""
  return tuple(
    (x, None) if coder is None else encode(x, *(how or (None, None)), coder)
    for x, how, coder in (
      (lhs, left, product.lhs),
      (rhs, right, product.rhs),
    )
  )


def _worth(product: Product, lhs, rhs, left, right):
  """Returns what a code of the right and of the left is worth, to broadcast.

  Applied one after the other, in the packed model's order.
  """
  found = []
  operands = (1, rhs, right, product.rhs), (0, lhs, left, product.lhs)
  out = jax.eval_shape(
    lambda a, b: raw_product(a, b, product.dims), lhs, rhs.astype(lhs.dtype)
  )
  for side, x, how, coder in operands:
    if coder is None:
      continue
    if coder.method == 'statsq':
      worth = statsq_size(x) / 2**coder.bits
    else:
      worth = jnp.maximum(how[0], LEAST)
    full = worth.reshape((1,) * (x.ndim - worth.ndim) + worth.shape)
    found.append(spread(full, product.dims, side, len(out.shape)))
  return found


def _forward(product, lhs, rhs, left, right):
  y = coded_product(product, lhs, rhs, left, right)
  return y, (lhs, rhs, left, right)


def _backward(product: Product, saved, cotangent):
  lhs, rhs, left, right = saved
  lhs, rhs = (_not_before(cotangent, x) for x in (lhs, rhs))
  coded = _codes(product, lhs, rhs, left, right)
  dtype = product.dtype or lhs.dtype
  # Of levels, not of codes: a cotangent times steps underflows in float16.
  levels = (x if worth is None else x * worth for x, worth in coded)
  # In the compute dtype, results too: see `products.multiply`.
  _, pullback = jax.vjp(
    lambda a, b: raw_product(a, b, product.dims),
    *(x.astype(dtype) for x in levels),
  )
  grads = pullback(cotangent.astype(dtype))
  x_grads, how_grads = [], []
  for x, codes, grad, how, coder in (
    (lhs, coded[0][0], grads[0], left, product.lhs),
    (rhs, coded[1][0], grads[1], right, product.rhs),
  ):
    one, other = _operand_grads(x, codes, grad, how, coder)
    x_grads.append(one.astype(x.dtype))
    how_grads.append(other)
  return *x_grads, *how_grads


def _not_before(cotangent, x):
  """Returns x so that nothing is made of it before the cotangent is there.

  Else XLA finds that the forward pass has made the same codes, and keeps them,
  or makes them early: those of all layers at a time.
  """

  def tie(cotangent, x):
    # A CPU drops barriers before it looks for equal expressions, but a NaN may
    # have to be passed on. Elsewhere a mesh would have to exchange it.
    first = cotangent[(0,) * cotangent.ndim]
    return jnp.where(jnp.isnan(first), first.astype(x.dtype), x)

  return jax.lax.platform_dependent(
    cotangent,
    x,
    cpu=tie,
    default=lambda *both: jax.lax.optimization_barrier(both)[1],
  )


def _operand_grads(x, codes, grad, how, coder: Coder | None):
  """Returns the gradients of (operand, (step, zero)) from its levels' one."""
  if coder is None:
    return grad, None
  x, grad = x.astype(jnp.float32), grad.astype(jnp.float32)
  inside = _is_inside(x, *(how or (None, None)), coder)
  if coder.method != 'step':
    return inside * grad, jax.tree.map(jnp.zeros_like, how)
  step, shape = jnp.maximum(how[0], LEAST), how[0].shape
  passed = inside * grad
  share, (first, last) = coder.share, coder.ends
  if not coder.has_zero:
    # Signed codes have fewer above zero: a zero point in the middle says so.
    share *= jnp.sqrt(last / (last - how[1]))
  # Sums first, as a division of every element costs more than the rest.
  slope = _sum_to(grad * codes, shape) - _sum_to(passed * x, shape) / step
  shift = step * _sum_to(passed - grad, shape)
  # A zero point beyond the codes is used as the last one: it may come back.
  shift = jnp.where(jnp.round(how[1]) < first, jnp.minimum(shift, 0), shift)
  shift = jnp.where(jnp.round(how[1]) > last, jnp.maximum(shift, 0), shift)
  return passed, (share * slope, share * shift)


def _sum_to(x, shape):
  """Returns x summed to a shape that broadcasts to it."""
  extra = x.ndim - len(shape)
  axes = [i for i in range(x.ndim) if i < extra or shape[i - extra] == 1]
  return x.sum(axis=tuple(axes), keepdims=True).reshape(shape)


coded_product.defvjp(_forward, _backward)
