"""Reads npz without pickle."""

import io
import pathlib
import zipfile

import ml_dtypes
import numpy as np

from qvit_jax.store.entries import DTYPES, Entry, check_shape, refuse
from qvit_jax.weights import zip_file

_HEADER = 16 * 1024  # more than any .npy header takes


def read(path: pathlib.Path) -> dict[str, Entry]:
  """Returns the archive's arrays, unread. Raises WeightsError."""
  entries = {}
  for name, info in zip_file.members(path).items():
    if not name.endswith('.npy'):
      refuse(path, f'member {name!r} is no .npy array')
    name = name.removesuffix('.npy')
    entries[name] = _entry(path, name, info)
  return entries


def _entry(path: pathlib.Path, name: str, info: zipfile.ZipInfo) -> Entry:
  with zipfile.ZipFile(path) as archive, archive.open(info) as file:
    head = io.BytesIO(file.read(_HEADER))
  version = np.lib.format.read_magic(head)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    refuse(path, f'array {name!r} has the .npy version {version}')
  shape, fortran, dtype = readers[version](head)
  if dtype == np.dtype('V2'):  # how NumPy stores bfloat16
    dtype = np.dtype(ml_dtypes.bfloat16)
  if dtype.newbyteorder('=') != dtype:
    refuse(path, f'array {name!r} is big-endian', 'save it as little-endian')
  if dtype not in DTYPES.values():
    refuse(
      path,
      f'array {name!r} has the type {dtype}, which is no number',
      f'allowed are {", ".join(DTYPES)}',
    )
  start = head.tell()
  if check_shape(path, name, shape, dtype) != info.file_size - start:
    refuse(path, f'array {name!r} is not as long as its shape {shape} says')

  def load():
    data = zip_file.content(path, info)
    values = np.frombuffer(data, dtype, offset=start)
    return values.reshape(shape, order='F' if fortran else 'C')

  return Entry(tuple(shape), dtype, load)
