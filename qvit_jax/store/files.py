"""Files of a workdir: atomic writes and the lock."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Sequence
from typing import IO, Any

from qvit_jax.errors import ConfigError

# What a reader meets in JSON that is not what was written.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError)
_ANEW = 'delete it and run the same command again'


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file in one step: a reader sees the old or the new text."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Replaces a file in one step: a reader sees the old or the new bytes."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with open(temporary, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[str]]:
  """Opens a text file that takes the place of another one when it is whole.

  Where that fails the former file stays.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a JSON file in one step."""
  write_text(path, json.dumps(value, indent=1) + '\n')


def read_json(
  path: pathlib.Path,
  what: str,
  keys: Sequence[str] = (),
  *,
  advice: str = _ANEW,
) -> dict[str, Any] | None:
  """Returns the object in a JSON file of a workdir; None where there is none.

  Args:
    path: Of the file.
    what: Phrase: what it has to be.
    keys: What the object has to hold.
    advice: What to do where it is not that.

  Raises:
    ConfigError: It is damaged or something else.
  """
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    return {**found, **{key: found[key] for key in keys}}
  except UNREADABLE as error:
    raise damaged(path, what, error, advice) from error


def damaged(
  path: pathlib.Path, what: str, error: Exception, advice: str = _ANEW
) -> ConfigError:
  """Returns the error for a JSON file that is not what it has to be."""
  return ConfigError(f'{path} is no {what} ({type(error).__name__}); {advice}')


def open_workdir(path: str) -> pathlib.Path:
  """Returns the workdir as an absolute path, made if it was not there.

  Raises:
    ConfigError: The path is a file, or its disk takes no files.
  """
  if not path:
    raise ConfigError('no workdir was given; set --workdir=DIR')
  if '://' in path:
    raise ConfigError(
      f'--workdir={path} is no local path; remote storage is not supported, '
      'choose a local directory'
    )
  workdir = pathlib.Path(path).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise ConfigError(
      f'--workdir={path} is (or lies below) a file; choose a directory'
    ) from error
  except OSError as error:
    raise ConfigError(cannot_write(path, error)) from error
  return workdir


def cannot_write(path, error: OSError) -> str:
  """Returns the one line for an operating system's refusal to write."""
  hint = {
    errno.ENOSPC: 'the disk is full: free some space',
    errno.EDQUOT: 'the quota is used up: free some space',
    errno.EROFS: 'the disk is read-only: choose another workdir',
    errno.EACCES: 'permission denied: choose another workdir',
  }.get(error.errno, f'{error.strerror or error}: choose another workdir')
  return f'{path} cannot be written, {hint} and run the same command again'


class Lock:
  """Keeps a second run out of a workdir while this one works there.

  Use it as a context. The operating system drops the lock with the process,
  however it dies.
  """

  def __init__(self, workdir: pathlib.Path):
    """Takes the lock. Raises ConfigError if another run holds it."""
    path = workdir / '.lock'
    try:
      self._file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115
    except OSError as error:
      raise ConfigError(cannot_write(workdir, error)) from error
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._file.seek(0)
      owner = self._file.read().strip() or 'another process'
      raise ConfigError(
        f'--workdir={workdir} is in use by {owner}; wait for it, stop it, or '
        'choose another workdir'
      ) from error
    try:
      self._file.truncate(0)
      self._file.write(f'process {os.getpid()} on {socket.gethostname()}')
      self._file.flush()
    except OSError as error:
      raise ConfigError(cannot_write(workdir, error)) from error

  def __enter__(self) -> 'Lock':
    return self

  def __exit__(self, *unused) -> None:
    self._file.close()
