"""Hostile and broken weights files: one error, nothing executed."""

import io
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qvit_jax.errors import WeightsError
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.weights import load
from qvit_jax.weights.containers import open_source
from tests.conftest import ROOT, peak_bytes

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
FILES = {
  'safetensors': FIXTURES / 'timm.safetensors',
  'npz': FIXTURES / 'google.npz',
  'pth': FIXTURES / 'dinov2.pth',
}


def read_all(path):
  """Returns every tensor of a file."""
  return {n: e.read() for n, e in open_source(path).entries.items()}


def refusal(path, *parts):
  with pytest.raises(WeightsError) as error:
    read_all(path)
  message = str(error.value)
  assert '\n' not in message
  for part in (path.name, *parts):
    assert part in message
  return message


# safetensors


def write_safetensors(path, header, data=b'', length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(length.to_bytes(8, 'little') + text + data)
  return path


def entry(shape, begin, end, dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize(
  ('header', 'data', 'part'),
  [
    ({'a': entry([2], 0, 8)}, b'\0' * 7, 'truncated: 1 bytes are missing'),
    ({'a': entry([2], 0, 8)}, b'\0' * 9, '1 bytes at its end'),
    ({'a': entry([2], 0, 4)}, b'\0' * 4, 'of 8 bytes claims the bytes [0, 4]'),
    ({'a': entry([2], 0, 8), 'b': entry([1], 4, 8)}, b'\0' * 8, 'overlaps'),
    ({'a': entry([2], 4, 12)}, b'\0' * 12, 'leaves a hole'),
    ({'a': entry([-2], 0, -8)}, b'', 'has the shape [-2]'),
    ({'a': entry([2**50], 0, 2**52)}, b'', 'has the shape'),
    ({'a': entry([1] * 9, 0, 4)}, b'\0' * 4, 'has the shape'),
    ({'a': entry([True], 0, 4)}, b'\0' * 4, 'has the shape [True]'),
    ({'a': entry([2], 0, 2, 'F8_E4M3')}, b'\0' * 2, 'has the type F8_E4M3'),
    ({'a': 3}, b'', "says nothing usable of 'a'"),
    ([], b'', 'no JSON object'),
    (b'{"a": {}, "a": {}}', b'', "the name 'a' stands in it twice"),
    (b'{"a', b'', 'its JSON cannot be read'),
    (b'[' * 100_000, b'', 'its JSON cannot be read'),
    ({f't{i}': entry([0], 0, 0) for i in range(20_001)}, b'', '20,001 tensors'),
    ({'__metadata__': {}}, b'', 'no tensor'),
  ],
)  # fmt: skip
def test_a_false_safetensors_header_is_refused(tmp_path, header, data, part):
  path = write_safetensors(tmp_path / 'x.safetensors', header, data)
  refusal(path, part)


@pytest.mark.parametrize('length', [2**63, 10**9, 1000])
def test_an_absurd_header_length_is_refused(tmp_path, length):
  path = write_safetensors(tmp_path / 'x.safetensors', {}, length=length)
  refusal(path, f'{length:,} bytes long')


def test_every_type_of_safetensors_is_read(tmp_path):
  for dtype in ('float64', 'float32', 'float16', 'int32', 'uint8', 'bool'):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    safetensors.numpy.save_file({'a': values}, tmp_path / 'x.safetensors')
    found = read_all(tmp_path / 'x.safetensors')['a']
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
  values = np.array([1.5, -2], ml_dtypes.bfloat16)
  safetensors.numpy.save_file({'a': values}, tmp_path / 'x.safetensors')
  assert read_all(tmp_path / 'x.safetensors')['a'].tolist() == [1.5, -2]


# npz


def write_npy(values):
  buffer = io.BytesIO()
  np.lib.format.write_array(buffer, values, allow_pickle=True)
  return buffer.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return path


def test_npz_never_unpickles(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, a=np.array([Evil(tmp_path / 'owned')], dtype=object))
  refusal(path, "array 'a' has the type object")
  assert not (tmp_path / 'owned').exists()


def test_an_npz_that_lies_about_its_shape_is_refused(tmp_path):
  data = write_npy(np.zeros(4, np.float32)).replace(b'(4,)', b'(9,)')
  refusal(write_zip(tmp_path / 'x.npz', {'a.npy': data}), 'shape (9,)')


def test_an_npz_bomb_is_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez_compressed(path, a=np.zeros(20 * 2**20, np.float32))
  refusal(path, '83,886,', 'zip bomb')


def test_a_compressed_npz_is_read(tmp_path):
  values = np.arange(24, dtype=np.float32).reshape(4, 6)
  np.savez_compressed(tmp_path / 'x.npz', a=np.asfortranarray(values))
  np.testing.assert_array_equal(read_all(tmp_path / 'x.npz')['a'], values)


# PyTorch's zip


class Evil:
  """Unpickling this makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


def torch_zip(path, pickled, storages=None, compression=zipfile.ZIP_STORED):
  members = {'archive/data.pkl': pickled, 'archive/version': b'3\n'}
  members |= {f'archive/data/{k}': v for k, v in (storages or {}).items()}
  return write_zip(path, members, compression)


def tensor_pickle(size=4, shape=(4,), strides=(1,), offset=0, key='0'):
  """The instructions of {'a': tensor}, as torch.save writes them."""

  def number(n):
    return b'\x8a\x08' + n.to_bytes(8, 'little', signed=True)

  def text(s):
    return b'X' + len(s).to_bytes(4, 'little') + s.encode()

  def tuple_of(items):
    return b'(' + b''.join(map(number, items)) + b't'

  storage = (
    b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text(key)
    + text('cpu') + number(size) + b'tQ'
  )  # fmt: skip
  return (
    b'\x80\x02}' + text('a') + b'ctorch._utils\n_rebuild_tensor_v2\n('
    + storage + number(offset) + tuple_of(shape) + tuple_of(strides)
    + b'\x89ccollections\nOrderedDict\n)RtRs.'
  )  # fmt: skip


DATA = np.arange(4, dtype=np.float32).tobytes()


def test_the_hand_written_pickle_is_read(tmp_path):
  path = torch_zip(tmp_path / 'x.pth', tensor_pickle(), {'0': DATA})
  np.testing.assert_array_equal(read_all(path)['a'], [0, 1, 2, 3])
  pickled = tensor_pickle(shape=(2, 2), strides=(1, 2))
  path = torch_zip(tmp_path / 'x.pth', pickled, {'0': DATA})
  np.testing.assert_array_equal(read_all(path)['a'], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
  ('pickled', 'part'),
  [
    (tensor_pickle(size=5), 'claims 5 numbers, its member has 16 bytes'),
    (tensor_pickle(size=2**40 - 1), 'claims 1,099,511,627,775 numbers'),
    (tensor_pickle(shape=(5,)), 'reaches beyond its storage'),
    (tensor_pickle(offset=1), 'reaches beyond its storage'),
    (tensor_pickle(shape=(2**30,), strides=(0,)), 'reaches beyond'),
    (tensor_pickle(strides=(-1,)), 'a tensor of no size'),
    (tensor_pickle(key='1'), "the data of 'a' is missing"),
    (tensor_pickle(key='../0'), 'no storage'),
    (tensor_pickle()[:-1], 'its pickle is damaged'),
    (b'\x80\x02K\x01.', 'no dict of tensors'),
    (b'\x80\x02}.', 'no tensors at the top or under state_dict'),
    (b'\x80\x02}r\xff\xff\xff\xff.', 'no tensors'),
    (b'\x80\x02(' + b'(' * 50_000 + b'.', 'no dict of tensors'),
    (b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.', ''),
  ],
)  # fmt: skip
def test_a_pth_that_lies_is_refused(tmp_path, pickled, part):
  refusal(torch_zip(tmp_path / 'x.pth', pickled, {'0': DATA}), part)


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_calls_a_function_is_not_executed(tmp_path, protocol):
  pickled = pickle.dumps({'a': Evil(tmp_path / 'owned')}, protocol)
  path = torch_zip(tmp_path / 'x.pth', pickled)
  message = refusal(path, 'safetensors.torch.save_file')
  if protocol >= 2:
    assert 'asks for posix.system' in message
  assert not (tmp_path / 'owned').exists()


def doubled_tuple(times):
  """A tuple of tuples of ... whose hash takes 2**times steps."""
  return b')' + b'q\x00h\x00\x86' * times


@pytest.mark.parametrize(
  ('pickled', 'part'),
  [
    (b'\x80\x02}' + doubled_tuple(60) + b'K\x01s.', 'no tensors at the top'),
    (b'\x80\x04' + doubled_tuple(60) + b'\x8c\x01a\x93.', 'is damaged'),
  ],
)
def test_a_pickle_cannot_make_us_hash_for_ever(tmp_path, pickled, part):
  refusal(torch_zip(tmp_path / 'x.pth', pickled), part)


def test_a_negated_view_is_not_read_with_the_wrong_sign(tmp_path):
  flagged = tensor_pickle().replace(
    b'\x89ccollections\nOrderedDict\n)R',
    b'\x89ccollections\nOrderedDict\n)R}X\x03\0\0\0neg\x88s',
  )
  refusal(torch_zip(tmp_path / 'x.pth', flagged, {'0': DATA}), 'with a flag')


def test_a_tensor_beside_the_state_dict_does_not_hide_it(tmp_path):
  one = tensor_pickle()[2:-1]  # {'a': tensor}
  two = one.replace(b'X\x01\0\0\0a', b'X\x01\0\0\0b')[1:]  # 'b': tensor s
  pickled = (
    b'\x80\x02' + one + b'X\x05\0\0\0model' + one + two + b's' + b'.'
  )  # fmt: skip
  path = torch_zip(tmp_path / 'x.pth', pickled, {'0': DATA})
  assert set(read_all(path)) == {'a', 'b'}


@pytest.mark.parametrize('low', [b'\x80\x02', b'PK'])
def test_a_header_of_any_length_is_safetensors(tmp_path, low):
  length = int.from_bytes(low, 'little') // 8 * 8
  text = json.dumps({'a': entry([1], 0, 4)}).encode().ljust(length)
  path = write_safetensors(tmp_path / 'x.safetensors', text, bytes(4))
  assert path.read_bytes()[0] in (0x80, 0x50)
  assert read_all(path)['a'].tolist() == [0]


def test_a_path_that_no_disk_takes_is_one_line():
  with pytest.raises(WeightsError, match='cannot be read'):
    open_source(pathlib.Path('x' * 300))


@pytest.mark.parametrize('name', ['eval', 'getattr', '__import__'])
def test_builtins_are_not_reached(tmp_path, name):
  pickled = (
    b'\x80\x02c__builtin__\n' + name.encode() + b'\nX\x01\0\0\x001\x85R.'
  )
  refusal(torch_zip(tmp_path / 'x.pth', pickled), f'__builtin__.{name}')


def test_two_tensors_of_one_name_are_refused(tmp_path):
  once = tensor_pickle()
  twice = once[:-1] + once[3:]  # a second pair for the same dict
  refusal(torch_zip(tmp_path / 'x.pth', twice, {'0': DATA}), "'a' stands in it")


def test_compressed_members_are_refused(tmp_path):
  path = torch_zip(
    tmp_path / 'x.pth', tensor_pickle(), {'0': bytes(16)}, zipfile.ZIP_DEFLATED
  )
  refusal(path, 'its members are compressed')


def test_a_zip_bomb_is_refused(tmp_path):
  storages = {'0': bytes(200 * 2**20)}
  path = torch_zip(
    tmp_path / 'x.pth', tensor_pickle(), storages, zipfile.ZIP_DEFLATED
  )
  assert path.stat().st_size < 2**20
  refusal(path, 'zip bomb')


def test_torchscript_is_refused(tmp_path):
  members = {'m/data.pkl': b'\x80\x02}.', 'm/code/__torch__.py': b'',
             'm/constants.pkl': b''}  # fmt: skip
  refusal(write_zip(tmp_path / 'x.pt', members), 'TorchScript', 'state dict')


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_members_of_one_name_are_refused(tmp_path):
  path = tmp_path / 'x.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    for _ in range(2):
      archive.writestr('archive/data.pkl', tensor_pickle())
  refusal(path, 'the same name')


# What is no weights file at all.


@pytest.mark.parametrize(
  ('content', 'part'),
  [
    (b'', 'the file is empty'),
    (b'<!DOCTYPE html><html>', 'web page'),
    (b'\n <html><body>404', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00', 'Git LFS'),
    (pickle.dumps({'a': 1}, 2), 'legacy PyTorch file'),
    (bytes(257) + b'ustar' + bytes(200), 'legacy PyTorch file'),
    (b'\x89HDF\r\n\x1a\n', 'HDF5'),
    (b'PK\x03\x04 and nothing else', 'damaged or truncated'),
    (b'hello, world, how are you', 'it is none of'),
  ],
)
@pytest.mark.parametrize('ending', ['pth', 'npz'])
def test_what_is_no_weights_file_is_named(tmp_path, content, part, ending):
  path = tmp_path / f'x.{ending}'
  path.write_bytes(content)
  refusal(path, part)


@pytest.mark.parametrize('kind', FILES)
@pytest.mark.parametrize('share', [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kind, share):
  content = FILES[kind].read_bytes()
  path = tmp_path / FILES[kind].name
  path.write_bytes(content[: int(share * len(content))])
  refusal(path)


def test_a_folder_without_weights_says_what_it_looks_for(tmp_path):
  (tmp_path / 'notes.txt').write_text('')
  refusal(tmp_path, 'model.safetensors')


def test_a_folder_with_two_files_asks_which(tmp_path):
  for name in ('a.npz', 'b.npz'):
    (tmp_path / name).write_bytes(b'')
  refusal(tmp_path, 'a.npz, b.npz: name one')


def test_an_unknown_activation_is_refused(tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(
    FILES['safetensors'].read_bytes()
  )
  (tmp_path / 'config.json').write_text('{"hidden_act": "relu"}')
  refusal(tmp_path / 'model.safetensors', 'relu')


def mutate(content, rng):
  """Returns a damaged copy: bits, bytes, cuts, swaps, insertions."""
  content = bytearray(content)

  # Half of the damage goes where the structure is: the first and last 4 KiB.
  def place():
    near = rng.random() < 0.5
    if near and rng.random() < 0.5:
      return rng.randrange(min(4096, len(content)))
    if near:
      return len(content) - 1 - rng.randrange(min(4096, len(content)))
    return rng.randrange(len(content))

  for _ in range(rng.choice((1, 1, 2, 8))):
    how, at = rng.randrange(5), place()
    if how == 0:
      content[at] ^= 1 << rng.randrange(8)
    elif how == 1:
      content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif how == 2:
      del content[at : at + rng.choice((1, 4, 100))]
    elif how == 3:
      content[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
    else:
      content[at : at + 8] = rng.choice((b'\xff' * 8, bytes(8)))
  return bytes(content)


def make_own(folder):
  """A checkpoint of our own with two small arrays."""
  items = {'variables': {'params': {'a': jnp.arange(64.0), 'b': jnp.ones(3)}}}
  checkpoints = Checkpoints(folder / 'checkpoints', writer=True)
  metadata = {'progress': {'best_step': 1},
              'architecture': dict.fromkeys(('heads', 'norm_eps',
                                             'image_size'), 1)}  # fmt: skip
  checkpoints.save(1, items, metadata, best_step=1)
  checkpoints.close()


def make_sharded(folder):
  """A folder as on the hub: two shards, an index and a config.json."""
  tensors = safetensors.numpy.load_file(FILES['safetensors'])
  names = sorted(tensors)
  index = {}
  for shard, part in (('a', names[::2]), ('b', names[1::2])):
    file = f'{shard}.safetensors'
    safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
    index |= dict.fromkeys(part, file)
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': index})
  )
  shutil.copy(FIXTURES / 'hf_vit' / 'config.json', folder)


def read_anything(path):
  """Returns every tensor of a file, a folder or a run of ours."""
  if (path / 'checkpoints').is_dir():
    source = load._own_source(str(path))
    return {n: e.read() for n, e in source.entries.items()}
  return read_all(path)


KINDS = (*FILES, 'sharded', 'own')


def prepare(kind, folder):
  """Returns (what to open, the files of it)."""
  if kind in FILES:
    shutil.copy(FILES[kind], folder)
    path = folder / FILES[kind].name
    return path, [path]
  (make_own if kind == 'own' else make_sharded)(folder)
  return folder, sorted(p for p in folder.rglob('*') if p.is_file())


def run_fuzz(kind, count, folder):
  """Damages one file at a time and opens the whole; prints what happened."""
  path, places = prepare(kind, folder)
  originals = {place: place.read_bytes() for place in places}
  tensors = read_anything(path)
  has_checksums = kind in ('npz', 'pth', 'own')
  limit = peak_bytes() + 2**30
  if kind != 'own':  # orbax reserves more than it uses
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  rng, slowest, refused, loaded = random.Random(kind), 0.0, 0, 0
  for _ in range(count):
    place = rng.choice([p for p in places if originals[p]])
    place.write_bytes(mutate(originals[place], rng))
    started = time.monotonic()
    try:
      found = read_anything(path)
      loaded += 1
      for name in found.keys() & tensors.keys() if has_checksums else ():
        np.testing.assert_array_equal(found[name], tensors[name])
    except WeightsError as error:
      refused += 1
      assert '\n' not in str(error), error
    slowest = max(slowest, time.monotonic() - started)
    place.write_bytes(originals[place])
  peak = peak_bytes() / 2**20
  print(f'{kind}: {refused} refused, {loaded} loaded, slowest {slowest:.2f} s, '
        f'peak {peak:.0f} MiB')  # fmt: skip
  assert slowest < 5
  assert refused + loaded == count
  assert peak < 1024


def fuzz(kind, count, folder):
  """Runs it in a process of its own, whose memory can be limited."""
  code = (
    'import pathlib, sys; from tests.weights import test_containers as t; '
    't.run_fuzz(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, kind, str(count), str(folder)],
    cwd=ROOT, capture_output=True, text=True, timeout=1800,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  print(done.stdout)


@pytest.mark.parametrize('kind', KINDS)
def test_damage_is_refused_or_changes_nothing(kind, tmp_path):
  fuzz(kind, 60 if kind == 'own' else 150, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_2000_mutations(kind, tmp_path):
  fuzz(kind, 2000, tmp_path)
