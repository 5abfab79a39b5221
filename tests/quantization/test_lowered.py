"""Products of float32 in the programs for accelerators, without one."""

import jax
import jax.numpy as jnp
import pytest

from qvit_jax import models
from qvit_jax.arithmetic.exact import exact_dot
from qvit_jax.arithmetic.products import multiply
from qvit_jax.ops import Site
from qvit_jax.quantization.methods.aqt import AqtCore
from qvit_jax.quantization.ptq import adaround, gptq
from qvit_jax.quantization.spec import QuantPlan, QuantSpec
from qvit_jax.training import losses
from tests.small_models import rich_config

PLAIN = (((1,), (0,)), ((), ()))


def products(function, *args, platform='cuda'):
  """Lines of the lowered program that multiply float32 operands."""
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
  lines = [x for x in lowered.as_text().splitlines() if 'dot_general' in x]
  operands = [x.rpartition(' : ')[2].partition('->')[0] for x in lines]
  return [x for x, of in zip(lines, operands, strict=True) if 'xf32>' in of]


def square(dtype='float32'):
  return jnp.ones((8, 8), dtype)


def model_of(config):
  model = models.build_model(config)
  images = jnp.zeros((2, 8, 8, 3))
  variables = model.init(jax.random.key(0), images)
  return (lambda v, x: model.apply(v, x).sum()), variables, images


def aqt_product(weights, acts, *, is_gradient):
  """A layer under AQT at some bits, or the gradient of both operands."""
  site = Site('layer', 'dense', (8,), (8, 8), 64)
  spec = QuantSpec(weights, acts)
  core = AqtCore(QuantPlan((site,), (spec,), 'per_token'))
  product = lambda x, w: core(None, site, x, w, PLAIN)
  if is_gradient:
    pick = lambda x, w: product(x, w)[0, 0]
    return jax.grad(pick, argnums=(0, 1)), square(), square()
  return product, square(), square()


@pytest.mark.parametrize('platform', ('cuda', 'tpu'))
@pytest.mark.parametrize(
  'case',
  (
    ('float product', lambda: (lambda a: multiply(a, a, PLAIN), square())),
    (
      'its gradient',
      lambda: (jax.grad(lambda a: multiply(a, a, PLAIN).sum()), square()),
    ),
    (
      'carrier of wide codes',
      lambda: (lambda a: exact_dot(a, a, PLAIN, 2**20), square()),
    ),
    (
      'gptq',
      lambda: (lambda w: gptq.round_by_outputs(w, w, w, bits=4), square()),
    ),
    (
      'adaround',
      lambda: (
        lambda w: adaround.round_by_reconstruction(w, w, w, bits=4, steps=2),
        square(),
      ),
    ),
    ('aqt, float input', lambda: aqt_product(4, None, is_gradient=False)),
    ('aqt, float kernel', lambda: aqt_product(None, 4, is_gradient=False)),
    ('gradients of aqt', lambda: aqt_product(4, 4, is_gradient=True)),
    ('teacher', lambda: (losses.feature_distance, *[square()] * 3)),
    ('float32 model', lambda: model_of(rich_config())),
  ),
  ids=lambda case: case[0].replace(',', '').replace(' ', '_'),
)
def test_float32_means_float32(case, platform):
  lines = products(*case[1](), platform=platform)
  assert lines
  plain = [x for x in lines if x.count('HIGHEST') != 2]
  assert not plain, plain[0]
