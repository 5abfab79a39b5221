"""The one seam between a model and its arithmetic.

A model never multiplies matrices itself: its layers are `SiteDense` and
`SiteProduct`, and both hand their operands to the `Ops` they were given. `Ops`
has four slots:

  core     how a product is computed: float, AQT, later learned steps or ints
  delta    what is added to a layer beside its kernel (LoRA)
  rectify  a transform of queries and keys before their product (Q-ViT's IRM)
  tap      an observer of operands (site listing, calibration)

A slot that needs variables declares them on the module it is handed, so they
live in their own collection under the layer's own path and `params` stays the
same, name for name, under every recipe.

Letters of the axes, here and everywhere: b batch, h w c image, n tokens,
d width, k heads, f hidden, i o weight in and out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYER_KINDS = ('dense', 'conv')
PRODUCT_KINDS = ('qk', 'av')
DotDims = tuple[tuple[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Site:
  """The address, kind and shape of one product of the model.

  Attributes:
    path: Where it is, such as 'stage1/conv2'.
    kind: 'dense', 'conv' (non-overlapping patches), 'qk' or 'av'.
    lhs_shape: Left operand for one image, without the batch axis.
    rhs_shape: Kernel [i, o] of a layer; right operand for one image otherwise.
    macs: Multiply-accumulates for one image.
  """

  path: str
  kind: str
  lhs_shape: tuple[int, ...]
  rhs_shape: tuple[int, ...]
  macs: int

  @property
  def is_layer(self) -> bool:
    """True for a product with weights, False for an attention product."""
    return self.kind in LAYER_KINDS


@dataclasses.dataclass(frozen=True)
class Stream:
  """Who writes to the residual stream and who reads from it, by path.

  Attributes:
    tokens: Parameters that lie in it: [..., d].
    writers: Layers whose outputs are added to it, each with the LayerScale
      that multiplies the output ('' where there is none).
    readers: Norms, each with the layers that read its output.
    values: (value, out) layers of each attention.
    queries: (query, key) layers of each attention whose products may be turned
      together; empty where a norm stands between.
    hidden: Layers behind a nonlinearity, whose inputs no kernel can turn.
  """

  tokens: tuple[str, ...]
  writers: tuple[tuple[str, str], ...]
  readers: tuple[tuple[str, tuple[str, ...]], ...]
  values: tuple[tuple[str, str], ...]
  queries: tuple[tuple[str, str], ...]
  hidden: tuple[str, ...]


@runtime_checkable
class Core(Protocol):
  """How one product is computed. Implementations are frozen and hashable.

  Attributes:
    is_packed: Whether kernels lie in a collection of the core's instead of in
      `params`; then layers declare none and hand over None, but for those whose
      kernels are in `params` nevertheless.
  """

  is_packed: bool

  def __call__(
    self,
    module: nn.Module,
    site: Site,
    lhs: Array,
    rhs: Array | None,
    dims: DotDims,
  ) -> Array:
    """Returns lhs . rhs by `dims` (lax.dot_general's), in float32.

    Args:
      module: The calling layer; variables of the core are declared on it.
      site: What is computed.
      lhs: Activations, in the compute dtype.
      rhs: Float32 kernel [i, o] of a layer, or activations of a product.
      dims: Dimension numbers of `lax.dot_general`.
    """


@runtime_checkable
class Delta(Protocol):
  """What is added to layers. Implementations are frozen and hashable."""

  def kernel(
    self, module: nn.Module, site: Site, w: Array | None
  ) -> Array | None:
    """Returns the kernel [i, o] that the core is handed; None if packed."""

  def output(
    self, module: nn.Module, site: Site, x: Array, w: Array | None, y: Array
  ) -> Array:
    """Returns the layer's output before its bias, [..., o].

    Args:
      module: The calling layer; variables of the slot are declared on it.
      site: Which layer.
      x: Its input [..., i], in the compute dtype.
      w: What `kernel` returned.
      y: The core's product of both, [..., o].
    """


def precision_of(*operands: Array) -> jax.lax.Precision | None:
  """Returns the precision of a product: float32 operands mean float32.

  Accelerators multiply float32 as TF32 (GPU) or bf16 (TPU) unless they are
  asked for more; half-width operands are exact as they are.
  """
  wide = any(x.dtype == jnp.float32 for x in operands)
  return jax.lax.Precision.HIGHEST if wide else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_general(lhs: Array, rhs: Array, dims: DotDims) -> Array:
  """Returns the product accumulated in float32, for operands of one dtype.

  Left to itself, autodiff of a bf16 product with a float32 result multiplies
  float32 cotangents by bf16 operands, off the fast path of the hardware. Here
  the cotangent is cast to the operands' dtype first; in float32 nothing
  changes.
  """
  return jax.lax.dot_general(
    lhs,
    rhs,
    dims,
    precision=precision_of(lhs, rhs),
    preferred_element_type=jnp.float32,
  )


def _dot_forward(lhs, rhs, dims):
  return dot_general(lhs, rhs, dims), (lhs, rhs)


def _dot_backward(dims, operands, cotangent):
  _, pullback = jax.vjp(
    lambda lhs, rhs: jax.lax.dot_general(
      lhs, rhs, dims, precision=precision_of(lhs, rhs)
    ),
    *operands,
  )
  return pullback(cotangent.astype(operands[0].dtype))


dot_general.defvjp(_dot_forward, _dot_backward)


@dataclasses.dataclass(frozen=True)
class FloatCore:
  """Plain products in the compute dtype of the activations."""

  is_packed = False

  def __call__(self, module, site, lhs, rhs, dims):
    """See `Core`."""
    del module, site
    return dot_general(lhs, rhs.astype(lhs.dtype), dims)


@dataclasses.dataclass(frozen=True)
class Ops:
  """The slots through which a model does its arithmetic; see the module."""

  core: Core = FloatCore()
  delta: Delta | None = None
  rectify: Callable[[nn.Module, str, Array], Array] | None = None
  tap: (
    Callable[[nn.Module, Site, Array, Array | None, DotDims], None] | None
  ) = None


class SiteDense(nn.Module):
  """A linear layer over the last `in_dims` axes whose product is a site.

  Attributes:
    features: Output axes, e.g. (k, d // k) for a query projection.
    ops: The arithmetic.
    in_dims: How many trailing axes of the input are contracted.
    kind: 'dense', or 'conv' when the input axes are those of a patch.
    dtype: Compute dtype; parameters are float32.
    out_dtype: Of the result; the compute dtype by default.
  """

  features: tuple[int, ...]
  ops: Ops
  in_dims: int = 1
  kind: str = 'dense'
  dtype: Any = jnp.float32
  out_dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
    """Returns [b, ..., *features] in the compute dtype."""
    lead, inside = x.shape[: -self.in_dims], x.shape[-self.in_dims :]
    matrix = math.prod(inside), math.prod(self.features)
    w = None  # a packed core has its own
    if not self.ops.core.is_packed or self.has_variable('params', 'kernel'):
      kernel = self.param(
        'kernel',
        nn.initializers.truncated_normal(0.02),
        inside + self.features,
        jnp.float32,
      )
      w = kernel.reshape(matrix)
    bias = self.param('bias', nn.initializers.zeros, self.features, jnp.float32)
    # One canonical product, x [..., i] by w [i, o], whatever the axes: every
    # core, solver and packer sees the same two-dimensional kernel.
    x = x.astype(self.dtype).reshape(*lead, matrix[0])
    site = Site(
      '/'.join(self.path),
      self.kind,
      x.shape[1:],
      matrix,
      math.prod(x.shape[1:]) * matrix[1],
    )
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    delta = self.ops.delta
    if delta is not None:
      w = delta.kernel(self, site, w)
    if self.ops.tap is not None:
      self.ops.tap(self, site, x, w, dims)
    y = self.ops.core(self, site, x, w, dims)
    if delta is not None:
      y = delta.output(self, site, x, w, y)
    y = y.reshape(*lead, *self.features) + bias
    return y.astype(self.out_dtype or self.dtype)


class SiteProduct(nn.Module):
  """An attention product, itself a site.

  Attributes:
    kind: 'qk' or 'av'.
    dims: Dimension numbers of `lax.dot_general`; axis 0 is the batch.
    ops: The arithmetic.
  """

  kind: str
  dims: DotDims
  ops: Ops

  @nn.compact
  def __call__(
    self, lhs: Float[Array, 'b ...'], rhs: Float[Array, 'b ...']
  ) -> Float[Array, 'b ...']:
    """Returns the product in float32."""
    (lhs_contract, _), _ = self.dims
    out = jax.eval_shape(
      lambda a, b: jax.lax.dot_general(a, b, self.dims), lhs, rhs
    )
    inner = math.prod(lhs.shape[axis] for axis in lhs_contract)
    site = Site(
      '/'.join(self.path),
      self.kind,
      lhs.shape[1:],
      rhs.shape[1:],
      math.prod(out.shape[1:]) * inner,
    )
    if self.ops.tap is not None:
      self.ops.tap(self, site, lhs, rhs, self.dims)
    return self.ops.core(self, site, lhs, rhs, self.dims)
