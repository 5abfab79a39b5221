"""BatchNorm: the layer, folding, other statistics for the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.experiment.model import folded
from qvit_jax.experiment.statistics import folded_params
from qvit_jax.models import batch_norm
from qvit_jax.models.batch_norm import BatchNorm
from tests.small_cnns import mobilenet_config, rich_variables, vgg_config


def layer_of(x, **fields):
  """Returns (layer, variables with uneven numbers)."""
  rng = np.random.default_rng(0)
  width = x.shape[-1]
  draw = lambda: rng.normal(size=width).astype(np.float32)
  return BatchNorm(**fields), {
    'params': {'scale': draw(), 'bias': draw()},
    'batch_stats': {'mean': draw(), 'var': np.exp(draw())},
  }


def normalised(x, variables, mean, var):
  """The paper's formula, with epsilon 1e-5."""
  params = variables['params']
  return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']


X = np.random.default_rng(1).normal(2, 3, (4, 5, 6, 7)).astype(np.float32)


def test_training_goes_by_the_batch_and_moves_the_averages():
  layer, variables = layer_of(X)
  apply = jax.jit(
    lambda v, x: layer.apply(v, x, True, mutable=['batch_stats'])
  )
  y, found = apply(variables, X)
  mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
  expected = normalised(X, variables, mean, var)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)
  for name, seen in (('mean', mean), ('var', var)):
    kept = 0.9 * variables['batch_stats'][name] + 0.1 * seen  # torch's 0.1
    np.testing.assert_allclose(found['batch_stats'][name], kept, rtol=1e-5)


@pytest.mark.parametrize(
  ('train', 'changes'), [(False, True), (True, False)], ids=['eval', 'held']
)
def test_elsewhere_it_goes_by_the_averages_and_keeps_them(train, changes):
  layer, variables = layer_of(X, changes=changes)
  y = jax.jit(lambda v, x: layer.apply(v, x, train))(variables, X)
  expected = normalised(X, variables, **variables['batch_stats'])
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_the_formula():
  layer, variables = layer_of(X)
  weight = np.random.default_rng(5).normal(size=X.shape).astype(np.float32)

  def plain(params, x):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / jnp.sqrt(var + 1e-5) * params['scale'] + params['bias']
    return (y * weight).sum()

  def ours(params, x):
    both = {**variables, 'params': params}
    y, _ = layer.apply(both, x, True, mutable=['batch_stats'])
    return (y * weight).sum()

  found, wanted = (
    jax.jit(jax.grad(f, argnums=(0, 1)))(variables['params'], jnp.asarray(X))
    for f in (ours, plain)
  )
  for here, there in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    scale = np.abs(there).max()
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * scale)


def test_bfloat16_is_normalised_in_float32():
  x = jnp.asarray(X + 1000, jnp.bfloat16)
  layer, variables = layer_of(x, dtype=jnp.bfloat16)
  apply = jax.jit(
    lambda v, x: layer.apply(v, x, True, mutable=['batch_stats'])
  )
  y, found = apply(variables, x)
  assert y.dtype == jnp.bfloat16
  assert found['batch_stats']['mean'].dtype == jnp.float32
  wide = np.asarray(x, np.float64)
  kept = 0.9 * variables['batch_stats']['var'] + 0.1 * wide.var((0, 1, 2))
  np.testing.assert_allclose(found['batch_stats']['var'], kept, rtol=1e-4)


@pytest.mark.parametrize('kind', ['vgg', 'mobilenet'])
def test_folding_leaves_the_logits_as_they_are(kind, monkeypatch):
  config = vgg_config()
  if kind == 'mobilenet':
    config = mobilenet_config(monkeypatch)
  variables = rich_variables(config)
  params = folded_params(config, variables)
  names = batch_norm.norms(tree.flatten(variables))
  assert names and not any('norm' in path for path in params)
  layers = [models.statistics(config).layer(norm) for norm in names]
  assert {f'{layer}/bias' for layer in layers} <= set(params)
  plain = folded(config)
  size = config.model.image_size
  shapes = jax.eval_shape(
    models.build_model(plain).init, jax.random.key(0),
    jnp.zeros((1, size, size, 3)),
  )  # fmt: skip
  assert shapes.keys() == {'params'}  # no statistics are left
  assert {p: x.shape for p, x in tree.flatten(shapes['params']).items()} == {
    p: x.shape for p, x in params.items()
  }
  images = np.random.default_rng(2).normal(size=(3, size, size, 3))
  images = images.astype(np.float32)
  there = jax.jit(models.build_model(config).apply)(variables, images)
  here = jax.jit(models.build_model(plain).apply)(
    {'params': tree.nest(params)}, images
  )
  largest = np.abs(there).max()
  assert largest > 1e-3
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * largest)


def test_other_statistics_leave_the_function_as_it_is():
  config = vgg_config()
  variables = rich_variables(config)
  flat = {n: np.asarray(x) for n, x in tree.flatten(variables).items()}
  rng = np.random.default_rng(3)
  found = {
    path: (np.exp if path.endswith('var') else np.asarray)(
      rng.normal(size=x.shape).astype(np.float32)
    )
    for path, x in flat.items()
    if path.startswith('batch_stats/')
  }
  changed = tree.nest(batch_norm.with_statistics(flat, found))
  images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
  apply = jax.jit(models.build_model(config).apply)
  there, here = apply(variables, images), apply(changed, images)
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)
  flat = tree.flatten(changed)
  assert all(np.array_equal(flat[path], x) for path, x in found.items())
