"""What convolutional models share: layers, padding, pooling, checks."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qvit_jax.arithmetic.products import Window
from qvit_jax.errors import ConfigError
from qvit_jax.models.batch_norm import BatchNorm
from qvit_jax.ops import Ops, SiteConv

# He et al. 2015, arXiv:1502.01852, section 2.2, by outputs as in torchvision.
HE = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
LINEAR = nn.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A convolution and, where the model has them, the BatchNorm behind it.

  Attributes:
    name: Of the convolution.
    norm: Of the BatchNorm.
    features: Output channels.
    size: Side of the kernel.
    stride: Of both axes.
    groups: See `Window`.
    padding: 'torch' or 'same'; see `window_of`.
    has_bias: Whether there is a bias even before a BatchNorm.
  """

  name: str
  norm: str
  features: int
  size: int = 3
  stride: int = 1
  groups: int = 1
  padding: str = 'torch'
  has_bias: bool = False


def window_of(layer: Layer, height: int, width: int) -> Window:
  """Returns how a layer's kernel slides over an image of that size.

  'torch' puts (k - 1) / 2 zeros on every side of the image. 'same' gives
  ceil(n / stride) pixels, as TensorFlow: as few zeros as this takes for the n
  pixels at hand, the odd one below and on the right.
  """
  k, stride = layer.size, layer.stride
  if layer.padding == 'torch':
    pads = ((k // 2, k // 2),) * 2
  else:
    totals = [
      max((-(-n // stride) - 1) * stride + k - n, 0) for n in (height, width)
    ]
    pads = tuple((total // 2, total - total // 2) for total in totals)
  return Window((k, k), (stride, stride), pads, layer.groups)


def apply_layer(
  o: Any, ops: Ops, layer: Layer, x: Float[Array, 'b h w i'], train: bool
) -> Float[Array, 'b p q o']:
  """Returns the layer's output before its activation.

  Called in a compact method of a module, whose children the layers become.

  Args:
    o: Options of the model: `batch_norm` and `dtype`.
    ops: The arithmetic.
    layer: What to apply.
    x: Its input.
    train: See the models.
  """
  has_norm = o.batch_norm != 'none'
  conv = SiteConv(
    layer.features,
    window_of(layer, *x.shape[1:3]),
    ops,
    use_bias=layer.has_bias or not has_norm,
    init=HE,
    dtype=o.dtype,
    name=layer.name,
  )
  x = conv(x)
  if not has_norm:
    return x
  changes = o.batch_norm == 'train'
  return BatchNorm(changes, dtype=o.dtype, name=layer.norm)(x, train)


def max_pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b p q c']:
  """Returns the largest of each 2 x 2 pixels; an odd last row is left out."""
  x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
  b, h, w, c = x.shape
  # Two maxima of halves: their gradients are cheaper than those of a window.
  x = x.reshape(b, h // 2, 2, w, c)
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])
  x = x.reshape(b, h // 2, w // 2, 2, c)
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def adaptive_mean(
  x: Float[Array, 'b h w c'], size: int
) -> Float[Array, 'b size size c']:
  """Returns means over size x size windows, whatever the image's size.

  Window i of n pixels reaches from floor(i n / size) to ceil((i + 1) n / size),
  as torch's AdaptiveAvgPool2d.
  """
  for axis in (1, 2):
    n = x.shape[axis]
    if n == size:
      continue
    wide = x.astype(jnp.float32)
    share = window_shares(n, size)
    mean = jnp.tensordot(wide, share, (axis, 0), precision='highest')
    x = jnp.moveaxis(mean, -1, axis).astype(x.dtype)
  return x


def window_shares(n: int, size: int) -> Float[np.ndarray, 'n size']:
  """Returns what each of n pixels counts in the mean over each window."""
  share = np.zeros((n, size), np.float32)
  for i in range(size):
    low, high = i * n // size, -(-(i + 1) * n // size)
    share[low:high, i] = 1 / (high - low)
  return share


def check_image(model: Any, least: int) -> None:
  """Raises ConfigError where an image is smaller than the strides allow.

  Args:
    model: `config.model`.
    least: Pixels that become one in the end.
  """
  if model.image_size < least:
    raise ConfigError(
      f'model.image_size={model.image_size} is too small: the strides of '
      f'{model.name} make one pixel of {least} x {least}; set '
      f'--config.model.image_size={least} or more'
    )
