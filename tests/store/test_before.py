"""Files that the version before the house wrote open and mean the same."""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from configs import vit_ti_digits_w4a4
from qvit_jax import modes, tree
from qvit_jax.experiment import calibration, first_state
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.store.checkpoint import Checkpoints

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'before_the_house'
LOSSES = json.loads((FIXTURES / 'losses.json').read_text())
# It computes in the type that it was packed with.
PTQ = {'quant.recipe': 'ptq', 'model.dtype': 'bfloat16'}
# Fields beside the model's, and the file.
CASES = {
  'float': ({'quant.recipe': 'none'}, 'float'),
  'aqt': ({'quant.recipe': 'aqt'}, 'aqt'),
  'lsq': ({'quant.recipe': 'lsq', 'quant.attention': 'a4'}, 'lsq'),
  'qvit': ({'quant.recipe': 'qvit', 'quant.attention': 'a4'}, 'qvit'),
  'lsq_packed': (PTQ, 'lsq/export/model.packed.safetensors'),
} | {
  name: (PTQ, f'ptq/artifacts/{name.removeprefix("ptq/")}.safetensors')
  for name in ('ptq/w4a4', 'ptq/int8_static', 'ptq/w4a8+twin_softmax')
}  # fmt: skip


@pytest.fixture(scope='module')
def before(tmp_path_factory):
  place = tmp_path_factory.mktemp('fixtures')
  with tarfile.open(FIXTURES / 'runs.tar.xz') as archive:
    archive.extractall(place, filter='data')
  return place / 'before'


def config_of(fields):
  """The config of the README beside the files, with other fields."""
  config = vit_ti_digits_w4a4.get_config()
  config.model.update(patch=4, width=16, depth=1, heads=2, mlp_dim=32)
  config.train.update(steps=30, batch_size=16)
  config.eval.update(batch_size=120, every=30, num_examples=120)
  config.log.update(every=30, tensorboard=False)
  config.update_from_flattened_dict(fields)
  return config


def loss_of(fields, place):
  modes.run('eval', config_of(fields), str(place))
  return json.loads((place / 'results.json').read_text())['baseline']['loss']


@pytest.mark.parametrize('name', CASES)
def test_it_evaluates_as_before(before, tmp_path, name):
  fields, file = CASES[name]
  fields = fields | {'checkpoint.path': str(before / file)}
  # At 4 bits one activation that a compiler's other order of operations rounds
  # to the other side is seen.
  rel = 1e-4 if name.startswith('ptq/w4') else 1e-6
  assert loss_of(fields, tmp_path) == pytest.approx(LOSSES[name], rel=rel)


def test_an_adapter_file_lies_on_its_base_as_before(before, tmp_path):
  fields = {
    'quant.recipe': 'none',
    'lora.rank': 2,
    'lora.targets': ('all',),
    'lora.path': str(before / 'lora' / 'adapters'),
    'weights.path': str(before / 'float'),
  }
  assert loss_of(fields, tmp_path) == pytest.approx(LOSSES['lora'], rel=1e-6)


def test_a_training_goes_on(before):
  config = config_of({'quant.recipe': 'none', 'train.steps': 40})
  experiment = Experiment(config, training=True)
  own = Checkpoints(before / 'float' / 'checkpoints', writer=True)
  state, progress, lines = first_state.initial_state(experiment, own)
  assert int(state.step) == 30
  assert progress.best['loss'] == pytest.approx(LOSSES['float'], rel=1e-12)
  assert lines[0] == 'resuming at step 30, digests verified'


def test_statistics_of_calibration_are_taken(before, tmp_path):
  fields = {
    'quant.recipe': 'none',
    'ptq.calibration_examples': 64,
    'ptq.calibration_path': str(before / 'ptq' / 'calibration'),
  }
  experiment = Experiment(config_of(fields), training=True)
  stored = Checkpoints(before / 'float' / 'checkpoints', writer=False)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  item = 'ema'
  shapes = stored.saved_shapes(30, item, device)
  params = tree.flatten(stored.restore(30, {item: shapes})[item]['params'])
  params = {name: np.asarray(x) for name, x in params.items()}
  said = []
  found = calibration.Calibration(experiment, tmp_path, said.append)
  assert found.observe((), params).keys() == {
    site.path for site in experiment.model.plan.sites
  }
  assert said[0].startswith('calibration: statistics of ')
