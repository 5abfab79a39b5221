"""The list of a checkpoint's files, with a digest of each.

Readers of other packages start threads and event loops before they look at a
file, and what goes wrong there is printed by them. So no such reader opens a
folder before every file in it is what was written.

The list lies beside the folders that it lists. A checkpoint without one is
older than the list; its arrays have digests of their own.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from qvit_jax.store import files

NAME = 'files.json'


def seal(body: Any) -> dict[str, Any]:
  """Returns JSON values with the SHA-256 of their text beside them."""
  text = json.dumps(body, sort_keys=True)
  return {'body': body, 'sha256': hashlib.sha256(text.encode()).hexdigest()}


def unseal(text: str) -> Any:
  """Returns the values of a sealed text.

  Raises:
    ValueError: It is no such text, or its digest is another one.
  """
  try:
    sealed = json.loads(text)
    body, there = sealed['body'], sealed['sha256']
  except (KeyError, TypeError, RecursionError) as error:
    raise ValueError('it is not sealed') from error
  if there != seal(body)['sha256']:
    raise ValueError('it does not match its own digest')
  return body


def write(folder: pathlib.Path) -> None:
  """Lists the files of all folders in a folder, with size and SHA-256.

  Raises:
    OSError: One cannot be read, or the list not be written.
  """
  body = {
    name: [path.stat().st_size, _digest(path)]
    for name, path in _files(p for p in folder.iterdir() if p.is_dir())
  }
  files.write_text(folder / NAME, json.dumps(seal(body), indent=1) + '\n')


def differences(folder: pathlib.Path, names: Iterable[str]) -> list[str]:
  """Returns how the files of some folders differ from those of the list.

  Args:
    folder: Where the list is.
    names: Of folders in it.

  Raises:
    OSError, ValueError: The list cannot be read, or is damaged.
  """
  try:
    text = (folder / NAME).read_text(encoding='utf-8')
  except FileNotFoundError:
    return []
  names = sorted(names)
  listed = {
    name: facts
    for name, facts in unseal(text).items()
    if name.partition('/')[0] in names
  }
  there = dict(_files(folder / name for name in names))
  lines = [f'{name} is missing' for name in listed if name not in there]
  for name, path in there.items():
    if name not in listed:
      lines.append(f'{name} was not saved there')
      continue
    size, digest = listed[name]
    if path.stat().st_size != size:
      lines.append(f'{name} has {path.stat().st_size:,} bytes, not {size:,}')
    elif _digest(path) != digest:
      lines.append(f'the content of {name} is not what was saved')
  return lines


def _files(
  folders: Iterable[pathlib.Path],
) -> Iterable[tuple[str, pathlib.Path]]:
  """Yields (path below the folder's parent, path) of every file in folders."""
  for folder in sorted(folders):
    for path in sorted(folder.rglob('*')):
      if not path.is_dir():
        yield path.relative_to(folder.parent).as_posix(), path


def _digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
