"""What a run takes over from another one."""

import dataclasses

import numpy as np
import pytest

from qvit_jax import data as data_lib
from qvit_jax import modes, tree, weights
from qvit_jax.errors import CheckpointError
from qvit_jax.experiment import first_state
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.modes import train
from qvit_jax.store.checkpoint import Checkpoints
from tests.conftest import make_digits_config

LEARNED = {'quant.recipe': 'lsq', 'quant.default': 'w4a4'}


def config_of(**fields):
  config = make_digits_config()
  config.train.steps = config.eval.every = 2
  config.update_from_flattened_dict(LEARNED | fields)
  return config


def start(config, place):
  """The first variables and the lines that say whence."""
  experiment = Experiment(config, training=True)
  own = Checkpoints(place / 'checkpoints', writer=True)
  state, _, lines = first_state.initial_state(experiment, own)
  flat = tree.flatten(state.variables)
  return {name: np.asarray(x) for name, x in flat.items()}, lines


@pytest.fixture(scope='module')
def steps_only(tmp_path_factory):
  """The workdir of a run that averaged its steps, the only thing it learned."""
  place = tmp_path_factory.mktemp('steps')
  fields = {'train.trainable': ('quant',), 'train.ema_decay': 0.9}
  modes.run('train', config_of(**fields), str(place))
  return place


def test_parameters_without_an_average_are_taken_as_they_are(
  steps_only, tmp_path
):
  path = str(steps_only)
  before, _ = start(config_of(**{'checkpoint.path': path}), tmp_path / 'same')
  after, lines = start(
    config_of(**{'checkpoint.path': path, 'quant.recipe': 'none'}),
    tmp_path / 'float',
  )
  assert lines == [f'starting from the parameters of step 2 of {path}']
  assert after.keys() == {n for n in before if n.startswith('params/')}
  for name, value in after.items():
    np.testing.assert_array_equal(value, before[name])
  # The same of weights.path, which leaves out the collection's name.
  shapes = Experiment(config_of(), training=True).model.shapes['params']
  taken, report = weights.read_weights(path, shapes)
  assert not report.reinitialised
  for name, value in taken.items():
    np.testing.assert_array_equal(value, after[f'params/{name}'])


def test_a_resume_names_changes_of_what_its_mode_reads(steps_only):
  fields = {'train.trainable': ('quant',), 'train.ema_decay': 0.9}
  unread = {'ptq.rows': ('fp32',), 'export.format': 'npz', 'eval.top_k': 3}
  config = config_of(**fields, **unread, **{'log.every': 7})
  experiment = Experiment(config, training=True)
  own = Checkpoints(steps_only / 'checkpoints', writer=False)
  is_read = train.is_read
  _, _, lines = first_state.initial_state(experiment, own, is_read=is_read)
  changed = [line.split()[2] for line in lines if 'changed since' in line]
  assert changed == ['log.every']


def test_a_start_from_classes_in_another_order_is_refused(steps_only, tmp_path):
  config = config_of(**{'checkpoint.path': str(steps_only)})
  data = data_lib.open_data(config, training=True)
  own = Checkpoints(tmp_path / 'checkpoints', writer=True)
  for names, is_refused in (
    (data.class_names[::-1], True),
    ([f'other {name}' for name in data.class_names], False),
  ):
    given = dataclasses.replace(data, class_names=tuple(names))
    experiment = Experiment(config, training=True, data=given)
    if not is_refused:
      first_state.initial_state(experiment, own)
      continue
    with pytest.raises(CheckpointError, match=r'in another order \(label 0 is'):
      first_state.initial_state(experiment, own)


def test_learned_zero_points_are_not_kept_where_none_are_learned(
  steps_only, tmp_path
):
  fields = {'checkpoint.path': str(steps_only), 'quant.zero_point': False}
  found, lines = start(config_of(**fields), tmp_path)
  assert lines[0].startswith('starting from the parameters of step 2 of ')
  zeros = [x for name, x in found.items() if name.endswith('lhs_zero')]
  assert zeros and all(np.isin(x, (0, 8)).all() for x in zeros)
