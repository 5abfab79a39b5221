"""Small models with uneven parameters, for tests of quantization."""

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree
from qvit_jax.quantization.ptq import apply as ptq
from qvit_jax.quantization.ptq import calibrate, plans, rows
from qvit_jax.quantization.ptq.ranges import AUTO
from tests.conftest import make_digits_config


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


# Fields of other backbones.
CLIP = {'pre_norm': True, 'activation': 'quick_gelu', 'norm_eps': 1e-5}
SIGLIP = {'pool': 'attention', 'activation': 'gelu_tanh'}
DINOV3 = {'position': 'rope', 'registers': 2, 'layer_scale': 1.0}
DINOV3_PLUS = DINOV3 | {'activation': 'swiglu'}


def rich_config(**fields):
  config = make_digits_config()
  config.model.update(depth=2, width=24, heads=3, mlp_dim=40)
  config.model.update(fields)
  return config


def random_params(config):
  """Parameters with norms, scales and biases that are not ones and zeros."""
  model = models.build_model(config)
  init = jax.jit(model.init)
  params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
  rng = np.random.default_rng(0)
  return {
    name: np.asarray(x) + 0.2 * rng.normal(size=x.shape).astype(np.float32)
    for name, x in tree.flatten(params).items()
  }


def logits(config, params, images):
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  return jax.jit(models.build_model(config).apply)(variables, images)


def packed_logits(config, packed, images):
  model = models.build_model(config, packed.ops)
  return np.asarray(jax.jit(model.apply)(packed.variables, jnp.asarray(images)))


def collect(config, params, batches, **wanted):
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  return calibrate.collect(
    lambda ops: models.build_model(config, ops),
    variables,
    lambda: batches,
    models.list_sites(config),
    **wanted,
  )


def seen(x, bins=2048):
  """Statistics of one operand, as calibration would keep them."""
  counts, _ = np.histogram(x, bins, (x.min(), x.max()))
  ends = np.asarray(x.min(), 'float32'), np.asarray(x.max(), 'float32')
  return calibrate.OperandStats(*ends, *ends, counts.astype(np.float32))


def pack(config, name, params, stats=None, *, rules=(), ranges=AUTO):
  """The packed model of a row; transforms see `stats` too."""
  stream, pairs = models.stream(config), models.pairs(config)
  row = rows.parse_row(name, has_stream=stream is not None, ranges=ranges)
  sites = models.list_sites(config)
  params = ptq.transform(
    row, params, stream, lambda done, params: stats, seed=0, pairs=pairs
  )
  planned = {}
  if not row.is_float:
    bits = plans.plan_row(row, products(config, rules), params)
    planned = plans.plan_sites(row, bits, stream)
  return ptq.apply_row(row, planned, params, sites, stats)


def products(config, rules=()):
  return plans.Products(
    models.list_sites(config), models.family(config).stem, rules
  )
