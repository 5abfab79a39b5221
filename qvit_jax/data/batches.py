"""Splits of a data set as batches: resident on the device or streamed.

Both kinds answer the same three questions. `source` is the pytree that stays
on the device (the whole split, or nothing); `train_batches` and `eval_batches`
yield host pytrees whose leading axis is this process' share of the batch;
`gather` (in `preprocess.py`) makes images and labels of the two inside the
jitted step.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from PIL import Image

from qvit_jax.data.augment_host import METHODS, HostAugment
from qvit_jax.data.decode import BadFiles, BadImageError, printable
from qvit_jax.data.order import Order, numbers_of
from qvit_jax.data.workers import Batch, load
from qvit_jax.errors import DataError

# Files in a row that may be bad where the next good one is looked for.
_TRIES = 32
# Of fewer images an evaluation is over before worker processes would be up.
_FEW = 10_000
# Of longer images, in shorter sides, only the middle is resized.
_LONGEST = 32
# Threads that decode without workers, and how far ahead of the training.
_THREADS, _BATCHES_AHEAD = 16, 4


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises DataError if a label is outside 0 .. num_classes - 1."""
  if labels.min() < 0 or labels.max() >= num_classes:
    raise DataError(
      f'labels run from {labels.min()} to {labels.max()}, but '
      f'model.num_classes={num_classes} allows 0 to {num_classes - 1}; set '
      f'--config.model.num_classes={labels.max() + 1}'
    )


def digest(*arrays: np.ndarray) -> str:
  """Returns 16 hex digits of the shapes and values of arrays."""
  found = hashlib.sha256()
  for array in arrays:
    found.update(f'{array.dtype} {array.shape}'.encode())
    found.update(np.ascontiguousarray(array))
  return found.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ResidentSplit:
  """A split that fits: uint8 images on the device, batches are indices.

  Attributes:
    images: uint8 [n, h, w, 3].
    labels: int32 [n].
  """

  images: np.ndarray
  labels: np.ndarray

  @property
  def size(self) -> int:
    """Number of examples."""
    return len(self.labels)

  @property
  def source(self) -> dict[str, np.ndarray]:
    """What the device keeps."""
    return {'image': self.images, 'label': self.labels}

  def train_batches(
    self,
    *,
    seed: int,
    batch: int,
    rows: slice,
    first: int,
    last: int,
    augmented: bool = False,
  ) -> Iterator[Batch]:
    """Yields this process' rows of updates `first` .. `last`, both included.

    Indices are the same whether images are `augmented`, which the step does.
    """
    del augmented
    order = Order(seed, self.size)
    for step in range(first, last + 1):
      yield {'index': order(numbers_of(step, batch, rows))}

  def eval_batches(self, *, batch: int, rows: slice) -> Iterator[Batch]:
    """Yields every example once, in order; `mask` is 0 on padding."""
    for start in range(0, self.size, batch):
      index = np.arange(start, start + batch, dtype=np.int32)[rows]
      # Padding repeats the last example: real pixels, so that a scale shared
      # by the batch sees nothing that is not in the data.
      yield {
        'index': np.minimum(index, self.size - 1),
        'mask': (index < self.size).astype(np.float32),
      }


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
  """A split that does not fit: decoded on the host by grain's workers.

  Attributes:
    records: Random-access source.
    decode: Record to (uint8 image [h, w, 3], label).
    image_size: Images are resized on the shorter side and centre-cropped.
    num_classes: Labels must lie below it.
    workers: Processes that decode; 0 decodes in threads, as evaluations of
      few images do.
    limit: Only the first so many examples; 0 = all.
    resize: `data.resize`.
    augment: What training does to images before they reach the step.
    bad_files: Where examples are booked whose `decode` raises BadImageError.
      Training reads the next good one of the list instead, a function of the
      files alone; evaluation masks them.
  """

  records: Any
  decode: Callable[[Any], tuple[np.ndarray, int]]
  image_size: int
  num_classes: int
  workers: int
  limit: int = 0
  resize: str = 'bicubic'
  augment: HostAugment | None = None
  bad_files: BadFiles | None = None

  @property
  def size(self) -> int:
    """Number of examples."""
    return min(len(self.records), self.limit or len(self.records))

  @property
  def source(self) -> dict[str, np.ndarray]:
    """What the device keeps: nothing."""
    return {}

  def train_batches(
    self,
    *,
    seed: int,
    batch: int,
    rows: slice,
    first: int,
    last: int,
    augmented: bool = False,
  ) -> Iterator[Batch]:
    """Yields this process' rows of updates `first` .. `last`, both included.

    Where `augmented`, images as the step takes them; else as evaluation does.
    """
    order = Order(seed, self.size)
    share = rows.stop - rows.start

    def example(i: int):
      step, row = first + i // share, i % share
      number = (step - 1) * batch + rows.start + row
      index = order.at(number)
      if not (augmented and self.augment):
        return self._example(index)
      return self._example(index, self.augment.draws(seed, number))

    for loaded in self._load(example, last - first + 1, share, self.workers):
      self._book(loaded.pop('record'), loaded.pop('skipped'))
      yield loaded

  def eval_batches(self, *, batch: int, rows: slice) -> Iterator[Batch]:
    """Yields every example once, in order; `mask` is 0 on padding."""
    share = rows.stop - rows.start
    steps = -(-self.size // batch)

    def example(i: int):
      number = (i // share) * batch + rows.start + i % share
      record = self._example(min(number, self.size - 1))
      counts = number < self.size and not record['skipped']
      return record | {'mask': np.float32(counts)}

    workers = self.workers if self.size > _FEW else 0
    for loaded in self._load(example, steps, share, workers):
      # Files that were read in place of a bad one have their own turn.
      self._book(loaded.pop('record'), np.minimum(loaded.pop('skipped'), 1))
      yield loaded

  def _load(
    self, example: Callable[[int], Batch], steps: int, share: int, workers: int
  ) -> Iterator[Batch]:
    """Yields batches of `share` examples each, numbered from 0."""
    if not workers:
      examples = grain.MapDataset.range(steps * share).map(example)
      ahead = max(_THREADS, _BATCHES_AHEAD * share)
      loader = examples.to_iter_dataset(grain.ReadOptions(_THREADS, ahead))
      yield from loader.batch(share, drop_remainder=True)
      return

    def batch(step: int) -> Batch:
      rows = [example(step * share + row) for row in range(share)]
      return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    yield from load(batch, steps=steps, workers=workers)

  def _example(
    self, index: int, draws: tuple[np.ndarray, np.ndarray] | None = None
  ) -> dict[str, np.ndarray]:
    """Returns the example, or the next good one, and how many were skipped.

    Args:
      index: Of the record.
      draws: Of its augmentation; None = there is none.
    """
    for skipped in range(_TRIES):
      try:
        image, label = self.decode(self.records[(index + skipped) % self.size])
      except BadImageError:
        continue
      break
    else:  # zeros stand in until the files are booked
      skipped, label = _TRIES, 0
      image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    if not 0 <= label < self.num_classes:
      check_labels(np.asarray([label]), self.num_classes)
    return {
      'image': self._fitted(image, draws),
      'label': np.int32(label),
      'record': np.int32(index),
      'skipped': np.int32(skipped),
    }

  def _fitted(
    self, image: np.ndarray, draws: tuple[np.ndarray, np.ndarray] | None
  ) -> np.ndarray:
    """Returns the image at the model's size, augmented by given draws."""
    if draws is None:
      return fit(image, self.image_size, resize=self.resize)
    window, colours = draws
    if self.augment.crop:
      image = self.augment.cut(image, window)
    else:
      image = fit(image, self.image_size, resize=self.resize)
    return self.augment.colour(image, colours)

  def _book(self, records: np.ndarray, skipped: np.ndarray) -> None:
    """Books bad files in this process: those that decode have no output."""
    for i in np.flatnonzero(skipped):
      for index in range(records[i], records[i] + skipped[i]):
        record = self.records[index % self.size]
        try:
          self.decode(record)
          reason = 'now it can be read'
        except BadImageError as error:
          reason = str(error)
        self.bad_files.add(record[0], reason)
      if skipped[i] == _TRIES:
        raise DataError(
          f'{printable(record[0])} and the {_TRIES - 1} files before it cannot '
          'be decoded; mend or delete them'
        )


def fit(image: np.ndarray, size: int, *, resize: str = 'bicubic') -> np.ndarray:
  """Returns uint8 [size, size, 3]: shorter side resized, centre kept."""
  if image.shape[:2] == (size, size):
    return image
  # Resized, a line of a million pixels would take gigabytes.
  most = _LONGEST * min(image.shape[:2])
  y, x = (max(0, side - most) // 2 for side in image.shape[:2])
  image = image[y : y + most, x : x + most]
  h, w = image.shape[:2]
  scale = size / min(h, w)
  shape = max(size, round(w * scale)), max(size, round(h * scale))
  resized = Image.fromarray(image).resize(shape, METHODS[resize])
  left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
  return np.asarray(resized.crop((left, top, left + size, top + size)))
