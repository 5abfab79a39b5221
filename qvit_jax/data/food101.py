"""Food-101 as distributed: images/CLASS/ID.jpg, and the splits in meta/.

Source: Bossard, Guillaumin & Van Gool 2014, "Food-101 - Mining Discriminative
Components with Random Forests". Each list of meta/ is there as text and as
JSON, which must agree; labels are the lines of classes.txt, which are those of
TFDS too, and names the lines of labels.txt.
"""

import collections
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from qvit_jax.data.decode import printable
from qvit_jax.data.listing import Files, lines, some, walk
from qvit_jax.data.shares import Splits, parse
from qvit_jax.errors import DataError

SPLITS = ('train', 'test')
_META = (
    'classes.txt', 'labels.txt', 'train.txt', 'test.txt', 'train.json',
    'test.json',
)  # fmt: skip
_AGAIN = 'unpack food-101.tar.gz again'


def is_food101(directory: str, splits: Sequence[str]) -> bool:
  """Returns whether a folder is Food-101, or what is left of it.

  Args:
    directory: `data.dir`.
    splits: What is asked for; a folder of that name is one of images.
  """
  has = lambda name: os.path.isdir(os.path.join(directory, name))
  if any(has(parse(split)[0]) for split in splits):
    return False
  named_so = os.path.basename(os.path.realpath(directory)) == 'food-101'
  parts = has('images') + has('meta')
  return parts == 2 or (named_so and parts == 1)


def check_splits(directory: str, *names: str) -> None:
  """Raises DataError for a split that Food-101 does not have."""
  for name in names:
    if name not in SPLITS:
      raise DataError(
        f'Food-101 in {printable(directory)} has no split {printable(name)!r}; '
        "set --config.data.train_split and --config.data.eval_split to 'train' "
        "or 'test', or to a share such as 'train[90%:]'"
      )


class Food101(Splits):
  """The set behind a folder with images/ and meta/."""

  def __init__(self, directory: str):
    """Reads meta/ and finds the images, without opening one.

    Args:
      directory: `data.dir`.

    Raises:
      DataError: A file of meta/ is missing or disagrees with another one, or
        an image is missing.
    """
    super().__init__(directory)
    missing = [name for name in _META if not os.path.isfile(self._meta(name))]
    if missing:
      raise DataError(
        f'Food-101 in {printable(self.root)} has no meta/'
        f'{" and no meta/".join(missing)}; {_AGAIN}'
      )
    self._ids = self._read_lines('classes.txt')
    self.class_names = self._names()
    self._entries = {split: self._read_split(split) for split in SPLITS}
    both = set(self._entries['train']) & set(self._entries['test'])
    if both:
      self._refuse(
        f'meta/train.txt and meta/test.txt both name {_few(both)}'
      )
    self._find_images()

  def _list_base(self, base: str) -> Files:
    check_splits(self.root, base)
    number = {one: label for label, one in enumerate(self._ids)}
    entries = [(number[e.partition('/')[0]], e) for e in self._entries[base]]
    entries.sort()
    labels = np.array([label for label, _ in entries], np.int32)
    absent = sorted({*range(len(self._ids))} - {*labels.tolist()})
    if absent:
      names = [printable(self._ids[label]) for label in absent]
      if base == 'train':
        self._refuse(f'meta/train.txt names no image of {some(names)}')
      self.notes.append(
        f'{base}: no images of {len(absent)} of {len(self._ids)} classes '
        f'({some(names)}), which count in no average unless they are predicted '
        '(f1_macro)'
      )
    return Files(self.root, tuple(_file(e) for _, e in entries), labels)

  def _meta(self, name: str) -> str:
    return os.path.join(self.root, 'meta', name)

  def _refuse(self, what: str) -> None:
    raise DataError(f'Food-101 in {printable(self.root)}: {what}; {_AGAIN}')

  def _read_lines(self, name: str) -> list[str]:
    """Returns the lines of a file of meta/, each once."""
    found = [line for line in map(str.strip, lines(self._meta(name))) if line]
    twice = [one for one, n in collections.Counter(found).items() if n > 1]
    if twice or not found:
      what = f'names {_few(twice)} twice' if twice else 'is empty'
      self._refuse(f'meta/{name} {what}')
    return found

  def _names(self) -> tuple[str, ...]:
    """Returns what people call the classes."""
    names = self._read_lines('labels.txt')
    if len(names) != len(self._ids):
      self._refuse(
        f'meta/classes.txt has {len(self._ids)} lines, meta/labels.txt '
        f'{len(names)}'
      )
    if len(names) < 2:
      self._refuse(f'meta/classes.txt names one class only ({_few(self._ids)})')
    return tuple(map(printable, names))

  def _read_split(self, split: str) -> list[str]:
    """Returns 'CLASS/ID' of each image of a split."""
    listed = self._read_lines(f'{split}.txt')
    known = set(self._ids)
    strange = [e for e in listed if e.partition('/')[0] not in known]
    strange += [e for e in listed if not _is_plain(e)]
    if strange:
      self._refuse(
        f'meta/{split}.txt names {_few(strange)}, of no class of '
        'meta/classes.txt'
      )
    differ = set(listed) ^ self._read_json(split)
    if differ:
      self._refuse(
        f'meta/{split}.txt and meta/{split}.json disagree on {_few(differ)}'
      )
    return listed

  def _read_json(self, split: str) -> set[str]:
    """Returns the same of the JSON file: {class: ['CLASS/ID', ...]}."""
    path = self._meta(f'{split}.json')
    try:
      value = json.loads('\n'.join(lines(path)))
      return {entry for entries in value.values() for entry in entries}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
      raise DataError(
        f'{printable(path)} is no JSON object of lists of images '
        f'({type(error).__name__}); {_AGAIN}'
      ) from error

  def _find_images(self) -> None:
    """Notes files that no list names; refuses lists that name no file."""
    if not os.path.isdir(os.path.join(self.root, 'images')):
      self._refuse('it has no folder images')
    found, ignored = walk(self.root, 'images')
    there = set(found)
    for split in SPLITS:
      gone = [e for e in self._entries[split] if _file(e) not in there]
      if gone:
        self._refuse(
          f'{len(gone):,} images of meta/{split}.txt are not there: '
          f'{some([printable(_file(e)) for e in sorted(gone)])}'
        )
      there -= {_file(e) for e in self._entries[split]}
    left = sorted([*there, *ignored])
    if left:
      self.notes.append(
        f'images: {len(left):,} entries are in no list of meta/ and are not '
        f'read: {some(list(map(printable, left)))}'
      )


def _file(entry: str) -> str:
  """Returns the path of an entry of a list, from the root."""
  return os.path.join('images', f'{entry}.jpg')


def _is_plain(entry: str) -> bool:
  """Returns whether an entry is CLASS/ID and leads nowhere else."""
  parts = entry.split('/')
  return len(parts) == 2 and all(p not in ('', '.', '..') for p in parts)


def _few(names: Iterable[str]) -> str:
  return some(sorted(map(printable, names)))
