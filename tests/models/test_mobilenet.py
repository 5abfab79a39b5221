"""MobileNetV2 against slow NumPy, published counts and torchvision's init."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from qvit_jax import models, tree
from qvit_jax.errors import ConfigError
from qvit_jax.experiment.model import Model
from qvit_jax.models import mobilenet
from tests import cnn_reference as reference
from tests.conftest import notes_of
from tests.models.cnns import (
  assert_close,
  gradients_of,
  logits_of,
  shapes_of,
  trained_logits,
  variables_of,
)
from tests.small_cnns import FEW_STAGES, mobilenet_config, vgg_config


def whole(size, **fields):
  config = common.get_config()
  config.model.update(
    name='mobilenet_v2', size=size, image_size=224, num_classes=1000
  )
  config.model.update(fields)
  return config


def images_of(config, count=2):
  size = config.model.image_size
  return np.random.default_rng(1).standard_normal((count, size, size, 3))


def test_parameter_count_is_the_published_one():
  count = tree.num_elements(shapes_of(whole('1.0'))['params'])
  assert count == 3_504_872


def test_sites_have_the_shapes_and_macs_of_their_products():
  sites = {site.path: site for site in models.list_sites(whole('1'))}
  assert len(sites) == 53  # 52 convolutions and the head
  side, inside, block = 112, 32, 0
  assert sites['stem'].macs == side * side * 27 * 32
  for expansion, features, count, first in mobilenet.STAGES:
    for i in range(count):
      hidden, path = inside * expansion, f'block_{block:02d}'
      assert (f'{path}/expand' in sites) == (expansion > 1)
      if expansion > 1:
        site = sites[f'{path}/expand']
        assert site.rhs_shape == (inside, hidden)
        assert site.macs == side * side * inside * hidden
      side //= 1 if i else first
      site = sites[f'{path}/depthwise']
      assert site.rhs_shape == (9, hidden) and site.window.groups == hidden
      assert site.macs == side * side * 9 * hidden
      assert sites[f'{path}/project'].macs == side * side * hidden * features
      inside, block = features, block + 1
  assert side == 7
  assert sites['last'].macs == 7 * 7 * 320 * 1280
  assert sites['head'].macs == 1280 * 1000


@pytest.mark.parametrize(
  ('channels', 'expected'),
  [(32 * 0.35, 16), (16 * 0.35, 8), (24 * 0.5, 16), (24 * 0.75, 24), (44.8, 48),
   (1280 * 1.4, 1792), (3, 8)],
)  # fmt: skip
def test_channels_are_multiples_of_eight_and_lose_a_tenth_at_most(
  channels, expected
):
  assert mobilenet.rounded(channels) == expected


@pytest.mark.parametrize(
  'fields',
  [
    dict(),
    dict(padding='same'),
    dict(padding='same', image_size=19),
    dict(image_size=17, batch_norm='held'),
    dict(batch_norm='none', padding='same', image_size=10),
  ],
  ids=str,
)
def test_logits_equal_the_reference(fields, monkeypatch):
  config = mobilenet_config(monkeypatch, **fields)
  variables, images = variables_of(config), images_of(config)
  expected = reference.mobilenet(
    tree.flatten(variables), images, FEW_STAGES, config.model.padding or 'torch'
  )
  assert_close(logits_of(config, variables, images), expected)


def test_paddings_are_two_functions_of_the_same_arrays(monkeypatch):
  torch, same = (
    mobilenet_config(monkeypatch, padding=name) for name in ('torch', 'same')
  )
  assert shapes_of(torch) == shapes_of(same)
  assert models.architecture(torch) != models.architecture(same)
  variables, images = variables_of(torch), images_of(torch)
  pair = (logits_of(config, variables, images) for config in (torch, same))
  assert np.abs(np.subtract(*pair)).max() > 1e-3


def test_statistics_and_norms_are_absent_where_there_is_no_batch_norm(
  monkeypatch
):
  config = mobilenet_config(monkeypatch)
  with_norms = shapes_of(config)
  config.model.batch_norm = 'none'
  without = shapes_of(config)
  assert set(with_norms) == {'params', 'batch_stats'}
  assert set(without) == {'params'}
  names = {
    path.replace('_norm/', '/').replace('/scale', '/kernel')
    for path in tree.flatten(with_norms['params'])
  }
  assert names == set(tree.flatten(without['params']))


@pytest.mark.slow
def test_remat_changes_no_gradient_and_no_statistic(monkeypatch):
  found = []
  for make in (lambda **f: mobilenet_config(monkeypatch, **f), vgg_config):
    for remat in (False, True):
      config = make(remat=remat, head_dropout=0.5)
      variables, images = variables_of(config), images_of(config)
      found.append(tree.flatten(gradients_of(config, variables, images)))
  for kept, again in (found[:2], found[2:]):
    for path, expected in kept.items():
      np.testing.assert_allclose(
        again[path], expected, rtol=1e-4, atol=1e-5, err_msg=path
      )


def test_half_width_logits_are_near_and_statistics_stay_float32(monkeypatch):
  config = mobilenet_config(monkeypatch)
  variables, images = variables_of(config), images_of(config)
  expected = logits_of(config, variables, images)
  config.model.dtype = 'bfloat16'
  found = logits_of(config, variables, images)
  assert found.dtype == np.float32
  assert_close(found, expected, 0.05)
  assert {x.dtype.name for x in jax.tree.leaves(shapes_of(config))} == {
    'float32'
  }


def test_blocks_are_skipped_more_often_the_later_they_come(monkeypatch):
  config = mobilenet_config(
    monkeypatch, stochastic_depth=0.999, batch_norm='held'
  )
  images = np.repeat(images_of(config, 1), 8, axis=0)
  variables = variables_of(config)
  logits = trained_logits(config, variables, images, 0)
  config.model.stochastic_depth = 0.0
  plain = trained_logits(config, variables, images, 0)
  assert_close(plain, logits_of(config, variables, images))
  # The last block alone is residual here; skipped, its input is what is left.
  flat = {k: np.array(x) for k, x in tree.flatten(variables).items()}
  for name in ('scale', 'bias'):
    flat[f'params/block_02/project_norm/{name}'][:] = 0
  skipped = logits_of(config, tree.nest(flat), images)
  assert_close(logits, skipped)


def test_fresh_parameters_have_the_spread_of_torchvision(monkeypatch):
  monkeypatch.setattr(mobilenet, 'STAGES', FEW_STAGES)
  config = whole('1.0', image_size=32)
  init = jax.jit(models.build_model(config).init)
  params = tree.flatten(
    init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  )
  for name, deviation in (
    ('stem', (2 / (9 * 32)) ** 0.5),
    ('last', (2 / 1280) ** 0.5),
    ('block_02/depthwise', (2 / (9 * 32)) ** 0.5),
    ('head', 0.01),
  ):
    found = np.asarray(params[f'{name}/kernel'])
    assert found.std() == pytest.approx(deviation, rel=0.15)
  assert not np.asarray(params['head/bias']).any()


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(size='B/16'), "model.size='B/16' is no size of mobilenet_v2"),
    (dict(size='0.01'), 'gives no whole channels .* Set .*size=0.35'),
    (dict(size='2'), 'gives no whole channels .* Set .*size=1.4'),
    (dict(image_size=31), 'model.image_size=31 is too small: .*=32 or more'),
  ],
  ids=str,
)
def test_an_impossible_model_is_refused(fields, words):
  config = whole('1.0')
  config.model.update(fields)
  for ask in (models.build_model, models.architecture):
    with pytest.raises(ConfigError, match=words) as error:
      ask(config)
    assert '\n' not in str(error.value)


def test_pairs_leave_out_sums():
  pairs = {
    (p.first, p.second): p
    for p in models.family(whole('1')).pairs(whole('1').model)
  }
  assert ('block_00/project', 'block_01/expand') in pairs
  assert pairs['block_00/project', 'block_01/expand'].is_linear
  # Block 2 adds what block 1 gives to its own output.
  assert not any(first == 'block_01/project' for first, _ in pairs)
  assert pairs['stem', 'block_00/depthwise'].ceiling == 6
  assert pairs['block_16/project', 'last'].is_linear
  inner = [p for p in pairs if p[0].split('/')[0] == p[1].split('/')[0]]
  assert len(inner) == 2 * 17 - 1


# Fields and adapters.


@pytest.mark.parametrize(
  ('name', 'field', 'value', 'others'),
  [
    ('vgg', 'patch', 4, 'vit'),
    ('vgg', 'padding', 'same', 'mobilenet_v2'),
    ('vgg', 'stochastic_depth', 0.1, 'vit or mobilenet_v2'),
    ('mobilenet_v2', 'channels', 8, 'vgg'),
    ('vit', 'batch_norm', 'held', 'vgg or mobilenet_v2'),
  ],
)
def test_a_field_that_the_family_does_not_read_is_refused(
  name, field, value, others
):
  size = {'vgg': '11', 'mobilenet_v2': '1.0', 'vit': ''}[name]
  config = common.get_config()
  config.model.update(name=name, size=size, image_size=32)
  config.model[field] = value
  config.train.steps = 1
  words = (
    rf"model.{field}={value!r} would have no effect: model.name='{name}' does "
    f'not read it; set --config.model.name={others}, or leave'
  )
  for overrides in ((), (f'model.{field}',)):
    with pytest.raises(ConfigError, match=words) as error:
      notes_of(config, overrides=overrides)
    assert '\n' not in str(error.value)


def test_another_family_on_a_page_of_a_vit_says_what_it_leaves_out():
  page = common.get_config()
  page.model.update(patch=8, image_size=32)
  page.train.steps = 1
  config = page.copy_and_resolve_references()
  config.model.update(name='vgg', size='11')
  notes = notes_of(config, overrides=['model.name', 'model.size'], page=page)
  assert any('model.patch=8 of the page has no effect' in n for n in notes)


def test_adapters_beside_convolutions_are_refused(monkeypatch):
  config = mobilenet_config(monkeypatch)
  config.lora.update(rank=2, targets=('all',))
  with pytest.raises(ConfigError, match='convolution stem.*none but its head'):
    Model(config)
  config = vgg_config(classifier='paper')
  config.lora.update(rank=2, targets=('conv2',))
  with pytest.raises(ConfigError, match=r'conv2_1; .*fc1, fc2; .*\x27fc1\x27'):
    Model(config)
  config.lora.targets = ('all',)
  adapter = Model(config).frozen.adapter
  assert [path for path, _ in adapter.layers] == ['fc1', 'fc2']
