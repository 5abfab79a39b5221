"""What tests of convolutional models share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree


def shapes_of(config):
  size = config.model.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  init = models.build_model(config).init
  return jax.eval_shape(init, jax.random.key(0), images)


def variables_of(config, gain=1.0):
  """Random variables of which none is idle; variances are positive."""
  random = np.random.default_rng(0)

  def fill(path, leaf):
    noise = random.standard_normal(leaf.shape)
    if path.endswith('/kernel'):
      inputs = np.prod(leaf.shape[:-1])
      noise = noise * gain * (2 / inputs) ** 0.5
    elif path.endswith('/var'):
      noise = np.exp(noise)
    else:
      noise = 0.3 * noise + path.endswith('/scale')
    return jnp.asarray(noise, jnp.float32)

  flat = tree.flatten(shapes_of(config))
  return tree.nest({path: fill(path, leaf) for path, leaf in flat.items()})


def logits_of(config, variables, images):
  apply = jax.jit(models.build_model(config).apply)
  return np.asarray(apply(variables, jnp.asarray(images, jnp.float32)))


def trained_logits(config, variables, images, key):
  return np.asarray(
    _trained(models.build_model(config))(
      variables, jnp.asarray(images, jnp.float32), jax.random.key(key)
    )
  )


@functools.cache
def _trained(model):
  @jax.jit
  def apply(variables, images, key):
    rngs = {'dropout': key}
    logits, _ = model.apply(
      variables, images, train=True, rngs=rngs, mutable=['batch_stats']
    )
    return logits

  return apply


def assert_close(actual, expected, tolerance=1e-5):
  expected = np.asarray(expected)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def gradients_of(config, variables, images):
  """Gradients of the parameters and the new statistics, in training."""
  model = models.build_model(config)

  @jax.jit
  def run(params, rest):
    def loss(params):
      logits, new = model.apply(
        {'params': params, **rest},
        jnp.asarray(images, jnp.float32),
        train=True,
        rngs={'dropout': jax.random.key(0)},
        mutable=['batch_stats'],
      )
      return jnp.square(logits).mean(), new

    return jax.grad(loss, has_aux=True)(params)

  rest = {k: v for k, v in variables.items() if k != 'params'}
  return run(variables['params'], rest)
