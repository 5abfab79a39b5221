"""Checkpoints: digests, strict comparison, damage, retention."""

import contextlib
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qvit_jax.errors import CheckpointError
from qvit_jax.store import digest
from qvit_jax.store.checkpoint import Checkpoints, find_step
from tests.conftest import fill


def mix(x):
  """MurmurHash3's finalizer on Python integers."""
  x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
  return x ^ (x >> 16)


def slow_digest(array):
  """The digest by a plain loop over the elements' bits."""
  array = np.asarray(array)
  if array.dtype.name in ('int4', 'bool'):
    array = array.astype(np.int8)
  width = array.dtype.itemsize
  bits = np.ascontiguousarray(array).reshape(-1).view(f'uint{8 * width}')
  first = second = 0
  for position, value in enumerate(bits.tolist()):
    weight = (2 * mix(position) + 1) % 2**32
    first = (first + value * weight) % 2**32
    second = (second + mix(value ^ weight)) % 2**32
  return f'{first:08x}{second:08x}'


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int8', 'int32', 'bool', 'int4']
)
@pytest.mark.parametrize('shape', [(), (7,), (3, 4, 5)])
def test_the_digest_equals_a_plain_loop(dtype, shape):
  values = np.random.default_rng(0).integers(-7, 8, shape)
  array = jnp.asarray(values).astype(getattr(ml_dtypes, dtype, dtype))
  assert digest.digests({'x': array}) == {'x': slow_digest(array)}


def test_the_digest_sees_one_bit_and_a_swap():
  x = np.linspace(-1, 1, 64, dtype=np.float32)
  before = digest.digests({'x': jnp.asarray(x)})
  for bit in (0, 13, 31):
    flipped = x.copy()
    flipped.view(np.uint32)[17] ^= np.uint32(1 << bit)
    assert digest.digests({'x': jnp.asarray(flipped)}) != before
  swapped = x.copy()
  swapped[[3, 4]] = swapped[[4, 3]]
  assert digest.digests({'x': jnp.asarray(swapped)}) != before


def state(seed=0):
  key = jax.random.key(seed)
  return {
    'variables': {'params': {'a': {'kernel': jax.random.normal(key, (16, 8))}}},
    'training': {'step': jnp.int32(3), 'opt_state': (jnp.ones(4), {})},
  }


def shapes_of(items):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), items
  )


def save(folder, step=3, best=None, items=None):
  checkpoints = Checkpoints(folder, writer=True)
  metadata = {'progress': {'best_step': best}}
  checkpoints.save(step, items or state(), metadata, best_step=best)
  checkpoints.close()
  return checkpoints


@pytest.fixture
def saved(tmp_path):
  return save(tmp_path / 'checkpoints')


def test_what_is_restored_is_what_was_saved(saved):
  restored = saved.restore(3, shapes_of(state()))
  assert jax.tree.structure(restored) == jax.tree.structure(state())
  jax.tree.map(np.testing.assert_array_equal, restored, state())


def test_an_item_can_be_restored_alone(saved):
  wanted = {'variables': shapes_of(state())['variables']}
  assert set(saved.restore(3, wanted)) == {'variables'}


def test_differences_are_listed_before_anything_is_read(saved):
  wanted = shapes_of(state())
  kernel = wanted['variables']['params']['a'].pop('kernel')
  wanted['variables']['params']['a'] = {
    'bias': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=kernel.sharding)
  }
  wanted['training']['step'] = jax.ShapeDtypeStruct(
    (), jnp.int8, sharding=kernel.sharding
  )
  shutil.rmtree(saved.directory / '3' / 'variables')  # it is not looked at
  with pytest.raises(CheckpointError) as error:
    saved.restore(3, wanted)
  for part in (
    'missing params/a/bias',
    'unexpected params/a/kernel',
    'training/step: int32[] instead of int8[]',
  ):
    assert part in str(error.value)


def files_of(step_folder):
  return sorted(
    path.relative_to(step_folder).as_posix()
    for path in step_folder.rglob('*')
    if path.is_file() and path.stat().st_size
  )


def damage(path, how):
  if how == 'delete':
    path.unlink()
  elif how == 'truncate':
    os.truncate(path, path.stat().st_size // 2)
  elif how == 'empty':
    os.truncate(path, 0)
  else:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << 4
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['flip', 'truncate', 'delete', 'empty'])
def test_damage_to_any_file_is_found_or_harmless(saved, tmp_path, how):
  pristine = saved.directory / '3'
  found = []
  for name in files_of(pristine):
    folder = tmp_path / 'copy' / 'checkpoints'
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(pristine, folder / '3')
    damage(folder / '3' / name, how)
    try:
      items = Checkpoints(folder, writer=False).restore(3, shapes_of(state()))
    except CheckpointError as error:
      assert f'{folder / "3"}' in str(error)
      assert '\n' not in str(error)
      found.append(name)
    else:  # a file that orbax does not read: the values must be right
      jax.tree.map(np.testing.assert_array_equal, items, state())
  data = [n for n in files_of(pristine) if '/d/' in n and 'process' not in n]
  assert data
  assert set(data) <= set(found)
  assert 'metadata/metadata' in found


def test_every_single_flipped_bit_of_the_data_is_found(saved, tmp_path):
  data = [
    n for n in files_of(saved.directory / '3') if n.startswith('variables')
  ]
  data = [n for n in data if '/d/' in n]
  random = np.random.default_rng(0)
  silent = 0
  for name in data:
    for _ in range(10):
      path = saved.directory / '3' / name
      content = path.read_bytes()
      bad = bytearray(content)
      bad[random.integers(len(bad))] ^= 1 << int(random.integers(8))
      path.write_bytes(bad)
      try:
        items = saved.restore(3, shapes_of(state()))
        kernel = items['variables']['params']['a']['kernel']
        expected = state()['variables']['params']['a']['kernel']
        silent += not np.array_equal(kernel, expected)
      except CheckpointError as error:
        assert 'damaged' in str(error)  # noqa: PT017
      path.write_bytes(content)
  assert silent == 0


def test_tampered_metadata_is_found(saved):
  path = saved.directory / '3' / 'metadata' / 'metadata'
  sealed = json.loads(path.read_text())
  sealed['body']['progress']['best_step'] = 7
  path.write_text(json.dumps(sealed))
  with pytest.raises(CheckpointError, match='does not match its own digest'):
    saved.metadata(3)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
  from qvit_jax.store import checkpoint

  monkeypatch.setattr(checkpoint, 'FORMAT', 99)
  saved = save(tmp_path / 'checkpoints')
  monkeypatch.undo()
  with pytest.raises(CheckpointError, match='format 99'):
    saved.metadata(3)


def test_the_last_and_the_best_are_kept(tmp_path):
  for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
    checkpoints = save(tmp_path, step, best)
  assert checkpoints.steps() == [2, 4]
  assert checkpoints.latest() == 4
  assert checkpoints.best() == 2


def test_saving_a_step_again_replaces_it(tmp_path):
  save(tmp_path, 3)
  checkpoints = save(tmp_path, 3, items=state(seed=1))
  restored = checkpoints.restore(3, shapes_of(state()))
  jax.tree.map(np.testing.assert_array_equal, restored, state(seed=1))
  assert [p.name for p in tmp_path.iterdir()] == ['3']


def test_a_kill_while_replacing_leaves_the_old_step(tmp_path):
  save(tmp_path, 3)
  (tmp_path / '3').rename(tmp_path / '3.replaced')
  (tmp_path / '3.orbax-checkpoint-tmp').mkdir()
  checkpoints = Checkpoints(tmp_path, writer=True)
  assert checkpoints.steps() == [3]
  checkpoints.restore(3, shapes_of(state()))
  assert [p.name for p in tmp_path.iterdir()] == ['3']


def test_a_kill_after_replacing_leaves_the_new_step(tmp_path):
  save(tmp_path, 3)
  shutil.copytree(tmp_path / '3', tmp_path / '2.replaced')
  assert Checkpoints(tmp_path, writer=True).steps() == [3]
  assert [p.name for p in tmp_path.iterdir()] == ['3']


def test_a_missing_step_names_those_that_are_there(saved):
  with pytest.raises(CheckpointError, match='has no step 9; it has 3'):
    saved.metadata(9)


def test_a_path_means_a_workdir_or_a_step(saved):
  folder = saved.directory
  assert find_step(str(folder.parent)) == (folder, None)
  assert find_step(str(folder / '3')) == (folder, 3)
  with pytest.raises(CheckpointError, match='is no directory'):
    find_step(str(folder / 'nothing'))


def test_a_full_disk_keeps_the_former_checkpoint(small_disk):
  save(small_disk / 'checkpoints')
  filler = small_disk / 'filler'
  big = {'variables': {'x': jnp.ones((800, 800))}}
  with pytest.raises(CheckpointError, match='MiB for a checkpoint'):
    save(small_disk / 'checkpoints', 4, items=big)
  with contextlib.suppress(OSError):
    filler.write_bytes(b'x' * 2**21)
  with pytest.raises(CheckpointError) as error:
    save(small_disk / 'checkpoints', 5)
  assert 'free some space' in str(error.value)
  filler.unlink()
  checkpoints = Checkpoints(small_disk / 'checkpoints', writer=True)
  assert checkpoints.steps() == [3]
  restored = checkpoints.restore(3, shapes_of(state()))
  jax.tree.map(np.testing.assert_array_equal, restored, state())


def test_a_read_only_disk_is_said_in_one_line(small_disk):
  save(small_disk / 'checkpoints')
  os.system(f'mount -o remount,ro {small_disk}')
  with pytest.raises(CheckpointError, match='the disk is read-only'):
    save(small_disk / 'checkpoints', 4)
  checkpoints = Checkpoints(
    pathlib.Path(small_disk) / 'checkpoints', writer=False
  )
  checkpoints.restore(3, shapes_of(state()))


def test_a_step_that_could_not_be_replaced_is_still_there(small_disk):
  folder = small_disk / 'checkpoints'
  items = {'variables': {str(i): jnp.ones((7, 7)) for i in range(40)}}
  save(folder, 3, best=3, items=items)
  fill(small_disk, leave=40 * 1024)
  with pytest.raises(CheckpointError, match='free some space'):
    save(folder, 3, best=3, items=items)
  assert Checkpoints(folder, writer=False).steps() == [3]
