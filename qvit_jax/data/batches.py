"""Splits of a data set as batches: resident on the device or streamed. Row 4.

Both kinds answer the same three questions. `source` is the pytree that stays
on the device (the whole split, or nothing); `train_batches` and `eval_batches`
yield host pytrees whose leading axis is this process' share of the batch;
`gather` (in `preprocess.py`) makes images and labels of the two inside the
jitted step.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from PIL import Image

from qvit_jax.data.order import Order, numbers_of
from qvit_jax.errors import DataError

Batch = dict[str, np.ndarray]


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises DataError if a label is outside 0 .. num_classes - 1."""
  if labels.min() < 0 or labels.max() >= num_classes:
    raise DataError(
      f'labels run from {labels.min()} to {labels.max()}, but '
      f'model.num_classes={num_classes} allows 0 to {num_classes - 1}; set '
      f'--config.model.num_classes={labels.max() + 1}'
    )


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
    self, *, seed: int, batch: int, rows: slice, first: int, last: int
  ) -> Iterator[Batch]:
    """Yields this process' rows of updates `first` .. `last`, both included."""
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
    workers: Processes that decode; 0 decodes in threads.
    limit: Only the first so many examples; 0 = all.
  """

  records: Any
  decode: Callable[[Any], tuple[np.ndarray, int]]
  image_size: int
  num_classes: int
  workers: int
  limit: int = 0

  @property
  def size(self) -> int:
    """Number of examples."""
    return min(len(self.records), self.limit or len(self.records))

  @property
  def source(self) -> dict[str, np.ndarray]:
    """What the device keeps: nothing."""
    return {}

  def train_batches(
    self, *, seed: int, batch: int, rows: slice, first: int, last: int
  ) -> Iterator[Batch]:
    """Yields this process' rows of updates `first` .. `last`, both included."""
    order = Order(seed, self.size)
    share = rows.stop - rows.start

    def example(i: int):
      step, row = first + i // share, i % share
      return self._example(
        int(order(numbers_of(step, batch, rows)[row : row + 1])[0])
      )

    total = (last - first + 1) * share
    yield from self._load(grain.MapDataset.range(total).map(example), share)

  def eval_batches(self, *, batch: int, rows: slice) -> Iterator[Batch]:
    """Yields every example once, in order; `mask` is 0 on padding."""
    share = rows.stop - rows.start
    steps = -(-self.size // batch)

    def example(i: int):
      number = (i // share) * batch + rows.start + i % share
      record = self._example(min(number, self.size - 1))
      return record | {'mask': np.float32(number < self.size)}

    examples = grain.MapDataset.range(steps * share).map(example)
    yield from self._load(examples, share)

  def _load(self, examples: grain.MapDataset, share: int) -> Iterator[Batch]:
    batches = examples.batch(share, drop_remainder=True)
    threads = grain.ReadOptions(num_threads=0 if self.workers else 16)
    loader = batches.to_iter_dataset(threads)
    if self.workers:
      options = grain.MultiprocessingOptions(num_workers=self.workers)
      loader = loader.mp_prefetch(options)
    return iter(loader)

  def _example(self, index: int) -> dict[str, np.ndarray]:
    image, label = self.decode(self.records[index])
    check_labels(np.asarray([label]), self.num_classes)
    return {
      'image': fit(image, self.image_size),
      'label': np.int32(label),
    }


def fit(image: np.ndarray, size: int) -> np.ndarray:
  """Returns uint8 [size, size, 3]: shorter side resized, centre kept."""
  if image.shape[:2] == (size, size):
    return image
  h, w = image.shape[:2]
  scale = size / min(h, w)
  shape = max(size, round(w * scale)), max(size, round(h * scale))
  resized = Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC)
  left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
  return np.asarray(resized.crop((left, top, left + size, top + size)))
