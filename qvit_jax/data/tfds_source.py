"""Classification sets prepared by TFDS, read without TensorFlow.

`tfds.data_source` gives random access to sets in the array_record format; only
preparing a set needs TensorFlow and the network.
"""

import hashlib
import os
import socket
import threading
import urllib.parse

import numpy as np
import tensorflow_datasets as tfds

from qvit_jax.errors import DataError

_PROBE_SECONDS = 2.0


def open_builder(name: str, data_dir: str):
  """Returns the builder of a prepared set; prepares it if the network is up.

  Raises:
    DataError: The name is unknown, the set is neither here nor to be had, it
      is prepared in another format, or it has no image and class label.
  """
  directory = data_dir or None
  try:
    builder = tfds.builder(name, data_dir=directory)
  except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
    raise DataError(
      f'data.name={name!r} is no TFDS data set; set --config.data.name to a '
      "name that TFDS knows, such as 'cifar100'"
    ) from error
  if not builder.is_prepared():
    _prepare(name, builder, directory)
    builder = tfds.builder(name, data_dir=directory)
  if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
    raise DataError(
      f'{name} in {builder.data_dir} is prepared as '
      f'{builder.info.file_format.value}; this project reads array_record: '
      f'run {_command(name, directory)} with another data_dir'
    )
  _keys(builder)
  return builder


def read(builder, split: str) -> tuple:
  """Returns (random-access source, image key, label key) of a split.

  Raises:
    DataError: The split does not exist or is empty.
  """
  image, label = _keys(builder)
  try:
    source = tfds.data_source(
      builder.info.name,
      split=split,
      data_dir=builder.data_dir_root,
      download=False,
      decoders=None,
    )
  except (ValueError, KeyError) as error:
    raise DataError(
      f'split {split!r} of {builder.info.name} cannot be read '
      f'({str(error).splitlines()[0]}); it has '
      f'{", ".join(builder.info.splits)}'
    ) from error
  if not len(source):
    raise DataError(
      f'split {split!r} of {builder.info.name} is empty; choose another'
    )
  return source, image, label


def digest(builder, split: str, size: int) -> str:
  """Returns 16 hex digits of name, version and the records of a split.

  Args:
    builder: Of the set.
    split: Its name, maybe with a share.
    size: How many examples of it are read.
  """
  files = [
    f'{os.path.basename(one.filename)} {one.skip} {one.take}'
    for one in builder.info.splits[split].file_instructions
  ]
  text = '\n'.join([builder.info.full_name, str(size), *files])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def classes(builder) -> tuple[str, ...]:
  """Returns the class names in label order."""
  _, label = _keys(builder)
  return tuple(builder.info.features[label].names)


def image_shape(builder) -> tuple[int, int, int] | None:
  """Returns the [h, w, c] that all images share, or None when they differ."""
  image, _ = _keys(builder)
  shape = builder.info.features[image].shape
  return None if None in shape else tuple(shape)


def load(source, image: str, label: str, limit: int | None = None) -> tuple:
  """Returns uint8 images [n, h, w, 3] and int32 labels [n], decoded.

  Args:
    source: Random-access source whose images share one shape.
    image: Key of the image.
    label: Key of the label.
    limit: Decode only the first so many.
  """
  size = min(len(source), limit or len(source))
  first = as_rgb(source[0][image])
  images = np.empty((size, *first.shape), np.uint8)
  labels = np.empty((size,), np.int32)
  for i in range(size):
    record = source[i]
    images[i] = as_rgb(record[image])
    labels[i] = record[label]
  return images, labels


def as_rgb(image: np.ndarray) -> np.ndarray:
  """Returns [h, w, 3]: grey images are repeated, a fourth channel dropped."""
  if image.shape[-1] == 1:
    return np.repeat(image, 3, axis=-1)
  return image[..., :3]


def _keys(builder) -> tuple[str, str]:
  features = builder.info.features
  keys = builder.info.supervised_keys or ('image', 'label')
  image, label = keys[0], keys[-1]
  fits = (
    len(keys) == 2
    and image in features
    and label in features
    and isinstance(features[image], tfds.features.Image)
    and isinstance(features[label], tfds.features.ClassLabel)
  )
  if not fits:
    raise DataError(
      f'{builder.info.name} has no (image, class label) pair (it has '
      f'{", ".join(features)}); choose a classification set'
    )
  return image, label


def _command(name: str, directory: str | None) -> str:
  where = f'data_dir={directory!r}, ' if directory else ''
  return (
    'python -c "import tensorflow_datasets as t; '
    f"t.builder('{name}', {where}file_format='array_record')"
    '.download_and_prepare()"'
  )


def _prepare(name: str, builder, directory: str | None) -> None:
  if not _online(builder):
    raise DataError(
      f'{name} is not prepared in {builder.data_dir_root} and its site does '
      'not answer; set TFDS_DATA_DIR or --config.data.dir to a folder that '
      f'has it, or run where there is a network: {_command(name, directory)}'
    )
  print(f'preparing {name} in {builder.data_dir_root} (once) ...', flush=True)
  tfds.builder(
    name, data_dir=directory, file_format='array_record'
  ).download_and_prepare()


def _online(builder) -> bool:
  """True if a host of the set accepts a connection within two seconds.

  TFDS itself would try for minutes. Runs in a thread because a name look-up
  has no time limit of its own.
  """
  urls = [str(url) for url in builder.url_infos]
  host = urllib.parse.urlparse(urls[0]).hostname if urls else None
  answers = []

  def probe():
    try:
      port = (host or 'storage.googleapis.com', 443)
      socket.create_connection(port, _PROBE_SECONDS).close()
      answers.append(True)
    except OSError:
      pass

  thread = threading.Thread(target=probe, daemon=True)
  thread.start()
  thread.join(_PROBE_SECONDS)
  return bool(answers)
