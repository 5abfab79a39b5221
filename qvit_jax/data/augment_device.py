"""The same augmentation inside the jitted step, for images on the device.

All operations of a batch run at once: a geometric one is a gather of pixels, a
colour one a table of 256 values for each channel, or a blend with a grey or a
smoothed image; an image that drew another operation gets one that does nothing.
Pixels are whole numbers, rounded as Pillow rounds them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from qvit_jax.data import augment

Images = UInt8[Array, 'b h w 3']
# Share of each channel in the grey value, of 2**16 (ITU-R 601), as in Pillow.
_GREY = (19595, 38470, 7471)
_NUMBER = {name: i for i, name in enumerate(augment.OPERATIONS)}


def cut(
  key: Array, images: Images, size: int, least: float, method: str
) -> UInt8[Array, 'b size size 3']:
  """Returns random windows of the images, resized.

  Args:
    key: Of the draws.
    images: At their stored size.
    size: Side of the result, in pixels.
    least: Smallest share of the area.
    method: 'bicubic' or 'bilinear', with antialias.
  """
  b, h, w, _ = images.shape
  draws = jax.random.uniform(key, (b, augment.CROP_DRAWS))
  box = augment.boxes(draws, h, w, least, jnp)
  return resize_boxes(images, box, size, method)


def resize_boxes(
  images: Images, box: Int[Array, 'b 4'], size: int, method: str
) -> UInt8[Array, 'b size size 3']:
  """Returns windows (top, left, height, width) of images, resized.

  As Pillow, along the rows first; nothing outside of a window is seen.
  """
  top, left, height, width = box.T.astype(jnp.float32)
  x = images.astype(jnp.float32)
  across = _weights(left, width, images.shape[2], size, method)
  x = jnp.einsum('btw,bhwc->bhtc', across, x, precision='highest')
  x = jnp.clip(jnp.round(x), 0, 255)
  down = _weights(top, height, images.shape[1], size, method)
  x = jnp.einsum('bsh,bhtc->bstc', down, x, precision='highest')
  return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def _weights(
  start: Float[Array, ' b'],
  length: Float[Array, ' b'],
  count: int,
  size: int,
  method: str,
) -> Float[Array, 'b size count']:
  """Returns which share of each of `count` pixels a pixel of the result is."""
  start, length = start[:, None, None], length[:, None, None]
  scale = length / size
  centre = start + (jnp.arange(size)[:, None] + 0.5) * scale
  pixels = jnp.arange(count)
  x = jnp.abs(pixels + 0.5 - centre) / jnp.maximum(scale, 1)
  if method == 'bilinear':
    share = jnp.maximum(1 - x, 0)
  else:  # Keys 1981, a = -0.5
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    share = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
  inside = (pixels >= start) & (pixels < start + length)
  share = jnp.where(inside, share, 0)
  return share / share.sum(axis=-1, keepdims=True)


def jitter(key: Array, images: Images, strength: float) -> Images:
  """Returns images of other brightness, contrast and saturation.

  Args:
    key: Of the draws.
    images: Of any size.
    strength: Factors are uniform in 1 - strength .. 1 + strength; the order of
      the three is drawn too.
  """
  draws = jax.random.uniform(key, (len(images), augment.JITTER_DRAWS))
  return jitter_by(draws, images, strength)


def jitter_by(
  draws: Float[Array, 'b 4'], images: Images, strength: float
) -> Images:
  """Returns the same for given uniform numbers."""
  count = len(augment.ORDERS)
  which = jnp.minimum((draws[:, 0] * count).astype(jnp.int32), count - 1)
  orders = jnp.asarray(augment.ORDERS)[which]  # [b, 3]
  factors = augment.factor(draws[:, 1:], strength)
  x = images
  for i in range(len(augment.ENHANCED)):
    at = orders[:, i]
    own = jnp.take_along_axis(factors, at[:, None], axis=1)[:, 0]
    ones = jnp.ones_like(own)
    pick = lambda name, at=at, own=own, ones=ones: jnp.where(
      at == augment.ENHANCED.index(name), own, ones
    )
    # Factors of 1 change nothing, so one of the three does.
    x = _blend(jnp.zeros_like(x), x, pick('brightness'))
    x = _blend(_mean_grey(x), x, pick('contrast'))
    x = _blend(_grey(x), x, pick('color'))
  return x


def randaugment(
  key: Array, images: Images, count: int, magnitude: float
) -> Images:
  """Returns images after `count` random operations each.

  Args:
    key: Of the draws.
    images: Of any size.
    count: Operations an image, drawn with replacement.
    magnitude: 0 to 30.
  """
  draws = jax.random.uniform(key, (count, 2, len(images)))
  kinds = len(augment.OPERATIONS)
  which = jnp.minimum((draws[:, 0] * kinds).astype(jnp.int32), kinds - 1)
  signs = jnp.where(draws[:, 1] < 0.5, 1, -1)

  def one(x, drawn):
    return operate(x, *drawn, magnitude), None

  return jax.lax.scan(one, images, (which, signs))[0]


def operate(
  images: Images,
  which: Int[Array, ' b'],
  signs: Int[Array, ' b'],
  magnitude: float,
) -> Images:
  """Returns each image after one operation of RandAugment.

  Args:
    images: Of any size.
    which: Indices into `augment.OPERATIONS`.
    signs: 1 or -1, of operations that have two directions.
    magnitude: 0 to 30.
  """
  x = _move(images, which, signs, magnitude)
  factor = 1 + signs * augment.enhancement(magnitude)
  pick = lambda name: jnp.where(which == _NUMBER[name], factor, 1.0)
  x = _look_up(x, _tables(x, which, magnitude))
  x = _blend(jnp.zeros_like(x), x, pick('brightness'))
  x = _blend(_mean_grey(x), x, pick('contrast'))
  x = _blend(_grey(x), x, pick('color'))
  return _blend(_smooth(x), x, pick('sharpness'))


def _move(images: Images, which: Array, signs: Array, magnitude: float):
  """Returns images after what geometric operation they drew; black around."""
  b, h, w, _ = images.shape
  both = [
    [augment.affine(name, sign * magnitude, h, w) for sign in (1, -1)]
    for name in augment.OPERATIONS
  ]
  matrix = jnp.asarray(both, jnp.float32)[which, (signs < 0).astype(jnp.int32)]
  y, x = jnp.arange(h)[:, None] + 0.5, jnp.arange(w) + 0.5
  at = lambda i: matrix[:, i, None, None]
  column = jnp.floor(at(0) * x + at(1) * y + at(2)).astype(jnp.int32)
  row = jnp.floor(at(3) * x + at(4) * y + at(5)).astype(jnp.int32)
  inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
  index = jnp.where(inside, row * w + column, 0).reshape(b, h * w, 1)
  moved = jnp.take_along_axis(images.reshape(b, h * w, 3), index, axis=1)
  return jnp.where(inside[..., None], moved.reshape(images.shape), 0)


def _tables(images: Images, which: Array, magnitude: float) -> Array:
  """Returns uint8 [b, 3, 256]: what becomes of each value of a channel."""
  values = jnp.arange(256)
  step = 2 ** (8 - augment.posterize_bits(magnitude))
  threshold = augment.solarize_threshold(magnitude)
  planes = jnp.moveaxis(images, -1, 1).reshape(-1, images[0, ..., 0].size)
  counts = jax.vmap(lambda plane: jnp.bincount(plane, length=256))(planes)
  counts = counts.reshape(len(images), 3, 256)
  tables = {
    'posterize': values // step * step,
    'solarize': jnp.where(values < threshold, values, 255 - values),
    'autocontrast': _stretched(counts),
    'equalize': _equalized(counts),
  }
  table = jnp.broadcast_to(values, counts.shape)
  for name, other in tables.items():
    table = jnp.where((which == _NUMBER[name])[:, None, None], other, table)
  return table.astype(jnp.uint8)


def _stretched(counts: Int[Array, 'b 3 256']) -> Array:
  """Returns tables that stretch the values that occur over 0 .. 255."""
  values, is_there = jnp.arange(256), counts > 0
  low = jnp.argmax(is_there, axis=-1, keepdims=True)
  high = 255 - jnp.argmax(is_there[..., ::-1], axis=-1, keepdims=True)
  # In whole numbers, whose quotients need no rounding.
  stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
  return jnp.where(high > low, jnp.clip(stretched, 0, 255), values)


def _equalized(counts: Int[Array, 'b 3 256']) -> Array:
  """Returns tables after which all values occur about as often."""
  values, is_there = jnp.arange(256), counts > 0
  last = 255 - jnp.argmax(is_there[..., ::-1], axis=-1, keepdims=True)
  of_last = jnp.take_along_axis(counts, last, axis=-1)
  step = (counts.sum(-1, keepdims=True) - of_last) // 255
  below = jnp.cumsum(counts, axis=-1) - counts
  table = (step // 2 + below) // jnp.maximum(step, 1)
  return jnp.where(step > 0, jnp.clip(table, 0, 255), values)


def _look_up(images: Images, tables: Array) -> Images:
  """Returns images with every value replaced by a table of its channel."""
  b, h, w, _ = images.shape
  planes = jnp.moveaxis(images, -1, 1).reshape(b, 3, h * w)
  found = jnp.take_along_axis(tables, planes.astype(jnp.int32), axis=2)
  return jnp.moveaxis(found.reshape(b, 3, h, w), 1, -1)


def _blend(other: Any, images: Images, factors: Float[Array, ' b']) -> Images:
  """Returns other + factor (image - other), cut down to whole numbers."""
  factors = factors[:, None, None, None].astype(jnp.float32)
  x, other = images.astype(jnp.float32), other.astype(jnp.float32)
  mixed = jnp.clip(other + factors * (x - other), 0, 255).astype(jnp.uint8)
  return jnp.where(factors == 1, images, mixed)


def _grey(images: Images) -> Array:
  """Returns uint8 [b, h, w, 1]."""
  weighted = images.astype(jnp.int32) * jnp.asarray(_GREY)
  return ((weighted.sum(-1, keepdims=True) + 2**15) >> 16).astype(jnp.uint8)


def _mean_grey(images: Images) -> Array:
  """Returns the mean grey value of each image, [b, 1, 1, 1], rounded."""
  grey = _grey(images).astype(jnp.int32)
  count = images.shape[1] * images.shape[2]
  total = grey.sum((1, 2, 3), keepdims=True)
  return (2 * total + count) // (2 * count)


def _smooth(images: Images) -> Images:
  """Returns weighted means of 3 x 3 pixels; those at the edge stay."""
  x = images.astype(jnp.int32)
  h, w = x.shape[1:3]
  if min(h, w) < 3:
    return images
  total = 4 * x[:, 1:-1, 1:-1]
  for i in range(3):
    for k in range(3):
      total = total + x[:, i : h - 2 + i, k : w - 2 + k]
  mean = (2 * total + 13) // 26
  return images.at[:, 1:-1, 1:-1].set(mean.astype(jnp.uint8))
