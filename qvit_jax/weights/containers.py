"""Opens whatever a weights path names: a file or a folder."""

import pathlib

from qvit_jax.errors import WeightsError
from qvit_jax.store import tensors
from qvit_jax.store.entries import (
  CONVERT,
  Entry,
  Source,
  guarded,
  printable,
  refuse,
)
from qvit_jax.weights import npz_file, peft, torch_file, zip_file
from qvit_jax.weights.facts import read_facts, read_json
from qvit_jax.weights.origin import read_texts

_SINGLE = ('model.safetensors', 'pytorch_model.bin')
_INDEX = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
_ENDINGS = ('.safetensors', '.npz', '.pth', '.pt', '.bin')
_PICKLES = (b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05')


def open_source(path: pathlib.Path) -> Source:
  """Returns the tensors of a file, or of a folder as on the hub, unread.

  Raises:
    WeightsError: There is nothing, or nothing that is safe to read.
  """
  try:
    is_folder, is_file = path.is_dir(), path.is_file()
    if is_file:
      path.open('rb').close()
    elif is_folder:
      next(path.iterdir(), None)
  except (OSError, ValueError) as error:
    text = getattr(error, 'strerror', None) or str(error)
    raise WeightsError(
      f'weights.path={printable(str(path))!r} cannot be read: {text}; check '
      'the path and its permissions'
    ) from error
  if is_folder:
    return _open_folder(path)
  if not is_file:
    raise WeightsError(
      f'weights.path={printable(str(path))!r} does not exist; give a file '
      f'({", ".join(_ENDINGS)}), a folder of the hub, the workdir of a run, or '
      'hf://OWNER/NAME'
    )
  if path.name in peft.WEIGHTS:
    peft.refuse_adapter(path.parent)
  entries, container, notes = _open_file(path)
  return _with_facts(entries, container, path.parent, path, notes)


def _with_facts(
  entries: dict[str, Entry],
  container: str,
  folder: pathlib.Path,
  path: pathlib.Path,
  notes: list[str],
) -> Source:
  """Returns the tensors with what is said in their file and beside it."""
  facts, places, more = read_facts(folder, path)
  title = f'{path} ({container})'
  if container == 'safetensors':
    texts = read_texts(tensors.read_metadata(path))
    facts |= texts
    places |= dict.fromkeys(texts, "the file's header")
  return Source(entries, title, facts, notes + more, places)


def _open_file(path: pathlib.Path) -> tuple[dict[str, Entry], str, list[str]]:
  container = guarded(path, lambda: _sniff(path))
  notes: list[str] = []
  if container == 'safetensors':
    entries = tensors.read(path)
  elif container == 'npz':
    entries = guarded(path, lambda: npz_file.read(path))
  else:
    entries, notes = guarded(path, lambda: torch_file.read(path))
  if not entries:
    refuse(path, 'it holds no tensor')
  wrapped = {
    name: Entry(e.shape, e.dtype, lambda e=e: guarded(path, e.read))
    for name, e in entries.items()
  }
  return wrapped, container, notes


def _sniff(path: pathlib.Path) -> str:
  """Returns 'safetensors', 'npz' or 'PyTorch zip', by content."""
  with open(path, 'rb') as file:
    head = file.read(512)
  text = head.lstrip().lower()
  if not head:
    refuse(path, 'the file is empty')
  # First, because its first byte may be any: it is part of a length.
  length = int.from_bytes(head[:8], 'little')
  if head[8:9] == b'{' and length <= path.stat().st_size - 8:
    return 'safetensors'
  if text.startswith((b'<!doctype', b'<html', b'<?xml')):
    refuse(path, 'it is a web page, probably of a failed download')
  if head.startswith(b'version https://git-lfs'):
    refuse(
      path, 'it is a Git LFS pointer, not the file', 'run git lfs pull there'
    )
  if head.startswith((b'PK\x03\x04', b'PK\x05\x06')):
    names = zip_file.members(path)
    if names and all(name.endswith('.npy') for name in names):
      return 'npz'
    return 'PyTorch zip'
  if head.startswith(_PICKLES) or head[257:262] == b'ustar':
    refuse(path, 'it is a legacy PyTorch file (before 1.6) or a bare pickle',
           CONVERT)  # fmt: skip
  if head.startswith(b'\x89HDF'):
    refuse(path, 'it is an HDF5 file', CONVERT)
  if head[8:9] == b'{' or path.suffix == '.safetensors':
    return 'safetensors'
  refuse(path, f'it is none of {", ".join(_ENDINGS)}')


def _open_folder(folder: pathlib.Path) -> Source:
  found = [name for name in (*_SINGLE, *_INDEX) if (folder / name).is_file()]
  adapters = [n for n in (*peft.WEIGHTS, peft.CONFIG) if (folder / n).is_file()]
  if adapters and not found:
    peft.refuse_adapter(folder)
  if not found:
    found = sorted(
      p.name for p in folder.iterdir() if p.suffix in _ENDINGS and p.is_file()
    )
    if len(found) != 1:
      here = f'it has {", ".join(found)}: name one' if found else 'none is here'
      refuse(
        folder,
        f'a folder of weights holds {" or ".join((*_SINGLE, *_INDEX))}, or one '
        f'weights file; {here}',
        'give that file, or the workdir of one of our runs',
      )
  # Safetensors first, in whatever form; it needs no trust.
  chosen = min(found, key=lambda name: 'safetensors' not in name)
  path = folder / chosen
  notes = [f'{name} is not read' for name in found if name != chosen]
  notes += [f'{name}, of a PEFT adapter, is not read' for name in adapters]
  if chosen in _INDEX:
    entries, container, more = _open_shards(path)
  else:
    entries, container, more = _open_file(path)
  return _with_facts(entries, container, folder, path, notes + more)


def _open_shards(index: pathlib.Path):
  """Returns the tensors of all files that an index lists."""
  listing = read_json(index)
  shards = listing.get('weight_map') if isinstance(listing, dict) else None
  if (
    not isinstance(shards, dict)
    or not shards
    or not all(isinstance(name, str) for name in shards.values())
  ):
    refuse(index, 'it has no weight_map that lists tensors')
  entries: dict[str, Entry] = {}
  notes: list[str] = []
  container = ''
  for name in sorted(set(shards.values())):
    if pathlib.PurePath(name).name != name or name in ('', '..'):
      refuse(index, f'it points outside its folder: {name[:80]!r}')
    part = index.parent / name
    if len(name) > 255 or not part.is_file():
      refuse(index, f'{name[:80]} is missing', 'fetch it into the same folder')
    found, container, more = _open_file(part)
    if twice := entries.keys() & found.keys():
      refuse(index, f'{min(twice)!r} stands in two of its files')
    entries |= found
    notes += more
  if entries.keys() != shards.keys():
    other = min(entries.keys() ^ shards.keys())
    refuse(index, f'it and its files disagree on {other!r}')
  return entries, f'{container}, sharded', notes
