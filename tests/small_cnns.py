"""Small convolutional models, for tests: 32 px, few channels, 10 classes."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from qvit_jax import models, tree
from qvit_jax.models import mobilenet

# Strides 2 and 1, an expansion of 1, and a residual block.
FEW_STAGES = ((1, 16, 1, 1), (2, 16, 2, 2))


def vgg_config(**fields):
  """VGG-11 with 8 channels where the paper has 512."""
  config = common.get_config()
  config.model.update(
    name='vgg', size='11', channels=1, classifier='linear', image_size=32,
    num_classes=10, dtype='float32',
  )  # fmt: skip
  config.model.update(fields)
  return config


def mobilenet_config(monkeypatch, **fields):
  """MobileNetV2 0.5 with three blocks of 8 channels, for 16 px."""
  monkeypatch.setattr(mobilenet, 'STAGES', FEW_STAGES)
  monkeypatch.setattr(mobilenet, 'LAST', 16)
  config = common.get_config()
  config.model.update(
    name='mobilenet_v2', size='0.5', image_size=16, num_classes=10,
    dtype='float32',
  )  # fmt: skip
  config.model.update(fields)
  return config


def run_config(**fields):
  """A training of `vgg_config` on the digits that takes seconds."""
  config = vgg_config(**fields)
  config.train.update(steps=4, batch_size=16)
  config.eval.update(batch_size=120, every=2, num_examples=120)
  config.log.update(every=1, tensorboard=False)
  config.ptq.engines = ()  # a second a row
  return config


def rich_variables(config):
  """Variables with uneven norms, of both signs, and uneven statistics."""
  size, rng = config.model.image_size, np.random.default_rng(0)
  init = jax.jit(models.build_model(config).init)
  flat = tree.flatten(init(jax.random.key(0), jnp.zeros((1, size, size, 3))))
  for path, x in flat.items():
    draw = rng.normal(size=x.shape).astype(np.float32)
    if path.endswith('/scale'):
      draw = np.sign(draw) * (0.5 + np.abs(draw))
    elif path.endswith('/var'):
      draw = np.exp(draw)
    elif path.endswith('kernel'):
      draw = np.asarray(x) + 0.02 * draw
    else:
      draw = 0.3 * draw
    flat[path] = jnp.asarray(draw)
  return tree.nest(flat)


def make_sharded_config(fields):
  """As that of `conftest`, a VGG whose channels mesh.tensor=4 splits."""
  config = run_config(channels=4)
  config.train.update(steps=5, batch_size=32)
  config.optim.name, config.optim.lr = 'sgd', 0.02
  config.eval.update(batch_size=120, every=5)
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config
