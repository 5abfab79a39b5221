"""Integer products as accelerators run them, without one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models
from qvit_jax.arithmetic import host
from qvit_jax.arithmetic.integers import Whole, int8_dot, integer_dot
from qvit_jax.experiment.model import Model
from tests.quantization.test_convolutions import WINDOWS, slow_convolution
from tests.quantization.test_norm_packing import packed_of
from tests.small_cnns import mobilenet_config, vgg_config
from tests.small_models import (
  DINOV3_PLUS,
  SIGLIP,
  collect,
  normal,
  pack,
  random_params,
  rich_config,
)

LAYER = (((2,), (0,)), ((), ()))
QK = (((3,), (3,)), ((0, 2), (0, 2)))  # [b, n, k, d] by [b, m, k, d]


def activations(rng, shape, zero, bits=8):
  """Code - zero of asymmetric codes, as an operand; `zero` broadcasts."""
  codes = rng.integers(0, 2**bits, shape)
  codes.flat[:2] = 0, 2**bits - 1
  shift = jnp.float32(2 ** (bits - 1) - zero) if bits == 8 else None
  return Whole(jnp.float32(codes - zero), 2**bits - 1, shift)


def kernel(rng, shape, *, is_odd=False):
  if is_odd:  # as StatsQ has them
    codes = 2 * rng.integers(-128, 128, shape) + 1
    return Whole(jnp.int16(codes), 256, is_odd=True)
  return Whole(jnp.int8(rng.integers(-128, 128, shape)), 128)


def check(lhs, rhs, dims, wanted):
  """Both forms against whole numbers of 64 bits."""
  found = jax.jit(functools.partial(int8_dot, dims=dims))(lhs, rhs)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, wanted)
  here = jax.jit(functools.partial(integer_dot, dims=dims))(lhs, rhs)
  np.testing.assert_array_equal(here, wanted.astype(np.float32))


def int64(x):
  return np.asarray(x.numbers).astype(np.int64)


ZEROS = {
  'one': lambda rng: 37,
  'one of an image': lambda rng: rng.integers(0, 256, (3, 1, 1)),
  'one of a row': lambda rng: rng.integers(0, 256, (3, 5, 1)),
  'one of a position': lambda rng: rng.integers(0, 256, (5, 1)),  # no batch
}


@pytest.mark.parametrize('is_odd', [False, True])
@pytest.mark.parametrize('zero', ZEROS)
def test_a_layer_of_int8_gives_the_integers_of_int64(zero, is_odd):
  rng = np.random.default_rng(0)
  lhs = activations(rng, (3, 5, 200), np.asarray(ZEROS[zero](rng)))
  rhs = kernel(rng, (200, 7), is_odd=is_odd)
  check(lhs, rhs, LAYER, int64(lhs) @ int64(rhs))


@pytest.mark.parametrize('bits', [4, 8])
def test_attention_of_int8_gives_the_integers_of_int64(bits):
  rng = np.random.default_rng(0)
  zero = lambda n: rng.integers(0, 2**bits, (2, n, 3, 1))
  lhs = activations(rng, (2, 5, 3, 64), zero(5), bits)
  rhs = activations(rng, (2, 6, 3, 64), zero(6), bits)
  wanted = np.einsum('bnkd,bmkd->bknm', int64(lhs), int64(rhs))
  check(lhs, rhs, QK, wanted)


@pytest.mark.parametrize('is_odd', [False, True])
@pytest.mark.parametrize('name', WINDOWS)
def test_a_convolution_of_int8_gives_the_integers_of_int64(name, is_odd):
  """What is put around the image is 0, not the code 0."""
  rng = np.random.default_rng(0)
  window, i, o = WINDOWS[name]
  zero = rng.integers(0, 256, (2, 1, 1, 1))
  lhs = activations(rng, (2, 7, 7, i), zero)
  rows = math.prod(window.size) * i // window.groups
  rhs = kernel(rng, (rows, o), is_odd=is_odd)
  wanted = slow_convolution(int64(lhs), int64(rhs), window)
  check(lhs, rhs, window, wanted)


# The program for CUDA


def lowered(config, packed, platform='cuda'):
  size = config.model.image_size
  apply = jax.jit(models.build_model(config, packed.ops).apply)
  traced = apply.trace(packed.variables, jnp.zeros((2, size, size, 3)))
  return traced.lower(lowering_platforms=(platform,)).as_text()


def dots(text):
  """Types of the operands and of the result of each product."""
  lines = [x for x in text.splitlines() if 'stablehlo.dot_general' in x]
  of = [re.findall(r'x([a-z]+\d+)>', x.rpartition(' : ')[2]) for x in lines]
  assert all(len(types) == 3 for types in of)
  return of


def check_program(config, packed, *, depthwise=0):
  text = lowered(config, packed)
  products = len(packed.plan.sites) - depthwise
  assert packed.execution == 'integer'
  assert dots(text) == [['i8', 'i8', 'i32']] * products
  assert 'bf16' not in text
  assert 'stablehlo.convolution' not in text
  # Where the CPU multiplies it; XLA would widen it elsewhere.
  for has_bf16 in (True, False):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(host, 'has', lambda *_, found=has_bf16: found)
      jax.clear_caches()  # the same program was traced before
      assert ('bf16' in lowered(config, packed, 'cpu')) == has_bf16


@pytest.mark.parametrize(
  ('row', 'fields'),
  [
    ('int8_static', {}),
    ('int8_dynamic', {}),
    ('w4a8+plain', SIGLIP),
    ('w4a4+plain', DINOV3_PLUS),
  ],
)
def test_every_product_of_a_vit_is_one_of_int8(row, fields):
  config = rich_config(depth=1, **fields)
  params, stats = random_params(config), None
  if row == 'int8_static':
    stats = collect(config, params, [normal((4, 8, 8, 3))])
  check_program(config, pack(config, row, params, stats))


def aqt_packed(config):
  config.quant.update(recipe='aqt', default='w8a8', attention='a8')
  model = Model(config)
  size = config.model.image_size
  variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))
  return packed_of(model, variables, config)


@pytest.mark.slow
def test_a_trained_model_has_products_of_int8_too():
  config = rich_config(depth=1)
  check_program(config, aqt_packed(config))


@pytest.mark.slow
def test_convolutions_are_products_of_int8_but_depthwise_ones(monkeypatch):
  config = vgg_config(batch_norm='none')
  check_program(config, aqt_packed(config))
  config = mobilenet_config(monkeypatch, batch_norm='none')
  packed = aqt_packed(config)
  depthwise = sum(
    site.window is not None and site.window.groups > 1
    for site in packed.plan.sites
  )
  assert depthwise == 3
  check_program(config, packed, depthwise=depthwise)
