"""Folders: split/class/file, or Tiny-ImageNet as distributed.

A split may be a share of its folder; see `shares`.
"""

import collections
import os
import unicodedata
from collections.abc import Sequence

import numpy as np

from qvit_jax.data import food101
from qvit_jax.data.decode import printable
from qvit_jax.data.listing import (
  SUFFIXES,
  Files,
  check_folder,
  check_inside,
  is_folder,
  is_hidden,
  is_image,
  lines,
  scan,
  some,
  walk,
)
from qvit_jax.data.shares import Splits, check_holdout, parse
from qvit_jax.errors import DataError

HOLDOUT = 0.1  # the default of data.holdout


class Folder(Splits):
  """A folder of labelled images, a folder a split."""

  def __init__(self, directory: str, splits: Sequence[str]):
    """Finds the classes.

    Args:
      directory: `data.dir`.
      splits: The names of the training and the evaluation split.

    Raises:
      DataError: There are no classes, one, or other ones in each split.
      ConfigError: A split is misspelt.
    """
    super().__init__(directory)
    self._ignored: list[str] = []
    self._is_tiny = os.path.isfile(os.path.join(self.root, 'wnids.txt'))
    self._bases = dict.fromkeys(parse(split)[0] for split in splits)
    # Labels are those of the training split, or of all there is.
    self._first = next(filter(self.has_split, self._bases), '')
    # {split: {class: its folder}}: Unicode has two forms of one name.
    self._folders: dict[str, dict[str, str]] = {}
    self._ids = self._find_ids()
    if len(self._ids) < 2:
      raise DataError(
        f'{printable(self.root)} has one class only ({some(self._ids)}); give '
        'each of two or more classes a folder of its own'
      )
    self.class_names = self._names()

  def has_split(self, split: str) -> bool:
    """Returns whether the folder of a split is there."""
    return os.path.isdir(os.path.join(self.root, parse(split)[0]))

  # Classes.

  def _find_ids(self) -> tuple[str, ...]:
    found = {
      base: self._class_folders(base)
      for base in self._bases
      if self.has_split(base) and not os.path.isfile(self._annotations(base))
    }
    if self._is_tiny:
      listed = lines(os.path.join(self.root, 'wnids.txt'))
      found = {'wnids.txt': tuple(filter(None, listed)), **found}
    if not found:
      raise DataError(_no_split(self.root, next(iter(self._bases))))
    (first, ids), *others = found.items()
    for other, there in others:
      self._check_known(first, ids, other, there)
    if len(set(ids)) < len(ids):
      raise DataError(
        f'{first} of {printable(self.root)} names a class twice; mend it'
      )
    return ids

  def _check_known(self, first: str, ids, other: str, there) -> None:
    """Raises DataError where a split has images of classes of no label."""
    names = [
      one for one in sorted(set(there) - set(ids))
      if walk(self.root, os.path.join(other, self._folders[other][one]))[0]
    ]  # fmt: skip
    missing = sorted(set(ids) - set(there))
    if missing and other == self._first:  # of wnids.txt
      raise DataError(
        f'the class folders of {first} and {other} in {printable(self.root)} '
        f'differ: only in {first}: {some(list(map(printable, missing)))}; '
        'unpack the data set again'
      )
    if not names:  # empty folders need no label
      return
    cases = {one.casefold(): one for one in ids}
    twins = [one for one in names if one.casefold() in cases]
    hint = ''
    if twins:
      hint = (
        f' ({printable(twins[0])!r} and '
        f'{printable(cases[twins[0].casefold()])!r} differ in case: give both '
        'one name)'
      )
    raise DataError(
      f'the class folders of {first} and {other} in {printable(self.root)} '
      f'differ: only in {other}: {some(list(map(printable, names)))}{hint}, '
      f'and labels are those of {first}; give {first} images of them too, or '
      f'move them out of {other}'
    )

  def _class_folders(self, base: str) -> tuple[str, ...]:
    place = self._checked(base)
    names = [
      entry.name
      for entry in scan(place)
      if not is_hidden(entry.name) and is_folder(entry)
    ]
    if not names or names == ['images']:
      raise DataError(
        f'{printable(place)} holds no class folders, so its images have no '
        f'labels; give each class a folder {base}/CLASS, or choose another '
        'split'
      )
    folders: dict[str, str] = {}
    for name in sorted(names):
      one = unicodedata.normalize('NFC', name)
      if one in folders:
        raise DataError(
          f'{printable(place)} holds the class {printable(one)!r} twice, in '
          'two Unicode forms of one name (composed and decomposed); move the '
          'images into one of the two folders and delete the other'
        )
      folders[one] = name
    self._folders[base] = folders
    return tuple(sorted(folders))

  def _names(self) -> tuple[str, ...]:
    """Returns what people call the classes: words.txt, else their folders."""
    path, words = os.path.join(self.root, 'words.txt'), {}
    if self._is_tiny and os.path.isfile(path):
      words = dict(line.split('\t', 1) for line in lines(path) if '\t' in line)
    names = [printable(words.get(one, one)) for one in self._ids]
    counts = collections.Counter(names)
    return tuple(
      name if counts[name] == 1 else f'{name} ({one})'
      for name, one in zip(names, self._ids, strict=True)
    )

  # Files.

  def _annotations(self, base: str) -> str:
    name = f'{os.path.basename(base)}_annotations.txt'
    return os.path.join(self.root, base, name)

  def _list_base(self, base: str) -> Files:
    self._ignored = []
    self._checked(base)
    if os.path.isfile(annotations := self._annotations(base)):
      files = self._list_annotated(base, annotations)
    else:
      files = self._list_classes(base)
    if self._ignored:
      self.notes.append(
        f'{base}: {len(self._ignored):,} entries are hidden, links to folders '
        'or no image files and are not read: '
        f'{some(list(map(printable, self._ignored)))}'
      )
    return files

  def _list_classes(self, base: str) -> Files:
    names: list[str] = []
    counts, absent = [], []
    entries = scan(os.path.join(self.root, base))
    if beside := sorted(entry.name for entry in entries if is_image(entry)):
      self.notes.append(
        f'{base}: {len(beside):,} images lie in no class folder and are not '
        f'read: {some(list(map(printable, beside)))}'
      )
    for one in self._ids:
      folder = os.path.join(base, self._folders[base].get(one, one))
      if one not in self._folders[base] and base != self._first:
        absent.append(one)
        counts.append(0)
        continue
      self._checked(folder)
      below = os.path.join(folder, 'images')
      if self._is_tiny and os.path.isdir(os.path.join(self.root, below)):
        folder = below
      found = self._list_images(folder)
      if not found and base != self._first:
        absent.append(one)
      elif not found:
        raise DataError(
          f'class {printable(one)!r} is empty: {printable(folder)} in '
          f'{printable(self.root)} holds no file that ends in '
          f'{", ".join(SUFFIXES)}; fill it, or delete '
          'the folder in every split'
        )
      names += found
      counts.append(len(found))
    if absent:
      self.notes.append(
        f'{base}: no images of {len(absent)} of {len(counts)} classes '
        f'({some(list(map(printable, absent)))}), which count in no average '
        'unless they are predicted (f1_macro)'
      )
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return Files(self.root, tuple(names), labels)

  def _list_annotated(self, base: str, path: str) -> Files:
    """Lists SPLIT/images by SPLIT/SPLIT_annotations.txt (file, tab, class)."""
    number = {one: label for label, one in enumerate(self._ids)}
    place = os.path.join(base, 'images')
    found = set(self._list_images(place))
    labelled = {}
    for line in filter(None, lines(path)):
      file, _, rest = line.partition('\t')
      one, name = rest.partition('\t')[0], os.path.join(place, file)
      if one not in number or name not in found:
        what = f'the class {one!r}' if one not in number else f'no file {file}'
        raise DataError(
          f'{printable(path)}: {line!r} names {what} that is not there; mend '
          'it, or unpack the data set again'
        )
      labelled[name] = number[one]
    self._ignored += sorted(found - set(labelled))
    names = sorted(labelled, key=lambda name: (labelled[name], name))
    labels = np.array([labelled[name] for name in names], np.int32)
    return Files(self.root, tuple(names), labels)

  def _list_images(self, folder: str) -> list[str]:
    """Returns the image files in and below a folder, sorted."""
    self._checked(folder)
    found, ignored = walk(self.root, folder)
    self._ignored += ignored
    return found

  def _checked(self, name: str) -> str:
    """Returns the path of a folder in the root."""
    place = os.path.join(self.root, name)
    if not os.path.isdir(place):
      raise DataError(_no_split(self.root, name))
    check_inside(self.root, name)
    return place


def open_folder(directory: str, splits: Sequence[str]) -> Splits:
  """Returns the set in a folder, of whichever kind it is.

  Args:
    directory: `data.dir`.
    splits: The names of the training and the evaluation split.

  Raises:
    DataError: Its files do not make a set with two classes.
    ConfigError: A split is misspelt.
  """
  if food101.is_food101(directory, splits):
    return food101.Food101(directory)
  return Folder(directory, splits)


def resolve_splits(data) -> tuple[str, str, list[str]]:
  """Returns the training split, the evaluation split and lines about them.

  Where `data.eval_split` has no folder and the training folder is the only
  one, `data.holdout` of that is held out.

  Args:
    data: The section `data` of a config.

  Raises:
    DataError: The folder is missing or empty, or a split has none in it.
    ConfigError: A split is misspelt, or data.holdout has no effect.
  """
  root = data.dir
  check_folder('data.dir', root)
  train, evaluation = parse(data.train_split), parse(data.eval_split)
  if food101.is_food101(root, (train[0], evaluation[0])):
    check_holdout(data, HOLDOUT)
    food101.check_splits(root, evaluation[0])
    return data.train_split, data.eval_split, []
  folder = lambda split: os.path.join(root, split[0])
  if os.path.isdir(folder(evaluation)):
    check_holdout(data, HOLDOUT)
    return data.train_split, data.eval_split, []
  others = [
    entry.name
    for entry in scan(root)
    if is_folder(entry) and entry.name != train[0] and not is_hidden(entry.name)
  ]
  if not os.path.isdir(folder(train)) or others or not data.holdout:
    raise DataError(_no_split(root, evaluation[0]))
  if train[1:] != (0, 1) or evaluation[1:] != (0, 1):
    raise DataError(
      f'data.eval_split={data.eval_split!r} has no folder in {root}; name '
      f"a share of what is there, such as '{train[0]}[90%:]'"
    )
  percent = f'{100 * (1 - data.holdout):g}%'
  line = (
    f'{data.eval_split!r} has no folder: {data.holdout:.0%} of {train[0]!r} is '
    'held out'
  )
  return f'{train[0]}[:{percent}]', f'{train[0]}[{percent}:]', [line]


def _no_split(root: str, name: str) -> str:
  there = [
    e.name for e in scan(root) if is_folder(e) and not is_hidden(e.name)
  ]
  return (
    f'{printable(root)} has no folder {printable(name)!r}; it has '
    f'{some(sorted(map(printable, there))) if there else "no folders"}. Images'
    ' are looked for in SPLIT/CLASS/: set --config.data.dir, '
    '--config.data.train_split and --config.data.eval_split so'
  )
