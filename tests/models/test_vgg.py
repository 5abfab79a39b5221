"""VGG against slow NumPy, published counts and torchvision's init."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from qvit_jax import models, tree
from qvit_jax.errors import ConfigError
from qvit_jax.models import vgg
from tests import cnn_reference as reference
from tests.models.cnns import (
  assert_close,
  logits_of,
  shapes_of,
  trained_logits,
  variables_of,
)
from tests.small_cnns import vgg_config

GOLDEN_PARAMETERS = {  # torchvision's, for 1000 classes
  ('11', 'none'): 132_863_336,
  ('11', 'train'): 132_868_840,
  ('16', 'none'): 138_357_544,
}


@pytest.mark.parametrize(('size', 'norm'), GOLDEN_PARAMETERS)
def test_parameter_count_is_the_published_one(size, norm):
  config = common.get_config()
  config.model.update(
    name='vgg', size=size, batch_norm=norm, image_size=224, num_classes=1000
  )
  count = tree.num_elements(shapes_of(config)['params'])
  assert count == GOLDEN_PARAMETERS[size, norm]


@pytest.mark.parametrize('size', vgg.SIZES)
def test_sizes_have_as_many_layers_as_their_names_say(size):
  sites = models.list_sites(vgg_config(size=size, classifier='paper'))
  assert len(sites) == int(size)
  assert all(site.kind in ('conv', 'dense') for site in sites)


def test_sites_have_the_shapes_and_macs_of_their_products():
  config = vgg_config(classifier='paper', channels=2, image_size=70)
  sites = {site.path: site for site in models.list_sites(config)}
  widths, side, inside = (2, 4, 8, 16, 16), 70, 3
  for i, (count, width) in enumerate(zip(vgg.SIZES['11'], widths, strict=True)):
    for k in range(count):
      site = sites[f'conv{i + 1}_{k + 1}']
      assert site.lhs_shape == (side, side, inside)
      assert site.rhs_shape == (9 * inside, width)
      assert site.macs == side * side * 9 * inside * width
      assert site.window.groups == 1
      inside = width
    side //= 2  # an odd last row is left out
  assert sites['fc1'].macs == 7 * 7 * 16 * 128
  assert sites['fc2'].macs == 128 * 128
  assert sites['head'].macs == 128 * 10
  assert [sites[n].window for n in ('fc1', 'fc2', 'head')] == [None] * 3
  family = models.family(config)
  assert [*sites][0] == family.stem and [*sites][-1] == family.head


@pytest.mark.parametrize(
  'fields',
  [
    dict(),
    dict(batch_norm='none', classifier='paper'),
    dict(batch_norm='held', classifier='paper', image_size=38),
    dict(size='16', image_size=36),
  ],
  ids=str,
)
def test_logits_equal_the_reference(fields):
  config = vgg_config(**fields)
  variables = variables_of(config)
  size = config.model.image_size
  images = np.random.default_rng(1).standard_normal((2, size, size, 3))
  expected = reference.vgg(
    tree.flatten(variables), images, vgg.SIZES[config.model.size],
    config.model.classifier,
  )  # fmt: skip
  assert_close(logits_of(config, variables, images), expected)


def test_dropout_lies_between_the_layers_of_the_classifier():
  config = vgg_config(
    classifier='paper', head_dropout=0.5, batch_norm='none', image_size=32
  )
  variables = variables_of(config)
  images = np.random.default_rng(1).standard_normal((2, 32, 32, 3))
  first, second = (
    trained_logits(config, variables, images, key) for key in (0, 1)
  )
  assert np.abs(first - second).max() > 0
  np.testing.assert_array_equal(
    first, trained_logits(config, variables, images, 0)
  )


def test_fresh_parameters_have_the_spread_of_torchvision():
  config = vgg_config(channels=16, classifier='paper')
  images = jnp.zeros((1, 32, 32, 3))
  init = jax.jit(models.build_model(config).init)
  params = tree.flatten(init(jax.random.key(0), images)['params'])
  for name, deviation in (
    ('conv4_2', (2 / (9 * 128)) ** 0.5),
    ('fc1', 0.01),
    ('fc2', 0.01),
  ):
    found = np.asarray(params[f'{name}/kernel'])
    assert found.std() == pytest.approx(deviation, rel=0.02)
    # Not cut off: two deviations would be the end of a truncated one.
    assert np.abs(found).max() > 3 * deviation
    assert not np.asarray(params[f'{name}/bias']).any()


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(size='12'), "model.size='12' is no size of vgg; allowed: '11' | "),
    (dict(size=''), "model.size='' is no size of vgg"),
    (dict(image_size=31), 'model.image_size=31 is too small: .*=32 or more'),
  ],
  ids=str,
)
def test_an_impossible_model_is_refused(fields, words):
  config = vgg_config(**fields)
  for ask in (models.build_model, models.architecture):
    with pytest.raises(ConfigError, match=words.replace('|', r'\|')) as error:
      ask(config)
    assert '\n' not in str(error.value)


def test_pairs_are_neighbours():
  config = vgg_config(classifier='paper')
  paths = [site.path for site in models.list_sites(config)]
  pairs = models.family(config).pairs(config.model)
  assert [(p.first, p.second) for p in pairs] == list(
    zip(paths, paths[1:], strict=False)
  )
