"""Products of integers from packed kernels: how a row of PTQ runs.

`arithmetic.integers` multiplies codes as integer hardware does, bit for bit: on
a CPU as bf16 numbers, which is XLA's fastest product there, on accelerators as
int8. Codes of more than 8 bits travel as float32.

Activations have asymmetric codes. What is multiplied is code - zero, a whole
number again, so that the zeros around an image are zeros. Models that AQT
trained keep its symmetric codes: see `aqt_product`.
"""

import dataclasses

import jax.numpy as jnp

from qvit_jax.arithmetic.integers import Whole, carried, integer_dot
from qvit_jax.arithmetic.products import (
  Window,
  multiply,
  patches,
  shared_axes,
  spread,
)
from qvit_jax.errors import QuantError
from qvit_jax.ops import Site
from qvit_jax.quantization import numerics
from qvit_jax.quantization.aqt_product import aqt_product
from qvit_jax.quantization.hadamard import turn_blocks
from qvit_jax.quantization.qtensor import QTensor, dequantize
from qvit_jax.quantization.softmax_codes import LEVELS

# Codes of more bits are rounded, but travel and multiply as float32.
MAX_PACKED_BITS = 8
_BF16_EXACT = 2**8


@dataclasses.dataclass(frozen=True)
class SitePlan:
  """How one product runs.

  Attributes:
    weights: Bits of the kernel; None: a float kernel.
    acts: Bits of the activations; None: float activations.
    is_static: Whether scales of activations were calibrated; else each row of
      the product finds its own.
    block: Channels that a Hadamard matrix turns together before they are
      rounded (see `hadamard.turn_blocks`); 0: none.
    softmax: Codes of attention weights: 'uniform', 'log2' or 'twin'.
    reach: Largest sum of |codes| of an output channel's kernel; 0: unknown. Of
      older files, which do not know `parts`.
    clip: Most that an input may be, in magnitude; 0: no bound.
    aqt: 'per_token' or 'per_tensor' where activations have AQT's symmetric
      codes (see `aqt_product`), with one scale for each row or for all; '':
      dynamic or static codes from the smallest to the largest value.
    parts: Pieces into which sums are cut (`exact.exact_dot`); 0: unknown.
  """

  weights: int | None = None
  acts: int | None = None
  is_static: bool = False
  block: int = 0
  softmax: str = 'uniform'
  reach: int = 0
  clip: float = 0.0
  aqt: str = ''
  parts: int = 0

  @property
  def most(self) -> int:
    """Bound on the magnitude of a code of the activations."""
    return 2 ** (self.acts - 1) if self.aqt else 2**self.acts - 1

  @property
  def cuts(self) -> int:
    """`parts`, as far as it is known."""
    is_short = 0 < self.reach * self.most < 2**24
    return self.parts or int(is_short)

  @property
  def is_integer(self) -> bool:
    """Whether both operands are packed codes, so that integers are multiplied.

    An attention product has no weights.
    """
    fits = max(self.acts or 0, self.weights or 0) <= MAX_PACKED_BITS
    return self.acts is not None and fits and self.softmax == 'uniform'


def _carrier(bits: int):
  return jnp.bfloat16 if 2**bits <= _BF16_EXACT else jnp.float32


def _centered(x, bits: int, axes, stored):
  """Returns (code - zero, zero, scale) of activations.

  Args:
    x: Activations.
    bits: Of their codes.
    axes: The contracted axes, over which a dynamic scale is shared.
    stored: Calibrated (scale, zero), or None for a dynamic one.
  """
  x = x.astype(jnp.float32)
  if stored is None:
    scale, zero = numerics.scale_of(
      x.min(axis=axes, keepdims=True),
      x.max(axis=axes, keepdims=True),
      bits,
      symmetric=False,
    )
  else:
    scale, zero = stored
  codes = numerics.centered_codes(x, scale, zero, bits, symmetric=False)
  return codes, zero, scale


def _whole(codes, zero, bits: int) -> Whole:
  """Returns what `_centered` gave, up to 8 bits, as an operand."""
  shift = 2 ** (bits - 1) - zero if bits == MAX_PACKED_BITS else None
  return Whole(codes, 2**bits - 1, shift)


def _kernel(kernel: QTensor, rows: slice = slice(None)) -> Whole:
  """Returns rows of a kernel as an operand."""
  most, is_odd = kernel.largest_code, kernel.is_odd
  return Whole(kernel.codes[rows], most, is_odd=is_odd)


def _half_float(x, scale, kernel, dims):
  """Returns the product of a layer of which an operand is no packed code.

  Scales come after the product, as in training: rounding them into an operand
  of bf16 would change what the next layer rounds.

  Args:
    x: Float activations, or code - zero.
    scale: Of these codes, or None.
    kernel: Float or packed.
    dims: Dimension numbers.
  """
  columns = None
  if isinstance(kernel, QTensor) and len(kernel.scale) == 1:
    w, columns = kernel.codes.astype(x.dtype), kernel.scale[0]
  else:
    w = dequantize(kernel) if isinstance(kernel, QTensor) else kernel
    dtype = x.dtype if scale is None else jnp.promote_types(x.dtype, w.dtype)
    x, w = x.astype(dtype), w.astype(dtype)
  y = multiply(x, w, dims)
  for one in (columns, scale):
    if one is not None:
      y = y * one
  return y


def _with_norm(module, y, dtype):
  """Returns a layer's product times the gain of a norm that was behind it.

  Its shift is the layer's bias by now. As in training: the layer's output had
  the compute dtype there before the norm took it in float32.

  Args:
    module: The layer.
    y: Its product.
    dtype: Compute dtype.
  """
  if not module.has_variable('quant', 'gain'):
    return y
  if module.has_variable('quant', 'offset'):
    y = y + module.get_variable('quant', 'offset')
  return y.astype(dtype).astype(jnp.float32) * module.get_variable(
    'quant', 'gain'
  )


def _rows_of(site: Site, x, dims):
  """Returns what each row of a product of matrices sees, and its dimensions.

  Groups of a kernel's rows have scales of their own, which no convolution
  applies.
  """
  if isinstance(dims, Window):
    if dims.groups > 1:
      raise QuantError(
        f'{site.path} is a convolution in {dims.groups} groups: its kernel '
        'cannot have scales of groups of rows and rounded activations; give '
        'it one scale for each output channel'
      )
    x = patches(x, dims)[..., 0, :]
  return x, (((x.ndim - 1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class IntegerCore:
  """Reads packed kernels from the collection `quant`. See `ops.Core`.

  Attributes:
    sites: (path, plan) of every product.
    is_exact: Whether long sums are cut where float32 would round them. Without,
      gradients pass.
  """

  sites: tuple[tuple[str, SitePlan], ...]
  is_exact: bool = True
  is_packed = True

  def __call__(self, module, site: Site, lhs, rhs, dims):
    """See `ops.Core`; `rhs` is None for a layer."""
    plan = dict(self.sites)[site.path]
    if not site.is_layer:
      if plan.aqt:
        return aqt_product(plan, site, lhs, rhs, dims, self._dot)
      return self._product(module, plan, lhs, rhs, dims)
    if plan.aqt:
      kernel = module.get_variable('quant', 'kernel')
      y = aqt_product(plan, site, lhs, kernel, dims, self._dot)
    else:
      y = self._layer(module, site, lhs, dims)
    return _with_norm(module, y, lhs.dtype)

  def _stored(self, module, plan: SitePlan, side: str):
    if not plan.is_static:
      return None
    read = module.get_variable
    return read('quant', f'{side}_scale'), read('quant', f'{side}_zero')

  def _dot(self, lhs: Whole, rhs: Whole, dims, parts: int = 0):
    if self.is_exact:
      return integer_dot(lhs, rhs, dims, parts)
    return multiply(carried(lhs.numbers), carried(rhs.numbers), dims)

  def _layer(self, module, site: Site, x, dims):
    plan = dict(self.sites)[site.path]
    kernel = module.get_variable('quant', 'kernel')
    scale = zero = None
    if plan.clip:
      x = jnp.clip(x, -plan.clip, plan.clip)
    if plan.block:
      x = turn_blocks(x.astype(jnp.float32), plan.block)
    if plan.acts is not None:
      x, zero, scale = _centered(
        x, plan.acts, shared_axes(dims, 0), self._stored(module, plan, 'lhs')
      )
    if not plan.is_integer or plan.weights is None:
      if scale is not None:
        x = x.astype(_carrier(plan.acts))
      return _half_float(x, scale, kernel, dims)
    if len(kernel.scale) == 1:
      x, w = _whole(x, zero, plan.acts), _kernel(kernel)
      return self._dot(x, w, dims, plan.cuts) * kernel.scale[0] * scale
    x, dims = _rows_of(site, x, dims)
    parts, y = int(plan.cuts == 1), 0
    for g, row in enumerate(kernel.scale):
      rows = slice(g * kernel.group, (g + 1) * kernel.group)
      part = _whole(x[..., rows], zero, plan.acts)
      y += self._dot(part, _kernel(kernel, rows), dims, parts) * row
    return y * scale

  def _product(self, module, plan: SitePlan, lhs, rhs, dims):
    if plan.acts is None:
      return multiply(lhs, rhs, dims)
    ((left,), (right,)), _ = dims
    if plan.softmax != 'uniform':
      levels = LEVELS[plan.softmax]
      a, a_scale = levels(lhs.astype(jnp.float32), plan.acts, left), None
    else:
      a, a_zero, a_scale = _centered(
        lhs, plan.acts, (left,), self._stored(module, plan, 'lhs')
      )
    b, b_zero, b_scale = _centered(
      rhs, plan.acts, (right,), self._stored(module, plan, 'rhs')
    )
    if plan.is_integer:
      pair = _whole(a, a_zero, plan.acts), _whole(b, b_zero, plan.acts)
      y = self._dot(*pair, dims)
    else:
      if a_scale is not None:
        a = a.astype(_carrier(plan.acts))
      y = multiply(a, b.astype(a.dtype), dims)
    for side, x, scale in ((1, b, b_scale), (0, a, a_scale)):
      if scale is not None:  # calibrated ones have no batch axis
        full = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        y = y * spread(full, dims, side, y.ndim)
    return y
