"""Crops of any size, colour jitter, RandAugment: what is drawn, and how strong.

The same numbers between 0 and 1 mean the same in the step (`augment_device`)
and on the host (`augment_host`), so that both draw from one distribution.

Source: random resized crops, Szegedy et al. 2014, arXiv:1409.4842, section 6
(area from a least share to 1, aspect 3/4 to 4/3); RandAugment, Cubuk et al.
2019, arXiv:1909.13719, with the operations and strengths of torchvision 0.28.
"""

import math
from typing import Any

# Numbers that a crop takes: area and aspect of each try, and its place.
TRIES = 10
CROP_DRAWS = 2 * TRIES + 2
_LOW, _HIGH = 3 / 4, 4 / 3
# Numbers that a jitter takes: which order, and three strengths.
JITTER_DRAWS = 4
ENHANCED = ('brightness', 'contrast', 'color')
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
# Numbers that an operation of RandAugment takes: which, and its sign.
OPERATION_DRAWS = 2
OPERATIONS = (
    'identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate',
    'brightness', 'color', 'contrast', 'sharpness', 'posterize', 'solarize',
    'autocontrast', 'equalize',
)  # fmt: skip
MOST = 30  # the largest magnitude
# Fields of `data` that the host sees to where it decodes, with what turns them
# off in the step.
OFF = {'crop': 0.0, 'jitter': 0.0, 'randaugment': ()}


def is_on(data: Any) -> bool:
  """Returns whether any of the three is asked for by a section `data`."""
  return any(data[name] for name in OFF)


def boxes(draws: Any, height: int, width: int, least: float, xp: Any) -> Any:
  """Returns where to crop: whole pixels of a random area and aspect.

  As torchvision's RandomResizedCrop: the first of ten tries that lies inside
  counts; where none does, the largest box in the middle with a legal aspect.

  Args:
    draws: Uniform [b, CROP_DRAWS].
    height: Of the images, in pixels.
    width: Of the images, in pixels.
    least: Smallest share of the area.
    xp: Module of the draws, `numpy` or `jax.numpy`.

  Returns:
    int [b, 4]: top, left, height, width.
  """
  areas = (least + (1 - least) * draws[:, :TRIES]) * (height * width)
  logs = math.log(_LOW) + math.log(_HIGH / _LOW) * draws[:, TRIES : 2 * TRIES]
  w = xp.round(xp.sqrt(areas * xp.exp(logs)))
  h = xp.round(xp.sqrt(areas * xp.exp(-logs)))
  fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
  first = xp.argmax(fits, axis=1)[:, None]
  fits = fits.any(axis=1)
  h, w = (xp.take_along_axis(x, first, axis=1)[:, 0] for x in (h, w))
  middle = min(height, round(width / _LOW)), min(width, round(height * _HIGH))
  h, w = xp.where(fits, h, middle[0]), xp.where(fits, w, middle[1])
  place = []
  for most, draw in ((height - h, draws[:, -2]), (width - w, draws[:, -1])):
    drawn = xp.minimum(xp.floor(draw * (most + 1)), most)
    place.append(xp.where(fits, drawn, most // 2))
  return xp.stack([*place, h, w], axis=1).astype(xp.int32)


def factor(draw: Any, strength: float) -> Any:
  """Returns the factor of a jitter: uniform in 1 - strength .. 1 + strength."""
  low = max(0.0, 1 - strength)
  return low + (1 + strength - low) * draw


def enhancement(magnitude: float) -> float:
  """Returns how far from 1 the factor of an enhancement lies."""
  return 0.9 * magnitude / MOST


def posterize_bits(magnitude: float) -> int:
  """Returns how many bits of a channel stay, 4 to 8."""
  return 8 - round(4 * magnitude / MOST)


def solarize_threshold(magnitude: float) -> float:
  """Returns from which value on a channel is inverted, 0 to 255."""
  return 255 * (1 - magnitude / MOST)


def affine(
  operation: str, signed: float, height: int, width: int
) -> tuple[float, ...]:
  """Returns (a, b, c, d, e, f) of a geometric operation, as Pillow counts.

  The pixel at (x, y) is taken from (a x + b y + c, d x + e y + f), centres of
  pixels at halves.

  Args:
    operation: One of OPERATIONS; all but the geometric ones move nothing.
    signed: Magnitude with its sign, -MOST to MOST.
    height: Of the image, in pixels.
    width: Of the image, in pixels.
  """
  share = signed / MOST
  if operation == 'shear_x':
    return 1, 0.3 * share, 0, 0, 1, 0
  if operation == 'shear_y':
    return 1, 0, 0, 0.3 * share, 1, 0
  # Whole pixels, cut towards zero.
  if operation == 'translate_x':
    return 1, 0, math.trunc(150 / 331 * width * share), 0, 1, 0
  if operation == 'translate_y':
    return 1, 0, 0, 0, 1, math.trunc(150 / 331 * height * share)
  if operation == 'rotate':
    angle = -math.radians(30 * share)  # counter-clockwise is positive
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y
  return 1, 0, 0, 0, 1, 0
