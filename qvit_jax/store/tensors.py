"""Safetensors: read strictly, written in one step.

The `safetensors` package maps the whole file, takes a duplicate name without a
word and any number of tensors; this reads the same format one tensor at a
time: eight bytes of header length, a JSON header, the data without holes.
"""

import hashlib
import json
import os
import pathlib
from typing import Any, NoReturn

import numpy as np
import safetensors.numpy

from qvit_jax.errors import ExportError
from qvit_jax.store import files
from qvit_jax.store.entries import (
  DTYPES,
  MAX_ENTRIES,
  Entry,
  check_shape,
  guarded,
  parse_json,
  refuse,
)

_DIGEST = 'qvit_jax_sha256'
_MAX_HEADER = 8 * 2**20
_NAMES = {
    'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
    'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8',
    'U8': 'uint8', 'BOOL': 'bool',
}  # fmt: skip


def read(path: pathlib.Path) -> dict[str, Entry]:
  """Returns the file's tensors, unread. Raises WeightsError."""
  return guarded(path, lambda: _read(path))


def _read(path: pathlib.Path) -> dict[str, Entry]:
  size = path.stat().st_size
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if length > min(_MAX_HEADER, size - 8):
      refuse(
        path,
        f'its header would be {length:,} bytes long, in a file of {size:,} '
        f'(at most {_MAX_HEADER:,} are allowed): truncated or no safetensors',
      )
    header = parse_json(path, file.read(length))
  if not isinstance(header, dict):
    refuse(path, 'its header is no JSON object')
  header.pop('__metadata__', None)
  if len(header) > MAX_ENTRIES:
    refuse(path, f'it lists {len(header):,} tensors, over {MAX_ENTRIES:,}')
  start = 8 + length
  entries, spans = {}, []
  for name, info in header.items():
    entries[name], span = _entry(path, name, info, start)
    spans.append((*span, name))
  end = 0
  for begin, stop, name in sorted(spans):
    if begin != end:
      refuse(path, f'the data of {name!r} overlaps or leaves a hole')
    end = stop
  if start + end > size:
    refuse(path, f'it is truncated: {start + end - size:,} bytes are missing')
  if start + end < size:
    refuse(path, f'{size - start - end:,} bytes at its end belong to nothing')
  return entries


def _entry(path, name, info, start):
  """Returns (entry, (first byte, last byte + 1))."""
  if not isinstance(info, dict) or set(info) != {
    'dtype', 'shape', 'data_offsets'
  }:  # fmt: skip
    refuse(path, f'the header says nothing usable of {name!r}')
  kind, shape, span = info['dtype'], info['shape'], info['data_offsets']
  if not isinstance(kind, str) or kind not in _NAMES:
    refuse(
      path,
      f'tensor {name!r} has the type {str(kind)[:20]}',
      f'allowed are {", ".join(_NAMES)}: convert it',
    )
  dtype = DTYPES[_NAMES[kind]]
  num_bytes = check_shape(path, name, shape, dtype)
  if (
    not isinstance(span, list)
    or len(span) != 2
    or not all(type(n) is int and n >= 0 for n in span)
    or span[1] - span[0] != num_bytes
  ):
    refuse(
      path,
      f'tensor {name!r} of {num_bytes:,} bytes claims the bytes '
      f'{str(span)[:60]}',
    )

  def load():
    count = num_bytes // dtype.itemsize
    values = np.fromfile(path, dtype, count, offset=start + span[0])
    if values.size != count:
      refuse(path, f'tensor {name!r} ends early')
    return values.reshape(shape)

  return Entry(tuple(shape), dtype, lambda: guarded(path, load)), tuple(span)


def save_tensors(
  tensors: dict[str, np.ndarray],
  path: pathlib.Path,
  *,
  form: str,
  metadata: dict[str, str] | None = None,
) -> None:
  """Writes tensors; an older file is replaced only when all is written.

  Args:
    tensors: Tensor name to array.
    path: Where to.
    form: 'safetensors' or 'npz'.
    metadata: Texts kept in the header of safetensors.

  Raises:
    ExportError: The disk does not take it.
  """
  temporary = path.with_name(f'.{path.name}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == 'npz':
      with open(temporary, 'wb') as file:
        np.savez(file, **tensors)
    else:
      texts = {'format': 'pt'} | (metadata or {})
      safetensors.numpy.save_file(tensors, temporary, texts)
      temporary.chmod(0o666 & ~_umask())  # the package allows the owner alone
    temporary.replace(path)
  except (OSError, safetensors.SafetensorError) as error:
    temporary.unlink(missing_ok=True)
    if isinstance(error, OSError):
      raise ExportError(files.cannot_write(path, error)) from error
    raise ExportError(
      f'{path} cannot be written ({error}); free some space and run the same '
      'command again'
    ) from error


def save_described(
  arrays: dict[str, Any],
  path: pathlib.Path,
  key: str,
  header: dict[str, Any],
) -> int:
  """Writes a file of ours: arrays, a JSON header and a digest of both.

  Args:
    arrays: Tensor name to array.
    path: Where to.
    key: Of the header in the file's texts; says what kind of file it is.
    header: JSON values.

  Returns:
    The bytes of the file.

  Raises:
    ExportError: The disk does not take it.
  """
  # Not by ascontiguousarray, which gives scalars an axis.
  arrays = {n: np.asarray(x, order='C') for n, x in arrays.items()}
  text = json.dumps(header)
  metadata = {key: text, _DIGEST: f'{_sha(text.encode())} {_content(arrays)}'}
  save_tensors(arrays, path, form='safetensors', metadata=metadata)
  return path.stat().st_size


def read_described(
  path: pathlib.Path, key: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns (arrays, header) of a file that `save_described` wrote.

  Files older than the digest have none.

  Raises:
    WeightsError: It is damaged.
    KeyError: It has no header of this kind.
  """
  header = read_header(path, key)
  arrays = {name: entry.read() for name, entry in read(path).items()}
  digests = read_metadata(path).get(_DIGEST, '').split(' ')
  if digests != [''] and digests[-1] != _content(arrays):
    _refuse_content(path)
  return arrays, header


def read_header(path: pathlib.Path, key: str) -> dict[str, Any]:
  """Returns the header of a file of ours.

  Raises:
    WeightsError: It is damaged.
    KeyError: The file has no header of this kind.
  """
  texts = read_metadata(path)
  digests = texts.get(_DIGEST, '').split(' ')
  if digests != [''] and digests[0] != _sha(texts[key].encode()):
    _refuse_content(path)
  header = parse_json(path, texts[key].encode())
  if not isinstance(header, dict):
    refuse(path, f'its header {key!r} is no JSON object')
  return header


def _refuse_content(path: pathlib.Path) -> NoReturn:
  refuse(
    path,
    'it is damaged: its content is not what was written',
    'bring it back from a copy, or write it again',
  )


def _sha(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _content(arrays: dict[str, np.ndarray]) -> str:
  """Returns the SHA-256 of arrays with their names, types and shapes."""
  total = hashlib.sha256()
  for name, values in sorted(arrays.items()):
    total.update(f'{name} {values.dtype} {values.shape} '.encode())
    total.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
  return total.hexdigest()


def read_metadata(path: pathlib.Path) -> dict[str, str]:
  """Returns the texts in the header of a safetensors file; {} for others."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return file.metadata() or {}
  except safetensors.SafetensorError:
    return {}


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
