"""Freezing and dampening of weights that swing between two levels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from qvit_jax import modes, tree
from qvit_jax.errors import ConfigError, Preempted
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.quantization import QuantPlan, QuantSpec
from qvit_jax.quantization.methods import oscillation
from qvit_jax.training import optimizer, stages
from tests import reference
from tests.conftest import make_digits_config
from tests.small_models import normal
from tests.training.test_resume import end_state, rows, stop_after

# The math.


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('reach', [0.005, 0.1, 0.45])
def test_weights_near_a_boundary_are_ofqs(bits, reach):
  w = normal((60, 7), bits)
  found = np.asarray(oscillation.near_boundary(w, bits, reach=reach))
  wanted = reference.near_boundary(w, bits, reach)
  np.testing.assert_array_equal(found, wanted)
  inside = np.abs(w) < 0.9 * 2 * np.abs(w).mean(0)
  assert found[np.abs(w) > 2 * np.abs(w).mean(0)].all()
  assert found[inside].mean() == pytest.approx(2 * reach, abs=0.12)


def test_a_weight_near_a_boundary_changes_its_code_by_a_touch():
  w = normal((50, 4))
  size = np.asarray(2 * np.abs(w).mean(0))
  near = np.asarray(oscillation.near_boundary(w, 3, reach=0.1))
  before, inside = reference.statsq(w, 3)
  for sign in (-1, 1):  # the statistics stay those of w
    moved = np.asarray(w) + sign * 0.1001 * size / 4
    after = size * (np.round(moved / size * 4 - 0.5) + 0.5) / 4
    changes = np.abs(after - before) > 1e-6
    assert not changes[~near & (inside > 0)].any()


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_dampening_is_the_papers(bits):
  w = np.asarray(normal((9, 5)), np.float64)
  step = np.asarray(0.3 + 0.2 * np.abs(normal((5,), 1)), np.float64)
  if bits < 8:  # some weights lie beyond the grid
    w[0] = 3 * step * 2 ** (bits - 1)
    w[1] = -w[0]
  given = jnp.asarray(w, jnp.float32), jnp.asarray(step, jnp.float32)
  value, (to_w, to_step) = jax.value_and_grad(
    lambda w, step: oscillation.dampening(w, step, bits), argnums=(0, 1)
  )(*given)
  assert value == pytest.approx(reference.dampening(w, step, bits), rel=1e-4)
  wanted = np.zeros_like(w)
  for at in np.ndindex(w.shape):
    sums = []
    for change in (1e-6, -1e-6):
      moved = w.copy()
      moved[at] += change
      sums.append(reference.dampening(moved, step, bits, of=w))
    wanted[at] = (sums[0] - sums[1]) / 2e-6
  np.testing.assert_allclose(to_w, wanted, atol=1e-4)
  assert not np.any(to_step)
  if bits < 8:
    assert not np.any(to_w[:2])


def plan_of(config, **quant):
  config.quant.update(quant)
  return Experiment(config, training=True).model.plan


def test_only_kernels_with_bits_count(digits_config):
  plan = plan_of(
    digits_config, recipe='lsq', default='w4a4', rules=(('head', 'a8'),)
  )
  shapes = Experiment(digits_config, training=True).model.shapes
  variables = jax.tree.map(lambda s: normal(s.shape), shapes)
  masks = oscillation.movable_weights(plan, variables, reach=0.1)
  flat, total = tree.flatten(variables), 0.0
  kernels = {n for n in flat if n.endswith('/kernel') and 'head' not in n}
  assert set(masks) == kernels
  for path in kernels:
    site = path.removeprefix('params/').removesuffix('/kernel')
    assert masks[path].shape == flat[path].shape
    step = flat[f'quant/{site}/kernel_step']
    w = np.asarray(flat[path]).reshape(-1, len(step))
    total += reference.dampening(w, np.maximum(step, 1e-8), 4)
  found = oscillation.total_dampening(plan, variables)
  assert found == pytest.approx(total, rel=1e-3)
  in_float = QuantPlan(plan.sites, (QuantSpec(),) * len(plan.sites), '')
  assert oscillation.total_dampening(in_float, variables) == 0


# Updates.


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lamb', 'adafactor'])
def test_a_held_weight_keeps_its_bits_and_another_one_moves(name):
  config = common.get_config()
  config.optim.update(name=name, lr=0.1, weight_decay=0.5, clip_norm=1.0)
  params = {'params': {'kernel': normal((200, 150)), 'bias': normal((150,))}}
  params['params']['kernel'] = params['params']['kernel'].at[0].set(-0.0)
  mask = np.random.default_rng(1).random((200, 150)) < 0.3
  mask[0] = False
  movable = lambda params: {'params/kernel': jnp.asarray(mask)}
  tx = optimizer.make_optimizer(config, optax.constant_schedule(0.1), params)
  state = tx.init(params)
  updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
  start = params = optax.apply_updates(params, updates)  # there is momentum
  held = stages.hold_elements(tx, movable)
  loss = lambda variables: sum(jnp.sin(x).sum() for x in jax.tree.leaves(
      variables))  # fmt: skip
  for _ in range(3):
    grads = jax.grad(stages.stop_elements(loss, movable))(params)
    kernel = grads['params']['kernel']
    np.testing.assert_array_equal(np.asarray(kernel) != 0, mask)
    wanted = np.where(mask, np.cos(params['params']['kernel']), 0)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-5)
    updates, state = held.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  before, after = (np.asarray(p['params']['kernel']) for p in (start, params))
  same = before.view('int32') == after.view('int32')
  np.testing.assert_array_equal(same, ~mask)
  assert (params['params']['bias'] != start['params']['bias']).all()


def config_of(**fields):
  config = make_digits_config()
  if 'freeze' in str(fields.get('train.stages', '')):
    config.quant.freeze = 0.1
  config.optim.update(name='sgd', lr=0.5, weight_decay=0.1)
  config.train.update(steps=6, ema_decay=0.9)
  config.eval.every = 3
  config.log.every = 1
  config.update_from_flattened_dict(fields)
  return config


def two_steps(config, stage):
  """The variables around an update of 'all' and one of a stage; the ticks."""
  experiment = Experiment(config, training=True)
  source = experiment.replicate(experiment.data.train.source)
  state = experiment.fresh_state(jax.random.key(0))
  copied = lambda: {
    n: np.array(x) for n, x in tree.flatten(state.variables).items()
  }
  seen, ticks, batches = [copied()], [], experiment.train_batches(1, 2)
  for name, batch in zip(('all', stage), batches, strict=True):
    step, _ = experiment.compile_train_step(state, source, batch, stage=name)
    state, tick = step(state, source, batch, experiment.given)
    seen.append(copied())
    ticks.append(np.asarray(tick))
  return experiment, seen, ticks


@pytest.mark.slow
def test_the_stage_freeze_moves_what_is_near_a_boundary():
  experiment, (_, before, after), _ = two_steps(
    config_of(**{'quant.recipe': 'statsq', 'quant.freeze': 0.1}), 'freeze'
  )
  plan, shares = experiment.model.plan, []
  for site in plan.sites:
    if site.is_layer:
      path = f'params/{site.path}/kernel'
      w, new = (x[path].reshape(site.rhs_shape) for x in (before, after))
      near = np.asarray(oscillation.near_boundary(jnp.asarray(w), 4, reach=0.1))
      moved = w.view('int32') != new.view('int32')
      assert not moved[~near].any()
      shares.append(moved[near].mean())
      assert 0.1 < near.mean() < 0.6
  assert min(shares) > 0.9  # by decay and momentum at least
  for path in ('params/head/bias', 'quant/head/lhs_step'):
    assert (before[path] != after[path]).any()


@pytest.mark.slow
def test_a_run_with_a_freeze_stage_resumes_bitwise(
  tmp_path, monkeypatch, capsys
):
  fields = {
    'quant.recipe': 'statsq', 'train.stages': ('all:0.5', 'freeze:0.5'),
  }  # fmt: skip
  modes.run('train', config_of(**fields), str(tmp_path / 'flat'))
  out = capsys.readouterr().out
  assert 'stages    all 1-3, freeze 4-6' in out
  assert 'steps 4 to 6, weights farther than quant.freeze from a' in out
  with monkeypatch.context() as context:
    stop_after(context, 4)
    with pytest.raises(Preempted):
      modes.run('train', config_of(**fields), str(tmp_path / 'cut'))
  modes.run('train', config_of(**fields), str(tmp_path / 'cut'))
  assert end_state(tmp_path / 'cut') == end_state(tmp_path / 'flat')
  assert rows(tmp_path / 'cut') == rows(tmp_path / 'flat')


@pytest.mark.slow
def test_dampening_is_in_the_loss_and_in_the_metrics(tmp_path, capsys):
  fields = {'quant.recipe': 'lsq', 'train.steps': 2, 'eval.every': 2}
  runs = {}
  for weight in (0.0, 0.25):
    config = config_of(**fields | {'quant.dampen': weight})
    modes.run('train', config, str(tmp_path / str(weight)))
    runs[weight] = rows(tmp_path / str(weight), 'train')
  out = capsys.readouterr().out
  assert ', kernels dampened by 0.25)' in out
  plain, damped = (runs[w][0] for w in (0.0, 0.25))
  assert 'dampen_loss' not in plain and damped['dampen_loss'] > 0
  added = 0.25 * damped['dampen_loss']
  assert damped['loss'] == pytest.approx(plain['loss'] + added, rel=1e-5)
  assert damped['grad_norm'] != plain['grad_norm']
  assert f'dampen loss {damped["dampen_loss"]:.4f}' in out


@pytest.mark.slow
def test_dampening_draws_kernels_but_not_held_ones():
  config = config_of(**{'quant.recipe': 'lsq', 'quant.dampen': 0.01})
  _, (_, before, after), (_, tick) = two_steps(config, 'norms')
  path = 'params/encoder/block_00/mlp/fc1/kernel'
  np.testing.assert_array_equal(before[path], after[path])
  config.quant.dampen = 0.0
  _, (_, _, plain), (_, other) = two_steps(config, 'norms')
  assert len(tick) == len(other) + 1 and tick[3] > 0
  assert (before[path] != plain[path]).any()  # drawn in the first update


@pytest.mark.parametrize(
  ('fields', 'given', 'message'),
  [
    ({'quant.recipe': 'statsq'}, 'quant.freeze',
     "no stage is named 'freeze'; set --config.train.stages="),
    ({'quant.recipe': 'lsq', 'train.stages': ('freeze:1',)}, 'quant.freeze',
     "quant.recipe='lsq' does not read it; set --config.quant.recipe=statsq"),
    ({'quant.recipe': 'statsq', 'quant.dampen': 1.0}, 'quant.dampen',
     "quant.recipe='statsq' does not read it; set --config.quant.recipe=lsq"),
    ({'quant.recipe': 'statsq', 'quant.freeze': 0.5}, 'quant.freeze',
     'quant.freeze=0.5 is not allowed; allowed: a number > 0 and < 0.5'),
  ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(fields, given, message, tmp_path):
  with pytest.raises(ConfigError) as error:
    modes.run('train', config_of(**fields), str(tmp_path), overrides=[given])
  assert message in str(error.value) and '\n' not in str(error.value)
