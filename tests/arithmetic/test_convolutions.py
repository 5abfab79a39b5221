"""Convolutions against slow NumPy, in every form and with every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax.arithmetic import convolutions
from qvit_jax.arithmetic.products import Window, multiply
from tests import cnn_reference as reference

SAME = Window((3, 3), (1, 1), ((1, 1), (1, 1)))
# The first layer of many models.
STRIDED = (5, 5, 3, 4, Window((3, 3), (2, 2), ((1, 1), (1, 1))))
CASES = [
  # height, width, input, output channels, window
  (6, 6, 4, 4, Window((3, 3), (1, 1), ((1, 1), (1, 1)), 4)),
  (7, 5, 4, 4, Window((3, 3), (2, 2), ((1, 1), (1, 1)), 4)),
  (6, 8, 4, 4, Window((3, 3), (2, 2), ((0, 1), (0, 1)), 4)),
  (5, 6, 3, 3, Window((2, 3), (2, 1), ((0, 0), (2, 0)), 3)),
  (7, 7, 2, 2, Window((1, 1), (3, 2), ((0, 0), (0, 0)), 2)),
  (9, 4, 2, 2, Window((5, 2), (3, 2), ((2, 2), (0, 1)), 2)),
  (34, 3, 2, 2, Window((3, 3), (1, 1), ((1, 1), (1, 1)), 2)),
  (6, 7, 4, 6, Window((3, 3), (1, 2), ((1, 1), (1, 0)), 2)),
  (6, 6, 4, 8, Window((3, 3), (1, 1), ((1, 1), (1, 1)), 4)),
  STRIDED,
  (6, 7, 5, 4, SAME),
  (9, 10, 5, 4, Window((3, 2), (2, 1), ((0, 1), (1, 0)))),
  (5, 4, 3, 4, Window((1, 1))),
  (5, 4, 4, 3, Window((1, 1))),
  (2, 2, 3, 4, Window((3, 3), (1, 1), ((1, 1), (1, 1)))),
  (4, 1, 3, 2, Window((3, 3), (2, 2), ((1, 1), (1, 1)))),
  (5, 4, 3, 4, Window((1, 1), (2, 2))),
]


def arrays(height, width, inside, outside, window, dtype='float32'):
  random = np.random.default_rng(0)
  out = window.out_size(height, width)
  kernel = (*window.size, inside // window.groups, outside)
  return tuple(
    jnp.asarray(random.integers(-3, 4, shape), dtype)
    for shape in ((2, height, width, inside), kernel, (2, *out, outside))
  )


def product(x, kernel, window):
  return multiply(x, kernel.reshape(-1, kernel.shape[-1]), window)


@functools.partial(jax.jit, static_argnums=3)
def values(x, kernel, cotangent, window):
  """The product and both gradients."""
  y, pullback = jax.vjp(lambda x, k: product(x, k, window), x, kernel)
  return (y, *pullback(cotangent.astype(y.dtype)))


@pytest.mark.parametrize('case', CASES, ids=str)
def test_product_and_gradients_equal_the_reference(case):
  # Small whole numbers: every form is exact, in whatever order it adds.
  x, kernel, cotangent = arrays(*case)
  window = case[-1]
  fields = window.strides, window.padding, window.groups
  wanted = (
    reference.convolve(x, kernel, *fields),
    *reference.gradients(x, kernel, np.asarray(cotangent), *fields),
  )
  for found, expected in zip(
    values(x, kernel, cotangent, window), wanted, strict=True
  ):
    np.testing.assert_array_equal(np.asarray(found), expected)


# Kernels of more rows than columns, and the other way round.
@pytest.mark.parametrize(('channels', 'features'), [(5, 4), (1, 12)])
def test_gradients_of_a_kernel_are_summed_over_parts_of_a_batch(
  channels, features, monkeypatch
):
  window = SAME
  # Two images of 30 pixels, each of which sees 9 of every channel.
  monkeypatch.setattr(convolutions, '_SEEN', 2 * 30 * 9 * channels)
  random = np.random.default_rng(0)
  x, kernel, cotangent = (
    random.integers(-3, 4, shape).astype(np.float32)
    for shape in (
      (6, 5, 6, channels), (3, 3, channels, features), (6, 5, 6, features)
    )
  )  # fmt: skip
  found = values(jnp.asarray(x), kernel, jnp.asarray(cotangent), window)
  fields = window.strides, window.padding, window.groups
  expected = reference.gradients(x, kernel, cotangent, *fields)
  np.testing.assert_array_equal(np.asarray(found[2]), expected[1])
  lowered = jax.jit(values, static_argnums=3).trace(
    x, kernel, cotangent, window
  )
  for platform, loops in (('cpu', 1), ('cuda', 0)):
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('stablehlo.while') == loops


def test_half_width_operands_are_summed_in_float32():
  case = CASES[0]
  x, kernel, cotangent = arrays(*case, dtype='bfloat16')
  y, dx, dk = values(x, kernel, cotangent, case[-1])
  assert (y.dtype, dx.dtype, dk.dtype) == ('float32', 'bfloat16', 'bfloat16')
  x = x.at[0, 2, 2, 0].set(256)  # 257 needs nine bits
  y = product(x, jnp.ones_like(kernel), case[-1])
  expected = reference.convolve(
    x, np.ones(kernel.shape), padding=((1, 1), (1, 1)), groups=4
  )
  np.testing.assert_array_equal(np.asarray(y), expected)


def test_gradients_of_half_width_kernels_are_summed_in_float32():
  case = (6, 7, 5, 4, SAME)
  x, kernel, cotangent = arrays(*case, dtype='bfloat16')
  x = x.at[0, 2, 2, 0].set(256)
  _, dx, dk = values(x, kernel, cotangent, SAME)
  assert (dx.dtype, dk.dtype) == ('bfloat16', 'bfloat16')
  fields = np.asarray(cotangent), SAME.strides, SAME.padding, 1
  expected = reference.gradients(x, kernel, *fields)
  for found, wanted in zip((dx, dk), expected, strict=True):
    np.testing.assert_array_equal(found, jnp.asarray(wanted, 'bfloat16'))


def hlo(platform, case):
  window = case[-1]
  traced = jax.jit(values, static_argnums=3).trace(*arrays(*case), window)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
@pytest.mark.parametrize(
  'case',
  [CASES[1], CASES[-2], STRIDED],
  ids=['depth', 'small', 'strided'],
)
def test_slow_forms_of_cpus_stay_those_of_accelerators(platform, case):
  count = hlo(platform, case).count('stablehlo.convolution')
  assert count == (0 if platform == 'cpu' else 3)


def test_the_library_computes_the_same_depthwise_product():
  case = CASES[1]
  x, kernel, cotangent = arrays(*case)

  @jax.jit
  def library(x, kernel, cotangent):
    product = functools.partial(
      convolutions._library, window=case[-1], out_dtype=None, precision=None
    )
    y, pullback = jax.vjp(product, x, kernel)
    return (y, *pullback(cotangent))

  pairs = zip(
    library(x, kernel, cotangent),
    values(x, kernel, cotangent, case[-1]),
    strict=True,
  )
  for found, expected in pairs:
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_products_are_mapped_over_an_axis():
  case = CASES[0]
  x, kernel, _ = arrays(*case)
  both = jnp.stack([kernel, 2 * kernel])
  y = jax.jit(jax.vmap(lambda k: product(x, k, case[-1])))(both)
  np.testing.assert_array_equal(np.asarray(y[1]), 2 * np.asarray(y[0]))
