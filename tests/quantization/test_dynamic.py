"""Training with ranges found in each token, and from packed models."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, modes, tree
from qvit_jax.errors import QuantError
from qvit_jax.experiment import first_state
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.quantization import METHODS, build_ops, build_plan, numerics
from qvit_jax.quantization.hadamard import turn_blocks
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.methods.packing import unpack
from qvit_jax.store import artifacts
from qvit_jax.store.checkpoint import Checkpoints
from tests import reference
from tests.conftest import make_digits_config
from tests.small_models import normal, pack, random_params, rich_config

DYNAMIC = {
  'recipe': 'lsq', 'default': 'w4a4', 'attention': 'a4',
  'act_granularity': 'per_token', 'rules': (('patch_embed', 'w4a8'),),
}  # fmt: skip


def built(config):
  plan = build_plan(config.quant, models.list_sites(config))
  ops = build_ops(config.quant, plan, hidden=models.stream(config).hidden)
  return plan, ops


def affine(x, bits):
  """Levels of an asymmetric quantizer of each row (last axis)."""
  x = np.asarray(x, np.float64)
  low = np.minimum(x.min(-1, keepdims=True), 0)
  high = np.maximum(x.max(-1, keepdims=True), 0)
  step = (high - low) / (2**bits - 1)
  zero = np.round(-low / step)
  return (np.clip(np.round(x / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_a_range_of_each_token_passes_every_gradient(bits):
  x, w, g = normal((3, 5, 8)), normal((8, 4), 1), normal((3, 5, 4), 2)
  ends = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
  left = numerics.scale_of(*ends, bits, symmetric=False)
  step = jnp.full((4,), 0.15)
  most = 2 ** (bits - 1)
  product = lsq.Product(
    (((2,), (0,)), ((), ())),
    lsq.Coder(bits, method='dynamic'),
    lsq.Coder(bits, is_signed=True),
  )
  y, pull = jax.vjp(
    lambda x, w: lsq.coded_product(product, x, w, left, (step, step * 0)), x, w
  )
  dx, dw = pull(g)
  near, (w_near, inside, *_) = (
    affine(x, bits),
    reference.lsq(w, step, 0, -most, most - 1),
  )
  np.testing.assert_allclose(y, near @ w_near, atol=1e-4)
  np.testing.assert_allclose(dx, np.asarray(g) @ w_near.T, atol=1e-4)
  wanted = np.einsum('bni,bno->io', near, g) * inside
  np.testing.assert_allclose(dw, wanted, atol=1e-4)


@pytest.mark.parametrize('row', ['w4a4+plain', 'w4a4+hadamard'])
def test_training_goes_on_with_the_codes_of_a_packed_model(row):
  config = rich_config()
  config.quant.update(**DYNAMIC, hadamard='hadamard' in row)
  plan, ops = built(config)
  packed = pack(config, row, random_params(config))
  images = normal((8, 8, 8, 3))
  known = models.build_model(config, packed.ops)
  wanted = np.asarray(jax.jit(known.apply)(packed.variables, images))
  flat, (line,) = unpack(METHODS['lsq'], packed, plan, ops)
  module = models.build_model(config, ops)
  shapes = tree.flatten(
    jax.eval_shape(module.init, jax.random.key(0), images[:1])
  )
  assert set(flat) == set(shapes)  # nothing but steps of kernels is learned
  variables = tree.nest(
    {n: x.reshape(shapes[n].shape) for n, x in flat.items()}
  )
  found = np.asarray(jax.jit(module.apply)(variables, images))
  # A code that falls to the other side of a half moves a logit by 1e-2.
  assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
  layers = sum(site.is_layer for site in plan.sites)
  assert f'{layers} from their codes, {layers} with the steps' in line


def test_a_turned_kernel_comes_back_as_it_was():
  config = rich_config()
  config.quant.update(**DYNAMIC)  # which does not turn
  plan, ops = built(config)
  params = random_params(config)
  flat, (line,) = unpack(
    METHODS['lsq'], pack(config, 'w8a4+hadamard', params), plan, ops
  )
  for site in plan.sites:
    if site.is_layer:
      name = f'{site.path}/kernel'
      w = np.asarray(params[name]).reshape(site.rhs_shape)
      step = np.abs(w).max() / 100
      np.testing.assert_allclose(flat[f'params/{name}'], w, atol=step)
  assert ', 0 with the steps' in line


def test_turned_layers_round_turned_operands():
  config = rich_config()
  config.quant.update(**DYNAMIC, hadamard=True)
  _, ops = built(config)
  path = ops.core.turned[0]
  site = next(s for s in models.list_sites(config) if s.path == path)
  block = ops.core.block(site)
  x, w = normal((2, 3, site.rhs_shape[0])), normal(site.rhs_shape, 1)

  class Module:
    def is_mutable_collection(self, name):
      return False

    def get_variable(self, collection, name):
      return jnp.full(site.rhs_shape[1:], 0.2)

  y = ops.core(Module(), site, x, w, (((2,), (0,)), ((), ())))
  near, *_ = reference.lsq(turn_blocks(w.T, block).T, 0.2, 0, -8, 7)
  wanted = affine(turn_blocks(x, block), 4) @ near
  np.testing.assert_allclose(y, wanted, atol=1e-4)
  assert block > 1


def test_turning_nothing_is_refused():
  config = rich_config()
  config.quant.update(**{**DYNAMIC, 'default': 'w4'}, hadamard=True)
  with pytest.raises(QuantError, match='no layer behind a nonlinearity'):
    built(config)


@pytest.mark.slow
def test_a_run_starts_from_a_packed_file(tmp_path, capsys):
  def config_of(**fields):
    config = make_digits_config()
    config.train.steps = config.eval.every = 2
    config.update_from_flattened_dict(fields)
    return config

  float_run, table = tmp_path / 'float', tmp_path / 'table'
  modes.run('train', config_of(**{'quant.recipe': 'none'}), str(float_run))
  asked = {
    'quant.recipe': 'none', 'checkpoint.path': str(float_run),
    'ptq.rows': ('w4a4',), 'ptq.calibration_examples': 64,
  }  # fmt: skip
  modes.run('ptq', config_of(**asked), str(table))
  path = table / 'artifacts' / 'w4a4.safetensors'
  fields = {f'quant.{name}': value for name, value in DYNAMIC.items()}
  fields |= {'quant.hadamard': True, 'checkpoint.path': str(path)}
  config = config_of(**fields)
  experiment = Experiment(config, training=True)
  own = Checkpoints(tmp_path / 'tuned' / 'checkpoints', writer=True)
  state, _, lines = first_state.initial_state(experiment, own)
  found = tree.flatten(state.variables)
  packed = artifacts.load(
    path, experiment.model.plan.sites, models.architecture(config)
  )
  name = 'head/kernel'
  np.testing.assert_allclose(
    found[f'quant/{name}_step'],
    packed.variables['quant']['head']['kernel'].scale[0],
  )
  assert f'starting from the packed model {path}' in lines
  modes.run('train', config_of(**fields), str(tmp_path / 'tuned'))
  assert 'inputs of 1 layers turned' in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_but_parameters_is_learned_without_steps(tmp_path, capsys):
  """StatsQ kernels and ranges of each token: straight-through training."""
  config = make_digits_config()
  config.quant.update({**DYNAMIC, 'recipe': 'statsq'})
  config.train.steps = config.eval.every = 2
  modes.run('train', config, str(tmp_path / 'run'))
  step = Checkpoints(tmp_path / 'run' / 'checkpoints', writer=False)
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert saved['train']['trainable'] == ['params']
  assert step.latest() == 2
  config.export.format = 'packed'
  modes.run('export', config, str(tmp_path / 'run'))
  text = capsys.readouterr().out
  (apart,) = re.findall(r'images within (\S+) of the run, 100.0%', text)
  assert float(apart) < 1e-6
