"""One update."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from qvit_jax import models, tree
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError
from qvit_jax.training import losses
from qvit_jax.training.state import make_state, split_collections
from qvit_jax.training.step import TICK, make_train_step
from tests import reference

BATCH, CLASSES = 8, 3


class Linear(nn.Module):
  """A layer over pixels, with a gain in a collection of its own."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    x = x.reshape(len(x), -1)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    gain = self.variable('quant', 'gain', jnp.ones, (1,))
    return nn.Dense(CLASSES)(x) * gain.value


@functools.cache
def variables_of_linear():
  return jax.device_get(
    Linear().init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
  )


def source_of(count=20):
  random = np.random.default_rng(0)
  return {
    'image': jnp.asarray(random.integers(0, 256, (count, 4, 4, 3)), jnp.uint8),
    'label': jnp.asarray(random.integers(0, CLASSES, count), jnp.int32),
  }


def batch_of(step=1):
  return {'index': jnp.arange(BATCH, dtype=jnp.int32) + step}


class Trainer:
  """make_train_step with all that it needs, for a Linear by default."""

  def __init__(
    self, *, model=None, variables=None, tx=None, data=None, seed=0,
    changing=(), **train,
  ):  # fmt: skip
    config = common.get_config()
    config.data.update(mean=(0.5,) * 3, std=(0.3,) * 3)
    config.data.update(data or {})
    config.train.trainable = ('params',)
    config.train.update(train)
    self.train, self.changing = config.train, changing
    self.model = model or Linear()
    self.tx = tx or optax.sgd(0.1)
    self.variables = jax.tree.map(
      jnp.asarray, variables or variables_of_linear()
    )
    self.prepare = functools.partial(
      preprocess.prepare_train, data=config.data, size=4, num_classes=CLASSES
    )
    self.step = jax.jit(
      make_train_step(
        apply=self.model.apply, tx=self.tx, gather=preprocess.gather,
        prepare=self.prepare, train=config.train, seed=seed,
        batch_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        changing=changing,
      )
    )  # fmt: skip

  def start(self):
    return make_state(
      self.variables,
      tx=self.tx,
      trainable=self.train.trainable,
      ema=self.train.ema_decay > 0,
      changing=self.changing,
    )

  def run(self, steps=1):
    """Returns the states and ticks of the first updates."""
    state, states, ticks = self.start(), [], []
    for number in range(1, steps + 1):
      state, tick = self.step(state, source_of(), batch_of(number))
      states.append(state)
      # A learned collection beside the parameters adds a number of its own.
      tick = np.asarray(tick)[: len(TICK)]
      ticks.append(dict(zip(TICK, tick, strict=True)))
    return states, ticks

  def logits(self):
    """Returns the logits of the first batch before any update, and targets."""
    images, labels = preprocess.gather(source_of(), batch_of())
    x, targets = self.prepare(jax.random.key(0), images, labels)
    return np.asarray(self.model.apply(self.variables, x)), np.asarray(targets)


def changed(before, after):
  """Returns the paths of the arrays that differ."""
  before, after = tree.flatten(before), tree.flatten(after)
  assert before.keys() == after.keys()
  return {p for p in before if not np.array_equal(before[p], after[p])}


def assert_same(a, b, atol=0.0):
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_allclose(a[path], b[path], rtol=0, atol=atol)


# Losses.


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
def test_cross_entropy_equals_the_reference(smoothing):
  random = np.random.default_rng(0)
  logits = 5 * random.standard_normal((6, 7)).astype(np.float32)
  targets = random.dirichlet(np.ones(7), 6).astype(np.float32)
  actual = losses.cross_entropy(
    jnp.asarray(logits), jnp.asarray(targets), smoothing
  )
  expected = reference.cross_entropy(logits, targets, smoothing)
  assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_even_logits_is_the_log_of_the_classes():
  targets = jnp.eye(4)
  loss = losses.cross_entropy(jnp.full((4, 4), 3.0), targets, 0.2)
  assert float(loss) == pytest.approx(np.log(4))


def test_top1_counts_best_scores_that_are_the_likeliest_target():
  logits = jnp.asarray([[2.0, 1, 0], [0, 3, 1], [5, 4, 9], [1, 0, 0]])
  targets = jnp.asarray([[0.6, 0.4, 0], [0, 1, 0], [0.9, 0.1, 0], [1, 0, 0]])
  assert float(losses.top1(logits, targets)) == 0.75


# The step.


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_tick_has_loss_top1_and_gradient_norm_of_the_batch(smoothing):
  trainer = Trainer(label_smoothing=smoothing, tx=optax.sgd(1.0))
  logits, targets = trainer.logits()
  (state,), (tick,) = trainer.run()
  expected = reference.cross_entropy(logits, targets, smoothing)
  assert tick['loss'] == pytest.approx(expected, rel=1e-5)
  hits = logits.argmax(1) == targets.argmax(1)
  assert tick['top1'] == pytest.approx(hits.mean())
  moved = jax.tree.map(
    lambda a, b: a - b, trainer.variables['params'], state.variables['params']
  )
  assert tick['grad_norm'] == pytest.approx(
    float(optax.global_norm(moved)), rel=1e-4
  )
  assert int(state.step) == 1


def test_update_of_a_linear_layer_is_the_one_on_paper():
  """The gradient of cross-entropy is (p - target) x / n."""
  trainer = Trainer(tx=optax.sgd(0.1), label_smoothing=0.2)
  logits, targets = trainer.logits()
  images, _ = preprocess.gather(source_of(), batch_of())
  x = ((np.asarray(images) / 255 - 0.5) / 0.3).reshape(BATCH, -1)
  smooth = 0.8 * targets + 0.2 / CLASSES
  error = (reference.softmax(logits.astype(np.float64)) - smooth) / BATCH
  (state,), _ = trainer.run()
  before = trainer.variables['params']['Dense_0']
  after = state.variables['params']['Dense_0']
  np.testing.assert_allclose(
    after['kernel'], before['kernel'] - 0.1 * x.T @ error, atol=1e-6
  )
  np.testing.assert_allclose(
    after['bias'], before['bias'] - 0.1 * error.sum(0), atol=1e-6
  )


def test_gradient_norm_is_taken_before_clipping():
  clip = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
  (state,), (tick,) = Trainer(tx=clip).run()
  _, (plain,) = Trainer().run()
  assert tick['grad_norm'] == pytest.approx(plain['grad_norm'], rel=1e-6)
  assert tick['grad_norm'] > 0.01


def test_loss_of_a_batch_falls_over_updates():
  trainer, ticks = Trainer(tx=optax.adam(0.01)), []
  state = trainer.start()
  for _ in range(20):
    state, tick = trainer.step(state, source_of(), batch_of())
    ticks.append(tick[0])
  assert ticks[-1] < 0.3 * ticks[0]


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_accumulated_gradients_equal_those_of_the_whole_batch(smoothing):
  whole, parts = (
    Trainer(accumulate=n, label_smoothing=smoothing).run(3) for n in (1, 4)
  )
  assert_same(whole[0][-1].variables, parts[0][-1].variables, atol=1e-6)
  for a, b in zip(whole[1], parts[1], strict=True):
    assert a == pytest.approx(b, rel=1e-5)
  assert changed(whole[0][0].variables, whole[0][2].variables)


def test_accumulated_slices_draw_their_own_dropout():
  model = Linear(dropout=0.5)
  same = jax.tree.map(lambda x: x[:1].repeat(20, axis=0), source_of())
  trainer = Trainer(model=model, accumulate=BATCH, tx=optax.sgd(1.0))
  whole = Trainer(model=model, accumulate=1, tx=optax.sgd(1.0))
  states = [t.step(t.start(), same, batch_of())[0] for t in (trainer, whole)]
  # Dropped pixels have no gradient: eight draws leave hardly one untouched.
  for state in states:
    kernel = state.variables['params']['Dense_0']['kernel']
    untouched = kernel == trainer.variables['params']['Dense_0']['kernel']
    assert untouched.all(axis=1).mean() < 0.1


def test_vit_loss_equals_the_reference():
  config = common.get_config()
  config.model.update(
    patch=2, width=16, depth=1, heads=2, mlp_dim=32, image_size=4,
    num_classes=CLASSES, dtype='float32',
  )  # fmt: skip
  model = models.build_model(config)
  images = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  params = reference.random_params(shapes['params'])
  trainer = Trainer(
    model=model, variables={'params': params}, label_smoothing=0.1
  )
  images, labels = preprocess.gather(source_of(), batch_of())
  x = (np.asarray(images) / 255 - 0.5) / 0.3
  logits = reference.vit(params, x, patch=2, pool='token')
  expected = reference.cross_entropy(logits, np.eye(CLASSES)[labels], 0.1)
  (state,), (tick,) = trainer.run()
  assert tick['loss'] == pytest.approx(expected, rel=1e-5)
  still = set(tree.flatten(trainer.variables)) - changed(
    trainer.variables, state.variables
  )
  # A softmax sees no constant: that gradient is zero but for rounding.
  assert still <= {'params/encoder/block_00/attn/key/bias'}


# Randomness.


NOISY = dict(model=Linear(dropout=0.5), data=dict(pad=1, flip=True))


def test_same_seed_and_step_give_the_same_update():
  once, twice = (Trainer(**NOISY).run(3) for _ in range(2))
  assert_same(once[0][-1].variables, twice[0][-1].variables)
  assert once[1] == twice[1]


def test_another_seed_gives_another_update():
  (a,), _ = Trainer(seed=0, **NOISY).run()
  (b,), _ = Trainer(seed=1, **NOISY).run()
  assert changed(a.variables, b.variables)


@pytest.mark.parametrize(
  'fields',
  [dict(model=Linear(dropout=0.5)), dict(data=dict(flip=True))],
  ids=['dropout', 'augmentation'],
)
def test_another_step_draws_anew(fields):
  trainer = Trainer(**fields)
  state = trainer.start()
  later = state.replace(step=state.step + 1)
  ticks = [
    trainer.step(one, source_of(), batch_of())[1] for one in (state, later)
  ]
  assert ticks[0][0] != ticks[1][0]


def test_without_randomness_the_step_number_changes_nothing():
  trainer = Trainer()
  state = trainer.start()
  later = state.replace(step=state.step + 5)
  a, b = (trainer.step(s, source_of(), batch_of())[0] for s in (state, later))
  assert_same(a.variables, b.variables)
  assert (int(a.step), int(b.step)) == (1, 6)


# Averages.


def test_average_follows_its_formula():
  trainer = Trainer(ema_decay=0.3)
  states, _ = trainer.run(6)
  average = np.asarray(trainer.variables['params']['Dense_0']['kernel'])
  average = average.astype(np.float64)
  for number, state in enumerate(states, start=1):
    decay = min(0.3, number / (number + 9))
    kernel = np.asarray(state.variables['params']['Dense_0']['kernel'])
    average = decay * average + (1 - decay) * kernel
    np.testing.assert_allclose(
      state.ema['params']['Dense_0']['kernel'], average, atol=1e-6
    )
  assert decay == 0.3  # the last updates are past the start


def test_average_is_what_is_evaluated():
  (*_, state), _ = Trainer(ema_decay=0.99).run(3)
  assert changed(state.variables, state.evaluated) == {
    'params/Dense_0/kernel',
    'params/Dense_0/bias',
  }
  assert_same(state.evaluated['params'], state.ema['params'])
  (plain,), _ = Trainer().run()
  assert plain.ema == {} and plain.evaluated == plain.variables


# Collections.


@pytest.mark.parametrize(
    ('trainable', 'expected'),
    [(('params',), {'params/Dense_0/kernel', 'params/Dense_0/bias'}),
     (('quant',), {'quant/gain'}),
     (('params', 'quant'),
      {'params/Dense_0/kernel', 'params/Dense_0/bias', 'quant/gain'})],
)  # fmt: skip
def test_trainable_names_the_collections_that_change(trainable, expected):
  trainer = Trainer(trainable=trainable, ema_decay=0.5)
  (state,), _ = trainer.run()
  assert changed(trainer.variables, state.variables) == expected
  assert set(state.ema) == set(trainable)
  assert set(state.variables) == {'params', 'quant'}


@pytest.mark.parametrize(
  ('name', 'near'),
  [('quants', 'quant'), ('params/Dense_1', 'params/Dense_0'),
   ('params/Dense_0/kernel/x', 'params/Dense_0/kernel'),
   ('param/Dense_0/bias', 'params/Dense_0/bias')],
)  # fmt: skip
def test_an_unknown_part_is_refused_with_the_nearest(name, near):
  with pytest.raises(ConfigError) as raised:
    split_collections(variables_of_linear(), ('params/Dense_0/bias', name))
  message = str(raised.value)
  assert f'train.trainable names {name!r}' in message
  assert 'only params, quant;' in message or 'only quant, params;' in message
  assert message.endswith(f'{near!r} is the nearest')


@pytest.mark.parametrize('again', ['params', 'params/Dense_0/bias'])
def test_a_part_that_is_named_twice_is_refused(again):
  with pytest.raises(ConfigError, match=f'names {again!r} twice'):
    split_collections(variables_of_linear(), ('params', again))


def test_parts_of_one_layer_are_trained_together():
  names = ('params/Dense_0/bias', 'params/Dense_0/kernel')
  train, rest = split_collections(variables_of_linear(), names)
  assert set(tree.flatten(train)) == set(names)
  assert set(tree.flatten(rest)) == {'quant/gain'}


def test_average_is_a_copy_of_the_start():
  """The step donates its state, so two fields may not share an array."""
  state = Trainer(ema_decay=0.5).start()
  pointers = [
    leaf.unsafe_buffer_pointer()
    for part in (state.variables['params'], state.ema['params'])
    for leaf in jax.tree.leaves(part)
  ]
  assert len(pointers) == len(set(pointers)) == 4
