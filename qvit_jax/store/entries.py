"""What a weights file holds, before any of it is read."""

import dataclasses
import json
import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from qvit_jax.errors import WeightsError

# No vision transformer comes near; a file beyond them is broken or hostile.
MAX_ENTRIES = 20_000
MAX_RANK = 8

DTYPES = {
    name: np.dtype(name)
    for name in ('float64', 'float32', 'float16', 'int64', 'int32', 'int16',
                 'int8', 'uint8', 'bool')
} | {'bfloat16': np.dtype(ml_dtypes.bfloat16)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file.

  Attributes:
    shape: Its axes, as the file names them.
    dtype: As stored.
    read: Reads it; raises WeightsError.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


@dataclasses.dataclass
class Source:
  """The tensors behind one path.

  Attributes:
    entries: Tensor name to entry.
    title: One phrase: where it lies and in which container.
    facts: What a config beside the weights says, in the words of our fields
      (`weights.facts.read_facts` lists them).
    notes: Lines for the report.
    places: Where each of the facts stands.
  """

  entries: dict[str, Entry]
  title: str
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)
  places: dict[str, str] = dataclasses.field(default_factory=dict)


CONVERT = (
  'load it in PyTorch where you trust it and save its state dict with '
  'safetensors.torch.save_file'
)


def printable(text: str) -> str:
  """Returns text on one line, with what no terminal should get escaped."""
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )


def refuse(path, what: str, advice: str = '') -> NoReturn:
  """Raises WeightsError: which file, what is wrong, what to do."""
  advice = advice or 'fetch it again, or give another file'
  raise WeightsError(printable(f'weights {path}: {what}; {advice}'))


def check_shape(path, name: str, shape: Any, dtype: np.dtype) -> int:
  """Returns the bytes of a tensor of this shape; refuses an impossible one."""
  if (
    not isinstance(shape, (list, tuple))
    or len(shape) > MAX_RANK
    or not all(type(n) is int and 0 <= n < 2**40 for n in shape)
  ):
    refuse(path, f'tensor {name!r} has the shape {str(shape)[:60]}')
  return math.prod(shape) * dtype.itemsize


def parse_json(path, text: bytes) -> Any:
  """Returns JSON; refuses a name that stands twice in one object."""

  def unique(pairs):
    names = dict(pairs)
    if len(names) != len(pairs):
      seen: set[str] = set()
      twice = next(n for n, _ in pairs if n in seen or seen.add(n))
      refuse(path, f'the name {twice!r} stands in it twice')
    return names

  try:
    return json.loads(text.decode('utf-8'), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    refuse(path, f'its JSON cannot be read ({str(error)[:80]})')


# What can come out of the standard library when a file is not what it claims.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError,
    IndexError, TypeError, EOFError, OverflowError, NotImplementedError,
    RecursionError, MemoryError, OSError,
)  # fmt: skip


def guarded(path: pathlib.Path, action):
  """Returns action(); damage of the file becomes a WeightsError."""
  try:
    return action()
  except _DAMAGE as error:
    what = ' '.join(str(error).split())[:120] or type(error).__name__
    refuse(path, f'it is damaged or truncated ({what})')
