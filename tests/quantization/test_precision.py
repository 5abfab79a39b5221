"""float16 with loss scaling, and backward products of 8 bits."""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from qvit_jax import models, modes, tree
from qvit_jax.errors import (
  CheckpointError,
  ConfigError,
  DivergedError,
  Preempted,
)
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.ops import Site
from qvit_jax.quantization import QuantPlan, build_ops, build_plan, parse_spec
from qvit_jax.quantization.methods.aqt import AqtCore
from qvit_jax.training import loss_scale
from qvit_jax.training.loss_scale import ScaledState
from qvit_jax.training.step import SCALING, TICK
from tests.conftest import make_digits_config, notes_of
from tests.quantization.test_aqt import GRANULARITIES, PRODUCTS, operands
from tests.training.test_resume import end_state, rows, stop_after


def make_config(dtype='float16', **fields):
  """Gradients of this model overflow from a scale of 2**18 on."""
  config = make_digits_config()
  config.model.update(dtype=dtype, dropout=0.1)
  config.train.update(steps=8, ema_decay=0.9)
  config.eval.every = 4
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def updates(config):
  """Yields (state, tick by name) before the first and after each update."""
  experiment = Experiment(config, training=True)
  state = experiment.fresh_state(jax.random.key(0))
  source = experiment.replicate(experiment.data.train.source)
  step = jax.jit(experiment.train_step_function())
  yield state, {}
  for batch in experiment.train_batches(1, experiment.total_steps):
    state, tick = step(state, source, batch)
    names = (*TICK, *SCALING)[: len(tick)]
    yield state, dict(zip(names, np.asarray(tick).tolist(), strict=True))


def bits_of(x):
  return {name: np.asarray(a).tobytes() for name, a in tree.flatten(x).items()}


# The rule.


@pytest.mark.parametrize('growth', [1, 2, 3])
def test_the_scale_follows_its_rule(growth):
  tx = loss_scale.dynamic(optax.sgd(0.1), initial=8.0, growth=growth)
  params = {'w': jnp.ones(2)}
  state, scale, count = tx.init(params), 8.0, 0
  for good in '11011110010111111':
    grads = {'w': jnp.asarray([1.0, 1.0 if good == '1' else jnp.inf])}
    _, state = tx.update(grads, state, params)
    if good == '1':
      count += 1
      if count == growth:
        scale, count = 2 * scale, 0
    else:
      scale, count = scale / 2, 0
    assert (float(state.scale), int(state.finite)) == (scale, count)


def test_not_a_number_is_an_overflow_too_and_the_optimizer_keeps_its_state():
  tx = loss_scale.dynamic(optax.adam(0.1), initial=8.0, growth=10)
  params = {'w': jnp.ones(2)}
  _, state = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
  _, after = tx.update({'w': jnp.asarray([jnp.nan, 0])}, state, params)
  assert bits_of(after.inner) == bits_of(state.inner)
  assert float(after.scale) == 4.0


def test_the_scale_never_doubles_to_infinity():
  tx = loss_scale.dynamic(optax.sgd(0.1), initial=2.0**127, growth=1)
  _, state = tx.update({'w': jnp.ones(1)}, tx.init({'w': jnp.ones(1)}))
  assert float(state.scale) == 2.0**127


def loss_in(dtype):
  """Returns a loss whose gradient is 1e-9 * x."""

  def loss(w, x):
    return (w.astype(dtype) * x).astype(jnp.float32).sum() * 1e-9, 'aux'

  return loss


def test_scaling_changes_no_bit_in_float32():
  w, x = jnp.linspace(-1, 1, 5), jnp.linspace(1, 3, 5)
  scaled = ScaledState(jnp.float32(2.0**15), jnp.int32(0), ())
  gradient = loss_scale.value_and_grad
  loss = loss_in('float32')
  one, other = (gradient(loss, state)(w, x) for state in ((), scaled))
  assert bits_of(one[1]) == bits_of(other[1])
  assert float(one[0][0]) == float(other[0][0])
  assert one[0][1] == other[0][1] == 'aux'


def test_scaling_saves_gradients_below_the_smallest_float16():
  w, x = jnp.linspace(-1, 1, 5), jnp.linspace(1, 3, 5)
  loss = loss_in('float16')
  found = {}
  for scale in (1.0, 2.0**15):
    state = ScaledState(jnp.float32(scale), jnp.int32(0), ())
    _, found[scale] = loss_scale.value_and_grad(loss, state)(
      w, x.astype(jnp.float16)
    )
  assert (found[1.0] == 0).all()
  np.testing.assert_allclose(found[2.0**15], 1e-9 * x, rtol=2e-3)


# An overflow in training.


def test_an_overflow_skips_the_update_and_training_recovers():
  config = make_config(**{'optim.loss_scale': 2.0**19})
  skipped, before = [], None
  for state, tick in updates(config):
    if before is None:
      before = state
      continue
    assert int(state.step) == int(before.step) + 1  # data order goes on
    old, new = float(before.opt_state.scale), float(state.opt_state.scale)
    assert tick['loss_scale'] == new
    skipped.append(tick['skipped'])
    same = [
      bits_of(a) == bits_of(b)
      for a, b in (
        (state.variables, before.variables),
        (state.ema, before.ema),
        (state.opt_state.inner, before.opt_state.inner),
      )
    ]
    if tick['skipped']:
      assert new == old / 2 and all(same)
      assert np.isfinite(tick['loss'])
    else:
      assert new == old and not any(same)
      assert all(np.isfinite(value) for value in tick.values())
    before = state
  assert skipped[0] == 1 and skipped[-2:] == [0, 0]
  kernels = tree.flatten(before.variables)
  assert {x.dtype for x in kernels.values()} == {jnp.dtype('float32')}


def test_a_first_update_in_float16_is_near_that_in_float32():
  ends = {}
  for dtype in ('float16', 'float32'):
    config = make_config(dtype, **{'train.accumulate': 2})
    config.model.dropout = 0.0
    config.optim.update(name='sgd', momentum=0.0)
    (before, _), (after, _) = itertools.islice(updates(config), 2)
    ends[dtype] = jax.tree.map(
      lambda a, b: a - b, after.variables, before.variables
    )
    ends[dtype] = np.concatenate(
      [np.ravel(x) for x in tree.flatten(ends[dtype]).values()]
    )
  error = np.abs(ends['float16'] - ends['float32']).max()
  assert 0 < error < 0.02 * np.abs(ends['float32']).max()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_only_float16_has_a_scale(dtype):
  experiment = Experiment(make_config(dtype), training=True)
  state = experiment.state_shapes
  batch = next(experiment.train_batches(1, 1))
  source = experiment.data.train.source
  step = experiment.train_step_function()
  _, tick = jax.eval_shape(step, state, source, batch)
  is_scaled = dtype == 'float16'
  assert isinstance(state.opt_state, ScaledState) == is_scaled
  assert tick.shape == ((5,) if is_scaled else (3,))
  assert bool(experiment.precision_lines()) == is_scaled


@pytest.fixture(scope='module')
def overflowed(tmp_path_factory):
  """The workdir of a float16 run whose first updates are skipped."""
  workdir = tmp_path_factory.mktemp('float16')
  modes.run('train', rich_config(), str(workdir))
  return workdir


def rich_config():
  return make_config(
      **{'optim.loss_scale': 2.0**19, 'quant.recipe': 'aqt',
         'quant.backward_bits': 8, 'optim.warmup_steps': 5}
  )  # fmt: skip


def test_the_metrics_count_skipped_updates_and_leave_them_out(overflowed):
  lines = rows(overflowed, 'train')
  assert [row['step'] for row in lines] == [2, 4, 6, 8]
  # Nothing was updated in the first window, so there is nothing to average.
  assert set(lines[0]) == {'step', 'split', 'lr', 'loss_scale', 'skipped'}
  assert lines[0]['skipped'] == 2 and lines[0]['loss_scale'] == 2.0**17
  total = lines[-1]['skipped']
  assert 2 <= total < 7
  assert lines[-1]['loss_scale'] == 2.0 ** (19 - total)
  assert all(np.isfinite(row['grad_norm']) for row in lines[2:])
  assert end_state(overflowed)[2]['skipped'] == total
  # The learning rate is that of the optimizer, which has not seen them.
  rise = optax.linear_schedule(1e-5, 1e-3, 5)
  lrs = [lines[0]['lr'], lines[1]['lr']]
  applied = 4 - lines[1]['skipped']
  assert lrs == pytest.approx([1e-5, float(rise(applied - 1))], rel=1e-4)


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_bits(
  overflowed, tmp_path, monkeypatch, capsys
):
  with monkeypatch.context() as context:
    stop_after(context, 3)  # between two skipped updates and the next line
    with pytest.raises(Preempted):
      modes.run('train', rich_config(), str(tmp_path))
  modes.run('train', rich_config(), str(tmp_path))
  assert end_state(tmp_path) == end_state(overflowed)
  assert rows(tmp_path) == rows(overflowed)
  lines = capsys.readouterr().out.splitlines()
  lines = [line for line in lines if '  loss scale 131072  ' in line]
  # The first of them has no update to speak of, but a number of its own.
  assert lines[0].startswith('step 2/8  lr 1.00e-05  loss scale 131072  skip')
  assert 'skipped 2  ' in lines[0]


def test_a_run_whose_every_update_overflows_ends_with_a_line(tmp_path):
  # Pixels of about 1e6 are infinite in float16, and so is the loss.
  config = make_config(
    **{'data.std': (1e-6,) * 3, 'train.steps': 40, 'eval.every': 40}
  )
  with pytest.raises(DivergedError) as raised:
    modes.run('train', config, str(tmp_path))
  message = str(raised.value)
  assert '\n' not in message
  assert 'the loss scale fell to 0.5' in message and 'at step 16' in message
  assert 'bfloat16' in message and 'Lower optim.lr' in message


def test_header_says_what_is_on(overflowed, capsys):
  modes.run('train', rich_config(), str(overflowed))
  out = capsys.readouterr().out
  assert (
    'precision float16 with loss scale 524288, halved at an overflow, '
    'doubled after 2000 finite updates'
  ) in out
  assert 'backward products 8 bit, stochastic' in out


# Fields.


@pytest.mark.parametrize(
  ('field', 'value', 'part'),
  [
    ('model.dtype', 'fp16', "'bfloat16' | 'float16' | 'float32'"),
    ('quant.backward_bits', 4, 'allowed: 0 | 8'),
    ('optim.loss_scale', 0.5, 'a number >= 1'),
    ('optim.loss_scale', float('inf'), 'a number >= 1'),
    ('optim.loss_scale_growth', 0, 'a number >= 1'),
  ],
)
def test_illegal_values_are_refused(field, value, part):
  config = make_config(**{field: value})
  with pytest.raises(ConfigError, match=field) as raised:
    notes_of(config, mode='train', overrides=())
  assert part in str(raised.value)


@pytest.mark.parametrize(
  ('field', 'hint'),
  [
    ('optim.loss_scale', '--config.model.dtype=float16'),
    ('optim.loss_scale_growth', '--config.model.dtype=float16'),
    ('quant.backward_bits', '--config.quant.recipe=aqt'),
  ],
)
def test_fields_without_an_effect_are_refused(field, hint):
  config = make_config('float32')
  with pytest.raises(ConfigError, match='would have no effect') as raised:
    notes_of(config, mode='train', overrides=[field])
  assert hint in str(raised.value)


def test_a_run_goes_on_in_its_own_dtype(overflowed):
  config = rich_config()
  config.model.dtype = 'bfloat16'
  config.optim.loss_scale = common.get_config().optim.loss_scale
  with pytest.raises(CheckpointError, match='model.dtype'):
    modes.run('train', config, str(overflowed))


# float16 through AQT.


@pytest.mark.parametrize('kind', PRODUCTS)
def test_sums_of_codes_may_pass_the_largest_float16(kind):
  site, core, lhs, rhs, dims = product(kind, 'w8a8', 'per_token')
  low = lambda x: jnp.asarray(100 * np.sign(x) + x, jnp.float16)
  lhs, rhs = low(np.abs(lhs)), low(np.abs(rhs))
  found = core(None, site, lhs, rhs, dims)
  wide = lambda x: np.asarray(x, np.float64)
  exact = np.einsum(PRODUCTS[kind][0], wide(lhs), wide(rhs))
  assert exact.max() > 65504 / 2  # and that of the codes is larger
  np.testing.assert_allclose(found, exact, rtol=0.02)


# Backward products.


class Keys:
  """What a core asks its layer for."""

  def __init__(self, key):
    self.has_rng = lambda name: key is not None
    self.make_rng = lambda name: {'rounding': key}[name]


def product(kind, text, granularity, backward_bits=0):
  """Returns (site, core, lhs, rhs, dims) of one product."""
  _, dims, lhs, rhs = PRODUCTS[kind]
  site = Site('site', kind, lhs[1:], rhs, 1)
  if kind != 'dense':
    text = text[text.index('a') :]
  plan = QuantPlan((site,), (parse_spec(text, field='test'),), granularity)
  core = AqtCore(plan, backward_bits)
  return (site, core, *operands(kind)[:2], dims)


def gradient_of(kind, text, granularity, backward_bits):
  """Returns key -> (output, gradients) of one product."""
  site, core, lhs, rhs, dims = product(kind, text, granularity, backward_bits)
  cotangent = operands(kind)[2]

  def gradient(key):
    out, pullback = jax.vjp(
      lambda lhs, rhs: core(Keys(key), site, lhs, rhs, dims), lhs, rhs
    )
    return out, pullback(jnp.asarray(cotangent))

  return gradient


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize(
  ('kind', 'text'),
  [('dense', 'w8a8'), ('dense', 'w4a3'), ('qk', 'a4'), ('av', 'a8')],
)
def test_the_8_bit_gradient_is_that_of_float_products_on_average(
  kind, text, granularity
):
  count = 1000
  out, exact = jax.jit(gradient_of(kind, text, granularity, 0))(None)
  keys = jax.random.split(jax.random.key(1), count)
  outs, drawn = jax.jit(jax.vmap(gradient_of(kind, text, granularity, 8)))(keys)
  np.testing.assert_array_equal(outs[0], out)  # the forward pass is the same
  for wanted, draws in zip(exact, drawn, strict=True):
    draws = np.asarray(draws, np.float64)
    error = draws.std(0) / np.sqrt(count)
    assert (error > 0).any()
    z = ((draws.mean(0) - wanted) / error)[error > 0]
    # Of N(0, 1): its mean square is 1, and no value lies beyond 5.
    assert np.abs(z).max() < 5
    assert 0.6 < np.square(z).mean() < 1.6
    # One draw is a rounding to 8 bits, not noise of the gradient's size.
    assert draws.std(0).max() < 0.02 * np.abs(wanted).max()


def test_keys_decide_the_rounding():
  gradient = jax.jit(gradient_of('dense', 'w4a4', 'per_token', 8))
  one, same, other = (gradient(jax.random.key(i))[1] for i in (0, 0, 1))
  assert bits_of(one) == bits_of(same)
  assert all((a != b).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
  ('text', 'changed'), [('w4', (True, False)), ('a4', (False, True))]
)
def test_a_gradient_that_meets_a_float_operand_stays_float(text, changed):
  key = jax.random.key(0)
  pair = (
    jax.jit(gradient_of('dense', text, 'per_token', bits))(key)[1]
    for bits in (0, 8)
  )
  found = tuple(bool((a != b).any()) for a, b in zip(*pair, strict=True))
  assert found == changed


@pytest.mark.parametrize(('bits', 'products'), [(0, 1), (8, 3)])
def test_backward_products_multiply_8_bit_integers(bits, products):
  gradient = gradient_of('dense', 'w4a4', 'per_token', bits)
  text = jax.jit(gradient).lower(jax.random.key(0)).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) == 3
  assert sum('xi8>' in line and 'xi32>' in line for line in dots) == products


def test_without_random_numbers_the_model_is_the_same(digits_config):
  images = jnp.linspace(-1, 1, 4 * 192).reshape(4, 8, 8, 3)
  found = []
  for bits in (0, 8):
    config = copy.deepcopy(digits_config)
    config.quant.update(recipe='aqt', backward_bits=bits)
    plan = build_plan(config.quant, models.list_sites(config))
    model = models.build_model(config, build_ops(config.quant, plan))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    loss = lambda v, model=model: jnp.square(model.apply(v, images)).sum()
    found.append(bits_of(jax.jit(jax.value_and_grad(loss))(variables)))
  assert found[0] == found[1]


@pytest.mark.slow
def test_every_layer_and_update_draws_its_own_numbers(digits_config):
  config = copy.deepcopy(digits_config)
  config.quant.update(recipe='aqt', backward_bits=8)
  plan = build_plan(config.quant, models.list_sites(config))
  asked = []

  class Spy(AqtCore):
    def __call__(self, module, site, lhs, rhs, dims):
      if module.has_rng('rounding'):
        asked.append(jax.random.key_data(module.make_rng('rounding')).tolist())
      return super().__call__(module, site, lhs, rhs, dims)

  ops = build_ops(config.quant, plan)
  model = models.build_model(config, type(ops)(core=Spy(plan, 8)))
  images = jnp.ones((2, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  for seed in (0, 1):
    model.apply(variables, images, rngs={'rounding': jax.random.key(seed)})
  assert len(asked) == len({tuple(key) for key in asked}) == 2 * len(plan.sites)
