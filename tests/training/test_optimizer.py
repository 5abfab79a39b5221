"""Learning rates, updates and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from qvit_jax import tree
from qvit_jax.errors import ConfigError, RuleError
from qvit_jax.training import optimizer
from tests import reference


def config_of(**optim):
  config = common.get_config()
  config.optim.update(optim)
  return config


def schedule_of(total, warmup=0, **optim):
  return optimizer.make_schedule(config_of(**optim), total, warmup)


def params_of(seed=0):
  random = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
  return {
    'params': {
      'fc': {'kernel': draw(3, 4), 'bias': draw(4)},
      'norm': {'scale': draw(3)},
    }
  }


def updated(config, gradients, schedule=None):
  """Returns the flat parameters after each of the gradients."""
  params = params_of()
  schedule = schedule or optax.constant_schedule(config.optim.lr)
  tx = optimizer.make_optimizer(config, schedule, jax.eval_shape(params_of))
  state, update, history = tx.init(params), jax.jit(tx.update), []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    history.append(tree.flatten(jax.device_get(params)))
  return history


def assert_equals_reference(actual, gradients, rule, rates, decay):
  """Compares every array; `decay` counts for kernels only."""
  start = tree.flatten(params_of())
  for path, array in actual.items():
    expected = rule(
      np.asarray(start[path], np.float64),
      [np.asarray(tree.flatten(g)[path], np.float64) for g in gradients],
      rates,
      decay=decay if path.endswith('kernel') else 0,
    )
    np.testing.assert_allclose(array, expected, rtol=2e-5, atol=1e-6)


# Schedules.


def test_cosine_falls_from_peak_to_end_after_the_warm_up():
  schedule = schedule_of(
    110, 10, schedule='cosine', lr=2.0, warmup_from=0.2, end_lr=0.2
  )
  steps = [0, 5, 10, 35, 60, 85, 110]
  part = lambda share: 0.2 + 1.8 * (1 + np.cos(np.pi * share)) / 2
  expected = [0.2, 1.1, 2.0, part(0.25), 1.1, part(0.75), 0.2]
  np.testing.assert_allclose([schedule(n) for n in steps], expected, rtol=1e-5)


def test_linear_falls_in_a_straight_line():
  schedule = schedule_of(
    50, 10, schedule='linear', lr=2.0, warmup_from=0.0, end_lr=1.0
  )
  steps = [0, 1, 10, 20, 30, 50]
  expected = [0, 0.2, 2.0, 1.75, 1.5, 1.0]
  np.testing.assert_allclose([schedule(n) for n in steps], expected, rtol=1e-5)


def test_constant_stays_at_its_peak():
  schedule = schedule_of(
    50, 4, schedule='constant', lr=2.0, warmup_from=1.0, end_lr=0.5
  )
  steps = [0, 2, 4, 5, 49]
  expected = [1, 1.5, 2, 2, 2]
  np.testing.assert_allclose([schedule(n) for n in steps], expected, rtol=1e-6)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'constant'])
def test_schedule_without_warm_up_starts_at_its_peak(name):
  schedule = schedule_of(20, schedule=name, lr=3e-4)
  assert float(schedule(0)) == pytest.approx(3e-4)


def test_default_warm_up_starts_from_1e_5():
  assert float(schedule_of(50, 5)(0)) == pytest.approx(1e-5, rel=1e-4)


# Warm-up.


def test_warm_up_steps_count_as_they_are():
  config = config_of(warmup_steps=7, warmup_epochs=3.0)
  config.train.epochs = 10.0
  assert optimizer.warmup_steps(config, 100, 10) == 7


def test_warm_up_epochs_count_updates_of_an_epoch():
  config = config_of(warmup_epochs=2.5)
  config.train.epochs = 10.0
  assert optimizer.warmup_steps(config, 1000, 100) == 250


@pytest.mark.parametrize(('steps', 'warmup'), [(100, 20), (50, 10), (10, 2)])
def test_warm_up_epochs_shrink_with_train_steps(steps, warmup):
  config = config_of(warmup_epochs=2.0)
  config.train.update(steps=steps, epochs=10.0)
  assert optimizer.warmup_steps(config, steps, 100) == warmup


def test_warm_up_epochs_do_not_stretch_with_train_steps():
  config = config_of(warmup_epochs=0.5)
  config.train.update(steps=1000, epochs=1.0)
  assert optimizer.warmup_steps(config, 1000, 100) == 50


def test_no_warm_up_is_no_error():
  config = config_of()
  for train in (dict(steps=1, epochs=0.0), dict(steps=0, epochs=1.0)):
    config.train.update(train)
    assert optimizer.warmup_steps(config, 1, 1) == 0


@pytest.mark.parametrize(
    ('optim', 'train', 'total', 'given'),
    [(dict(warmup_steps=10), dict(steps=10), 10, 'warmup_steps=10'),
     (dict(warmup_steps=11), dict(steps=10), 10, 'warmup_steps=11'),
     (dict(warmup_steps=9), dict(steps=5, epochs=0.0), 5, 'warmup_steps=9'),
     (dict(warmup_epochs=3.0), dict(epochs=2.0), 20, 'warmup_epochs=3.0'),
     (dict(warmup_epochs=2.0), dict(epochs=2.0), 20, 'warmup_epochs=2.0'),
     (dict(warmup_epochs=1.0), dict(steps=6, epochs=0.0), 6,
      'warmup_epochs=1.0'),
     # Shorter than the training, but not by as much as one update.
     (dict(warmup_epochs=0.95), dict(steps=6, epochs=1.0), 6,
      'warmup_epochs=0.95')],
)  # fmt: skip
def test_warm_up_that_fills_the_training_is_refused(optim, train, total, given):
  config = config_of(**optim)
  config.train.update(train)
  with pytest.raises(ConfigError) as raised:
    optimizer.warmup_steps(config, total, 10)
  message = str(raised.value)
  assert f'optim.{given}' in message and f'the {total} of the' in message


# Updates.


@pytest.mark.parametrize('count', [1, 3])
def test_adamw_equals_the_reference(count):
  config = config_of(name='adamw', weight_decay=0.3, b1=0.8, b2=0.95)
  schedule = schedule_of(10, 2, lr=0.1, warmup_from=0.05)
  gradients = [params_of(seed) for seed in range(1, count + 1)]
  rule = lambda p, g, rates, decay: reference.adamw(
    p, g, rates, b1=0.8, b2=0.95, decay=decay
  )
  actual = updated(config, gradients, schedule)[-1]
  rates = [0.05, 0.075, 0.1][:count]
  assert_equals_reference(actual, gradients, rule, rates, 0.3)


@pytest.mark.parametrize('count', [1, 3])
@pytest.mark.parametrize('momentum', [0.0, 0.7])
def test_sgd_equals_the_reference(count, momentum):
  config = config_of(name='sgd', weight_decay=0.3, momentum=momentum)
  schedule = schedule_of(10, 2, lr=0.1, warmup_from=0.05)
  gradients = [params_of(seed) for seed in range(1, count + 1)]
  rule = lambda p, g, rates, decay: reference.sgd(
    p, g, rates, momentum=momentum, decay=decay
  )
  actual = updated(config, gradients, schedule)[-1]
  rates = [0.05, 0.075, 0.1][:count]
  assert_equals_reference(actual, gradients, rule, rates, 0.3)


@pytest.mark.parametrize(('scale', 'clipped'), [(0.01, False), (100.0, True)])
def test_clip_norm_shortens_long_gradients_only(scale, clipped):
  config = config_of(name='sgd', momentum=0.0, lr=1.0, clip_norm=2.0)
  gradient = jax.tree.map(lambda g: scale * g, params_of(1))
  norm = np.sqrt(sum((g**2).sum() for g in tree.flatten(gradient).values()))
  assert (norm > 2) == clipped
  factor = 2 / norm if clipped else 1
  (actual,) = updated(config, [gradient])
  start, flat = tree.flatten(params_of()), tree.flatten(gradient)
  for path, array in actual.items():
    expected = start[path] - factor * flat[path]
    np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


def test_clip_comes_before_the_moments():
  gradients = [jax.tree.map(lambda g: 1e4 * g, params_of(1)), params_of(2)]
  config = config_of(name='sgd', momentum=0.9, lr=1.0, clip_norm=1.0)
  moved = [
    np.sqrt(sum(((b[p] - a[p]) ** 2).sum() for p in a))
    for a, b in zip(
      [tree.flatten(params_of()), *updated(config, gradients)],
      updated(config, gradients), strict=False,
    )
  ]  # fmt: skip
  assert moved[0] == pytest.approx(1, rel=1e-4) and moved[1] < 2


# Weight decay.


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lamb', 'adafactor'])
def test_weight_decay_touches_kernels_only(name):
  gradients = [params_of(1)]
  common_fields = dict(name=name, lr=0.1)
  (plain,) = updated(config_of(**common_fields), gradients)
  (decayed,) = updated(config_of(weight_decay=0.5, **common_fields), gradients)
  touched = {p for p in plain if not np.array_equal(plain[p], decayed[p])}
  assert touched == {'params/fc/kernel'}


def test_decay_rules_choose_what_decays():
  fields = dict(name='sgd', momentum=0.0, lr=0.1, weight_decay=0.5)
  config = config_of(decay_rules=('fc/', 'scale$'), **fields)
  zero = jax.tree.map(jnp.zeros_like, params_of())
  (actual,) = updated(config, [zero])
  for path, start in tree.flatten(params_of()).items():
    np.testing.assert_allclose(actual[path], 0.95 * start, rtol=1e-6)
  kernel_only = config_of(decay_rules=('kernel$',), **fields)
  (actual,) = updated(kernel_only, [zero])
  np.testing.assert_array_equal(
    actual['params/fc/bias'], params_of()['params']['fc']['bias']
  )


def test_dead_decay_rule_is_refused():
  config = config_of(weight_decay=0.1, decay_rules=('kernel$', 'kernal$'))
  with pytest.raises(RuleError) as raised:
    updated(config, [])
  message = str(raised.value)
  assert "optim.decay_rules[1]: 'kernal$' matches nothing" in message
  assert 'params/fc/kernel' in message


def test_decay_rules_do_not_matter_without_decay():
  config = config_of(weight_decay=0.0, decay_rules=('kernal$',))
  assert len(updated(config, [params_of(1)])) == 1


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'adafactor'])
def test_decay_is_per_unit_of_learning_rate(name):
  """With no gradient, one update takes lr x weight_decay of a kernel."""
  config = config_of(name=name, lr=0.2, weight_decay=0.5)
  zero = jax.tree.map(jnp.zeros_like, params_of())
  (actual,) = updated(config, [zero])
  start = tree.flatten(params_of())['params/fc/kernel']
  np.testing.assert_allclose(actual['params/fc/kernel'], 0.9 * start, rtol=1e-5)


def test_decay_enters_the_momentum_of_sgd_and_not_the_scaling_of_adafactor():
  zero = jax.tree.map(jnp.zeros_like, params_of())
  fields = dict(lr=0.2, weight_decay=0.5)
  start = tree.flatten(params_of())['params/fc/kernel']
  sgd = updated(config_of(name='sgd', momentum=0.9, **fields), [zero] * 2)
  # m1 = 0.5 p, p1 = 0.9 p; m2 = 0.9 m1 + 0.5 p1 = 0.9 p, p2 = 0.72 p
  np.testing.assert_allclose(
    sgd[1]['params/fc/kernel'], 0.72 * start, rtol=1e-5
  )
  adafactor = updated(config_of(name='adafactor', **fields), [zero] * 2)
  np.testing.assert_allclose(
    adafactor[1]['params/fc/kernel'], 0.81 * start, rtol=1e-5
  )


# All optimizers.


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lamb', 'adafactor'])
def test_optimizer_lowers_a_quadratic_loss(name):
  params, target = params_of(), params_of(9)
  config = config_of(name=name, lr=0.02, clip_norm=10.0)
  tx = optimizer.make_optimizer(
    config, optax.constant_schedule(0.02), jax.eval_shape(params_of)
  )
  loss = lambda p: sum(
    ((a - b) ** 2).sum()
    for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
  )

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  before, state, current = tree.flatten(params), tx.init(params), params
  for _ in range(30):
    current, state = step(current, state)
  for path, array in tree.flatten(current).items():
    assert np.isfinite(array).all() and (array != before[path]).all(), path
  assert loss(current) < 0.7 * loss(params)


@pytest.mark.parametrize('name', ['adamw', 'lamb'])
@pytest.mark.parametrize('size', [0.02, 3.0])
def test_quant_lr_is_a_share_of_a_step(name, size):
  config = config_of(name=name, lr=1e-4, quant_lr=1e-2, weight_decay=0.0)
  variables = {
    'params': {'kernel': jnp.full((4, 4), size)},
    'quant': {'kernel_step': jnp.full((4,), size)},
  }
  tx = optimizer.make_optimizer(
    config, optax.constant_schedule(1e-4), jax.eval_shape(lambda: variables)
  )
  gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.3), variables)
  updates, _ = jax.jit(tx.update)(gradients, tx.init(variables), variables)
  np.testing.assert_allclose(
    updates['quant']['kernel_step'], -1e-2 * size, rtol=1e-4
  )
  share = size if name == 'lamb' else 1
  np.testing.assert_allclose(
    updates['params']['kernel'], -1e-4 * share, rtol=1e-4
  )


def test_lamb_moves_each_array_by_a_share_of_its_norm():
  """You et al. 2019, arXiv:1904.00962: the trust ratio scales the update."""
  (actual,) = updated(config_of(name='lamb', lr=0.01), [params_of(1)])
  for path, start in tree.flatten(params_of()).items():
    moved = np.linalg.norm(actual[path] - start)
    assert moved == pytest.approx(0.01 * np.linalg.norm(start), rel=1e-3)


def test_adafactor_update_has_a_root_mean_square_of_at_most_the_rate():
  """A gradient that jumps would be worth 1.3 rates if it were not clipped."""
  gradients = [params_of(1), jax.tree.map(lambda g: 1e3 * g, params_of(1))]
  before, after = updated(config_of(name='adafactor', lr=0.01), gradients)
  for path, array in after.items():
    moved = np.sqrt(np.mean((array - before[path]) ** 2))
    assert moved == pytest.approx(0.01, rel=1e-3), path
