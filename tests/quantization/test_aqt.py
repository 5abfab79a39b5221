"""AQT's products beside the NumPy reference."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.ops import Site
from qvit_jax.quantization import QuantPlan, build_ops, build_plan, parse_spec
from qvit_jax.quantization.methods.aqt import AqtCore
from tests import reference

# kind: (einsum, dimension numbers as in the model, shapes of the operands)
PRODUCTS = {
  'dense': ('bni,io->bno', (((2,), (0,)), ((), ())), (3, 5, 16), (16, 8)),
  'qk': (
    'bnkd,bmkd->bknm', (((3,), (3,)), ((0, 2), (0, 2))),
    (3, 5, 2, 8), (3, 5, 2, 8),
  ),
  'av': (
    'bknm,bmkd->bknd', (((3,), (1,)), ((0, 1), (0, 2))),
    (3, 2, 5, 5), (3, 5, 2, 8),
  ),
}  # fmt: skip
GRANULARITIES = ('per_token', 'per_tensor')


def operands(kind, seed=0):
  """Returns two operands whose slices differ in size, and a cotangent."""
  formula, _, lhs, rhs = PRODUCTS[kind]
  random = np.random.default_rng(seed)
  draw = lambda shape: (
    random.standard_normal(shape) * np.exp(random.standard_normal(shape))
  ).astype(np.float32)
  lhs, rhs = draw(lhs), draw(rhs)
  return lhs, rhs, draw(np.einsum(formula, lhs, rhs).shape)


def core_of(kind, text, granularity):
  """Returns f(lhs, rhs) of an AqtCore whose plan has one site."""
  _, dims, lhs, rhs = PRODUCTS[kind]
  site = Site('site', kind, lhs[1:], rhs, 1)
  spec = parse_spec(text, field='test')
  core = AqtCore(QuantPlan((site,), (spec,), granularity))
  return jax.jit(lambda lhs, rhs: core(None, site, lhs, rhs, dims))


def assert_equals_reference(kind, text, granularity):
  lhs, rhs, g = operands(kind)
  spec = parse_spec(text, field='test')
  is_layer = kind == 'dense'
  one = granularity == 'per_tensor'
  lhs_q, rhs_q, out = reference.quantized_dot(
    PRODUCTS[kind][0], lhs, rhs,
    bits=(spec.acts, spec.weights if is_layer else spec.acts),
    whole=(one, one and not is_layer),
  )  # fmt: skip
  function = core_of(kind, text, granularity)
  actual, pullback = jax.vjp(function, lhs, rhs)
  assert_close(actual, out)
  gradients = reference.quantized_dot_gradients(
    PRODUCTS[kind][0], lhs_q, rhs_q, g
  )
  for mine, theirs in zip(pullback(g), gradients, strict=True):
    assert_close(mine, theirs)


def assert_close(actual, expected, tolerance=1e-5):
  assert actual.shape == expected.shape
  assert actual.dtype == jnp.float32
  error = np.abs(np.asarray(actual, np.float64) - expected).max()
  assert error <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_layer_and_its_gradients_equal_the_reference(bits, granularity):
  assert_equals_reference('dense', f'w{bits}a{bits}', granularity)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('text', ['w3', 'a3', 'w2a8', 'w8a2', 'float'])
def test_operands_may_have_different_bits_or_none(text, granularity):
  assert_equals_reference('dense', text, granularity)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('kind', ['qk', 'av'])
def test_attention_products_equal_the_reference(kind, bits, granularity):
  assert_equals_reference(kind, f'a{bits}', granularity)


def test_granularities_differ():
  lhs, rhs, _ = operands('dense')
  token = core_of('dense', 'w4a4', 'per_token')(lhs, rhs)
  tensor = core_of('dense', 'w4a4', 'per_tensor')(lhs, rhs)
  assert np.abs(token - tensor).max() > 1e-2


def test_kernel_has_a_scale_of_its_own_for_each_output_channel():
  lhs, rhs, _ = operands('dense')
  function = core_of('dense', 'w4', 'per_tensor')
  factors = 10.0 ** np.arange(-4, 4)
  scaled = function(lhs, (rhs * factors).astype(np.float32))
  np.testing.assert_allclose(scaled / factors, function(lhs, rhs), rtol=1e-4)


def test_per_token_scales_keep_images_apart():
  lhs, rhs, _ = operands('dense')
  loud = lhs.copy()
  loud[0] *= 1000
  for granularity, apart in (('per_token', True), ('per_tensor', False)):
    function = core_of('dense', 'w4a4', granularity)
    same = np.array_equal(function(loud, rhs)[1:], function(lhs, rhs)[1:])
    assert same == apart, granularity


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_operand_of_zeros_gives_zeros_and_finite_gradients(granularity):
  lhs, rhs, g = operands('dense')
  function = core_of('dense', 'w4a4', granularity)
  out, pullback = jax.vjp(function, 0 * lhs, rhs)
  assert (out == 0).all()
  assert all(np.isfinite(gradient).all() for gradient in pullback(g))


@pytest.mark.parametrize('kind', PRODUCTS)
def test_bfloat16_operands_work_and_stay_near_the_reference(kind):
  lhs, rhs, g = operands(kind)
  low = lambda x: jnp.asarray(x, jnp.bfloat16)
  text = 'w8a8' if kind == 'dense' else 'a8'
  function = core_of(kind, text, 'per_token')
  # Kernels come in float32, activations in the compute dtype.
  right = jnp.asarray(rhs) if kind == 'dense' else low(rhs)
  out, pullback = jax.vjp(function, low(lhs), right)
  gradients = pullback(jnp.asarray(g))
  assert out.dtype == jnp.float32
  assert [x.dtype for x in gradients] == [jnp.bfloat16, right.dtype]
  formula = PRODUCTS[kind][0]
  lhs_q, rhs_q, expected = reference.quantized_dot(
    formula, lhs, rhs, bits=(8, 8), whole=(False, False)
  )
  expected = (
    expected,
    *reference.quantized_dot_gradients(formula, lhs_q, rhs_q, g),
  )
  for mine, theirs in zip((out, *gradients), expected, strict=True):
    assert_close(mine.astype(jnp.float32), theirs, 0.02)


# Whole models.


def build(config, **quant):
  """Returns the model of a config under the given fields of `quant`."""
  config = copy.deepcopy(config)
  config.quant.update(recipe='aqt', default='float', attention='float')
  config.quant.update(quant)
  plan = build_plan(config.quant, models.list_sites(config))
  return models.build_model(config, build_ops(config.quant, plan))


def shapes_of(model):
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.fixture
def run(digits_config):
  """Returns the logits of the same weights and images under `quant`."""
  params = reference.random_params(
    shapes_of(models.build_model(digits_config))['params']
  )
  images = np.random.default_rng(1).standard_normal((4, 8, 8, 3))
  params = jax.tree.map(jnp.asarray, params)
  images = jnp.asarray(images, jnp.float32)

  def logits(head=None, **quant):
    """`head`, if given, replaces the kernel of the head by a function of it."""
    variables = {'params': dict(params)}
    if head is not None:
      kernel = jnp.asarray(head(params['head']['kernel']), jnp.float32)
      variables['params']['head'] = params['head'] | {'kernel': kernel}
    model = build(digits_config, **quant)
    return np.asarray(jax.jit(model.apply)(variables, images))

  return logits


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_recipe_leaves_the_variables_of_the_model_alone(
  digits_config, granularity
):
  plain = shapes_of(build(digits_config, recipe='none'))
  quantized = shapes_of(
    build(
      digits_config, default='w4a4', attention='a4',
      act_granularity=granularity,
    )
  )  # fmt: skip
  describe = lambda shapes: {
    path: tree.describe(leaf) for path, leaf in tree.flatten(shapes).items()
  }
  assert describe(quantized) == describe(plain)
  assert set(quantized) == {'params'}


def test_plan_of_floats_computes_what_no_recipe_computes(run):
  np.testing.assert_array_equal(run(recipe='aqt'), run(recipe='none'))


def test_more_bits_are_nearer_to_the_float_model(run):
  exact = run(recipe='none')
  errors = [
    np.abs(run(default=text) - exact).max() for text in ('w8a8', 'w4a4', 'w2a2')
  ]
  assert 0 < 3 * errors[0] < errors[1] < errors[2]


def test_attention_bits_change_the_logits(run):
  fine, coarse = run(attention='a8'), run(attention='a2')
  exact = run()
  assert 0 < np.abs(fine - exact).max() < np.abs(coarse - exact).max()


def test_rule_quantizes_its_layer_and_no_other(run):
  quantized = run(rules=(('head', 'w4'),))
  by_hand = run(head=lambda kernel: reference.quantize(kernel, 4, 0))
  np.testing.assert_allclose(quantized, by_hand, rtol=1e-4, atol=1e-5)
  assert np.abs(quantized - run()).max() > 1e-2


def test_gradients_at_8_bits_point_where_the_float_ones_point(digits_config):
  model = build(digits_config, default='w8a8')
  variables = {'params': reference.random_params(shapes_of(model)['params'])}
  variables = jax.tree.map(jnp.asarray, variables)
  images = jnp.ones((2, 8, 8, 3)).at[:, ::2].set(-1.0)

  def gradient(model):
    loss = lambda variables: (model.apply(variables, images) ** 2).mean()
    return tree.flatten(jax.jit(jax.grad(loss))(variables))

  quantized = gradient(model)
  exact = gradient(models.build_model(digits_config))
  flat = lambda tree: np.concatenate([x.ravel() for x in tree.values()])
  a, b = flat(quantized), flat(exact)
  cosine = a @ b / np.sqrt((a @ a) * (b @ b))
  assert 0.98 < cosine < 1 - 1e-9
