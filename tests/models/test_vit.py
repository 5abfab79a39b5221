"""The vision transformer."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from qvit_jax import models, tree
from qvit_jax.errors import ConfigError
from qvit_jax.models import vit
from qvit_jax.ops import FloatCore, Ops
from qvit_jax.quantization.ptq import rotate, row_checks, rows
from tests import reference

GOLDEN_PARAMETERS = {
  'Ti/16': 5_717_416,
  'S/16': 22_050_664,
  'B/16': 86_567_656,
  'L/16': 304_326_632,
}
DROPOUTS = (
  'dropout', 'attention_dropout', 'embedding_dropout', 'head_dropout'
)  # fmt: skip
BLOCK = 'encoder/block_00'


def tiny(**fields):
  """Returns the config of a float32 block of width 16 for 8 px images."""
  config = common.get_config()
  config.model.update(
    patch=4, width=16, depth=1, heads=2, mlp_dim=32, image_size=8,
    num_classes=10, dtype='float32',
  )  # fmt: skip
  config.model.update(fields)
  return config


def shapes_of(config):
  return _shapes_of(tuple(sorted(config.model.items())))


@functools.cache
def _shapes_of(fields):
  config = tiny(**dict(fields))
  size = config.model.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  init = models.build_model(config).init
  return jax.eval_shape(init, jax.random.key(0), images)


def variables_of(config):
  params = reference.random_params(shapes_of(config)['params'])
  return jax.tree.map(jnp.asarray, {'params': params})


def images_of(config, count=3):
  size = config.model.image_size
  images = np.random.default_rng(1).standard_normal((count, size, size, 3))
  return jnp.asarray(images, jnp.float32)


def logits_of(config, variables=None, ops=Ops(), *, count=3):  # noqa: B008
  variables = variables or variables_of(config)
  model = models.build_model(config, ops)
  return np.asarray(model.apply(variables, images_of(config, count)))


def _train(config, variables, images, key):
  model, rngs = models.build_model(config), {'dropout': jax.random.key(key)}
  return model.apply(variables, images, train=True, rngs=rngs)


def trained_logits_of(config, variables, images, key=0):
  return np.asarray(_train(config, variables, images, key))


def assert_close(actual, expected, tolerance=1e-5):
  expected = np.asarray(expected)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@functools.cache
def fresh_params():
  """Fresh parameters of a model that is wide enough for statistics."""
  config = tiny(width=64, mlp_dim=256, layer_scale=0.25, qk_norm=True)
  images = images_of(config, 1)
  init = jax.jit(models.build_model(config).init)
  return jax.device_get(init(jax.random.key(0), images)['params'])


# Sizes.


@pytest.mark.parametrize('size', GOLDEN_PARAMETERS)
def test_parameter_count_is_the_published_one(size):
  config = common.get_config()
  config.model.update(size=size, image_size=224, num_classes=1000)
  count = tree.num_elements(shapes_of(config)['params'])
  assert count == GOLDEN_PARAMETERS[size]


def test_every_size_has_a_golden_parameter_count():
  assert {size.split('/')[0] for size in GOLDEN_PARAMETERS} == set(vit.SIZES)


def test_b16_has_the_published_macs():
  config = common.get_config()
  config.model.update(size='B/16', image_size=224, num_classes=1000)
  sites = models.list_sites(config)
  assert sum(site.macs for site in sites) == 17_563_828_224
  assert len(sites) == 1 + 12 * 8 + 1


def test_macs_of_each_site_are_those_of_its_product():
  macs = {site.path: site.macs for site in models.list_sites(tiny())}
  assert macs['patch_embed'] == 4 * (4 * 4 * 3) * 16
  assert macs[f'{BLOCK}/attn/query'] == 5 * 16 * 16
  assert macs[f'{BLOCK}/attn/qk'] == macs[f'{BLOCK}/attn/av'] == 5 * 5 * 16
  assert macs[f'{BLOCK}/mlp/fc1'] == macs[f'{BLOCK}/mlp/fc2'] == 5 * 16 * 32
  assert macs['head'] == 16 * 10


def test_size_and_its_five_numbers_are_the_same_model():
  named, listed = (
    tiny(size='Ti/4'),
    tiny(width=192, depth=12, heads=3, mlp_dim=768),
  )
  assert shapes_of(named) == shapes_of(listed)


@pytest.mark.parametrize(('image_size', 'patch'), [(20, 4), (3, 1)])
def test_any_image_that_the_patch_divides_works(image_size, patch):
  config = tiny(image_size=image_size, patch=patch)
  tokens = 1 + (image_size // patch) ** 2
  assert shapes_of(config)['params']['pos_embed'].shape == (1, tokens, 16)
  variables = variables_of(config)
  expected = reference.vit(
    variables['params'], images_of(config), patch=patch, pool='token'
  )
  assert_close(logits_of(config, variables), expected)


# The forward pass.


@pytest.mark.parametrize(
  'fields',
  [
    dict(pool='token', depth=2),
    dict(pool='mean'),
    dict(layer_scale=0.1),
    dict(qk_norm=True),
    dict(norm_eps=0.1),
    dict(pool='mean', layer_scale=0.1, qk_norm=True, heads=4, depth=2),
    dict(pool='patch_mean', registers=2),
    dict(pool='patch_mean', norm_after_pool=True),
    dict(pool='mean', norm_after_pool=True, registers=2, norm_eps=0.1),
    dict(pool='token', norm_after_pool=True),
    dict(pre_norm=True, activation='quick_gelu'),
    dict(pre_norm=True, pool='mean', registers=2, norm_after_pool=True),
    dict(activation='gelu_tanh', layer_scale=0.1),
    dict(pool='attention', activation='gelu_tanh', heads=4),
    dict(pool='attention', registers=2, qk_norm=True, pre_norm=True),
    dict(last_norm=False, registers=1),
    dict(activation='swiglu', mlp_dim=20),
    dict(position='rope', registers=2, layer_scale=0.1, qk_norm=True),
    dict(position='rope', pool='attention', heads=4, pre_norm=True),
    dict(last_norm=False, pool='attention'),
    dict(pool='token_attention', registers=2, heads=4),
  ],
  ids=str,
)
def test_logits_equal_the_reference(fields):
  config = tiny(**fields)
  variables = variables_of(config)
  expected = reference.vit(
    variables['params'], images_of(config), patch=4, pool=config.model.pool,
    eps=config.model.norm_eps, activation=config.model.activation,
  )  # fmt: skip
  assert_close(logits_of(config, variables), expected)


def test_options_add_only_their_own_parameters():
  plain = set(tree.flatten(shapes_of(tiny())['params']))
  more = tiny(layer_scale=0.1, qk_norm=True)
  added = set(tree.flatten(shapes_of(more)['params'])) - plain
  norms = {
    f'{BLOCK}/attn/{n}_norm/{leaf}'
    for n in ('query', 'key')
    for leaf in ('scale', 'bias')
  }
  assert added == norms | {f'{BLOCK}/scale1', f'{BLOCK}/scale2'}
  mean = set(tree.flatten(shapes_of(tiny(pool='mean'))['params']))
  assert plain - mean == {'cls'} and not mean - plain
  behind = set(tree.flatten(shapes_of(tiny(norm_after_pool=True))['params']))
  assert {n.replace('pool_norm', 'encoder/norm') for n in behind} == plain
  both = set(tree.flatten(shapes_of(tiny(pool='patch_mean'))['params']))
  assert both == plain


def test_the_architecture_is_that_of_old_files_where_nothing_new_is_on():
  """Runs and packed files that know no `norm_after_pool` still open."""
  new = {'last_norm': False, 'pre_norm': True, 'activation': 'gelu_tanh'}
  plain = models.architecture(tiny())
  assert not new.keys() & plain.keys()
  assert models.architecture(tiny(**new)) == plain | new


def test_no_norm_cannot_stand_behind_the_pooling():
  config = tiny(norm_after_pool=True, last_norm=False)
  with pytest.raises(ConfigError, match='leave one of them out'):
    models.build_model(config)


@pytest.mark.parametrize('pool', ['token_mean', 'attention', 'token_attention'])
def test_a_norm_behind_two_pooled_tokens_is_refused(pool):
  config = tiny(pool=pool, norm_after_pool=True)
  with pytest.raises(ConfigError, match=r'--config\.model\.pool=patch_mean'):
    models.build_model(config)


@pytest.mark.parametrize(
  'fields',
  [
    dict(pool='patch_mean', norm_after_pool=True, registers=1),
    dict(pool='mean', norm_after_pool=True, layer_scale=0.1),
    dict(pool='attention', registers=1),
    dict(pool='token_attention'),
  ],
  ids=str,
)
def test_a_norm_behind_the_pooling_is_folded_and_turned(fields):
  config = tiny(depth=2, **fields)
  params = {
    name: np.asarray(x)
    for name, x in tree.flatten(variables_of(config)['params']).items()
  }
  stream = models.stream(config)
  turned = rotate.turn(rotate.fold_norms(params, stream), stream, seed=0)
  last = 'pool/attn/key' if 'attention' in config.model.pool else 'head'
  for name in ('patch_embed/kernel', f'{last}/kernel'):
    assert np.abs(turned[name] - params[name]).max() > 0.1
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, turned))}
  assert_close(logits_of(config, variables), logits_of(config), 1e-4)


@pytest.mark.parametrize(
  'fields', [dict(pre_norm=True), dict(last_norm=False, pool='mean')], ids=str
)
def test_a_stream_that_cannot_be_turned_has_turned_heads(fields):
  config = tiny(depth=2, activation='quick_gelu', **fields)
  params = {
    name: np.asarray(x)
    for name, x in tree.flatten(variables_of(config)['params']).items()
  }
  stream = models.stream(config)
  turned = rotate.turn(rotate.fold_norms(params, stream), stream, seed=0)
  assert np.abs(turned[f'{BLOCK}/attn/value/kernel'] - params[
    f'{BLOCK}/attn/value/kernel']).max() > 0.1  # fmt: skip
  for name in ('patch_embed/kernel', 'pos_embed', 'encoder/block_01/scale1',
               'pre_norm/scale', 'cls', 'head/kernel'):  # fmt: skip
    if name not in params or (name == 'head/kernel' and config.model.last_norm):
      continue
    np.testing.assert_array_equal(turned[name], params[name])
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, turned))}
  assert_close(logits_of(config, variables), logits_of(config), 1e-4)
  row, plain = rows.parse_row('w4a4'), rows.parse_row('w4a4+gptq')
  sites = models.list_sites(config)
  assert row_checks.solver_notes([row, plain], sites, stream) == [
    'w4a4: rotate turns the heads alone: where a norm stands before the blocks,'
    ' or none behind them, the residual stream stays'
  ]
  assert row_checks.solver_notes([row], sites, models.stream(tiny())) == []


def test_logits_of_an_image_do_not_depend_on_the_batch():
  config = tiny()
  assert_close(logits_of(config)[:1], logits_of(config, count=1), 1e-6)


def test_bfloat16_model_keeps_float32_parameters_and_logits():
  config = tiny(dtype='bfloat16', layer_scale=0.5, qk_norm=True)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes_of(config))}
  assert dtypes == {jnp.dtype('float32')}
  logits = logits_of(config)
  exact = logits_of(tiny(layer_scale=0.5, qk_norm=True))
  assert logits.dtype == np.float32
  assert_close(logits, exact, 0.05)
  assert np.abs(logits - exact).max() > 1e-5 * np.abs(exact).max()


def test_remat_gives_the_same_gradients_and_keeps_less_for_them():
  gradients, kept = [], []
  for remat in (False, True):
    config = tiny(remat=remat, dropout=0.1)
    variables, images = variables_of(config), images_of(config)
    apply = lambda v, c=config, images=images: _train(c, v, images, 2)
    logits, pullback = jax.vjp(apply, variables)
    kept.append(tree.num_elements(pullback))
    gradients.append(tree.flatten(pullback(logits)[0]))
  assert kept[1] < 0.5 * kept[0]
  for path, plain in gradients[0].items():
    # A key's bias has no gradient but noise, so no relative error either.
    np.testing.assert_allclose(gradients[1][path], plain, 1e-4, atol=1e-4)
  assert np.abs(gradients[0]['params/head/kernel']).max() > 0.1


def test_remat_has_the_same_sites():
  assert models.list_sites(tiny(remat=True)) == models.list_sites(tiny())


# Initialisation.


def test_fresh_kernels_are_truncated_normals_of_scale_002():
  flat = tree.flatten(fresh_params())
  drawn = [p for p in flat if p.endswith(('kernel', 'cls', 'pos_embed'))]
  assert len(drawn) == 1 + 6 + 1 + 2
  for path in drawn:
    values = flat[path].ravel()
    assert np.abs(values).max() <= 0.04 + 1e-7, path
    # Cutting a normal at two sigmas leaves 0.8796 of its deviation.
    error = 4 / math.sqrt(values.size)
    assert abs(values.std() / (0.02 * 0.8796) - 1) < error, path
    assert abs(values.mean()) < 0.02 * error, path
  alike = flat['encoder/block_00/attn/query/kernel']
  assert (alike != flat['encoder/block_00/attn/key/kernel']).any()


def test_fresh_biases_norms_and_layer_scales_are_constants():
  constants = {'bias': 0, 'scale': 1, 'scale1': 0.25, 'scale2': 0.25}
  seen = set()
  for path, values in tree.flatten(fresh_params()).items():
    name = path.split('/')[-1]
    if name in constants:
      seen.add(name)
      assert (values == constants[name]).all(), path
  assert seen == set(constants)


# Dropout and stochastic depth.


@pytest.mark.parametrize('field', [*DROPOUTS, 'stochastic_depth'])
def test_dropout_changes_training_and_leaves_evaluation_alone(field):
  depth = 2 if field == 'stochastic_depth' else 1
  config = tiny(**{'depth': depth, field: 0.5})
  variables, images = variables_of(config), images_of(config)
  train = functools.partial(trained_logits_of, config, variables, images)
  plain = logits_of(tiny(depth=depth), variables)
  np.testing.assert_array_equal(logits_of(config, variables), plain)
  assert np.abs(train(0) - plain).max() > 1e-3
  assert np.abs(train(0) - train(1)).max() > 1e-3
  np.testing.assert_array_equal(train(0), train(0))


def test_dropout_zeroes_hidden_channels_of_the_mlp():
  config = tiny(dropout=0.5)
  hidden = []

  def tap(module, site, lhs, rhs, dims):
    if site.path == f'{BLOCK}/mlp/fc2':
      hidden.append(lhs)

  model = models.build_model(config, Ops(tap=tap))
  variables, images = variables_of(config), images_of(config)
  model.apply(variables, images)
  rngs = {'dropout': jax.random.key(0)}
  model.apply(variables, images, train=True, rngs=rngs)
  plain, dropped = ((x == 0).mean() for x in hidden)
  assert plain < 0.01 and 0.4 < dropped < 0.6


@pytest.mark.parametrize('branch', ['attn', 'mlp'])
def test_dropout_comes_after_both_branches(branch):
  """A branch of constants changes only by the dropout behind it."""
  config = tiny(dropout=0.5)
  variables = variables_of(config)
  block = variables['params']['encoder']['block_00']
  for layer in (block['attn']['out'], block['mlp']['fc2']):
    layer.update(jax.tree.map(jnp.zeros_like, layer))
  last = {'attn': 'out', 'mlp': 'fc2'}[branch]
  block[branch][last]['bias'] = jnp.ones(16)
  trained = trained_logits_of(config, variables, images_of(config))
  assert np.abs(trained - logits_of(config, variables)).max() > 1e-2


def test_training_without_dropout_equals_evaluation():
  config = tiny()
  variables = variables_of(config)
  logits = trained_logits_of(config, variables, images_of(config))
  assert_close(logits, logits_of(config, variables), 1e-6)


def test_head_dropout_zeroes_and_rescales_features():
  config = tiny(head_dropout=0.75)
  variables = variables_of(config)
  variables['params']['head'] = {
    'kernel': jnp.eye(16, 10),
    'bias': jnp.zeros(10),
  }
  plain = logits_of(config, variables)
  dropped = trained_logits_of(config, variables, images_of(config))
  kept = dropped != 0
  assert 0 < kept.sum() < kept.size / 2
  np.testing.assert_allclose(dropped[kept], 4 * plain[kept], rtol=1e-5)


def test_stochastic_depth_skips_whole_branches_image_by_image():
  """Each image of a batch is one of four: last block's branches on or off."""
  config = tiny(depth=2, stochastic_depth=0.5)
  variables, image = variables_of(config), images_of(config, 1)
  outcomes = np.concatenate([
    reference.vit(
      variables['params'], image, patch=4, pool='token',
      keep=[(1, 1), (first, second)],
    )
    for first, second in itertools.product((0, 2), repeat=2)
  ])  # fmt: skip
  copies = jnp.repeat(image, 2048, axis=0)
  logits = trained_logits_of(config, variables, copies)
  distance = np.abs(logits[:, None] - outcomes).max(-1)
  assert distance.min(axis=1).max() < 1e-4 * np.abs(outcomes).max()
  counts = np.bincount(distance.argmin(axis=1), minlength=4)
  assert counts.sum() == 2048 and counts.min() >= 400  # 512 expected of each


def test_stochastic_depth_grows_linearly_with_the_block():
  """Of three blocks and 0.8 the second is skipped with 0.4."""
  config = tiny(depth=3, stochastic_depth=0.8)
  variables, image = variables_of(config), images_of(config, 1)
  copies = jnp.repeat(image, 2048, axis=0)
  logits = trained_logits_of(config, variables, copies)

  def share(*keep):
    outcome = reference.vit(
      variables['params'], image, patch=4, pool='token', keep=keep
    )
    distance = np.abs(logits - outcome).max(-1)
    return (distance < 1e-4 * np.abs(outcome).max()).mean()

  # What is kept counts 1 / (1 - rate).
  everything = share((1, 1), (1 / 0.6, 1 / 0.6), (5, 5))
  assert everything == pytest.approx(0.6**2 * 0.2**2, abs=0.009)
  nothing = share((1, 1), (0, 0), (0, 0))
  assert nothing == pytest.approx(0.4**2 * 0.8**2, abs=0.03)


# Errors.


def refusal(**fields):
  with pytest.raises(ConfigError) as raised:
    models.build_model(tiny(**fields))
  return str(raised.value)


def test_patch_that_does_not_divide_the_image_is_refused():
  message = refusal(image_size=30)
  assert 'model.image_size=30' in message and 'patch 4' in message
  assert 'such as 28' in message
  assert 'such as 16' in refusal(image_size=8, patch=16)


def test_heads_that_do_not_divide_the_width_are_refused():
  message = refusal(heads=3)
  assert 'model.heads=3' in message and 'model.width=16' in message
  assert 'heads that divide the width' in message


@pytest.mark.parametrize(
  'size', ['H/16', 'L', 'L/', '/16', 'l/16', 'L-16', 'L/x', 'L/0', 'L/\u00b2']
)
def test_unknown_size_is_refused_with_the_known_ones(size):
  message = refusal(size=size)
  assert f'model.size={size!r} is unknown' in message
  assert 'Ti, S, B, L' in message and 'L/16' in message


# The slots of Ops.


def test_tap_sees_every_site_in_order_with_its_operands():
  config = tiny()
  seen = []
  ops = Ops(tap=lambda module, site, a, b, dims: seen.append((site, a, b)))
  models.build_model(config, ops).apply(variables_of(config), images_of(config))
  sites = [site for site, _, _ in seen]
  assert sites == models.list_sites(config)
  attn = f'{BLOCK}/attn'
  assert {s.path: (s.kind, s.lhs_shape, s.rhs_shape) for s in sites} == {
    'patch_embed': ('conv', (4, 48), (48, 16)),
    f'{attn}/query': ('dense', (5, 16), (16, 16)),
    f'{attn}/key': ('dense', (5, 16), (16, 16)),
    f'{attn}/value': ('dense', (5, 16), (16, 16)),
    f'{attn}/qk': ('qk', (5, 2, 8), (5, 2, 8)),
    f'{attn}/av': ('av', (2, 5, 5), (5, 2, 8)),
    f'{attn}/out': ('dense', (5, 16), (16, 16)),
    f'{BLOCK}/mlp/fc1': ('dense', (5, 16), (16, 32)),
    f'{BLOCK}/mlp/fc2': ('dense', (5, 32), (32, 16)),
    'head': ('dense', (16,), (16, 10)),
  }
  names = ' '.join(s.path.split('/')[-1] for s in sites)
  assert names == 'patch_embed query key value qk av out fc1 fc2 head'
  for site, lhs, rhs in seen:
    assert lhs.shape == (3, *site.lhs_shape)
    batch = () if site.is_layer else (3,)
    assert rhs.shape == (*batch, *site.rhs_shape)


def test_delta_adds_to_the_output_of_its_layer():
  """A delta x @ d is the same as a kernel with d added."""
  config = tiny()
  path = f'{BLOCK}/mlp/fc2'
  d = np.random.default_rng(3).standard_normal((32, 16)).astype(np.float32)

  class Added:
    def kernel(self, module, site, w):
      return w

    def output(self, module, site, x, w, y):
      return y + x @ d if site.path == path else y

  plain, merged = variables_of(config), variables_of(config)
  merged['params']['encoder']['block_00']['mlp']['fc2']['kernel'] += d
  with_delta = logits_of(config, plain, Ops(delta=Added()))
  assert_close(with_delta, logits_of(config, merged))
  assert np.abs(with_delta - logits_of(config, plain)).max() > 1e-2


def test_rectify_changes_queries_and_keys_before_their_product():
  config = tiny()
  factors = {'query': 2.0, 'key': 0.25}
  rectify = lambda module, name, x: x * factors[name] + 0.5
  plain, scaled = variables_of(config), variables_of(config)
  for name, factor in factors.items():
    layer = scaled['params']['encoder']['block_00']['attn'][name]
    layer['kernel'] = layer['kernel'] * factor
    layer['bias'] = layer['bias'] * factor + 0.5
  rectified = logits_of(config, plain, Ops(rectify=rectify))
  assert_close(rectified, logits_of(config, scaled))
  assert np.abs(rectified - logits_of(config, plain)).max() > 1e-2


def test_core_computes_every_product():
  config = tiny()
  variables = variables_of(config)
  seen = []

  def doubled_head(module, site, lhs, rhs, dims):
    seen.append(site.path)
    y = FloatCore()(module, site, lhs, rhs, dims)
    return 2 * y if site.path == 'head' else y

  doubled_head.is_packed = False
  logits = logits_of(config, variables, Ops(core=doubled_head))
  bias = variables['params']['head']['bias']
  plain = logits_of(config, variables)
  assert_close(logits, 2 * (plain - bias) + bias)
  assert seen == [site.path for site in models.list_sites(config)]
