"""Stages of a training: boundaries, what is rounded, what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from qvit_jax import modes, tree
from qvit_jax.errors import ConfigError, Preempted
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.quantization import QuantSpec
from qvit_jax.training import optimizer, stages
from tests.conftest import make_digits_config
from tests.training.test_resume import baseline, end_state, rows, stop_after

STAGES = (('acts', 0.25), 'all:0.5', ('norms', 0.25))


def make_config(**quant):
  """A quantized model with every kind of parameter that `norms` knows."""
  config = make_digits_config()
  config.quant.update({'recipe': 'aqt', 'default': 'w4a4'} | quant)
  config.model.update(layer_scale=0.5, qk_norm=True, registers=1)
  config.optim.update(weight_decay=0.1, clip_norm=1.0)
  config.train.update(steps=8, ema_decay=0.9)
  config.eval.every = 4
  return config


def host(state):
  """Returns the arrays of a state by path, as copies."""
  parts = {'v': state.variables, 'o': state.opt_state, 'e': state.ema}
  return {k: np.array(v) for k, v in tree.flatten(parts).items()}


class Stepper:
  """An experiment whose stages are compiled once each."""

  def __init__(self, config):
    self._experiment = Experiment(config, training=True)
    self._source = self._experiment.replicate(
      self._experiment.data.train.source
    )
    self._steps = {}

  def __call__(self, *names):
    """Returns the arrays before and after one update of each, and the ticks."""
    state = self._experiment.fresh_state(jax.random.key(0))
    seen, ticks = [host(state)], []
    batches = self._experiment.train_batches(1, len(names))
    for name, batch in zip(names, batches, strict=True):
      args = self._source, batch
      if name not in self._steps:
        self._steps[name], _ = self._experiment.compile_train_step(
          state, *args, stage=name
        )
      state, tick = self._steps[name](state, *args, self._experiment.given)
      seen.append(host(state))
      ticks.append(np.asarray(tick))
    return seen, ticks


def plain_sgd(**quant):
  """With momentum, but without what makes updates depend on each other."""
  config = make_config(**quant)
  config.optim.update(name='sgd', clip_norm=0.0, lr=0.1)
  return config


@pytest.fixture(scope='module')
def steps():
  """Updates of a plan with both operands and attention products."""
  return Stepper(plain_sgd(attention='a8'))


def changed(before, after):
  """Returns the paths whose bits differ."""
  return {p for p in before if before[p].tobytes() != after[p].tobytes()}


def assert_same(a, b):
  assert a.keys() == b.keys() and not changed(a, b)


# Boundaries.


@pytest.mark.parametrize(
  ('given', 'total', 'expected'),
  [
    ((), 9, ['all 1-9']),
    ((('acts', 0.3), 'all:0.6', ['norms', 0.1]), 100,
     ['acts 1-30', 'all 31-90', 'norms 91-100']),
    (('weights:0.5', 'all:.5'), 7, ['weights 1-4', 'all 5-7']),
    (('all:0.1',) * 10, 20, [f'all {n}-{n + 1}' for n in range(1, 20, 2)]),
  ],
)  # fmt: skip
def test_boundaries_follow_from_shares_and_steps(given, total, expected):
  assert [str(stage) for stage in stages.resolve(given, total)] == expected


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (('norm:1',), "train.stages[0] is named 'norm'; allowed: all, acts, "),
    (('all:0.5', 'acts'), "train.stages[1]='acts' is no stage; write "),
    (('all:half',), "train.stages[0]='all:half' is no stage"),
    ((('all', 0.5, 1),), "train.stages[0]=('all', 0.5, 1) is no stage"),
    ((7,), 'train.stages[0]=7 is no stage'),
    (('all:0', 'acts:1'), 'train.stages[0] has the share 0; give a number'),
    (('all:nan',), 'train.stages[0] has the share nan; give a number'),
    (('all:0.5', 'norms:0.4'), 'the shares of train.stages sum to 0.9, not'),
    (('all:0.99', 'norms:0.01'),
     "train.stages[1]='norms' has no update: the share 0.01 of 10 steps is too "
     'small'),
    (('acts:0.01', 'all:0.99'), "train.stages[0]='acts' has no update: "),
  ],
)  # fmt: skip
def test_a_bad_list_is_one_line(given, message):
  with pytest.raises(ConfigError) as error:
    stages.resolve(given, 10)
  assert message in str(error.value) and '\n' not in str(error.value)


# What there is to do.


@pytest.mark.parametrize(
  ('name', 'quant', 'kind'),
  [
    ('acts', {'default': 'w4'}, 'activations'),
    ('weights', {'default': 'a4'}, 'kernels'),
    ('acts', {'recipe': 'none'}, 'activations'),
    ('weights', {'recipe': 'none'}, 'kernels'),
  ],
)
def test_a_stage_that_quantizes_nothing_is_refused(name, quant, kind, tmp_path):
  config = make_digits_config()
  config.quant.update({'recipe': 'aqt'} | quant)
  config.train.stages = ('all:0.5', f'{name}:0.5')
  Experiment(config, training=True)  # other modes may read such a file
  with pytest.raises(ConfigError) as error:
    modes.run('train', config, str(tmp_path))
  message = str(error.value)
  assert f"train.stages[1]='{name}' quantizes {kind} alone, but" in message
  assert '\n' not in message
  assert not (tmp_path / 'checkpoints').exists()


def test_a_stage_that_trains_nothing_is_refused():
  found = stages.resolve(('norms:1',), 5)
  kernel = {'params': {'head': {'kernel': jnp.ones(2)}}}
  with pytest.raises(ConfigError) as error:
    stages.check(found, kernel, [QuantSpec(4, 4)])
  message = str(error.value)
  assert "train.stages[0]='norms' trains nothing: params (train." in message
  assert '\n' not in message
  steps = {'quant': {'head': {'step': jnp.ones(1)}}}
  stages.check(found, kernel | steps, [QuantSpec(4, 4)])
  assert stages.frozen('norms', kernel | steps) == {'params/head/kernel'}
  adapters = {'lora': {'head': {'a': jnp.ones((2, 1))}}}  # move kernels too
  assert stages.frozen('norms', adapters | steps) == {'lora/head/a'}


# What is rounded.


@pytest.mark.parametrize(
  ('name', 'alone'),
  [
    ('acts', dict(default='a4', attention='a8')),
    ('weights', dict(default='w4')),
  ],
)
def test_a_stage_is_the_plan_with_one_operand(steps, name, alone):
  (start, staged), _ = steps(name)
  (_, whole), _ = steps('all')
  (_, expected), _ = Stepper(plain_sgd(**alone))('all')
  assert_same(staged, expected)
  assert changed(staged, whole) and changed(staged, start)


def test_attention_products_count_as_activations():
  plan = Experiment(make_config(attention='a8'), training=True).model.plan
  assert {str(s) for s in plan.only('acts').specs} == {'a4', 'a8'}
  assert {str(s) for s in plan.only('weights').specs} == {'w4', 'float'}


# What is trained.


def test_norms_leave_kernels_and_their_moments_bit_for_bit(steps):
  (_, before, after), _ = steps('all', 'norms')
  moved = changed(before, after)
  for path in before:
    part, _, end = path.partition('params/')
    is_small = end.split('/')[-1] in ('bias', 'scale', 'scale1', 'scale2')
    # Averages go on towards the kernels as they are; counts have no path.
    assert (path in moved) == (is_small or part == 'e/' or not end), path
  assert {p.split('/')[0] for p in moved} == {'v', 'o', 'e'}


def test_norms_have_the_gradient_of_the_whole(steps):
  (start, norms), ((loss, _, norm),) = steps('norms')
  (_, whole), ((whole_loss, _, whole_norm),) = steps('all')
  moved = {p for p in changed(start, norms) if p.startswith('v/')}
  assert {p.split('/')[-1] for p in moved} == {
    'bias', 'scale', 'scale1', 'scale2'
  }  # fmt: skip
  for path in moved:
    np.testing.assert_allclose(
      norms[path] - start[path], whole[path] - start[path], rtol=1e-3, atol=1e-6
    )
  assert loss == pytest.approx(whole_loss, rel=1e-5)
  # What is reported, and clipped, is the gradient of what is trained.
  squares = [np.square(norms[p] - start[p]).sum() for p in moved]
  assert norm == pytest.approx(np.sqrt(sum(squares)) / 0.1, rel=1e-4)
  assert norm < whole_norm


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lamb', 'adafactor'])
def test_a_held_array_keeps_its_bits_and_its_moments(name):
  config = common.get_config()
  config.optim.update(name=name, lr=0.1, weight_decay=0.5, clip_norm=1.0)
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  params = {'params': {'kernel': draw(200, 150), 'bias': draw(150)}}
  params['params']['kernel'] = params['params']['kernel'].at[0].set(-0.0)
  tx = optimizer.make_optimizer(config, optax.constant_schedule(0.1), params)
  grads = jax.tree.map(jnp.cos, params)
  _, state = tx.update(grads, tx.init(params), params)

  held = stages.hold(tx, frozenset({'params/kernel'}))
  updates, after = held.update(grads, state, params)
  free, plain = tx.update(grads, state, params)
  new = optax.apply_updates(params, updates)['params']
  assert np.array(new['kernel']).tobytes() == (
    np.array(params['params']['kernel']).tobytes()
  )
  np.testing.assert_array_equal(
    updates['params']['bias'], free['params']['bias']
  )
  before, kept, moved = (tree.flatten(s) for s in (state, after, plain))
  assert kept.keys() == before.keys()
  for path in kept:
    wanted = before if path.endswith('/kernel') else moved
    np.testing.assert_array_equal(kept[path], wanted[path])
  assert stages.hold(tx, frozenset()) is tx


# The run.


@pytest.fixture(scope='module')
def staged(tmp_path_factory):
  """The workdir of a finished run in three stages."""
  workdir = tmp_path_factory.mktemp('staged')
  config = make_config()
  config.train.stages = STAGES
  modes.run('train', config, str(workdir))
  return workdir


# On a boundary, inside a stage, on a boundary after one.
@pytest.mark.parametrize(
  'stops',
  [
    pytest.param((2,), marks=pytest.mark.slow),
    pytest.param((5,), marks=pytest.mark.slow),
    (1, 5),
  ],
)
def test_a_stopped_run_goes_on_in_its_stage(
  staged, tmp_path, monkeypatch, capsys, stops
):
  config = make_config()
  config.train.stages = STAGES
  for more in stops:
    with monkeypatch.context() as context:
      stop_after(context, more)
      with pytest.raises(Preempted):
        modes.run('train', config, str(tmp_path))
  assert end_state(tmp_path)[0] == sum(stops)
  capsys.readouterr()
  modes.run('train', config, str(tmp_path))
  out = capsys.readouterr().out
  assert 'stages    acts 1-2, all 3-6, norms 7-8' in out
  began = [line for line in out.splitlines() if line.startswith('stage ')]
  lines = [
    'stage 2/3 all: steps 3 to 6, bits as planned, everything is trained',
    'stage 3/3 norms: steps 7 to 8, kernels and embeddings stay as they are',
  ]
  assert began == (lines[1:] if sum(stops) == 6 else lines)
  assert end_state(tmp_path) == end_state(staged)
  assert rows(tmp_path) == rows(staged)


def test_evaluations_see_the_whole_plan(staged, tmp_path):
  config = make_config()
  config.train.update(stages=('acts:1',), steps=4)
  modes.run('train', config, str(tmp_path / 'acts'))
  (row,) = rows(tmp_path / 'acts', 'eval')
  config.train.stages = ()
  config.checkpoint.path = str(tmp_path / 'acts')
  modes.run('eval', config, str(tmp_path / 'eval'))
  again = baseline(tmp_path / 'eval')
  assert (again['loss'], again['weight_bits']) == (row['loss'], 4)
  assert baseline(staged)['weight_bits'] == 4


@pytest.mark.slow
def test_without_stages_nothing_is_said_and_all_is_one_of_them(
  tmp_path, capsys
):
  config = make_config()
  config.train.steps = 4
  modes.run('train', config, str(tmp_path / 'plain'))
  out = capsys.readouterr().out
  assert not [line for line in out.splitlines() if line.startswith('stage')]
  config.train.stages = ('all:0.5', 'all:0.5')
  modes.run('train', config, str(tmp_path / 'two'))
  plain, two = end_state(tmp_path / 'plain'), end_state(tmp_path / 'two')
  assert plain == two
