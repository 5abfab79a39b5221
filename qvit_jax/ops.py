"""The one seam between a model and its arithmetic.

A model never multiplies itself: its layers are `SiteDense`, `SiteConv` and
`SiteProduct`, and all hand their operands to the `Ops` they were given. `Ops`
has five slots:

  core     how a product is computed: float, AQT, later learned steps or ints
  delta    what is added to a layer beside its kernel (LoRA)
  rectify  a transform of queries and keys before their product (Q-ViT's IRM)
  tap      an observer of operands (site listing, calibration)
  cut      what goes on at a cut of the model (features computed once)

A slot that needs variables declares them on the module it is handed, so they
live in their own collection under the layer's own path and `params` stays the
same, name for name, under every recipe.

Letters of the axes, here and everywhere: b batch, h w c image, n tokens,
d width, k heads, f hidden, i o weight in and out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.arithmetic.products import Dims, DotDims, Window, multiply
from qvit_jax.errors import ConfigError

LAYER_KINDS = ('dense', 'conv')
PRODUCT_KINDS = ('qk', 'av')


@dataclasses.dataclass(frozen=True)
class Site:
  """The address, kind and shape of one product of the model.

  Attributes:
    path: Where it is, such as 'stage1/conv2'.
    kind: 'dense', 'conv', 'qk' or 'av'.
    lhs_shape: Left operand for one image, without the batch axis.
    rhs_shape: Kernel [i, o] of a layer, as a matrix (see `products`); right
      operand for one image otherwise.
    macs: Multiply-accumulates for one image.
    window: Of a convolution whose windows may overlap; None for one whose
      input was cut into patches, which is a product of matrices.
  """

  path: str
  kind: str
  lhs_shape: tuple[int, ...]
  rhs_shape: tuple[int, ...]
  macs: int
  window: Window | None = None

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
      that multiplies the output ('' where there is none). No tokens and no
      writers where something that cannot be turned enters it.
    readers: Norms, each with the layers that read its output.
    values: (value, out) layers of each attention.
    queries: (query, key) layers of each attention whose products may be turned
      together; empty where a norm or a position stands between.
    hidden: Layers behind a nonlinearity, whose inputs no kernel can turn.
  """

  tokens: tuple[str, ...]
  writers: tuple[tuple[str, str], ...]
  readers: tuple[tuple[str, tuple[str, ...]], ...]
  values: tuple[tuple[str, str], ...]
  queries: tuple[tuple[str, str], ...]
  hidden: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two layers between which channels can be scaled, by path.

  The second layer alone reads what the first gives, through an activation f
  with f(s x) = s f(x) for s > 0, up to a ceiling. An input channel of the
  second is a row of its kernel matrix modulo the channels of the first.

  Attributes:
    first: The layer whose output channels are scaled.
    second: The layer whose input channels are scaled back.
    ceiling: Beyond it the activation is constant (6 of a ReLU6); None: none.
    is_linear: Whether there is no activation at all.
    has_mean: Whether a mean over pixels lies between the activation and the
      second layer, so that this one's inputs do not show what the activation
      gave.
  """

  first: str
  second: str
  ceiling: float | None = None
  is_linear: bool = False
  has_mean: bool = False


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
    dims: Dims,
  ) -> Array:
    """Returns lhs . rhs by `dims`, in float32.

    Args:
      module: The calling layer; variables of the core are declared on it.
      site: What is computed.
      lhs: Activations, in the compute dtype.
      rhs: Float32 kernel [i, o] of a layer, or activations of a product.
      dims: Dimension numbers of `lax.dot_general`, or a `Window`.
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


@dataclasses.dataclass(frozen=True)
class FloatCore:
  """Plain products in the compute dtype of the activations."""

  is_packed = False

  def __call__(self, module, site, lhs, rhs, dims):
    """See `Core`."""
    del module, site
    return multiply(lhs, rhs.astype(lhs.dtype), dims)


@dataclasses.dataclass(frozen=True)
class Ops:
  """The slots through which a model does its arithmetic; see the module."""

  core: Core = FloatCore()
  delta: Delta | None = None
  rectify: Callable[[nn.Module, str, Array], Array] | None = None
  tap: (
    Callable[[nn.Module, Site, Array, Array | None, Dims], None] | None
  ) = None
  cut: Callable[[nn.Module, str, Array], Array] = lambda module, name, x: x


class SiteDense(nn.Module):
  """A linear layer over the last `in_dims` axes whose product is a site.

  Attributes:
    features: Output axes, e.g. (k, d // k) for a query projection.
    ops: The arithmetic.
    in_dims: How many trailing axes of the input are contracted.
    kind: 'dense', or 'conv' when the input axes are those of a patch.
    dtype: Compute dtype; parameters are float32.
    out_dtype: Of the result; the compute dtype by default.
    init: Of the kernel.
  """

  features: tuple[int, ...]
  ops: Ops
  in_dims: int = 1
  kind: str = 'dense'
  dtype: Any = jnp.float32
  out_dtype: Any = None
  init: Callable[..., Array] = nn.initializers.truncated_normal(0.02)

  @nn.compact
  def __call__(self, x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
    """Returns [b, ..., *features] in the compute dtype."""
    lead, inside = x.shape[: -self.in_dims], x.shape[-self.in_dims :]
    matrix = math.prod(inside), math.prod(self.features)
    w = None  # a packed core has its own
    if not self.ops.core.is_packed or self.has_variable('params', 'kernel'):
      shape = inside + self.features
      kernel = self.param('kernel', self.init, shape, jnp.float32)
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


class SiteConv(nn.Module):
  """A convolution whose product is a site.

  Attributes:
    features: Output channels.
    window: How it slides.
    ops: The arithmetic.
    use_bias: Whether a bias is added; none before a BatchNorm.
    init: Of the kernel [kh, kw, i / groups, o].
    dtype: Compute dtype; parameters are float32.
  """

  features: int
  window: Window
  ops: Ops
  use_bias: bool = True
  init: Callable[..., Array] = nn.initializers.he_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w i']) -> Float[Array, 'b p q o']:
    """Returns the result in the compute dtype.

    Raises:
      ConfigError: Groups do not divide the channels, or the padded image is
        smaller than the kernel.
    """
    window, path = self.window, '/'.join(self.path)
    _check(window, path, x.shape, self.features)
    inside = x.shape[-1] // window.groups
    shape = (*window.size, inside, self.features)
    matrix = math.prod(shape[:3]), self.features
    w = None  # a packed core has its own
    if not self.ops.core.is_packed or self.has_variable('params', 'kernel'):
      kernel = self.param('kernel', self.init, shape, jnp.float32)
      w = kernel.reshape(matrix)
    x = x.astype(self.dtype)
    pixels = math.prod(window.out_size(*x.shape[1:3]))
    site = Site(
      path, 'conv', x.shape[1:], matrix, pixels * math.prod(matrix), window
    )
    delta = self.ops.delta
    if delta is not None:
      w = delta.kernel(self, site, w)
    if self.ops.tap is not None:
      self.ops.tap(self, site, x, w, window)
    y = self.ops.core(self, site, x, w, window)
    if delta is not None:
      y = delta.output(self, site, x, w, y)
    if self.use_bias:
      bias = self.param(
        'bias', nn.initializers.zeros, (self.features,), jnp.float32
      )
      y = y + bias
    return y.astype(self.dtype)


def _check(window: Window, path: str, shape, features: int) -> None:
  """Raises ConfigError where a window does not go with its input."""
  _, height, width, channels = shape
  if channels % window.groups or features % window.groups:
    raise ConfigError(
      f'{path} has {window.groups} groups, which do not divide its {channels} '
      f'input and {features} output channels; choose groups that divide both'
    )
  if min(window.out_size(height, width)) < 1:
    raise ConfigError(
      f'{path} slides a window of {window.size[0]} x {window.size[1]} over '
      f'{height} x {width} pixels, which is larger; raise '
      '--config.model.image_size='
    )


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
