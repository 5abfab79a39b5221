"""Augmentation where images are decoded, by Pillow, one image at a time.

Every draw is a function of the seed and of the example's number in the endless
row that training reads (see `order`): so neither a resume nor the number of
workers or devices changes one.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from qvit_jax.data import augment

_ENHANCERS = {
  'brightness': ImageEnhance.Brightness, 'contrast': ImageEnhance.Contrast,
  'color': ImageEnhance.Color, 'sharpness': ImageEnhance.Sharpness,
}  # fmt: skip
# `data.resize` in Pillow, whose methods have antialias.
METHODS = {
  'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR,
}  # fmt: skip
# Keeps these draws apart from those of the order of examples.
_STREAM = 1


@dataclasses.dataclass(frozen=True)
class HostAugment:
  """What the host does to training images.

  Attributes:
    size: Side of the result, in pixels.
    resize: How crops are resized.
    crop: `data.crop`.
    jitter: `data.jitter`.
    randaugment: `data.randaugment`.
  """

  size: int
  resize: Image.Resampling
  crop: float = 0.0
  jitter: float = 0.0
  randaugment: tuple = ()

  def cut(
    self, image: UInt8[np.ndarray, 'h w 3'], draws: np.ndarray
  ) -> UInt8[np.ndarray, 'size size 3']:
    """Returns a random window of the whole image, resized."""
    h, w = image.shape[:2]
    (box,) = augment.boxes(draws[None], h, w, self.crop, np)
    top, left, height, width = map(int, box)
    window = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(window.resize((self.size, self.size), self.resize))

  def colour(
    self, image: UInt8[np.ndarray, 'h w 3'], draws: np.ndarray
  ) -> UInt8[np.ndarray, 'h w 3']:
    """Returns the image after jitter and RandAugment, those that are on."""
    if not (self.jitter or self.randaugment):
      return image
    made = Image.fromarray(image)
    if self.jitter:
      order, *factors = draws[: augment.JITTER_DRAWS]
      for i in augment.ORDERS[int(order * len(augment.ORDERS))]:
        factor = augment.factor(factors[i], self.jitter)
        made = _ENHANCERS[augment.ENHANCED[i]](made).enhance(factor)
    if self.randaugment:
      count, magnitude = self.randaugment
      start = augment.JITTER_DRAWS
      for i in range(count):
        which, sign = draws[start + 2 * i : start + 2 * i + 2]
        name = augment.OPERATIONS[int(which * len(augment.OPERATIONS))]
        made = operate(made, name, magnitude, 1 if sign < 0.5 else -1)
    return np.asarray(made)

  def draws(self, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the uniform numbers of `cut` and of `colour` for an example.

    Args:
      seed: Of the training.
      number: In the endless row that it reads.
    """
    # RandomState, because NumPy promises that its stream never changes.
    bits = np.random.Philox(np.random.SeedSequence((seed, number, _STREAM)))
    count = self.randaugment[0] if self.randaugment else 0
    total = augment.JITTER_DRAWS + augment.OPERATION_DRAWS * count
    found = np.random.RandomState(bits).random_sample(
      augment.CROP_DRAWS + total
    )
    return found[: augment.CROP_DRAWS], found[augment.CROP_DRAWS :]


def make_host_augment(config: Any) -> HostAugment | None:
  """Returns what the host does to streamed training images; None: nothing.

  Args:
    config: A whole config.
  """
  data = config.data
  if not augment.is_on(data):
    return None
  return HostAugment(
    config.model.image_size, METHODS[data.resize], data.crop, data.jitter,
    tuple(data.randaugment),
  )  # fmt: skip


def operate(
  image: Image.Image, name: str, magnitude: float, sign: int
) -> Image.Image:
  """Returns an image after one operation of RandAugment.

  Args:
    image: RGB.
    name: One of `augment.OPERATIONS`.
    magnitude: 0 to 30.
    sign: 1 or -1, of operations that have two directions.
  """
  if name in _ENHANCERS:
    factor = 1 + sign * augment.enhancement(magnitude)
    return _ENHANCERS[name](image).enhance(factor)
  if name == 'posterize':
    return ImageOps.posterize(image, augment.posterize_bits(magnitude))
  if name == 'solarize':
    return ImageOps.solarize(image, augment.solarize_threshold(magnitude))
  if name == 'autocontrast':
    return ImageOps.autocontrast(image)
  if name == 'equalize':
    return ImageOps.equalize(image)
  if name == 'identity':
    return image
  matrix = augment.affine(name, sign * magnitude, image.height, image.width)
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
  )
