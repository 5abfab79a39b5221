"""Image files as RGB pixels, by Pillow, never more than was asked for.

Formats are named, so that no other parser of Pillow ever sees a file; the
pixels that a header promises are counted before memory is taken.
"""

import os
import re
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from qvit_jax.errors import DataError

FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF')
_CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]')
_TAGS = {'exif', 'xmp'}  # where a JPEG says how it is turned

# Above the most that data.max_pixels may be, Pillow warns and goes on.
warnings.filterwarnings('error', category=Image.DecompressionBombWarning)


class BadImageError(DataError):
  """A file is no image that can be read; the message says why, not which."""


def read_image(
  path: str, *, max_pixels: int, size: int = 0
) -> UInt8[np.ndarray, 'h w 3']:
  """Returns the pixels of an image file, upright.

  Grey values are repeated, palettes looked up; of 16 bits the upper 8 count;
  CMYK is converted without a profile; transparent pixels lie on white; of an
  animation the first frame counts; the EXIF orientation is applied.

  Args:
    path: A JPEG, PNG, GIF, BMP, WebP or TIFF file, whatever its suffix.
    max_pixels: The most that width times height may be.
    size: Pixels of the shorter side that are wanted; a JPEG of at least four
      times as many is scaled down by a power of two while it is decoded, to no
      less than twice as many. 0 = as stored.

  Raises:
    BadImageError: It cannot be read, has too many pixels, or values without a
      known range (32-bit integers, floats).
  """
  try:
    with Image.open(path, formats=FORMATS) as image:
      width, height = image.size
      if width * height > max_pixels:
        raise BadImageError(
          f'{width * height} pixels are more than data.max_pixels={max_pixels}'
        )
      if size and min(width, height) >= 4 * size:
        image.draft(None, (2 * size, 2 * size))
      image.load()
      # Most JPEGs have no tags: a tenth of the time of a small one is saved.
      if image.format != 'JPEG' or _TAGS & image.info.keys():
        ImageOps.exif_transpose(image, in_place=True)
      return to_rgb(image)
  except BadImageError:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as bomb:
    count = re.search(r'\d+', str(bomb))[0]
    raise BadImageError(
      f'{count} pixels are more than data.max_pixels={max_pixels}'
    ) from bomb
  except Exception as error:  # noqa: BLE001 - parsers raise whatever they meet
    raise BadImageError(_reason(path, error)) from error


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, 'h w 3']:
  """Returns the pixels of an image, as `read_image` does, as it lies.

  Raises:
    BadImageError: Its values have no known range.
  """
  if image.mode.startswith('I;16'):
    # Pillow would clip at 255; of 16-bit colours it keeps the upper half too.
    grey = (np.asarray(image) >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
  if image.mode in ('I', 'F'):
    raise BadImageError(f'its values (mode {image.mode}) have no known range')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def _reason(path: str, error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):
    if os.path.getsize(path) == 0:
      return 'the file is empty'
    return f'it is none of {", ".join(FORMATS)}'
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'


def printable(path: str) -> str:
  r"""Returns a path on one line: what is no UTF-8 or no text stands as \xNN."""
  text = os.fsencode(path).decode('utf-8', 'backslashreplace')
  return _CONTROL.sub(lambda found: f'\\x{ord(found[0]):02x}', text)


class BadFiles:
  """The files that could not be decoded; shared by the splits of a run."""

  def __init__(self, limit: int | None):
    """Args: limit: How many there may be; None: any number."""
    self._limit = limit
    self.reasons: dict[str, str] = {}

  def add(self, path: str, reason: str) -> None:
    """Books a file and prints its path, once.

    Raises:
      DataError: There are more than the limit.
    """
    if path in self.reasons:
      return
    self.reasons[path] = reason
    text = f'{printable(path)} cannot be decoded ({reason})'
    if self._limit is None:
      print(f'skipped   {text}', flush=True)
      return
    if len(self.reasons) > self._limit:
      raise DataError(
        f'{text}, file {len(self.reasons)} of that kind, but data.bad_files='
        f'{self._limit} is the most; mend or delete '
        f'{"it" if self._limit == 0 else "them"}, or raise '
        '--config.data.bad_files'
      )
    print(
      f'skipped   {text}, {len(self.reasons)} of at most {self._limit}',
      flush=True,
    )

  def lines(self) -> list[str]:
    """Returns a line with the count, if there were any."""
    count = len(self.reasons)
    files = 'file' if count == 1 else 'files'
    return [f'{count:,} {files} could not be decoded'] if count else []
