"""From uint8 pixels to what the model sees, inside the jitted step.

Order: windows of random size at the model's size; colours, padded crop and flip
at that size or, without windows, at the stored one; resize to the model's size,
normalise, erase, mix. Every draw is a function of the key alone, so a batch is
the same on one device and on eight. Windows and colours of streamed images are
the host's work; see `for_step`.

Source: mixup, Zhang et al. 2017, arXiv:1710.09412; CutMix, Yun et al. 2019,
arXiv:1905.04899; random erasing, Zhong et al. 2017, arXiv:1708.04896 (area
2% to 33%, aspect 0.3 to 3.3, filled with normal noise).
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from qvit_jax.data import augment, augment_device

Images = Float[Array, 'b h w 3']


def gather(source: dict, batch: dict) -> tuple[Array, Array]:
  """Returns (uint8 images, labels) of a batch of indices or of pixels."""
  if 'index' in batch:
    take = lambda x: jnp.take(x, batch['index'], axis=0, mode='clip')
    return take(source['image']), take(source['label'])
  return batch['image'], batch['label']


def prepare_eval(
  images: UInt8[Array, 'b h w 3'], *, data: Any, size: int
) -> Float[Array, 'b size size 3']:
  """Returns normalised float32 images of the model's size."""
  x = _resize(images.astype(jnp.float32) / 255, size, data.resize)
  return (x - jnp.asarray(data.mean)) / jnp.asarray(data.std)


def prepare_train(
  key: Array,
  images: UInt8[Array, 'b h w 3'],
  labels: Int[Array, ' b'],
  *,
  data: Any,
  size: int,
  num_classes: int,
) -> tuple[Float[Array, 'b size size 3'], Float[Array, 'b classes']]:
  """Returns augmented images of the model's size and target distributions."""
  crop_key, flip_key, erase_key, mix_key = jax.random.split(key, 4)
  targets = jax.nn.one_hot(labels, num_classes)
  images = _augment(key, images, data, size)
  if data.pad:
    images = _crop(crop_key, images, data.pad)
  if data.flip:
    flip = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    images = jnp.where(flip, images[:, :, ::-1], images)
  x = prepare_eval(images, data=data, size=size)
  if data.erase:
    x = _erase(erase_key, x, data.erase)
  if data.mixup or data.cutmix:
    x, targets = _mix(mix_key, x, targets, data.mixup, data.cutmix)
  return x, targets


def for_step(data: Any, *, is_resident: bool) -> Any:
  """Returns the section `data` as `prepare_train` is to read it.

  Args:
    data: The section of a config.
    is_resident: Whether the training split is; the host has done its part of
      a streamed one.
  """
  fields = data.to_dict()
  return types.SimpleNamespace(
    **(fields if is_resident else fields | augment.OFF)
  )


def _augment(key: Array, images: Array, data: Any, size: int) -> Array:
  """Returns images after windows, jitter and RandAugment, where they are on."""
  # Keys of their own, so that what was drawn before they came is unchanged.
  crop_key, jitter_key, operation_key = (
    jax.random.fold_in(key, i) for i in range(3)
  )
  if data.crop:
    images = augment_device.cut(crop_key, images, size, data.crop, data.resize)
  if data.jitter:
    images = augment_device.jitter(jitter_key, images, data.jitter)
  if data.randaugment:
    images = augment_device.randaugment(
      operation_key, images, *data.randaugment
    )
  return images


def _resize(x: Images, size: int, method: str) -> Array:
  if x.shape[1:3] == (size, size):
    return x
  shape = (x.shape[0], size, size, x.shape[3])
  # Bicubic overshoots at edges; real pixels lie in 0..1.
  return jnp.clip(jax.image.resize(x, shape, method, antialias=True), 0, 1)


def _crop(key: Array, images: Array, pad: int) -> Array:
  """Zero-pads by `pad` pixels and cuts out the old size at a random place."""
  _, h, w, c = images.shape
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  corners = jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1)
  cut = lambda image, at: jax.lax.dynamic_slice(
    image, (at[0], at[1], 0), (h, w, c)
  )
  return jax.vmap(cut)(padded, corners)


def _box(key: Array, count: int, h: int, w: int, areas, aspects) -> Array:
  """Returns boolean [count, h, w, 1]: inside a random box an image."""
  top, left = jax.random.split(key)
  height = jnp.clip(jnp.round(jnp.sqrt(areas * h * w * aspects)), 0, h)
  width = jnp.clip(jnp.round(jnp.sqrt(areas * h * w / aspects)), 0, w)
  y0 = jnp.floor(jax.random.uniform(top, (count,)) * (h - height + 1))
  x0 = jnp.floor(jax.random.uniform(left, (count,)) * (w - width + 1))
  y, x = jnp.arange(h)[:, None], jnp.arange(w)
  at = lambda v: v[:, None, None]
  inside = (y >= at(y0)) & (y < at(y0 + height))
  inside &= (x >= at(x0)) & (x < at(x0 + width))
  return inside[..., None]


def _erase(key: Array, x: Images, chance: float) -> Images:
  b, h, w, _ = x.shape
  which, area, aspect, place, noise = jax.random.split(key, 5)
  areas = jax.random.uniform(area, (b,), minval=0.02, maxval=0.33)
  log = jnp.log(3.3)
  aspects = jnp.exp(jax.random.uniform(aspect, (b,), minval=-log, maxval=log))
  box = _box(place, b, h, w, areas, aspects)
  box &= jax.random.bernoulli(which, chance, (b, 1, 1, 1))
  return jnp.where(box, jax.random.normal(noise, x.shape, x.dtype), x)


def _mix(key: Array, x: Images, targets: Array, mixup: float, cutmix: float):
  """Mixes each image with its mirror place in the batch, one draw a batch."""
  b, h, w, _ = x.shape
  which, mixup_key, cutmix_key, place = jax.random.split(key, 4)
  use_cutmix = jnp.asarray(cutmix > 0)
  if mixup and cutmix:
    use_cutmix = jax.random.bernoulli(which, 0.5)
  keep = jnp.ones((1, h, w, 1))  # share of the own image, by pixel
  if mixup:
    keep = keep * jax.random.beta(mixup_key, mixup, mixup)
  if cutmix:
    area = 1 - jax.random.beta(cutmix_key, cutmix, cutmix, (1,))
    box = _box(place, 1, h, w, area, jnp.full((1,), h / w))
    keep = jnp.where(use_cutmix, 1.0 - box, keep)
  share = keep.mean()
  x = x * keep + x[::-1] * (1 - keep)
  return x, targets * share + targets[::-1] * (1 - share)
