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
from qvit_jax.store import digest, manifest
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


@pytest.fixture
def no_orbax(monkeypatch):
  """Fails a test whose checkpoint is opened by orbax."""

  def opened(*unused):
    raise AssertionError('orbax has opened the checkpoint')

  monkeypatch.setattr(Checkpoints, '_read', opened)


def folder_of(name):
  return name.partition('/')[0]


def refusal(checkpoints, items=('variables', 'training')):
  wanted = {name: shapes_of(state())[name] for name in items}
  with pytest.raises(CheckpointError) as error:
    checkpoints.restore(3, wanted)
  text = str(error.value)
  assert f'{checkpoints.directory / "3"} is damaged: ' in text
  assert '\n' not in text
  return text


@pytest.mark.parametrize(
  'how', ['flip', 'truncate', 'delete', 'empty', 'extra', 'dangling']
)
def test_damage_to_any_file_of_an_item_is_found_before_orbax_reads(
  saved, no_orbax, how
):
  step = saved.directory / '3'
  names = [name for name in files_of(step) if folder_of(name) in state()]
  assert {'_METADATA', '_sharding', 'manifest.ocdbt', 'process_0'} <= {
    name.split('/')[-1] for name in names
  }
  for name in names:
    path = step / name
    content, bad = path.read_bytes(), name
    if how == 'extra':
      bad = f'{name}.more'
      (step / bad).write_bytes(b'x')
    elif how == 'dangling':
      path.unlink()
      path.symlink_to('nowhere')
    else:
      damage(path, how)
    assert bad in refusal(saved)
    (step / f'{name}.more').unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_a_flip_in_any_range_of_any_file_is_found_or_harmless(saved, capfd):
  step = saved.directory / '3'
  outside = []
  for name in files_of(step):
    path = step / name
    content = path.read_bytes()
    for position in np.linspace(0, len(content) - 1, 8).astype(int):
      bad = bytearray(content)
      bad[position] ^= 1 << int(position % 8)
      path.write_bytes(bad)
      if folder_of(name) in (*state(), 'files.json') or name.endswith(
        'metadata/metadata'
      ):
        refusal(saved)
      else:
        outside.append(name)
        items = saved.restore(3, shapes_of(state()))
        jax.tree.map(np.testing.assert_array_equal, items, state())
    path.write_bytes(content)
  # What orbax keeps of the whole step is not read.
  assert {*outside} == {
    '_CHECKPOINT_METADATA', 'commit_success.txt', 'metadata/commit_success.txt'
  }  # fmt: skip
  assert capfd.readouterr() == ('', '')


def test_items_that_are_not_wanted_are_not_looked_at(saved):
  damage(next((saved.directory / '3' / 'training' / 'd').iterdir()), 'flip')
  wanted = {'variables': shapes_of(state())['variables']}
  restored = saved.restore(3, wanted)['variables']
  jax.tree.map(np.testing.assert_array_equal, restored, state()['variables'])
  assert 'training/d/' in refusal(saved)


def test_a_checkpoint_without_a_list_has_the_digests_of_its_arrays(saved):
  (saved.directory / '3' / manifest.NAME).unlink()
  restored = saved.restore(3, shapes_of(state()))
  jax.tree.map(np.testing.assert_array_equal, restored, state())
  metadata = saved.directory / '3' / 'metadata' / 'metadata'
  body = manifest.unseal(metadata.read_text())
  body['arrays']['training']['step']['digest'] = '0' * 16
  metadata.write_text(json.dumps(manifest.seal(body)))
  assert 'the content of training/step is not what was saved' in refusal(saved)


def test_the_list_is_there_when_the_step_gets_its_name(tmp_path, monkeypatch):
  """A kill between writing and naming leaves neither."""
  seen = []

  def killed(folder):
    seen.append(folder.name)
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(manifest, 'write', killed)
  with pytest.raises(CheckpointError, match='the disk is full'):
    save(tmp_path)
  assert seen[0].startswith('3.orbax-checkpoint-tmp')
  assert Checkpoints(tmp_path, writer=True).steps() == []


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
