"""Learned steps: LSQ, LSQ+, StatsQ and Q-ViT against NumPy, packed, trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, modes, tree, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import CheckpointError, ConfigError
from qvit_jax.experiment import checks
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model
from qvit_jax.ops import Site
from qvit_jax.quantization import (
  METHODS,
  QuantPlan,
  QuantSpec,
  build_ops,
  build_plan,
)
from qvit_jax.quantization.methods import lsq, qvit
from qvit_jax.quantization.methods.learned_core import LearnedCore, step_axes
from qvit_jax.quantization.methods.packing import pack
from qvit_jax.store.runs import Run
from tests import reference
from tests.conftest import make_digits_config
from tests.small_models import normal, rich_config

LAYER = (((2,), (0,)), ((), ()))
QK = (((3,), (3,)), ((0, 2), (0, 2)))
AV = (((3,), (1,)), ((0, 1), (0, 2)))


def gradients(product, lhs, rhs, left, right, cotangent):
  """The product, and its gradients by `coded_product`'s own rule."""
  y, pull = jax.vjp(
    lambda *given: lsq.coded_product(product, *given), lhs, rhs, left, right
  )
  return y, pull(cotangent)


# The math


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
@pytest.mark.parametrize('zero', [0.0, 5.3, 'middle'])
@pytest.mark.parametrize('steps', ['tensor', 'token'])
def test_a_layers_gradients_are_lsqs(bits, zero, steps):
  x, w = normal((3, 5, 7)), normal((7, 4), 1)
  zero = 2.0 ** (bits - 1) if zero == 'middle' else zero
  shape = (1, 1) if steps == 'tensor' else (5, 1)
  step = 0.2 + 0.1 * jnp.abs(normal(shape, 2))
  zero = jnp.full(shape, zero)
  kernel_step = 0.1 + 0.1 * jnp.abs(normal((4,), 3))
  left = lsq.Coder(bits, share=0.3)
  right = lsq.Coder(bits, is_signed=True, share=0.7)
  cotangent = normal((3, 5, 4), 4)
  y, (dx, dw, (ds, dz), (dks, _)) = gradients(
    lsq.Product(LAYER, left, right), x, w, (step, zero),
    (kernel_step, jnp.zeros(4)), cotangent,
  )  # fmt: skip
  near, inside, of_step, of_zero = reference.lsq(x, step, zero, 0, 2**bits - 1)
  most = 2 ** (bits - 1)
  w_near, w_inside, w_of_step, _ = reference.lsq(
    w, kernel_step, 0, -most, most - 1
  )
  g = np.asarray(cotangent, np.float64)
  np.testing.assert_allclose(y, near @ w_near, atol=1e-4)
  up = g @ w_near.T
  np.testing.assert_allclose(dx, up * inside, atol=1e-4)
  axes = (0, 1, 2) if steps == 'tensor' else (0, 2)
  wanted = 0.3 * (up * of_step).sum(axes).reshape(shape)
  np.testing.assert_allclose(ds, wanted, rtol=1e-3, atol=1e-3)
  wanted = 0.3 * (up * of_zero).sum(axes).reshape(shape)
  if zero.max() > 2**bits - 1:  # no further up
    wanted = np.maximum(wanted, 0)
  np.testing.assert_allclose(dz, wanted, rtol=1e-3, atol=1e-3)
  down = np.einsum('bni,bno->io', near, g)
  np.testing.assert_allclose(dw, down * w_inside, atol=1e-3)
  wanted = 0.7 * (down * w_of_step).sum(0)
  np.testing.assert_allclose(dks, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize(
  ('dims', 'formula'),
  [(QK, 'bnkd,bmkd->bknm'), (AV, 'bknm,bmkd->bknd')],
)
def test_an_attention_products_gradients_are_lsqs(bits, dims, formula):
  """Steps per head; both operands learn theirs."""
  shapes = {QK: ((2, 5, 3, 4), (2, 6, 3, 4)), AV: ((2, 3, 5, 6), (2, 6, 3, 4))}
  a, b = (normal(s, i) for i, s in enumerate(shapes[dims]))
  heads = [dims[1][side][1] for side in (0, 1)]
  learned, near, parts = [], [], []
  for side, x in enumerate((a, b)):
    shape = [1, 1, 1, 1]
    shape[heads[side]] = 3
    step = 0.3 + 0.2 * jnp.abs(normal(shape[1:], 5 + side))
    zero = jnp.full(step.shape, 1.2 + side)
    learned.append((step, zero))
    value, *rest = reference.lsq(x, step, zero, 0, 2**bits - 1)
    near.append(value)
    parts.append(rest)
  wanted = np.einsum(formula, *near)
  cotangent = normal(wanted.shape, 9)
  coder = lsq.Coder(bits)
  y, (da, db, of_a, of_b) = gradients(
    lsq.Product(dims, coder, coder), a, b, *learned, cotangent
  )
  np.testing.assert_allclose(y, wanted, atol=1e-4)
  one, rest = formula.split(',')
  two, out = rest.split('->')
  g = np.asarray(cotangent, np.float64)
  ups = (
    np.einsum(f'{out},{two}->{one}', g, near[1]),
    np.einsum(f'{out},{one}->{two}', g, near[0]),
  )
  for side, (dx, (ds, dz)) in enumerate(((da, of_a), (db, of_b))):
    inside, of_step, of_zero = parts[side]
    up, axes = ups[side], tuple(i for i in range(4) if i != heads[side])
    np.testing.assert_allclose(dx, up * inside, atol=1e-3)
    for found, part in ((ds, of_step), (dz, of_zero)):
      wanted = (up * part).sum(axes).reshape(found.shape)
      np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_statsq_rounds_to_odd_halves_of_the_mean_magnitude(bits):
  x, w, g = normal((6, 9)), normal((9, 4), 1), normal((6, 4), 2)
  product = lsq.Product(
    (((1,), (0,)), ((), ())), None, lsq.Coder(bits, 'statsq', is_signed=True)
  )
  y, (dx, dw, _, _) = gradients(product, x, w, None, None, g)
  near, inside = reference.statsq(w, bits)
  np.testing.assert_allclose(y, x @ near, atol=1e-4)
  np.testing.assert_allclose(dx, g @ near.T, atol=1e-4)
  np.testing.assert_allclose(dw, (x.T @ g) * inside, atol=1e-4)
  codes, worth = lsq.encode(w, None, None, product.rhs)
  assert set(np.abs(np.asarray(codes)).ravel() % 2) == {1.0}
  np.testing.assert_allclose(codes * worth, near, atol=1e-5)


@pytest.mark.parametrize('method', ['step', 'statsq'])
@pytest.mark.parametrize('bits', [4, 8])
def test_gradients_in_float16_are_those_in_float32(bits, method):
  """Of a cotangent that float16 holds, but not after a product with steps."""
  x = normal((64, 48)).astype('float16').astype('float32')
  w = (0.02 * normal((48, 40), 1)).astype('float16').astype('float32')
  left, right = lsq.Coder(bits), lsq.Coder(bits, method, is_signed=True)
  how = [v.reshape(1) for v in lsq.fit(x, left, (0, 1), has_zero=True)]
  kernel = jnp.abs(w).max(axis=0) / 2 ** (bits - 1), jnp.zeros(40)
  product = lsq.Product((((1,), (0,)), ((), ())), left, right)
  cotangent = 1e-3 * normal((64, 40), 2)

  def found(dtype):
    kernel_how = kernel if method == 'step' else None
    _, grads = gradients(
      product, x.astype(dtype), w, tuple(how), kernel_how, cotangent
    )
    return jax.tree.leaves(grads)

  for low, wanted in zip(found('float16'), found('float32'), strict=True):
    error = np.linalg.norm(np.asarray(low, 'float32') - wanted)
    assert error <= 0.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_step_below_zero_still_learns(dtype):
  coder = lsq.Coder(4)
  _, (_, _, (ds, _), _) = gradients(
    lsq.Product((((1,), (0,)), ((), ())), coder, None),
    jnp.abs(normal((3, 5))).astype(dtype), normal((5, 2)).astype(dtype),
    (jnp.full((1,), -0.1), jnp.zeros(1)), None, jnp.ones((3, 2)),
  )  # fmt: skip
  assert np.isfinite(ds).all()
  assert (ds != 0).all()


@pytest.mark.parametrize(('zero', 'sign'), [(-400.0, -1), (400.0, 1)])
def test_a_zero_point_beyond_the_codes_is_the_last_code_and_comes_back(
  zero, sign
):
  """Codes less a zero point stay exact in bf16, and 0 has a code."""
  coder, x = lsq.Coder(8), normal((64,))
  step = jnp.full((1,), 0.01)
  codes, _ = lsq.encode(x, step, jnp.full((1,), zero), coder)
  assert jnp.abs(codes).max() <= 255
  assert lsq.encode(jnp.zeros(1), step, jnp.full((1,), zero), coder)[0] == 0
  product = lsq.Product((((1,), (0,)), ((), ())), coder, None)
  found = []
  for cotangent in (1.0, -1.0):
    _, (_, _, (_, dz), _) = gradients(
      product, x[None], jnp.ones((64, 1)), (step, jnp.full((1,), zero)), None,
      jnp.full((1, 1), cotangent),
    )  # fmt: skip
    found.append(float(dz[0]))
  # Descent goes against the gradient: only back.
  assert min(sign * dz for dz in found) == 0
  assert max(sign * dz for dz in found) > 0


def test_the_gradient_scale_is_that_of_the_paper():
  assert lsq.gradient_share(100, lsq.Coder(4, is_signed=True)) == (
    pytest.approx(1 / np.sqrt(100 * 7))
  )
  assert lsq.gradient_share(100, lsq.Coder(4)) == (
    pytest.approx(1 / np.sqrt(100 * 15))
  )


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('is_signed', [True, False])
def test_a_step_without_zero_point_has_lsqs_gradient_scale(bits, is_signed):
  """Qp is that of signed codes where negative values were seen."""
  x = normal((2, 6, 4)) if is_signed else jnp.abs(normal((2, 6, 4)))

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      site = Site('', 'dense', (6, 4), (4, 3), 0)
      plan = QuantPlan((site,), (QuantSpec(acts=bits),), 'per_tensor')
      w = normal((4, 3), 1)
      return LearnedCore(plan, has_zero=False)(self, site, x, w, LAYER)

  variables = Layer().init(jax.random.key(0), x)
  found = jax.grad(lambda v: Layer().apply(v, x).sum())(variables)['quant']
  step, zero = (np.ravel(variables['quant'][f'lhs_{n}']) for n in
                ('step', 'zero'))  # fmt: skip
  most = 2 ** (bits - 1)
  first, last = (-most, most - 1) if is_signed else (0, 2 * most - 1)
  assert zero == -first
  _, _, of_step, _ = reference.lsq(x, step, 0, first, last)
  up = np.asarray(normal((4, 3), 1), np.float64).sum(1)
  wanted = (up * of_step).sum() / np.sqrt(6 * 4 * last)
  np.testing.assert_allclose(np.ravel(found['lhs_step']), wanted, rtol=1e-3)
  assert not np.any(found['lhs_zero'])


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_fitted_steps_err_less_than_extremes_and_than_lsqs_own(bits):
  x = normal((400, 3)) ** 3  # long tails
  for has_zero in (True, False):
    coder = lsq.Coder(bits)
    step, zero = lsq.fit(x, coder, (0,), has_zero=has_zero)
    assert step.shape == zero.shape == (1, 3)

    def error(step, zero, coder=coder):
      codes, worth = lsq.encode(x, step, zero, coder)
      return np.square(codes * worth - x).sum(axis=0)

    low, high = x.min(axis=0), x.max(axis=0)
    widest = (high - low) / (2**bits - 1)
    if has_zero:
      least = error(widest, -low / widest)
      assert (error(step, zero) <= least + 1e-4).all()
    papers = 2 * jnp.abs(x).mean(axis=0) / (2 ** (bits - 1) - 1) ** 0.5
    middle = jnp.full((3,), 2.0 ** (bits - 1))
    assert (error(step, zero) <= error(papers, middle) + 1e-4).all()


def test_codes_are_signed_where_negative_values_were_seen():
  for x, zero in ((normal((50, 2)), 8), (jnp.abs(normal((50, 2))), 0)):
    _, found = lsq.fit(x, lsq.Coder(4), (0, 1), has_zero=False)
    assert float(found.reshape(())) == zero


@pytest.mark.parametrize(
  ('steps', 'wanted'),
  [('per_tensor', (0, 1, 2, 3)), ('per_head', (0, 1, 3)),
   ('per_position', (0, 3))],
)  # fmt: skip
def test_what_shares_a_step(steps, wanted):
  assert step_axes(4, (3,), (2,), steps) == wanted


def test_rectified_queries_are_q_vits():
  x = np.asarray(normal((2, 5, 3, 4)), np.float64)
  gamma, beta = 1 + np.abs(normal((3, 1), 1)), np.asarray(normal((3, 1), 2))
  found = qvit.rectify(
    jnp.asarray(x, jnp.float32), jnp.asarray(gamma), jnp.asarray(beta),
    form='paper',
  )  # fmt: skip
  wanted = reference.rectify(x, gamma, beta)
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_gradients_of_rectification_are_differences():
  x = np.asarray(normal((1, 3, 2, 3)), np.float64)
  gamma, beta = 1 + np.abs(normal((2, 1), 1)), np.asarray(normal((2, 1), 2))
  given = [np.asarray(v, np.float64) for v in (x, gamma, beta)]
  weigh = np.asarray(normal(x.shape, 3), np.float64)
  found = jax.grad(
    lambda x, gamma, beta: (
      jnp.asarray(weigh, jnp.float32)
      * qvit.rectify(x, gamma, beta, form='paper')
    ).sum(),
    argnums=(0, 1, 2),
  )(*(jnp.asarray(v, jnp.float32) for v in given))
  for which, gradient in enumerate(found):
    wanted = np.zeros_like(given[which])
    for at in np.ndindex(wanted.shape):
      values = []
      for change in (1e-5, -1e-5):
        moved = [v.copy() for v in given]
        moved[which][at] += change
        values.append((weigh * reference.rectify(*moved)).sum())
      wanted[at] = (values[0] - values[1]) / 2e-5
    np.testing.assert_allclose(gradient, wanted, atol=1e-3)


def test_the_layernorm_form_normalises_each_token():
  x = normal((2, 5, 3, 4))
  y = qvit.rectify(x, jnp.ones((3, 4)), jnp.zeros((3, 4)), form='layernorm')
  np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(axis=-1), 1, atol=1e-3)


# In a model


PER_POSITION = {'act_granularity': 'per_position'}


def learned_config(recipe, **quant):
  config = rich_config()
  config.quant.update(recipe=recipe, default='w4a4', attention='a4')
  config.quant.rules = (('patch_embed|head', 'w8a8'),)
  config.quant.update(quant)
  return config


def learned_model(config):
  plan = build_plan(config.quant, models.list_sites(config))
  ops = build_ops(config.quant, plan, hidden=models.stream(config).hidden)
  return models.build_model(config, ops), plan, ops


def fitted(config, images):
  module, plan, ops = learned_model(config)
  variables = module.init(jax.random.key(0), images[:1])
  _, learned = module.apply(variables, images, mutable=['quant'])
  return module, plan, ops, {**variables, **learned}


@pytest.mark.parametrize('recipe', ['lsq', 'statsq', 'qvit'])
def test_params_keep_their_names_and_steps_their_places(recipe):
  config = learned_config(recipe)
  images = normal((4, 8, 8, 3))
  _, _, _, variables = fitted(config, images)
  config.quant.recipe = 'none'
  plain = models.build_model(config).init(jax.random.key(0), images)
  assert set(tree.flatten(variables['params'])) == set(
    tree.flatten(plain['params'])
  )
  names = set(tree.flatten(variables['quant']))
  assert 'encoder/block_00/attn/qk/rhs_step' in names
  assert ('head/kernel_step' in names) == (recipe != 'statsq')
  assert ('encoder/block_01/attn/key_gamma' in names) == (recipe == 'qvit')


@pytest.mark.parametrize(
  ('recipe', 'quant', 'dtype'),
  [
    ('lsq', {}, 'float32'),
    pytest.param(
      'lsq',
      {'zero_point': False} | PER_POSITION,
      'float32',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'lsq',
      {'default': 'w8a8', 'attention': 'a8'},
      'bfloat16',
      marks=pytest.mark.slow,
    ),
    ('lsq', {'default': 'w4', 'attention': 'float'}, 'bfloat16'),
    pytest.param(
      'lsq',
      {'default': 'a4', 'act_granularity': 'per_position'},
      'bfloat16',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'lsq',
      {'act_granularity': 'per_token'},
      'bfloat16',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'lsq',
      {'act_granularity': 'per_token', 'hadamard': True},
      'bfloat16',
      marks=pytest.mark.slow,
    ),
    ('lsq', {'default': 'a8', 'hadamard': True}, 'bfloat16'),
    pytest.param(
      'lsq',
      {'act_granularity': 'per_position', 'hadamard': True},
      'float32',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'statsq',
      {'act_granularity': 'per_head'},
      'float32',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'statsq',
      {'act_granularity': 'per_token', 'hadamard': True},
      'float32',
      marks=pytest.mark.slow,
    ),
    ('qvit', {}, 'bfloat16'),
    pytest.param(
      'qvit',
      {'irm': 'layernorm', 'default': 'w2a2'},
      'float32',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_packed_model_has_the_codes_of_its_training(recipe, quant, dtype):
  config = learned_config(recipe, **quant)
  config.model.dtype = dtype
  images = 2 * normal((8, 8, 8, 3))
  module, plan, ops, variables = fitted(config, images)
  wanted = np.asarray(jax.jit(module.apply)(variables, images))
  packed = pack(METHODS[recipe], tree.flatten(variables), plan, ops, dtype)
  again = models.build_model(config, packed.ops)
  found = np.asarray(jax.jit(again.apply)(packed.variables, images))
  np.testing.assert_array_equal(found, wanted)
  is_whole = quant.get('default', 'w4a4') in ('w4a4', 'w8a8', 'w2a2')
  assert (packed.execution == 'integer') == is_whole
  kernel = packed.variables['quant']['head']['kernel']
  w, most = variables['params']['head']['kernel'], 2 ** (kernel.bits - 1)
  if recipe == 'statsq':
    levels, _ = reference.statsq(w, kernel.bits)
  else:
    step = variables['quant']['head']['kernel_step']
    levels, *_ = reference.lsq(w, step, 0, -most, most - 1)
  near = np.asarray(kernel.codes) * np.asarray(kernel.scale)
  np.testing.assert_allclose(near, levels, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  'recipe',
  [
    'lsq',
    pytest.param('statsq', marks=pytest.mark.slow),
    pytest.param('qvit', marks=pytest.mark.slow),
  ],
)
def test_a_step_keeps_no_codes_for_its_gradients(recipe):
  """XLA plans a fifth more for them than in float at most."""
  images = jnp.zeros((16, 64, 64, 3))

  def temporaries(recipe):
    config = learned_config(recipe)
    config.model.update(depth=4, width=128, heads=4, mlp_dim=512)
    config.model.update(image_size=64, patch=8, dtype='bfloat16')
    if recipe == 'none':
      model = models.build_model(config)
      variables = jax.eval_shape(model.init, jax.random.key(0), images)
    else:
      model = learned_model(config)[0]
      variables = jax.eval_shape(lambda: fitted(config, images)[3])
    lowered = jax.jit(
      jax.grad(lambda given: jnp.square(model.apply(given, images)).sum())
    ).lower(variables)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(recipe) <= 1.2 * temporaries('none')


def test_what_behind_a_gelu_exceeds_ten_is_clipped_by_qvit():
  config = learned_config('qvit')
  plan = build_plan(config.quant, models.list_sites(config))
  ops = build_ops(config.quant, plan, hidden=models.stream(config).hidden)
  assert isinstance(ops.core, LearnedCore)
  assert ops.core.clipped == (
    'encoder/block_00/mlp/fc2', 'encoder/block_01/mlp/fc2',
  )  # fmt: skip


def test_rectification_starts_where_it_changes_little():
  """Of one image, whose statistics are the ones that it starts from."""
  x = normal((1, 6, 3, 4))

  for form in ('paper', 'layernorm'):

    class Holder(nn.Module):
      form: str

      @nn.compact
      def __call__(self, x):
        return qvit.Rectifier(self.form)(self, 'query', x)

    y, _ = Holder(form).init_with_output(jax.random.key(0), x)
    if form == 'paper':
      np.testing.assert_allclose(y, x, atol=1e-4)
    else:  # tokens differ in size, which a LayerNorm evens out
      assert np.corrcoef(np.ravel(y), np.ravel(x))[0, 1] > 0.8


# Training


def digits_run(tmp_path, name, **changes):
  config = make_digits_config()
  config.model.update(depth=2, width=24, heads=3, mlp_dim=40)
  config.train.steps, config.eval.every = 12, 6
  config.log.every = 4
  config.update_from_flattened_dict(changes)
  modes.run('train', config, str(tmp_path / name))
  return config


def steps_of(place, step):
  from qvit_jax.store.checkpoint import Checkpoints

  stored = Checkpoints(place / 'checkpoints', writer=False)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = stored.saved_shapes(step, 'variables', device)
  return tree.flatten(stored.restore(step, {'variables': shapes})['variables'])


@pytest.fixture(scope='module')
def float_run(tmp_path_factory):
  place = tmp_path_factory.mktemp('float')
  digits_run(place, 'run', **{'quant.recipe': 'none'})
  return place / 'run'


LEARNED = {
  'quant.recipe': 'lsq', 'quant.default': 'w4a4', 'quant.attention': 'a4',
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['lsq', 'statsq', 'qvit'])
def test_a_run_from_a_float_checkpoint_learns_steps_and_resumes_bitwise(
  recipe, float_run, tmp_path, capsys
):
  changes = {
    **LEARNED, 'quant.recipe': recipe, 'checkpoint.path': str(float_run),
  }  # fmt: skip
  changes['optim.schedule'] = 'constant'
  digits_run(tmp_path, 'cut', **changes | {'train.steps': 6})
  assert 'starting from the parameters of step' in capsys.readouterr().out
  first = steps_of(tmp_path / 'cut', 6)
  digits_run(tmp_path, 'cut', **changes)
  digits_run(tmp_path, 'flat', **changes)
  cut, flat = (steps_of(tmp_path / n, 12) for n in ('cut', 'flat'))
  for path, x in flat.items():
    np.testing.assert_array_equal(cut[path], x, err_msg=path)
  name = 'quant/encoder/block_00/mlp/fc1/lhs_step'
  assert first[name] != flat[name]


@pytest.mark.slow
def test_steps_have_their_own_learning_rate(float_run, tmp_path):
  changes = {**LEARNED, 'checkpoint.path': str(float_run),
             'optim.schedule': 'constant', 'train.steps': 6}  # fmt: skip
  digits_run(tmp_path, 'fast', **changes, **{'optim.quant_lr': 1e-2})
  digits_run(tmp_path, 'frozen', **changes, **{'train.trainable': ('params',)})
  fast, frozen = (steps_of(tmp_path / n, 6) for n in ('fast', 'frozen'))
  names = [n for n in fast if n.endswith('_step')]
  assert len(names) > 20
  # Six updates of AdamW, each at most about the rate times the array's size.
  size = lambda x: np.sqrt(np.square(x).mean())
  moved = [np.abs(fast[n] - frozen[n]).max() / size(frozen[n]) for n in names]
  assert np.median(moved) > 1e-2 and max(moved) < 0.1


@pytest.mark.slow
def test_lsq_without_zero_points_keeps_them(float_run, tmp_path):
  changes = {**LEARNED, 'checkpoint.path': str(float_run),
             'quant.zero_point': False, 'train.steps': 6}  # fmt: skip
  digits_run(tmp_path, 'lsq', **changes)
  found = steps_of(tmp_path / 'lsq', 6)
  zeros = [float(v.ravel()[0]) for n, v in found.items() if n.endswith('_zero')]
  assert set(zeros) == {0.0, 8.0}


@pytest.mark.slow
def test_learned_zero_points_do_not_start_a_run_without_them(
  float_run, tmp_path, capsys
):
  """Its parameters do, although averages are kept of the steps alone."""
  changes = {**LEARNED, 'checkpoint.path': str(float_run), 'train.steps': 1}
  averaged = {'train.trainable': ('quant',), 'train.ema_decay': 0.9}
  config = digits_run(tmp_path, 'run', **changes, **averaged)
  place = str(tmp_path / 'run')
  shapes = Experiment(config, training=False).model.shapes['params']
  params, report = weights.read_weights(place, shapes)
  assert not report.reinitialised
  capsys.readouterr()
  changes |= {'quant.zero_point': False, 'checkpoint.path': place}
  digits_run(tmp_path, 'next', **changes, **{'optim.lr': 1e-12})
  assert 'starting from the parameters of step 1' in capsys.readouterr().out
  found = steps_of(tmp_path / 'next', 1)
  zeros = [float(v.ravel()[0]) for n, v in found.items() if n.endswith('_zero')]
  assert set(zeros) == {0.0, 8.0}
  for name, x in params.items():
    np.testing.assert_allclose(found[f'params/{name}'], x, atol=1e-9)


def qvit_changes(float_run):
  return {**LEARNED, 'checkpoint.path': str(float_run), 'train.steps': 6,
          'quant.recipe': 'qvit'}  # fmt: skip


@pytest.fixture(scope='module')
def qvit_run(float_run, tmp_path_factory):
  """The config and the workdir of a finished run."""
  place = tmp_path_factory.mktemp('qvit')
  return digits_run(place, 'run', **qvit_changes(float_run)), place / 'run'


@pytest.mark.slow
def test_another_recipe_or_form_does_not_resume(float_run, qvit_run):
  changes = {**qvit_changes(float_run), 'quant.recipe': 'lsq'}
  with pytest.raises(Exception, match="quant.recipe is 'qvit' there, 'lsq'"):
    digits_run(qvit_run[1].parent, 'run', **changes)


def test_turned_inputs_are_told_from_others(tmp_path):
  """They have the same variables, so nothing else would notice."""
  config = make_digits_config()
  config.quant.update(recipe='lsq', default='w4a4', hadamard=True)
  facts = {
    'config': config_lib.to_json(config),
    'architecture': models.architecture(config),
    'plan': Model(config).plan.digest_lines(),
  }
  run = Run('run', tmp_path, facts)
  checks.check_same(Model(config), run, same_plan=True)
  config.quant.hadamard = False
  with pytest.raises(CheckpointError, match='quant.hadamard is True there, F'):
    checks.check_same(Model(config), run, same_plan=True)


@pytest.mark.parametrize(
  ('recipe', 'field', 'value', 'message'),
  [
    ('aqt', 'quant.act_granularity', 'per_head', 'is not what quant.recipe='),
    ('aqt', 'optim.quant_lr', 1e-3, "'aqt' does not read it"),
    ('qvit', 'quant.zero_point', False, "'qvit' does not read it"),
    ('lsq', 'quant.irm', 'layernorm', "'lsq' does not read it"),
  ],
)
def test_fields_of_other_recipes_are_refused(recipe, field, value, message):
  config = make_digits_config()
  config.quant.recipe = recipe
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=message):
    modes.run('train', config, 'unused', overrides=[field])


@pytest.mark.slow
def test_the_packed_export_of_a_run_has_its_accuracy(qvit_run, capsys):
  config, workdir = qvit_run
  config = config.copy_and_resolve_references()
  config.checkpoint.path, config.export.format = '', 'packed'
  modes.run('export', config, str(workdir))
  text = capsys.readouterr().out
  assert 'within 0 of the run, 100.0% of the classes equal' in text
  assert 'not rectified' not in text
  config.export.format = 'npz'
  modes.run('export', config, str(workdir))
  assert 'note: queries and keys are not rectified' in capsys.readouterr().out
