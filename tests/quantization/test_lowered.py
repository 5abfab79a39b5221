"""Products of float32 in the programs for accelerators, without one."""

import re

import jax
import jax.numpy as jnp
import pytest

from qvit_jax import models
from qvit_jax.ops import dot_general
from qvit_jax.quantization.integer_core import exact_dot
from qvit_jax.quantization.ptq import adaround, gptq
from qvit_jax.training import losses
from tests.small_models import rich_config

PLAIN = (((1,), (0,)), ((), ()))


def products(function, *args, platform='cuda'):
  """Lines of the lowered program that multiply float32 operands."""
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
  lines = [x for x in lowered.as_text().splitlines() if 'dot_general' in x]
  return [x for x in lines if re.search(r'\(tensor<[0-9x]*xf32>', x)]


def square(dtype='float32'):
  return jnp.ones((8, 8), dtype)


def model_of(config):
  model = models.build_model(config)
  images = jnp.zeros((2, 8, 8, 3))
  variables = model.init(jax.random.key(0), images)
  return (lambda v, x: model.apply(v, x).sum()), variables, images


@pytest.mark.parametrize('platform', ('cuda', 'tpu'))
@pytest.mark.parametrize(
  'case',
  (
    ('float product', lambda: (lambda a: dot_general(a, a, PLAIN), square())),
    (
      'its gradient',
      lambda: (jax.grad(lambda a: dot_general(a, a, PLAIN).sum()), square()),
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
    ('teacher', lambda: (losses.feature_distance, *[square()] * 3)),
    ('float32 model', lambda: model_of(rich_config())),
  ),
  ids=lambda case: case[0].replace(' ', '_'),
)
def test_float32_means_float32(case, platform):
  lines = products(*case[1](), platform=platform)
  assert lines
  plain = [x for x in lines if x.count('HIGHEST') != 2]
  assert not plain, plain[0]
