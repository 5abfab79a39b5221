"""Several devices give the numbers of one; what cannot be split is said."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qvit_jax import modes
from tests.conftest import EIGHT_DEVICES, ROOT, TINY, start_two

# Runs modes.run for each (name, overrides) it is given, in one process.
_SCRIPT = """
import json, sys
from qvit_jax import modes
from tests.conftest import make_sharded_config
for name, fields in json.loads(sys.argv[2]).items():
  modes.run('train', make_sharded_config(fields), f'{sys.argv[1]}/{name}')
"""
# How arrays are split, printed in the same process: its start is dear.
_SPLITS = """
import jax
from qvit_jax.training import sharding
from tests.conftest import make_sharded_config
mesh = sharding.make_mesh(make_sharded_config(
    {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 4,
     'mesh.fsdp_min_mib': 1 / 64}))
S = lambda *shape: jax.ShapeDtypeStruct(shape, 'float32')
shapes = {'attn': {'query': {'kernel': S(64, 4, 16)}},
          'odd': {'kernel': S(65, 67)},
          'three': {'query': {'kernel': S(64, 3, 5)}},
          'bias': S(64)}
places, notes = sharding.infer(shapes, mesh, [('query/kernel$', 1)], 1 / 64)
for path in ('attn', 'three'):
  print(path, tuple(places[path]['query']['kernel'].spec))
print('odd', tuple(places['odd']['kernel'].spec))
print('bias', tuple(places['bias'].spec))
print('\\n'.join(notes))
from qvit_jax.experiment.experiment import Experiment
config = make_sharded_config({'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 4,
     'mesh.fsdp_min_mib': 1 / 64})
state = Experiment(config, training=True).fresh_state(jax.random.key(0))
block = lambda tree: tree['params']['encoder']['block_00']
for tree in (state.variables, state.opt_state[0].mu):
  x = block(tree)['mlp']['fc1']['kernel']
  print('fc1', x.shape, 'shard', x.addressable_shards[0].data.shape)
"""
RUNS = {  # of others: slow
  'none': {'quant.recipe': 'none'},
  'probe': {'train.trainable': ['params/head'], 'optim.lr': 0.003},
}
MESHES = {
  'data4_fsdp2': {'mesh.data': 4, 'mesh.fsdp': 2, 'mesh.fsdp_min_mib': 1 / 64},
  'data2_tensor4': {'mesh.data': 2, 'mesh.tensor': 4},
}


def losses(workdir):
  rows = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  return np.array([r['loss'] for r in rows if r['split'] == 'train'])


def on_eight(folder, recipes, script=_SCRIPT):
  """Trains {name: overrides} on both meshes; returns what was printed."""
  runs = {
    f'{recipe}_{mesh}': {**fields, **axes}
    for recipe, fields in recipes.items()
    for mesh, axes in MESHES.items()
  }
  env = {**os.environ, **EIGHT_DEVICES, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', script, str(folder), json.dumps(runs)],
    env=env,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=1500,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


@pytest.fixture(scope='module')
def eight_devices(tmp_path_factory):
  """Returns (folder of all runs, what was printed)."""
  folder = tmp_path_factory.mktemp('mesh')
  return folder, on_eight(folder, RUNS, _SCRIPT + _SPLITS)


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  """Returns the folder of the same runs on one device."""
  from tests.conftest import make_sharded_config

  folder = tmp_path_factory.mktemp('one')
  for recipe, fields in RUNS.items():
    modes.run('train', make_sharded_config(fields), str(folder / recipe))
  return folder


@pytest.mark.parametrize('run', [*RUNS])
@pytest.mark.parametrize('mesh', [*MESHES])
def test_eight_devices_give_the_losses_of_one(
  one_device, eight_devices, mesh, run
):
  expected = losses(one_device / run)
  found = losses(eight_devices[0] / f'{run}_{mesh}')
  assert len(expected) == 5
  assert expected[-1] < expected[0]  # it learns: equality is no accident
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_features_are_computed_once_on_eight_devices(eight_devices):
  printed = eight_devices[1].count('images are computed once, before head: ')
  assert printed == len(MESHES)


@pytest.mark.slow
def test_learned_steps_on_eight_devices(tmp_path):
  """Steps are fitted to all images, and all devices move them alike."""
  from tests.conftest import make_sharded_config

  quant = {'quant.default': 'w8a8', 'quant.attention': 'a8'}
  recipes = {
    name: {'quant.recipe': name, **quant} for name in ('lsq', 'statsq')
  } | {'aqt': {'quant.recipe': 'aqt'}}
  on_eight(tmp_path, recipes)
  for recipe, fields in recipes.items():
    modes.run('train', make_sharded_config(fields), str(tmp_path / recipe))
    expected = losses(tmp_path / recipe)
    assert len(expected) == 5 and expected[-1] < expected[0]
    for mesh in MESHES:
      found = losses(tmp_path / f'{recipe}_{mesh}')
      # The first update is the sign of gradients, of which some are sums near
      # 0: those of one product agree within 1e-5, losses no nearer than this.
      within = 1e-3 if recipe == 'aqt' else 2e-2
      np.testing.assert_allclose(found, expected, rtol=0, atol=within)


def test_the_header_says_how_the_devices_are_used(eight_devices):
  assert 'devices   8 x cpu (data=4 x fsdp=2 x tensor=1)' in eight_devices[1]
  assert 'devices   8 x cpu (data=2 x fsdp=1 x tensor=4)' in eight_devices[1]


def test_a_checkpoint_of_eight_devices_is_evaluated_on_one(
  eight_devices, tmp_path
):
  from tests.conftest import make_sharded_config

  folder = eight_devices[0] / 'none_data4_fsdp2'
  config = make_sharded_config({'checkpoint.path': str(folder)})
  modes.run('eval', config, str(tmp_path))
  there = json.loads((folder / 'results.json').read_text())['baseline']
  here = json.loads((tmp_path / 'results.json').read_text())['baseline']
  assert here['top1'] == there['top1']
  assert here['loss'] == pytest.approx(there['loss'], abs=1e-5)


def test_sharding_splits_large_arrays_and_names_the_others(eight_devices):
  out = eight_devices[1]
  # Parameters and both optimizer moments lie in eighths.
  assert out.count('fc1 (64, 128) shard (32, 32)') == 2
  assert "attn ('fsdp', 'tensor', None)" in out
  assert 'three (None, None, None)' in out
  assert 'odd (None, None)' in out
  assert 'bias (None,)' in out
  assert (
    'three/query/kernel float32[64, 3, 5]: axis 1 is not divisible by '
    'mesh.tensor=4' in out
  )
  assert (
    'odd/kernel float32[65, 67]: no axis is divisible by mesh.fsdp=2' in out
  )
  assert (
    '2 of 4 arrays are smaller than mesh.fsdp_min_mib=0.015625 (0.0 MiB in '
    'all), mesh.fsdp does not split them' in out
  )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, call_main):
  flags = (*TINY, '--config.train.steps=5', '--config.log.every=1')
  workers = start_two(*flags, f'--workdir={tmp_path / "two"}')
  outputs = [worker.communicate(timeout=300)[0] for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0], outputs
  assert '2 process(es)' in outputs[0]
  assert 'step 1/5' not in outputs[1]  # one of them speaks and writes
  alone = call_main(*flags, f'--workdir={tmp_path / "one"}')
  assert alone.returncode == 0, alone.stderr
  np.testing.assert_allclose(
    losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=0, atol=1e-3
  )


# As _SCRIPT, of a model with BatchNorm: means are those of the whole batch.
_NORMED = _SCRIPT.replace(
  'tests.conftest import make_sharded_config',
  'tests.small_cnns import make_sharded_config',
)


@pytest.mark.slow
def test_statistics_of_norms_are_those_of_all_devices(tmp_path):
  from tests.small_cnns import make_sharded_config

  fields = {'train.reestimate_batches': 2, 'train.ema_decay': 0.9}
  on_eight(tmp_path, {'vgg': fields}, _NORMED)
  modes.run('train', make_sharded_config(fields), str(tmp_path / 'vgg'))
  expected = losses(tmp_path / 'vgg')
  assert len(expected) == 5
  for mesh in MESHES:
    found = losses(tmp_path / f'vgg_{mesh}')
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  there, *here = (
    json.loads((tmp_path / name / 'results.json').read_text())['baseline']
    for name in ('vgg', *(f'vgg_{mesh}' for mesh in MESHES))
  )
  for row in here:
    assert row['loss'] == pytest.approx(there['loss'], abs=1e-4)
