"""Splits of image files, and shares of them in TFDS's syntax: 'train[:80%]'.

Shares are stratified and do not depend on `seed`, so that 'train[:80%]',
'train[80%:90%]' and 'train[90%:]' never share a file, in any run.
"""

import os
import re

import numpy as np

from qvit_jax.data.decode import printable
from qvit_jax.data.listing import Files, stratify
from qvit_jax.errors import ConfigError, DataError

_SHARE = re.compile(r'(.+?)\[(?:(\d+\.?\d*)%)?:(?:(\d+\.?\d*)%)?\]')


class Splits:
  """Labelled images in splits; a kind of set says how a split is listed.

  Attributes:
    root: Path of the set, without links.
    class_names: In label order.
    notes: Lines about what listing it left out or made up.
  """

  class_names: tuple[str, ...]

  def __init__(self, directory: str):
    """Args: directory: `data.dir`."""
    self.root = os.path.realpath(directory)
    self.notes: list[str] = []
    self._listed: dict[str, Files] = {}

  def list_split(self, split: str) -> Files:
    """Returns the files of a split.

    Raises:
      DataError: It is missing or empty, a class of the training split is
        empty, or a link leads out of the folder.
      ConfigError: The split is misspelt.
    """
    base, low, high = parse(split)
    if base not in self._listed:
      self._listed[base] = self._list_base(base)
    files = self._listed[base]
    if (low, high) != (0, 1):
      first, last = (round(len(files) * share) for share in (low, high))
      files = files.take(stratify(files.labels)[first:last])
      self._note_share(split, files)
    if not len(files):
      raise DataError(f'split {split!r} of {printable(self.root)} is empty')
    return files

  def count_shared(self, first: str, second: str) -> int:
    """Returns how many files two splits have in common."""
    (a, *low_high), (b, *others) = parse(first), parse(second)
    if os.path.normpath(a) != os.path.normpath(b):
      return 0
    low, high = max(low_high[0], others[0]), min(low_high[1], others[1])
    count = len(self._listed[a])
    return max(0, round(count * high) - round(count * low))

  def _list_base(self, base: str) -> Files:
    """Returns all files of a split."""
    raise NotImplementedError

  def _note_share(self, split: str, files: Files) -> None:
    missing = len(self.class_names) - len(np.unique(files.labels))
    self.notes.append(
      f'{split} is a stratified share of its folder'
      + (f'; it has no image of {missing} classes' if missing else '')
    )


def parse(split: str) -> tuple[str, float, float]:
  """Returns (name, first share, last share) of a split.

  Raises:
    ConfigError: It is misspelt.
  """
  if '[' not in split and split:
    return split, 0, 1
  found = _SHARE.fullmatch(split)
  low, high = (0.0, 1.0)
  if found:
    low = float(found[2] or 0) / 100
    high = float(found[3] or 100) / 100
  if not found or not 0 <= low < high <= 1:
    raise ConfigError(
      f'data split {split!r} is malformed; give the name of a folder, or a '
      "share of it in percent such as 'train[:80%]' or 'train[80%:90%]'"
    )
  return found[1], low, high


def check_holdout(data, default: float) -> None:
  """Raises ConfigError where `data.holdout` is set but nothing is held out.

  Args:
    data: The section `data` of a config, whose evaluation split is there.
    default: Of the field.
  """
  if data.holdout != default:
    raise ConfigError(
      f'data.holdout={data.holdout:g} would have no effect: '
      f'data.eval_split={data.eval_split!r} is there; leave data.holdout '
      'out, or choose shares such as '
      "--config.data.train_split='train[:90%]' "
      "--config.data.eval_split='train[90%:]'"
    )
