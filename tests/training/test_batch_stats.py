"""Statistics of norms in one update: moved, kept, averaged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qvit_jax import tree
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError
from qvit_jax.models.batch_norm import COLLECTION, BatchNorm
from qvit_jax.training import loss_scale, stages
from tests.training.test_step import (
  BATCH,
  CLASSES,
  Trainer,
  batch_of,
  source_of,
)


class Normed(nn.Module):
  """A norm between two layers over pixels."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(5, use_bias=False)(x.reshape(len(x), 1, 1, -1))
    return nn.Dense(CLASSES)(BatchNorm()(x, train)[:, 0, 0])


@pytest.fixture(scope='module')
def variables():
  init = jax.jit(Normed().init)
  return jax.device_get(init(jax.random.key(0), jnp.ones((1, 4, 4, 3))))


def trainer(variables, **fields):
  return Trainer(
    model=Normed(), variables=variables, changing=(COLLECTION,), **fields
  )


def inputs_of_norm(one, variables, step=1):
  """Returns what the norm sees of a batch, [b, 5]."""
  images, labels = preprocess.gather(source_of(), batch_of(step))
  x, _ = one.prepare(jax.random.key(0), images, labels)
  kernel = variables['params']['Dense_0']['kernel']
  return np.asarray(x, np.float64).reshape(BATCH, -1) @ kernel


def moved(stats, x):
  return {
    'mean': 0.9 * stats['mean'] + 0.1 * x.mean(0),
    'var': 0.9 * stats['var'] + 0.1 * x.var(0),
  }


def stats_of(variables):
  return variables[COLLECTION]['BatchNorm_0']


def assert_near(found, wanted):
  for name in ('mean', 'var'):
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_an_update_moves_the_statistics_by_its_batch(variables):
  one = trainer(variables)
  (after,), _ = one.run()
  wanted = moved(stats_of(variables), inputs_of_norm(one, variables))
  assert_near(stats_of(after.variables), wanted)
  # No optimizer knows them, and no gradient is of them.
  assert not any(COLLECTION in path for path in tree.flatten(after.opt_state))


def test_slices_of_a_batch_move_them_one_after_the_other(variables):
  one = trainer(variables, accumulate=2)
  (after,), _ = one.run()
  x, wanted = inputs_of_norm(one, variables), stats_of(variables)
  for part in (x[0::2], x[1::2]):
    wanted = moved(wanted, part)
  assert_near(stats_of(after.variables), wanted)


def test_averages_hold_those_of_the_same_updates(variables):
  one = trainer(variables, ema_decay=0.5)
  states, _ = one.run(3)
  wanted = stats_of(variables)
  for number, state in enumerate(states, start=1):
    decay, new = min(0.5, number / (number + 9)), stats_of(state.variables)
    wanted = {n: decay * wanted[n] + (1 - decay) * new[n] for n in wanted}
  assert_near(stats_of(states[-1].ema), wanted)
  assert_near(stats_of(states[-1].evaluated), wanted)


def test_a_skipped_update_leaves_them_as_they_were(variables):
  tx = loss_scale.dynamic(optax.sgd(0.1), initial=float('inf'), growth=100)
  one = trainer(variables, tx=tx, ema_decay=0.5)
  before = one.start()
  after, tick = one.step(before, source_of(), batch_of())
  assert tick[-1] == 1  # the scaled gradient overflows
  for state in (after.variables, after.ema):
    for name, x in stats_of(variables).items():
      np.testing.assert_array_equal(stats_of(state)[name], x)


def test_a_stage_that_holds_needs_something_to_hold(variables):
  held = stages.resolve(('all:0.5', 'held:0.5'), 4)
  params = {'params': variables['params']}
  stages.check(held, params, (), (COLLECTION,))
  with pytest.raises(ConfigError, match=r'train.stages\[1\]=.held. would have'):
    stages.check(held, params, ())
