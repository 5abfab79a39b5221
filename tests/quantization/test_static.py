"""Static ranges: codes that lie evenly about 0, and what rows choose."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.quantization import numerics
from qvit_jax.quantization.ptq import rows
from qvit_jax.quantization.ptq.ranges import RANGES, choose_range
from tests.small_models import (
  collect,
  normal,
  pack,
  random_params,
  rich_config,
  seen,
)


@pytest.mark.parametrize('bits', [2, 3, 4, 8, 16])
def test_even_codes_are_signed_numbers(bits):
  most = jnp.float32(3.7)
  scale, zero = numerics.even_scale_of(jnp.float32(-1.2), most, bits)
  assert float(zero) == 2 ** (bits - 1)
  assert float(scale) == pytest.approx(3.7 / (2 ** (bits - 1) - 1), rel=1e-6)
  x = most * jnp.asarray([1.0, -1, 0, -9, 9])
  codes = numerics.to_codes(x, scale, zero, bits, symmetric=False)
  last = 2 ** (bits - 1) - 1
  np.testing.assert_array_equal(
    codes - zero, [last, -last, 0, -last - 1, last]
  )


def even_error(x, most, bits):
  """Mean squared error of signed codes, in NumPy."""
  last = 2 ** (bits - 1) - 1
  scale = most / last
  codes = np.clip(np.round(x / scale), -last - 1, last)
  return np.square(codes * scale - x).mean()


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_best_even_range_is_searched_for_signed_codes(sign, bits):
  rng = np.random.default_rng(0)
  x = sign * np.append(rng.normal(0.5, 1, 50_000), [9.0, -1.0])
  low, high = choose_range(seen(x), bits, 'mse', even=True)
  assert low == -high
  tried = np.linspace(0.02, 1.2, 400) * np.abs(x).max()
  best = min(even_error(x, most, bits) for most in tried)
  assert even_error(x, float(high), bits) <= 1.03 * best


@pytest.mark.parametrize('method', RANGES)
def test_even_ranges_have_equal_ends(method):
  x = np.append(normal((100_000,)), [12.0])
  low, high = choose_range(seen(x), 4, method, even=True)
  assert low == -high
  if method in ('minmax', 'moving_average'):
    assert high == 12.0
  else:  # none of the others keeps the one value far away
    assert 2 < high < 8


@pytest.fixture(scope='module')
def model():
  config = rich_config()
  return config, random_params(config), normal((16, 8, 8, 3))


def quant_of(packed):
  return {n: np.asarray(x) for n, x in
          tree.flatten(packed.variables['quant']).items()
          if n.endswith(('_scale', '_zero'))}  # fmt: skip


@pytest.mark.parametrize('scales', ['per_tensor', 'per_position'])
@pytest.mark.parametrize('method', ['minmax', 'mse'])
def test_queries_keys_and_values_have_signed_codes(model, scales, method):
  config, params, images = model
  stats = collect(config, params, [images], scales=scales)
  packed = pack(config, 'int8_static+plain', params, stats, ranges=method)
  found, count = quant_of(packed), 0
  for site in models.list_sites(config):
    for side in ('lhs',) if site.is_layer else ('lhs', 'rhs'):
      operand = getattr(stats[site.path], side)
      scale = found[f'{site.path}/{side}_scale']
      zero = found[f'{site.path}/{side}_zero']
      assert scale.shape == zero.shape == operand.low.shape
      np.testing.assert_array_equal(zero, np.clip(np.round(zero), 0, 255))
      if site.kind == 'qk' or (site.kind == 'av' and side == 'rhs'):
        np.testing.assert_array_equal(zero, 128)
        most = np.maximum(-operand.low, operand.high)
        if method == 'minmax':
          np.testing.assert_allclose(scale, most / 127, rtol=1e-6)
        count += 1
      elif site.kind == 'av':  # softmax weights
        np.testing.assert_array_equal(zero, 0)
  assert count == 3 * config.model.depth


def test_clip_rows_cut_queries_at_both_sides(model):
  config, params, images = model
  stats = collect(config, params, [images])
  found = quant_of(pack(config, 'int8_clip_95', params, stats))
  path = 'encoder/block_00/attn/qk'
  operand = stats[path].lhs
  ends = choose_range(operand, 8, 'percentile', kept=95)
  assert found[f'{path}/lhs_zero'] == 128
  assert found[f'{path}/lhs_scale'] == pytest.approx(
    np.abs(ends).max() / 127, rel=1e-6
  )


def test_a_name_asks_for_static_ranges_at_any_bits(model):
  config, params, images = model
  row = rows.parse_row('w4a8_static+plain')
  assert (row.default.weights, row.default.acts) == (4, 8)
  assert row.attention.acts == 8
  stats = collect(config, params, [images])
  packed = pack(config, 'w4a8_static+plain', params, stats)
  kernel = packed.variables['quant']['head']['kernel']
  assert kernel.bits == 4
  assert quant_of(packed)['head/lhs_scale'].shape == ()
  same = pack(config, 'int8_static+plain', params, stats)
  other = pack(config, 'w8a8_static+plain', params, stats)
  for name, wanted in quant_of(same).items():
    np.testing.assert_array_equal(quant_of(other)[name], wanted)


@pytest.mark.parametrize(
  ('name', 'has_stream', 'asked', 'wanted'),
  [
    ('int8_static', True, 'auto', 'minmax'),
    ('w4a8_static', True, 'auto', 'minmax'),
    ('w6a6_static', True, 'auto', 'minmax'),
    ('w8a4_static', True, 'auto', 'mse'),
    ('int8_static', False, 'auto', 'mse'),
    ('int8_static', True, 'entropy', 'entropy'),
    ('int8_static+plain', True, 'auto', 'minmax'),
    ('int8_clip_99', True, 'minmax', ''),  # its percentile says it
    ('w8a8', True, 'minmax', ''),  # finds them anew
  ],
)
def test_a_row_chooses_its_range_by_its_bits(name, has_stream, asked, wanted):
  row = rows.parse_row(name, has_stream=has_stream, ranges=asked)
  assert row.range == wanted
  if wanted:
    assert row.method().startswith(f'static {wanted}, ')


def test_solvers_of_a_static_row_are_chosen_for_its_bits():
  found = {
    name: rows.parse_row(name).solvers
    for name in ('int8_static', 'w8a8_static', 'w4a8_static', 'w16a16_static')
  }
  assert found['int8_static'] == found['w8a8_static'] == (
    'smooth_quant', 'bias_correction'
  )  # fmt: skip
  assert found['w4a8_static'] == ('rotate', 'gptq', 'bias_correction')
  assert found['w16a16_static'] == ()
  without = rows.parse_row('w4a8_static', has_stream=False)
  assert without.solvers == ('gptq', 'bias_correction', 'tune')
