"""Reads PyTorch's zip-format .pth and .bin without PyTorch."""

import functools
import math
import pathlib
import re
from typing import Any

import numpy as np

from qvit_jax.store.entries import (
  CONVERT,
  Entry,
  check_shape,
  printable,
  refuse,
)
from qvit_jax.weights import zip_file
from qvit_jax.weights.averaged import averaged
from qvit_jax.weights.pickled import Opaque, Tensor, interpret

_MAX_PICKLE = 16 * 2**20


def read(path: pathlib.Path) -> tuple[dict[str, Entry], list[str]]:
  """Returns the file's tensors, unread, and notes. Raises WeightsError."""
  infos = zip_file.members(path)
  if any('/code/' in name or name.endswith('constants.pkl') for name in infos):
    refuse(path, 'it is a TorchScript archive, which holds code', CONVERT)
  pickles = [name for name in infos if name.split('/')[1:] == ['data.pkl']]
  if len(pickles) != 1:
    refuse(path, 'it is a zip archive without FOLDER/data.pkl', CONVERT)
  root = pickles[0].partition('/')[0]
  if any(not zip_file.is_stored(info) for info in infos.values()):
    refuse(path, 'its members are compressed, which PyTorch never does')
  order = infos.get(f'{root}/byteorder')
  if order and zip_file.content(path, order).strip() != b'little':
    refuse(path, 'it was written on a big-endian machine', CONVERT)
  if infos[pickles[0]].file_size > _MAX_PICKLE:
    refuse(path, f'its pickle is over {_MAX_PICKLE:,} bytes long')
  value, stepped = interpret(path, zip_file.content(path, infos[pickles[0]]))
  tensors, notes = _find_tensors(path, value, stepped)
  # Tensors that share a storage mostly follow each other.
  content = functools.lru_cache(maxsize=1)(
    lambda name: zip_file.content(path, infos[name])
  )
  entries = {
    name: _entry(path, name, tensor, infos.get(f'{root}/data/{key}'), content)
    for name, tensor in tensors.items()
    for key in (tensor.storage.key,)
  }
  return entries, notes


def _find_tensors(
  path, value, stepped: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
  """Returns the state dict, at the top or one level down, and notes.

  Args:
    path: For messages.
    value: What the pickle describes.
    stepped: Names of what it asks for beside tensors.
  """
  names = ', '.join(stepped)[:200]
  asked = (
    f'its pickle asks for {names}, which is no tensor; nothing was executed'
    if names
    else ''
  )
  if not isinstance(value, dict):
    refuse(path, asked or 'it holds no dict of tensors', CONVERT)
  places = [(None, value)]
  places += [(k, v) for k, v in value.items() if isinstance(v, dict)]
  found = {
    place: tensors for place, inner in places if (tensors := _tensors(inner))
  }
  if not found:
    keys = ', '.join(str(k)[:30] for k in list(value)[:8])
    here = f'no tensors at the top or under state_dict and such; it has {keys}'
    refuse(path, f'{here}; {asked}' if asked else here, CONVERT)
  chosen = _choose(found)
  inner = value if chosen is None else value[chosen]
  for name, x in inner.items():
    # A tensor of a kind that is not known here must not count as missing.
    if not isinstance(x, Tensor) and re.search(r'\.(?!_extra)', str(name)):
      kind = x.name if isinstance(x, Opaque) else type(x).__name__
      refuse(
        path,
        f'{str(name)[:60]!r} is a {kind[:60]}, which is no plain tensor; '
        'nothing was executed',
        CONVERT,
      )
  left = [k for k in inner if k not in found[chosen]]
  left += [k for k in value if k != chosen] if chosen is not None else []
  notes = [f'read from its entry {chosen!r}'] if chosen is not None else []
  if left:
    notes.append(f'not read: {", ".join(str(k)[:30] for k in left)[:200]}')
  if stepped:
    notes.append(f'stepped over, not executed: {names}')
  return found[chosen], [printable(note) for note in notes]


def _choose(found: dict[Any, dict[str, Tensor]]) -> Any:
  """Returns which of several state dicts counts: the largest, averaged one."""
  most = max(map(len, found.values()))
  best = [place for place in found if len(found[place]) == most]
  names = {str(place): place for place in best}
  return names.get(averaged(list(names)), best[0])


def _tensors(inner: dict) -> dict[str, Tensor]:
  return {
    k: v
    for k, v in inner.items()
    if isinstance(v, Tensor) and isinstance(k, str)
  }


def _entry(path, name, tensor: Tensor, info, content) -> Entry:
  storage, dtype = tensor.storage, tensor.storage.dtype
  if info is None:
    refuse(path, f'the data of {name!r} is missing')
  if storage.size * dtype.itemsize != info.file_size:
    refuse(
      path,
      f'the storage of {name!r} claims {storage.size:,} numbers, its member '
      f'has {info.file_size:,} bytes',
    )
  check_shape(path, name, tensor.shape, dtype)
  count = math.prod(tensor.shape)
  last = tensor.offset + sum(
    (n - 1) * stride
    for n, stride in zip(tensor.shape, tensor.strides, strict=True)
  )
  # `count` bounds what is copied: a stride of 0 could ask for any size.
  if count and (last >= storage.size or count > storage.size):
    refuse(path, f'tensor {name!r} reaches beyond its storage')

  def load():
    flat = np.frombuffer(content(info.filename), dtype)[tensor.offset :]
    if not count:
      return np.zeros(tensor.shape, dtype)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
    return np.ascontiguousarray(view)

  return Entry(tensor.shape, dtype, load)
