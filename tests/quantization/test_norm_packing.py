"""What training with rounded kernels evaluates, packed with its norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.experiment.model import Model, folded
from qvit_jax.quantization.methods import packing
from qvit_jax.store import artifacts
from tests.small_cnns import mobilenet_config, rich_variables, vgg_config


def quantized(config, recipe, bits='w4a4'):
  config.quant.update(recipe=recipe, default=bits)
  return config


def trained_like(config, images):
  """Returns (model, variables) as after a training, steps fitted."""
  model = Model(config)
  variables = {**jax.jit(model.init)(jax.random.key(0), images[:1])}
  variables |= {
    name: x for name, x in rich_variables(config).items() if name != 'quant'
  }
  if model.fitted:
    fit = jax.jit(lambda v, x: model.module.apply(v, x, mutable=['quant'])[1])
    variables |= fit(variables, images)
  return model, variables


def packed_of(model, variables, config):
  return packing.pack(
    model.method, tree.flatten(variables), model.plan, model.ops,
    config.model.dtype, statistics=models.statistics(config),
  )  # fmt: skip


@pytest.mark.parametrize(
  ('recipe', 'dtype'),
  [
    ('aqt', 'float32'),
    *(
      pytest.param(recipe, dtype, marks=pytest.mark.slow)
      for recipe, dtype in (
        ('aqt', 'bfloat16'), ('lsq', 'float32'), ('lsq', 'bfloat16'),
        ('statsq', 'float32'), ('statsq', 'bfloat16'),
      )
    ),
  ],
)  # fmt: skip
def test_the_packed_model_computes_the_bits_of_evaluation(
  recipe, dtype, monkeypatch, tmp_path
):
  config = quantized(mobilenet_config(monkeypatch, dtype=dtype), recipe)
  images = np.random.default_rng(1).normal(size=(8, 16, 16, 3))
  images = images.astype(np.float32)
  model, variables = trained_like(config, images)
  packed = packed_of(model, variables, config)
  plain = folded(config)
  facts, path = models.architecture(plain), tmp_path / 'model.safetensors'
  artifacts.save(packed, path, facts)
  packed = artifacts.load(path, model.plan.sites, facts)
  there = jax.jit(model.module.apply)(variables, images)
  module = models.build_model(plain, packed.ops)
  here = jax.jit(module.apply)(packed.variables, images)
  assert np.abs(there).max() > 1e-3
  np.testing.assert_array_equal(here, there)
  # No float copy of a kernel, no norm and no statistics are left.
  assert {'params', 'quant'} == packed.variables.keys()
  flat = tree.flatten(packed.variables)
  gains = [x for name, x in flat.items() if name.endswith('/gain')]
  assert gains and any((np.asarray(x) < 0).any() for x in gains)
  assert not any('norm' in name for name in flat)


def test_a_bias_before_a_norm_is_added_before_its_gain():
  config = quantized(vgg_config(), 'aqt', 'w8a8')
  images = np.random.default_rng(1).normal(size=(4, 32, 32, 3))
  images = images.astype(np.float32)
  model, variables = trained_like(config, images)
  packed = packed_of(model, variables, config)
  flat = tree.flatten(packed.variables)
  bias = variables['params']['conv1_1']['bias']
  np.testing.assert_array_equal(flat['quant/conv1_1/offset'], bias)
  module = models.build_model(folded(config), packed.ops)
  there = jax.jit(model.module.apply)(variables, images)
  here = jax.jit(module.apply)(packed.variables, images)
  np.testing.assert_array_equal(here, there)


@pytest.mark.slow
def test_training_goes_on_from_a_packed_model_without_norms():
  config = quantized(vgg_config(), 'lsq', 'w8a8')
  images = np.random.default_rng(1).normal(size=(4, 32, 32, 3))
  model, variables = trained_like(config, images.astype(np.float32))
  packed = packed_of(model, variables, config)
  plain = folded(config)
  other = Model(plain)
  found, lines = packing.unpack(other.method, packed, other.plan, other.ops)
  # A gain may be negative, which no step is: those of convolutions are new.
  assert lines == [
    'kernels: 9 from their codes, 1 with the steps of these; other steps are '
    'found anew'
  ]
  flat = tree.flatten(packed.variables)
  kernel = packed.variables['quant']['conv1_1']
  w = kernel['kernel'].codes * kernel['kernel'].scale * kernel['gain']
  np.testing.assert_allclose(
    found['params/conv1_1/kernel'], w, rtol=1e-6, atol=0
  )
  np.testing.assert_allclose(
    found['params/conv1_1/bias'],
    flat['params/conv1_1/bias']
    + flat['quant/conv1_1/offset'] * flat['quant/conv1_1/gain'],
    rtol=1e-5, atol=1e-6,
  )  # fmt: skip
  assert jnp.shape(found['quant/head/kernel_step']) == (10,)
