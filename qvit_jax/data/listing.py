"""Which image files there are: read from directories alone.

No file is opened, and none but links is asked for its status, so a million of
them are listed in seconds.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from qvit_jax.data.decode import printable
from qvit_jax.errors import DataError

SUFFIXES = (
    '.jpg', '.jpeg', '.jpe', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff',
)  # fmt: skip


# Folders that systems and tools leave behind, beside those with a dot.
_JUNK = {
  '__macosx', '@eadir', '$recycle.bin', 'lost+found', '#recycle', '@recycle',
  'system volume information', '__pycache__', '#snapshot', '@tmp',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Files:
  """Random access to (path, label).

  Attributes:
    root: The folder that the names count from.
    names: Of the files, by class and then by name.
    labels: int32 [n].
  """

  root: str
  names: tuple[str, ...]
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> tuple[str, int]:
    return os.path.join(self.root, self.names[index]), int(self.labels[index])

  def take(self, index: np.ndarray) -> 'Files':
    """Returns the files of the given positions, in ascending order."""
    index = np.sort(index)
    names = tuple(self.names[i] for i in index)
    return Files(self.root, names, self.labels[index])

  def spread(self, count: int) -> 'Files':
    """Returns `count` files, of every class in proportion; all for 0."""
    if not count or count >= len(self):
      return self
    return self.take(stratify(self.labels)[:count])


def stratify(labels: np.ndarray) -> np.ndarray:
  """Returns an order of the examples whose every stretch is stratified.

  Of a class with k examples, each stretch of n/k places in the n holds one, up
  to ties with other classes. The order is a fixed function of the labels.

  Args:
    labels: int [n].

  Returns:
    int [n], a permutation.
  """
  # RandomState, because NumPy promises that its stream never changes.
  chance = np.random.RandomState(0).permutation(len(labels))
  grouped = np.lexsort((chance, labels))
  _, starts, counts = np.unique(
    labels[grouped], return_index=True, return_counts=True
  )
  rank = np.arange(len(labels)) - np.repeat(starts, counts)
  place = (rank + 0.5) / np.repeat(counts, counts)
  return grouped[np.lexsort((chance[grouped], place))]


def digest(parts: Iterable[Files]) -> str:
  """Returns 16 hex digits of the names and labels of splits."""
  found = hashlib.sha256()
  for files in parts:
    found.update(os.fsencode('\0'.join(files.names)) + files.labels.tobytes())
  return found.hexdigest()[:16]


def digest_sizes(files: Files) -> str:
  """Returns 16 hex digits of the names, labels and sizes of files.

  Raises:
    DataError: One of them has gone.
  """
  sizes = []
  for name in files.names:
    try:
      sizes.append(os.stat(os.path.join(files.root, name)).st_size)
    except OSError as error:
      raise DataError(
        f'{printable(name)} of {printable(files.root)} cannot be read '
        f'({error.strerror}); bring it back, or run the same command again'
      ) from error
  found = digest([files]).encode() + np.array(sizes, np.int64).tobytes()
  return hashlib.sha256(found).hexdigest()[:16]


def check_folder(field: str, directory: str) -> None:
  """Raises DataError where a config field names no folder with something in."""
  if not os.path.isdir(directory):
    what = 'is a file' if os.path.exists(directory) else 'does not exist'
    raise DataError(
      f'{field}={directory!r} {what}; set --config.{field} to a folder'
    )
  if not any(scan(directory)):
    raise DataError(f'{field}={directory!r} is empty; fill it')


def list_images(field: str, path: str) -> tuple[Files, list[str]]:
  """Returns all image files below a folder (or one file), and notes.

  Labels are 0. Links are not followed into folders.

  Raises:
    DataError: There is none, or a link leads out of the folder.
  """
  if os.path.isfile(path):
    root, name = os.path.split(os.path.abspath(path))
    return Files(root, (name,), np.zeros(1, np.int32)), []
  check_folder(field, path)
  root = os.path.realpath(path)
  names, ignored = walk(root, '')
  if not names:
    raise DataError(
      f'{field}={path!r} holds no file that ends in {", ".join(SUFFIXES)}'
    )
  notes = []
  if ignored:
    notes = [
      f'{len(ignored):,} entries are hidden, links to folders or no image files'
    ]
  labels = np.zeros(len(names), np.int32)
  return Files(root, tuple(names), labels), notes


def walk(root: str, folder: str) -> tuple[list[str], list[str]]:
  """Returns image files in and below a folder, and what else is there.

  Both are sorted and named from the root. Links are not followed into folders.

  Raises:
    DataError: A link leads out of the root.
  """
  names, ignored, folders = [], [], [folder]
  while folders:
    folder = folders.pop()
    for entry in scan(os.path.join(root, folder)):
      name = os.path.join(folder, entry.name)
      if entry.is_symlink():
        check_inside(root, name)
      is_own = entry.is_dir(follow_symlinks=False)
      if is_own and not is_hidden(entry.name):
        folders.append(name)
      elif is_image(entry):
        names.append(name)
      else:
        ignored.append(name)
  return sorted(names), sorted(ignored)


def is_hidden(name: str) -> bool:
  """Returns whether a folder is none of the user's."""
  return name.startswith('.') or name.casefold() in _JUNK


def is_image(entry: os.DirEntry) -> bool:
  """Returns whether a directory entry is a file named as an image is."""
  name = entry.name.lower()
  # Not entry.is_file(), which raises where links lead in a circle.
  return (
    not name.startswith('.')
    and name.endswith(SUFFIXES)
    and (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file())
  )


def is_folder(entry: os.DirEntry) -> bool:
  """Returns whether a directory entry is a folder, or a link to one."""
  if entry.is_symlink():
    return os.path.isdir(entry.path)
  return entry.is_dir()


def scan(folder: str) -> list[os.DirEntry]:
  """Returns the entries of a folder. Raises DataError if it is unreadable."""
  try:
    with os.scandir(folder) as entries:
      return list(entries)
  except OSError as error:
    raise DataError(
      f'{printable(folder)} cannot be listed ({error.strerror}); make it '
      'readable'
    ) from error


def lines(path: str) -> list[str]:
  """Returns the lines of a text file; bytes that are no UTF-8 survive.

  Raises:
    DataError: It cannot be read.
  """
  try:
    with open(path, encoding='utf-8', errors='surrogateescape') as file:
      return [line.rstrip('\r\n') for line in file]
  except OSError as error:
    raise DataError(
      f'{printable(path)} cannot be read ({error.strerror}); make it readable'
    ) from error


def check_inside(root: str, name: str) -> None:
  """Raises DataError where `name` leads out of `root`, which has no links."""
  real = os.path.realpath(os.path.join(root, name))
  if os.path.commonpath((root, real)) != root:
    raise DataError(
      f'{printable(name)} is a link that leaves {printable(root)} (to '
      f'{printable(real)}); put what it names into the folder'
    )


def some(names: Sequence[str]) -> str:
  """Returns the first three names and how many more there are."""
  more = f' and {len(names) - 3:,} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
