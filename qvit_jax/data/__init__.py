"""Data sets: what a config names, as two splits of batches."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from qvit_jax.data import batches, digits, folder_source, listing, preprocess
from qvit_jax.data.augment_host import HostAugment, make_host_augment
from qvit_jax.data.decode import BadFiles, printable, read_image
from qvit_jax.errors import ConfigError, DataError

__all__ = [
    'Data', 'count_classes', 'find_data', 'open_data', 'open_images',
    'preprocess',
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Data:
  """Both splits of a data set.

  Attributes:
    train: Split that is learned from; None when only evaluating.
    eval: Split that is evaluated.
    class_names: In label order.
    description: One line for the header of a run.
    notes: More lines: what was left out, what was held out.
    name: Of the set.
    eval_split: Name of the evaluated split, with its share.
    eval_digest: Returns the digest of what is evaluated; see `evaluated`.
    digest: Of the files' names and labels; '' where there are no files.
    bad_files: What could not be decoded so far.
    only_images: Whether nothing but the images of `eval` is known.
  """

  train: batches.ResidentSplit | batches.StreamedSplit | None
  eval: batches.ResidentSplit | batches.StreamedSplit
  class_names: tuple[str, ...]
  description: str
  notes: Sequence[str] = ()
  name: str = ''
  eval_split: str = ''
  eval_digest: Callable[[], str] = lambda: ''
  digest: str = ''
  bad_files: BadFiles = dataclasses.field(default_factory=lambda: BadFiles(0))
  only_images: bool = False

  @functools.cached_property
  def evaluated(self) -> dict[str, Any]:
    """What a number of this evaluation split is of: {'split', 'data'}.

    `data` is {'name', 'digest'}: 16 hex digits of the pixels and labels of the
    digits; of names, labels and sizes of the files of a folder; of name,
    version and records of a TFDS set. Other splits, shares and limits have
    other digests.
    """
    data = {'name': self.name, 'digest': self.eval_digest()}
    return {'split': self.eval_split, 'data': data}


def open_data(config, *, training: bool) -> Data:
  """Returns the data set that `config.data` names.

  Args:
    config: A whole config.
    training: False skips the training split.

  Raises:
    DataError: The set is missing or does not fit the model.
    ConfigError: A field of `config.data` contradicts another.
  """
  if config.data.source == 'digits':
    return _open_digits(config, training)
  if config.data.source == 'folder':
    return _open_folder(config, training)
  return _open_tfds(config, training)


def find_data(config) -> None:
  """Raises DataError if the data set is not there, before anything is built."""
  if config.data.source == 'tfds':
    _open_builder(config)
  elif config.data.source == 'folder':
    _folder_splits(config.data)


def count_classes(config) -> int:
  """Returns how many classes the data set has that `config.data` names.

  Raises:
    DataError: The set is missing.
    ConfigError: A field of `config.data` contradicts another.
  """
  if config.data.source == 'digits':
    return digits.NUM_CLASSES
  if config.data.source == 'folder':
    *splits, _ = _folder_splits(config.data)
    names = folder_source.open_folder(config.data.dir, splits).class_names
    return len(names)
  from qvit_jax.data import tfds_source

  return len(tfds_source.classes(_open_builder(config)))


def _open_builder(config):
  # TFDS costs a second to import and digits do without it.
  from qvit_jax.data import tfds_source

  if not config.data.name:
    raise ConfigError(
      "data.source='tfds' needs a set; set --config.data.name=cifar100"
    )
  return tfds_source.open_builder(config.data.name, config.data.dir)


def _open_digits(config, training: bool) -> Data:
  for field, allowed in (('name', ('', 'digits')), ('dir', ('',))):
    if config.data[field] not in allowed:
      raise ConfigError(
        f'data.{field}={config.data[field]!r} has no effect with '
        "data.source='digits'; set --config.data.source=tfds"
      )
  splits = digits.load()
  wanted = (config.data.train_split, config.data.eval_split)
  for split in wanted if training else wanted[1:]:
    if split not in splits:
      raise DataError(
        f"digits has no split {split!r}; choose 'train' or 'test'"
      )
  names = tuple(map(str, range(digits.NUM_CLASSES)))
  return _resident(
      config, 'digits', names, splits[wanted[0]] if training else None,
      splits[wanted[1]],
      lambda evaluation: batches.digest(evaluation.images, evaluation.labels),
  )  # fmt: skip


def _open_tfds(config, training: bool) -> Data:
  from qvit_jax.data import tfds_source

  data, builder = config.data, _open_builder(config)
  names = tfds_source.classes(builder)
  _check_classes(config, data.name, names)
  limit = config.eval.num_examples
  identify = lambda split: tfds_source.digest(
    builder, data.eval_split, split.size
  )
  train = tfds_source.read(builder, data.train_split) if training else None
  evaluation = tfds_source.read(builder, data.eval_split)
  shape = tfds_source.image_shape(builder)
  if shape and _fits(data, shape, train, evaluation):
    return _resident(
        config, data.name, names, tfds_source.load(*train) if train else None,
        tfds_source.load(*evaluation, limit=limit), identify,
    )  # fmt: skip

  def streamed(records, image, label, limit=0, host=None):
    return batches.StreamedSplit(
      records,
      lambda record: (tfds_source.as_rgb(record[image]), int(record[label])),
      image_size=config.model.image_size,
      num_classes=config.model.num_classes,
      workers=data.workers,
      limit=limit,
      resize=data.resize,
      augment=host,
    )

  train = streamed(*train, host=make_host_augment(config)) if training else None
  evaluation = streamed(*evaluation, limit=limit)
  return Data(
      train, evaluation, names, _describe(data.name, train, evaluation),
      name=data.name, eval_split=data.eval_split,
      eval_digest=functools.partial(identify, evaluation),
  )  # fmt: skip


def _folder_splits(data) -> tuple[str, str, list[str]]:
  if data.name or not data.dir:
    what = (
      f'has no use for data.name={data.name!r}' if data.name else 'needs it'
    )
    raise ConfigError(
      f"data.source='folder' {what}; set --config.data.dir to the folder that "
      'holds the splits, and leave data.name empty'
    )
  return folder_source.resolve_splits(data)


def _open_folder(config, training: bool) -> Data:
  data = config.data
  *splits, notes = _folder_splits(data)
  folder = folder_source.open_folder(data.dir, splits)
  name = os.path.basename(folder.root) or folder.root
  _check_classes(config, data.dir, folder.class_names)
  parts = [folder.list_split(splits[0])] if training else []
  parts.append(folder.list_split(splits[1]).spread(config.eval.num_examples))
  shared = folder.count_shared(*splits) if training else 0
  if shared:
    notes.append(f'{shared:,} of the eval images are trained on too')
  bad_files = BadFiles(data.bad_files)
  train = None
  if training:
    train = _file_split(config, parts[0], bad_files, make_host_augment(config))
  evaluation = _file_split(config, parts[-1], bad_files)
  described = _describe(printable(name), train, evaluation)
  return Data(
      train, evaluation, folder.class_names,
      f'{described}, {len(folder.class_names)} classes',
      notes=(*notes, *folder.notes), name=printable(name),
      eval_split=splits[1], digest=listing.digest(parts),
      eval_digest=functools.partial(listing.digest_sizes, parts[-1]),
      bad_files=bad_files,
  )  # fmt: skip


def open_images(config, class_names: Sequence[str]) -> Data:
  """Returns the images of `eval.images`, unlabelled, as the evaluation split.

  Args:
    config: A whole config.
    class_names: In label order.

  Raises:
    DataError: There are none.
    ConfigError: The field is empty.
  """
  path = config.eval.images
  if not path:
    raise ConfigError(
      '--mode=predict needs images; set --config.eval.images to a folder of '
      'them or to one file'
    )
  files, notes = listing.list_images('eval.images', path)
  bad_files = BadFiles(None)
  split = _file_split(config, files, bad_files)
  return Data(
      None, split, tuple(class_names),
      f'{len(files):,} images of {printable(path)}', notes=notes,
      name=printable(path),
      bad_files=bad_files, only_images=True,
  )  # fmt: skip


def _file_split(
  config, files, bad_files: BadFiles, host: HostAugment | None = None
) -> batches.StreamedSplit:
  size, most = config.model.image_size, config.data.max_pixels
  # The smallest window should not have to be enlarged.
  wanted = size
  if host and host.crop:
    wanted = math.ceil(size / math.sqrt(host.crop))
  return batches.StreamedSplit(
    files,
    functools.partial(_decode, max_pixels=most, size=wanted),
    image_size=size,
    num_classes=config.model.num_classes,
    workers=config.data.workers,
    resize=config.data.resize,
    augment=host,
    bad_files=bad_files,
  )


def _decode(record, *, max_pixels: int, size: int):
  return read_image(record[0], max_pixels=max_pixels, size=size), record[1]


def _fits(data, shape, train, evaluation) -> bool:
  count = len(evaluation[0]) + (len(train[0]) if train else 0)
  pixels = math.prod(shape[:2]) * 3
  return count * pixels <= data.resident_mib * 2**20


def _resident(config, name, class_names, train, evaluation, identify) -> Data:
  _check_classes(config, name, class_names)
  limit = config.eval.num_examples or None
  evaluation = batches.ResidentSplit(*(part[:limit] for part in evaluation))
  train = batches.ResidentSplit(*train) if train else None
  for split in filter(None, (train, evaluation)):
    batches.check_labels(split.labels, config.model.num_classes)
  return Data(
      train, evaluation, class_names, _describe(name, train, evaluation),
      name=name, eval_split=config.data.eval_split,
      eval_digest=functools.partial(identify, evaluation),
  )  # fmt: skip


def _check_classes(config, name: str, class_names: tuple[str, ...]) -> None:
  if len(class_names) > config.model.num_classes:
    raise DataError(
      f'{name} has {len(class_names)} classes, more than '
      f'model.num_classes={config.model.num_classes}; set '
      f'--config.model.num_classes={len(class_names)}'
    )


def _describe(name, train, evaluation) -> str:
  kind = type(evaluation).__name__.removesuffix('Split').lower()
  parts = [f'{train.size:,} train'] if train else []
  parts.append(f'{evaluation.size:,} eval images')
  return f'{name}, {", ".join(parts)}, {kind}'
