"""What is not finite, or a scale that is not positive, is never packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.errors import QuantError
from qvit_jax.lora import frozen
from qvit_jax.ops import Site
from qvit_jax.quantization import METHODS, build_ops, build_plan, quantize
from qvit_jax.quantization.finite import check_finite
from qvit_jax.quantization.methods.packing import pack
from qvit_jax.quantization.ptq import apply as ptq
from qvit_jax.quantization.ptq import calibrate, plans, rows
from tests.small_models import normal, random_params, rich_config, seen

BAD = [np.nan, np.inf, -np.inf]
KERNEL = 'encoder/block_00/mlp/fc1/kernel'


def broken(x, value):
  """A copy of which one element is the value."""
  x = np.array(x)
  x.flat[x.size // 2] = value
  return x


def one_line(error):
  return '\n' not in str(error.value)


@pytest.fixture(scope='module')
def trained():
  """{recipe: (variables by path, plan, ops)} with fitted steps."""
  found, images = {}, normal((2, 8, 8, 3))
  for recipe in ('aqt', 'lsq', 'statsq', 'qvit'):
    config = rich_config(depth=1)
    config.quant.update(recipe=recipe, default='w4a4', attention='a4')
    plan = build_plan(config.quant, models.list_sites(config))
    ops = build_ops(config.quant, plan, hidden=models.stream(config).hidden)
    module = models.build_model(config, ops)
    variables = jax.jit(module.init)(jax.random.key(0), images)
    found[recipe] = variables, plan, ops
  return {
    name: ({k: np.asarray(x) for k, x in tree.flatten(v).items()}, plan, ops)
    for name, (v, plan, ops) in found.items()
  }


@pytest.mark.parametrize('value', BAD)
@pytest.mark.parametrize('recipe', ['aqt', 'lsq', 'statsq', 'qvit'])
def test_a_trained_kernel_that_is_not_finite_is_named(trained, recipe, value):
  variables, plan, ops = trained[recipe]
  name = f'params/{KERNEL}'
  wrong = {name: broken(variables[name], value)}
  with pytest.raises(QuantError, match=KERNEL) as error:
    pack(METHODS[recipe], variables | wrong, plan, ops, 'float32')
  assert one_line(error)


@pytest.mark.parametrize(
  ('name', 'values'),
  [
    ('attn/qk/lhs_step', BAD),
    ('mlp/fc1/kernel_step', BAD),
    ('mlp/fc2/lhs_zero', BAD),
    ('attn/query_gamma', BAD),
  ],
)
def test_a_learned_value_that_cannot_be_packed_is_named(trained, name, values):
  variables, plan, ops = trained['qvit']
  path = f'encoder/block_00/{name}'
  for value in values:
    wrong = {f'quant/{path}': broken(variables[f'quant/{path}'], value)}
    with pytest.raises(QuantError, match=path) as error:
      pack(METHODS['qvit'], variables | wrong, plan, ops, 'float32')
    assert one_line(error)


@pytest.mark.parametrize('value', BAD)
@pytest.mark.parametrize(
  'row',
  ['fp32', 'w4a4', 'w4a4+plain', 'w10a10', 'w4a8+gptq', 'w4a8+adaround',
   'int4_weight_only_g32'],
)  # fmt: skip
def test_a_row_names_a_kernel_that_is_not_finite(row, value):
  config = rich_config(depth=1)
  params = random_params(config)
  params[KERNEL] = broken(params[KERNEL], value)
  sites, row = models.list_sites(config), rows.parse_row(row)
  with pytest.raises(QuantError, match=KERNEL):
    ptq.apply_row(row, {}, params, sites, None)


def test_a_solver_that_gives_no_numbers_is_named():
  site = Site('a/b', 'dense', (3, 4), (4, 2), 8)
  row = rows.parse_row('w4a8+gptq')
  plan = plans.SitePlan(4, 8)
  indefinite = -np.eye(4, dtype='float32') + 2 * np.ones((4, 4), 'float32')
  stats = calibrate.SiteStats(seen(np.ones(4)), hessian=indefinite)
  with pytest.raises(QuantError, match='^a/b: codes: '):
    ptq._pack(row, site, plan, normal((4, 2)), {'a/b': stats})


@pytest.mark.parametrize('value', BAD)
def test_statistics_that_are_not_finite_are_named(value):
  x = normal((64,))
  stats = {'a/b': calibrate.SiteStats(seen(np.asarray(x)))}
  high = np.asarray(value, 'float32')
  stats['a/b'].lhs = dataclasses.replace(stats['a/b'].lhs, high=high)
  with pytest.raises(QuantError, match='a/b/lhs_high') as error:
    calibrate.from_arrays(calibrate.to_arrays(stats))
  assert one_line(error)


@pytest.mark.parametrize('value', BAD)
def test_a_frozen_kernel_that_is_not_finite_is_named(value):
  config = rich_config(depth=1)
  config.lora.update(rank=2, targets=('all',), base='int4')
  sites = models.list_sites(config)
  params = random_params(config)
  params[KERNEL] = broken(params[KERNEL], value)
  params = tree.nest(jax.tree.map(jnp.asarray, params))
  whole = frozen.build(config, sites)
  with pytest.raises(QuantError, match=KERNEL):
    whole.settle({'params': params, 'lora': {}})


def test_a_matrix_that_is_not_finite_is_no_qtensor():
  with pytest.raises(QuantError, match='kernel: 1 of 8 values'):
    quantize(jnp.asarray(broken(normal((4, 2)), np.nan)), 4)


def test_values_of_any_float_type_are_looked_at():
  for dtype in ('float32', 'float16', jnp.bfloat16):
    check_finite({'a': np.ones(3, dtype)})
    with pytest.raises(QuantError, match='a: 1 of 3'):
      check_finite({'a': broken(np.ones(3, dtype), np.inf)})
  check_finite({'a': np.ones(3, 'int8')})
