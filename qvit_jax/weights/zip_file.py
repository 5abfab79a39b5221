"""Opens the zip archives that .pth and .npz files are."""

import pathlib
import zipfile

from qvit_jax.store.entries import MAX_ENTRIES, refuse

# Compressed archives may grow by this much: real weights hardly shrink.
_MAX_GROWTH = 20
_SMALL = 64 * 2**20


def members(path: pathlib.Path) -> dict[str, zipfile.ZipInfo]:
  """Returns member name to description. Raises WeightsError.

  Refused are duplicate names, encryption, absurd counts, and archives that
  would unpack to far more than they are (zip bombs).
  """
  with zipfile.ZipFile(path) as archive:
    infos = archive.infolist()
  if len(infos) > MAX_ENTRIES:
    refuse(path, f'it has {len(infos):,} members, over {MAX_ENTRIES:,}')
  names = {info.filename: info for info in infos}
  if len(names) != len(infos):
    refuse(path, 'two of its members have the same name')
  if any(info.flag_bits & 1 for info in infos):
    refuse(path, 'it is encrypted')
  total = sum(info.file_size for info in infos)
  limit = max(_SMALL, _MAX_GROWTH * path.stat().st_size)
  if total > limit:
    refuse(path, f'it would unpack to {total:,} bytes: a zip bomb')
  return names


def is_stored(info: zipfile.ZipInfo) -> bool:
  """Returns whether a member lies in the archive uncompressed."""
  return (
    info.compress_type == zipfile.ZIP_STORED
    and info.compress_size == info.file_size
  )


def content(path: pathlib.Path, info: zipfile.ZipInfo) -> bytes:
  """Returns a member's bytes, compared with its checksum."""
  with zipfile.ZipFile(path) as archive, archive.open(info) as file:
    data = file.read(info.file_size + 1)
  if len(data) != info.file_size:
    refuse(path, f'member {info.filename!r} is not as long as it says')
  return data
