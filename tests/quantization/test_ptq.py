"""Post-training quantization: numbers, solvers, packing, the table."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import common, vit_cifar100_finetune
from qvit_jax import models, modes, tree
from qvit_jax.arithmetic.exact import exact_dot
from qvit_jax.errors import ConfigError, QuantError, RuleError, WeightsError
from qvit_jax.experiment import findings, ptq_table
from qvit_jax.experiment.calibration import Calibration
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import (
  dequantize,
  integer_core,
  numerics,
  qtensor,
  quantize,
)
from qvit_jax.quantization.ptq import calibrate, gptq, rotate, row_checks, rows
from qvit_jax.quantization.ptq.ranges import choose_range
from qvit_jax.store import artifacts
from tests.small_models import (
  DINOV3_PLUS,
  SIGLIP,
  collect,
  logits,
  normal,
  pack,
  random_params,
  rich_config,
  seen,
)

# Codes and packing


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
@pytest.mark.parametrize('symmetric', [True, False])
def test_rounding_errs_by_half_a_step_at_most(bits, symmetric):
  x = normal((50, 7))
  low, high = x.min(axis=0, keepdims=True), x.max(axis=0, keepdims=True)
  scale, zero = numerics.scale_of(low, high, bits, symmetric=symmetric)
  near = numerics.round_to_grid(x, scale, zero, bits, symmetric=symmetric)
  assert float(jnp.max(jnp.abs(near - x) / scale)) <= 0.5 + 1e-5
  codes = numerics.to_codes(x, scale, zero, bits, symmetric=symmetric)
  first, last = numerics.code_range(bits, symmetric=symmetric)
  assert codes.min() >= first
  assert codes.max() <= last
  assert last - first == 2**bits - (2 if symmetric else 1)
  np.testing.assert_array_equal(codes, jnp.round(codes))


def test_zero_is_always_a_level():
  x = normal((9, 4)) + 5  # all positive
  scale, zero = numerics.scale_of(x.min(0), x.max(0), 4, symmetric=False)
  level = numerics.round_to_grid(jnp.zeros(4), scale, zero, 4, symmetric=False)
  np.testing.assert_array_equal(level, 0)


def test_searched_scales_beat_the_widest_ones():
  w = normal((64, 9)) ** 3  # long tails
  for bits in (2, 3, 4):
    errors = [
      float(jnp.square(dequantize(quantize(w, bits, search=s)) - w).sum())
      for s in (True, False)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize('rows_', [1, 2, 7, 64])
def test_two_codes_lie_in_a_byte_and_come_back(rows_):
  codes = np.random.default_rng(0).integers(-8, 8, (rows_, 5), np.int8)
  packed = qtensor.pack_nibbles(jnp.asarray(codes))
  assert packed.shape == (-(-rows_ // 2), 5)
  back = qtensor.unpack_nibbles(packed, rows_)
  np.testing.assert_array_equal(back, codes)
  assert back.dtype == jnp.int8


@pytest.mark.parametrize('bits', [2, 4, 5, 8])
@pytest.mark.parametrize('group', [0, 16, 32, 64])
def test_a_qtensor_is_its_codes_times_its_scales(bits, group):
  w = normal((40, 6))  # no group divides it evenly
  q = quantize(w, bits, group=group)
  size = min(group or 40, 40)
  assert q.shape == (40, 6)
  assert q.scale.shape == (-(-40 // size), 6)
  scale = np.repeat(np.asarray(q.scale), size, axis=0)[:40]
  codes = np.asarray(q.codes, np.float64)
  np.testing.assert_allclose(dequantize(q), codes * scale, rtol=1e-6)
  assert np.abs(codes).max() <= 2 ** (bits - 1) - 1
  inside = np.abs(codes) < 2 ** (bits - 1) - 1
  assert (np.abs(codes * scale - w)[inside] <= scale[inside] * 0.5001).all()
  width = 6 * (40 if bits > 4 else 20)
  assert q.num_bytes() == width + 4 * q.scale.size


@pytest.mark.parametrize('bits', [1, 9])
def test_bits_that_cannot_be_packed_are_refused(bits):
  with pytest.raises(QuantError, match=f'{bits} bits cannot be packed'):
    quantize(normal((4, 4)), bits)


# Integers


@pytest.mark.parametrize('size', [5, 512, 1500, 4096])
def test_carriers_give_the_integers_of_int64(size):
  rng = np.random.default_rng(size)
  lhs = rng.integers(-255, 256, (3, size))
  rhs = rng.integers(-127, 128, (size, 4))
  lhs[0], rhs[:, 0] = 255, 127  # the largest sum there can be
  found = exact_dot(
    jnp.asarray(lhs, jnp.bfloat16),
    jnp.asarray(rhs, jnp.bfloat16),
    (((1,), (0,)), ((), ())),
    255 * 128,
  )
  wanted = lhs @ rhs
  np.testing.assert_array_equal(found, wanted.astype(np.float32))


class Layer(nn.Module):
  """One product by a core, for comparison with NumPy."""

  core: integer_core.IntegerCore

  @nn.compact
  def __call__(self, x):
    site = Site('', 'dense', x.shape[1:], (x.shape[-1], 6), 1)
    return self.core(self, site, x, None, (((x.ndim - 1,), (0,)), ((), ())))


def slow_codes(x, bits):
  """Asymmetric codes of one row, minus zero, and their scale: NumPy."""
  low, high = min(x.min(), 0), max(x.max(), 0)
  scale = np.float32(high - low) / np.float32(2**bits - 1)
  zero = np.round(-low / scale)
  return np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero, scale


@pytest.mark.parametrize(('w_bits', 'a_bits'), [(8, 8), (4, 8), (4, 4), (2, 2)])
@pytest.mark.parametrize('group', [0, 16])
def test_a_layer_multiplies_integers(w_bits, a_bits, group):
  kernel = quantize(normal((40, 6)), w_bits, group=group)
  x = np.asarray(normal((2, 3, 40), 1)) + 0.3
  core = integer_core.IntegerCore(
    (('', integer_core.SitePlan(w_bits, a_bits)),)
  )
  found = Layer(core).apply({'quant': {'kernel': kernel}}, jnp.asarray(x))
  wanted = np.zeros((2, 3, 6))
  codes = np.asarray(kernel.codes, np.int64)
  for i in np.ndindex(2, 3):
    row, scale = slow_codes(x[i], a_bits)
    for g, w_scale in enumerate(np.asarray(kernel.scale)):
      part = slice(g * kernel.group, (g + 1) * kernel.group)
      integers = row[part].astype(np.int64) @ codes[part]
      wanted[i] += integers * w_scale * scale
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# Solvers


def test_gptq_keeps_outputs_and_gives_up_weights():
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(150, 150)) / 12 + np.eye(150)
  x = jnp.asarray(rng.normal(size=(600, 150)) @ mix, jnp.float32)
  x = x.at[:, 7].set(0)  # an input that is never used
  w = normal((150, 20), 1)
  for bits in (2, 3, 4):
    scale = numerics.search_scale(w, bits)
    full = jnp.broadcast_to(scale, w.shape)
    codes = gptq.round_by_outputs(w, x.T @ x, full, bits=bits, block=64)
    nearest = numerics.round_to_grid(w, scale, 0 * scale, bits, symmetric=True)
    error = lambda near: float(jnp.square(x @ (near - w)).sum())
    assert error(codes * scale) < 0.8 * error(nearest)
    assert jnp.square(codes * scale - w).sum() > jnp.square(nearest - w).sum()
    assert jnp.abs(codes).max() <= 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(codes, jnp.round(codes))


def slow_gptq(w, hessian, scale, bits, damping=0.01):
  """The paper's algorithm column by column, with the inverse recomputed."""
  w, hessian = np.array(w, np.float64), np.array(hessian, np.float64)
  hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
  most = 2 ** (bits - 1) - 1
  codes = np.zeros_like(w)
  left = list(np.argsort(-np.diag(hessian), kind='stable'))
  while left:
    i, rest = left[0], left[1:]
    inverse = np.linalg.inv(hessian[np.ix_(left, left)])
    codes[i] = np.clip(np.round(w[i] / scale), -most, most)
    error = (w[i] - codes[i] * scale) / inverse[0, 0]
    w[rest] -= np.outer(inverse[1:, 0], error)
    left = rest
  return codes


def test_gptq_is_the_papers_algorithm():
  x = normal((200, 24)) @ normal((24, 24), 1)
  w, bits = normal((24, 5), 2), 4
  scale = numerics.search_scale(w, bits)
  full = jnp.broadcast_to(scale, w.shape)
  found = gptq.round_by_outputs(w, x.T @ x, full, bits=bits, block=8)
  wanted = slow_gptq(w, x.T @ x, np.asarray(scale)[0], bits)
  assert np.mean(np.asarray(found) != wanted) < 0.02  # float32 ties


@pytest.mark.parametrize(
  'fields',
  [{}, {'pool': 'mean'}, {'pool': 'token_mean', 'layer_scale': 1.0},
   {'registers': 2}, {'qk_norm': True}, SIGLIP,
   DINOV3_PLUS],
)  # fmt: skip
def test_folding_and_turning_leave_the_function(fields):
  config = rich_config(**fields)
  params, stream = random_params(config), models.stream(config)
  images = normal((4, 8, 8, 3))
  wanted = logits(config, params, images)
  folded = rotate.fold_norms(params, stream)
  turned = rotate.turn(folded, stream, seed=0)
  for norm, _ in stream.readers:
    np.testing.assert_array_equal(folded[f'{norm}/scale'], 1)
    np.testing.assert_array_equal(folded[f'{norm}/bias'], 0)
  for changed in (folded, turned):
    np.testing.assert_allclose(
      logits(config, changed, images), wanted, atol=1e-4
    )
  moved = turned['encoder/block_00/mlp/fc1/kernel']
  assert np.abs(moved - folded['encoder/block_00/mlp/fc1/kernel']).max() > 0.1


def test_turning_spreads_an_outlier_channel():
  config = rich_config(width=48, heads=3)
  params, stream = random_params(config), models.stream(config)
  params['patch_embed/kernel'][..., 5] *= 100
  params['patch_embed/bias'][5] += 50
  images = normal((4, 8, 8, 3))

  def crest(params):
    seen = {}
    ops = Ops(
      tap=lambda module, site, lhs, *rest: seen.update({site.path: lhs})
    )
    variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
    models.build_model(config, ops).apply(variables, images)
    x = seen['encoder/block_00/attn/query']
    return float(jnp.abs(x).max() / jnp.sqrt(jnp.square(x).mean()))

  folded = rotate.fold_norms(params, stream)
  turned = rotate.turn(folded, stream, seed=0)
  assert crest(folded) > 5
  assert crest(turned) < 0.7 * crest(folded)


def test_statistics_are_those_of_numpy():
  config = rich_config()
  params = random_params(config)
  batches = [normal((4, 8, 8, 3), seed) for seed in (0, 1)]
  stats = collect(config, params, batches, hessians=True)
  assert set(stats) == {site.path for site in models.list_sites(config)}
  # The patch embedding's inputs are known without the model.
  x = np.concatenate([np.asarray(b) for b in batches])
  x = x.reshape(8, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
  found = stats['patch_embed']
  assert found.lhs.low == pytest.approx(x.min())
  assert found.lhs.high == pytest.approx(x.max())
  np.testing.assert_allclose(found.hessian, x.T @ x, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=1e-5)
  counts, _ = np.histogram(x, 2048, (x.min(), x.max()))
  assert found.lhs.counts.sum() == x.size
  assert np.abs(np.cumsum(found.lhs.counts) - np.cumsum(counts)).max() < 5
  qk = stats['encoder/block_00/attn/qk']
  assert qk.rhs is not None
  assert qk.hessian is None


def test_calibration_without_images_is_an_error():
  config = rich_config()
  with pytest.raises(QuantError, match=r'never observed patch_embed, .*raise'):
    collect(config, random_params(config), [])


def test_ranges_cut_an_outlier():
  rng = np.random.default_rng(0)
  x = np.append(rng.normal(size=100_000), [40.0, -1.0])
  stats = seen(x)
  widest = choose_range(stats, 4, 'minmax')
  assert widest == (np.float32(x.min()), 40.0)
  low, high = choose_range(stats, 4, 'percentile')
  assert high == pytest.approx(np.quantile(x, 0.99995), abs=0.1)
  assert low == pytest.approx(np.quantile(x, 0.00005), abs=0.1)

  def error(low, high, bits):
    scale, zero = numerics.scale_of(
      jnp.float32(low), jnp.float32(high), bits, symmetric=False
    )
    near = numerics.round_to_grid(jnp.asarray(x, jnp.float32), scale, zero,
                                  bits, symmetric=False)  # fmt: skip
    return float(jnp.square(near - x).mean())

  for bits in (2, 4, 8):
    best = choose_range(stats, bits, 'mse')
    assert error(*best, bits) <= error(*widest, bits)
    assert error(*best, bits) <= 1.02 * error(low, high, bits)


def test_bias_correction_restores_the_mean_output():
  config = rich_config()
  params = random_params(config)
  batches = [normal((16, 8, 8, 3)) + 1]
  stats = collect(config, params, batches)
  packed = pack(config, 'w2a16+bias_correction', params, stats)
  kernel = packed.variables['quant']['patch_embed']['kernel']
  w = params['patch_embed/kernel'].reshape(48, -1)
  mean = stats['patch_embed'].mean
  bias = np.asarray(packed.variables['params']['patch_embed']['bias'])
  np.testing.assert_allclose(
    mean @ np.asarray(dequantize(kernel)) + bias,
    mean @ w + params['patch_embed/bias'],
    atol=1e-4,
  )
  assert np.abs(bias - params['patch_embed/bias']).max() > 0.01


# Rows


@pytest.mark.parametrize(
  ('name', 'parts'),
  [
    ('int8_dynamc', ("the nearest is 'int8_dynamic'",)),
    ('w4a4+gtpq', ("unknown solver 'gtpq'", "'gptq'")),
    ('w9a4', ('bits outside', '2, 3, 4')),
    ('w1a4', ('bits outside',)),
    ('bf16+gptq', ('in float', 'leave gptq out')),
  ],
)
def test_an_unknown_row_names_the_nearest(name, parts):
  with pytest.raises(ConfigError) as error:
    rows.parse_row(name)
  for part in (name, *parts):
    assert part in str(error.value)


def test_solvers_of_a_row_are_replaced_or_taken_away():
  assert rows.parse_row('w6a6').solvers == ('rotate', 'gptq')
  assert rows.parse_row('w4a4+plain').solvers == ()
  assert rows.parse_row('w4a4+gptq').solvers == ('gptq',)
  assert rows.parse_row('w8a8+gptq+rotate').solvers == ('rotate', 'gptq')


def test_the_stem_keeps_eight_bits_of_its_pixels():
  config = rich_config()
  packed = pack(config, 'w4a4+plain', random_params(config))
  bits = {site: (p.weights, p.acts) for site, p in packed.site_plans.items()}
  assert bits.pop('patch_embed') == (4, 8)
  assert bits.pop('head') == (4, 4)
  products = {n: b for n, b in bits.items() if n.endswith(('/qk', '/av'))}
  assert set(products.values()) == {(None, 4)}
  assert len(products) == 4
  assert set(bits.values()) == {(4, 4), (None, 4)}


# The mode


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A float run of 300 updates."""
  config = rich_config()
  config.train.steps = config.eval.every = 300
  workdir = tmp_path_factory.mktemp('float')
  modes.run('train', config, str(workdir))
  return workdir


def ptq_config(trained, *names):
  config = rich_config()
  config.checkpoint.path = str(trained)
  config.ptq.update(rows=names, calibration_examples=40, rounds=2,
                    latency_batch=4)  # fmt: skip
  return config


def read(place):
  return json.loads((place / 'results.json').read_text())


def counted(monkeypatch, owner, name):
  """Returns a list that grows with every call of a function."""
  calls, known = [], getattr(owner, name)

  def call(*given, **more):
    calls.append(name)
    return known(*given, **more)

  monkeypatch.setattr(owner, name, call)
  return calls


def test_the_table_of_a_run(trained, tmp_path, monkeypatch, capsys):
  """One table for all that is read of one: its rows, its report, its files."""
  drawn = counted(monkeypatch, findings, 'histograms')
  passes = counted(monkeypatch, ptq_table.Table, '_eval_batches')
  names = ('fp32', 'bf16', 'int8_static', 'int8_clip_95', 'int4_weight_only',
           'w4a4', 'w2a2+plain', 'mixed_sensitivity')  # fmt: skip
  config = ptq_config(trained, *names)
  run = read(trained)
  run['baseline']['method'] = 'aqt'
  (tmp_path / 'qat').mkdir()
  (tmp_path / 'qat' / 'results.json').write_text(json.dumps(run))
  config.ptq.qat_runs = (str(tmp_path / 'qat'),)
  config.ptq.sensitivity_examples = 16
  modes.run('ptq', config, str(tmp_path))
  out = capsys.readouterr().out
  result = read(tmp_path)
  assert [row['name'] for row in result['rows']] == list(names)
  found = {row['name']: row for row in result['rows']}
  _check_numbers(found, read(trained)['baseline'], result)
  _check_files(found, tmp_path)
  _check_report(found, result, (tmp_path / 'report.html').read_text())
  assert (tmp_path / 'figures' / 'accuracy_vs_size.png').stat().st_size > 5000
  seen = json.loads((tmp_path / 'activation_stats.json').read_text())
  assert list(seen) == [site['path'] for site in found['w4a4']['sites']]
  for entry in result['histograms']:
    side = entry['kind'].partition(' ')[2] or 'lhs'
    one = seen[entry['site']][side]
    assert [one['low'], one['high']] == entry['edges']
    assert one['counts'] == entry['counts']
  # Plain, turned and smoothed.
  assert out.count('calibration: ranges of 40 images') == 3
  assert 'rule: ^patch_embed$ a8 (first layer), in rows of fewer bits' in out
  assert len(drawn) == 1  # histograms are not drawn again at every row
  assert len(passes) == len(names)  # each row reads the split once
  # The same command again measures nothing twice.
  modes.run('ptq', config, str(tmp_path))
  assert capsys.readouterr().out.count('done before') == len(names)
  assert read(tmp_path)['rows'] == result['rows']


def _check_numbers(found, trained, result):
  float_row = found['fp32']
  assert float_row['loss'] == pytest.approx(trained['loss'])
  assert float_row['top1'] == trained['top1'] == result['baseline']['top1']
  assert float_row['agreement'] == 1.0
  kinds = {name: row['execution'] for name, row in found.items()}
  assert kinds['fp32'] == kinds['bf16'] == 'float'
  assert kinds['int8_static'] == kinds['w4a4'] == 'integer'
  assert kinds['int4_weight_only'] == 'simulated'
  why = found['int4_weight_only']['why']
  assert why.startswith('of 18 products: 14 of packed weights, dequantized')
  assert 30 > found['w4a4']['sqnr_db'] > 5
  assert found['int8_static']['sqnr_db'] > 25
  assert found['int4_weight_only']['agreement'] > 0.9
  assert 4 <= found['mixed_sensitivity']['weight_bits'] <= 8
  for row in found.values():
    assert row['num_examples'] == 360
    assert row['latency_ms']['p10'] <= row['latency_ms']['median']


def _check_files(found, place):
  for name, row in found.items():
    path = place / 'artifacts' / f'{name}.safetensors'
    assert row['artifact_bytes'] == path.stat().st_size
    assert 0 < row['artifact_bytes'] - row['size_bytes'] < 40_000  # the header
  # No float copy of a kernel: matrices are integers or 1-d scales.
  tensors = safetensors.numpy.load_file(
    place / 'artifacts' / 'w4a4.safetensors'
  )
  assert not any(n.startswith('params') and 'kernel' in n for n in tensors)
  kernels = [x for n, x in tensors.items() if n.endswith('kernel/data')]
  assert {x.dtype.name for x in kernels} == {'uint8'}
  assert len(kernels) == 14


def _check_report(found, result, page):
  """It shows a collapse and its suspects."""
  fallen = found['w2a2+plain']
  assert fallen['collapsed']
  assert fallen['classes_predicted'] <= 10
  assert len(fallen['suspects']) == 3
  worst = min(s['sqnr_db'] for s in fallen['sites'])
  assert f'{worst:.1f} dB' in fallen['suspects'][0]
  assert not found['int8_static']['collapsed']
  for text in ('collapsed', fallen['suspects'][0], 'int8_clip_95'):
    assert text in page
  assert [row['name'] for row in result['qat']] == ['qat']
  # One histogram for each operand of each kind; the ranges of static rows.
  kinds = {entry['kind'] for entry in result['histograms']}
  assert kinds == {'patch_embed', 'query', 'key', 'value', 'qk lhs', 'qk rhs',
                   'av lhs', 'av rhs', 'out', 'fc1', 'fc2', 'head'}  # fmt: skip
  for entry in result['histograms']:
    # int8_static has other values: smooth_quant comes first.
    assert set(entry['ranges']) == {'int8_clip_95'}
    low, high = entry['ranges']['int8_clip_95']
    if entry['kind'] in ('qk lhs', 'qk rhs', 'av rhs'):
      assert -low == high <= np.abs(entry['edges']).max()
    else:
      assert entry['edges'][0] <= low <= high <= entry['edges'][1]
  assert len(result['sensitivity']['sites']) == 18


def test_a_rule_without_effect_stops_the_table_before_it_begins(
  trained, tmp_path
):
  config = ptq_config(trained, 'w4a4+plain')
  config.quant.rules = (('haed', 'w8a8'),)
  with pytest.raises(RuleError, match="quant.rules.*'haed' matches nothing"):
    modes.run('ptq', config, str(tmp_path))
  assert not (tmp_path / 'calibration').exists()


@pytest.mark.slow
def test_calibration_is_kept_and_taken_over(trained, tmp_path, capsys):
  first, second = tmp_path / 'first', tmp_path / 'second'
  modes.run('ptq', ptq_config(trained, 'int8_static'), str(first))
  assert (first / 'calibration' / 'plain.safetensors').is_file()
  config = ptq_config(trained, 'int8_static', 'w4a16+gptq')
  capsys.readouterr()
  modes.run('ptq', ptq_config(trained, 'int8_static', 'bf16'), str(first))
  out = capsys.readouterr().out
  assert 'int8_static: done before' in out
  assert read(first)['histograms']  # though nothing was observed anew
  modes.run('ptq', ptq_config(trained, 'bf16'), str(first))
  assert [row['name'] for row in read(first)['other_rows']] == ['int8_static']
  (first / 'artifacts' / 'int8_static.safetensors').unlink()
  modes.run('ptq', ptq_config(trained, 'int8_static'), str(first))
  assert 'done before' not in capsys.readouterr().out.split('int8_static')[-1]
  assert 'calibration: ranges' not in out
  taken = ptq_config(trained, 'int8_static')
  taken.ptq.calibration_path = str(first / 'calibration')
  modes.run('ptq', taken, str(second))
  assert 'calibration: ranges' not in capsys.readouterr().out
  name = 'artifacts/int8_static.safetensors'
  one, other = (
    safetensors.numpy.load_file(place / name) for place in (first, second)
  )
  assert set(one) == set(other)
  for tensor, values in one.items():
    np.testing.assert_array_equal(values, other[tensor])
  # More than the file holds, or another seed of images: an error that says so.
  config.ptq.calibration_path = str(first / 'calibration')
  with pytest.raises(QuantError, match='holds no Hessians'):
    modes.run('ptq', config, str(tmp_path / 'third'))
  taken.seed = 5
  with pytest.raises(QuantError, match='is of other weights, images'):
    modes.run('ptq', taken, str(tmp_path / 'fourth'))
  taken.ptq.calibration_path = str(tmp_path / 'nowhere')
  with pytest.raises(ConfigError, match='is no folder'):
    modes.run('ptq', taken, str(tmp_path / 'fifth'))


@pytest.mark.slow
def test_statistics_in_which_a_bit_flipped_are_not_taken(tmp_path):
  """Those that the user names are refused, the workdir's own made anew."""
  config, lines = rich_config(), []
  config.ptq.calibration_examples = 8
  params = random_params(config)

  def observe():
    experiment = Experiment(config, training=False, calibrating=True)
    calibration = Calibration(experiment, tmp_path, lines.append)
    calibration.observe((), params)
    return safetensors.numpy.load_file(path)

  path = tmp_path / 'calibration' / 'plain.safetensors'
  expected, content = observe(), path.read_bytes()
  observe()
  assert 'anew' not in ''.join(lines)
  damaged = []
  for position in (len(content) - 3, content.index(b'examples')):
    damaged.append(bytearray(content))
    damaged[-1][position] ^= 1
  path.write_bytes(damaged[0])
  lines.clear()
  jax.tree.map(np.testing.assert_array_equal, observe(), expected)
  assert 'anew, because of' in lines[0]
  config.ptq.calibration_path = str(path.parent)
  for bad in damaged:
    path.write_bytes(bad)
    with pytest.raises(WeightsError, match='plain.safetensors: it is damaged'):
      observe()


def test_statistics_do_not_grow_with_the_images():
  config = rich_config()
  params = random_params(config)
  sizes = []
  for count in (1, 5):
    batches = [normal((4, 8, 8, 3), seed) for seed in range(count)]
    found = collect(config, params, batches, hessians=True)
    arrays = calibrate.to_arrays(found)
    sizes.append(sum(x.nbytes for x in arrays.values()))
    again = calibrate.from_arrays(arrays)
    for name, x in calibrate.to_arrays(again).items():
      np.testing.assert_array_equal(x, arrays[name])
  assert sizes[0] == sizes[1]


def test_rows_are_not_asked_for_twice(trained, tmp_path):
  with pytest.raises(ConfigError, match='names w8a8 twice'):
    modes.run('ptq', ptq_config(trained, 'w8a8', 'w8a8'), str(tmp_path))


def test_updates_of_tune_need_a_row_that_is_tuned(trained, tmp_path):
  config = ptq_config(trained, 'w8a8', 'w4a4')
  config.ptq.tune_steps = 3
  with pytest.raises(ConfigError, match=r'=3 would have no effect.*add w4a4'):
    modes.run('ptq', config, str(tmp_path))


def test_a_folder_without_training_is_no_qat_run(trained, tmp_path):
  config = ptq_config(trained, 'w8a8')
  for place in (tmp_path / 'nothing', trained):  # the second is in float
    config.ptq.qat_runs = (str(place),)
    with pytest.raises(ConfigError, match=r'holds no results\.json'):
      modes.run('ptq', config, str(tmp_path))


def test_macs_are_what_xla_counts():
  config = vit_cifar100_finetune.get_config()  # ViT-S/14, 98 px
  config.model.dtype = 'float32'
  model = models.build_model(config)
  images = jax.ShapeDtypeStruct((1, 98, 98, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  flops = jax.jit(model.apply).lower(variables, images).cost_analysis()['flops']
  macs = sum(site.macs for site in models.list_sites(config))
  # XLA counts norms, softmax, GELU and additions too: 3 % here.
  assert 1 <= flops / 2 / macs < 1.04


def test_rows_of_other_weights_are_measured_anew(trained, tmp_path, capsys):
  config = ptq_config(trained, 'bf16')
  modes.run('ptq', config, str(tmp_path))
  result = read(tmp_path)
  for name in ('rows', 'weights_digest'):
    assert result[name]
  result['weights_digest'] = 'of other weights'
  (tmp_path / 'results.json').write_text(json.dumps(result))
  capsys.readouterr()
  modes.run('ptq', config, str(tmp_path))
  assert 'done before' not in capsys.readouterr().out


@pytest.mark.slow
def test_gptq_is_not_left_out_above_eight_bits():
  config = rich_config()
  params = random_params(config)
  stats = collect(config, params, [normal((64, 8, 8, 3))], hessians=True)
  packed = {
    name: pack(config, name, params, stats).variables['quant']['encoder'][
      'block_00'
    ]['mlp']['fc1']['kernel']
    for name in ('w10a16+plain', 'w10a16+gptq')
  }
  assert jnp.abs(packed['w10a16+plain'] - packed['w10a16+gptq']).max() > 0


def test_a_packed_model_comes_back_from_its_file(trained, tmp_path):
  config = ptq_config(trained, 'w4a8')
  modes.run('ptq', config, str(tmp_path))
  sites, architecture = models.list_sites(config), models.architecture(config)
  path = tmp_path / 'artifacts' / 'w4a8.safetensors'
  packed = artifacts.load(path, sites, architecture)
  images = normal((5, 8, 8, 3))
  forward = jax.jit(models.build_model(config, packed.ops).apply)
  found = forward(packed.variables, images)
  artifacts.save(packed, tmp_path / 'again.safetensors', architecture)
  again = artifacts.load(tmp_path / 'again.safetensors', sites, architecture)
  np.testing.assert_array_equal(forward(again.variables, images), found)
  with pytest.raises(Exception, match='of another model'):
    artifacts.load(path, sites, architecture | {'depth': 5})


def test_ptq_of_a_quantized_run_is_refused(tmp_path):
  config = rich_config()
  config.quant.recipe = 'aqt'
  modes.run('train', config, str(tmp_path / 'aqt'))
  config = ptq_config(tmp_path / 'aqt', 'w8a8')
  with pytest.raises(ConfigError, match='already quantized .recipe aqt'):
    modes.run('ptq', config, str(tmp_path / 'out'))
  config.weights.path, config.checkpoint.path = config.checkpoint.path, ''
  with pytest.raises(ConfigError, match='weights.path=.*already quantized'):
    modes.run('ptq', config, str(tmp_path / 'out'))
  config.quant.recipe = 'aqt'
  with pytest.raises(ConfigError, match='--config.quant.recipe=none'):
    modes.run('ptq', config, str(tmp_path / 'out'))


def test_groups_that_no_layer_fills_are_refused():
  row = rows.parse_row('int4_weight_only_g64')
  with pytest.raises(QuantError, match='patch_embed has only 48'):
    row_checks.check_groups([row], models.list_sites(rich_config()))


def test_layers_that_do_not_fill_a_group_are_said():
  row = rows.parse_row('int4_weight_only_g32')
  lines = row_checks.check_groups([row], models.list_sites(rich_config()))
  assert 'have fewer than 32 inputs and one scale' in lines[0]
  assert 'do not divide the inputs of patch_embed' in lines[1]


def test_groups_that_end_short_are_said():
  sites = models.list_sites(rich_config(width=48, mlp_dim=64))
  row = rows.parse_row('int4_weight_only_g32')
  (line,) = row_checks.check_groups([row], sites)
  assert 'groups of 32 do not divide the inputs of' in line
  assert 'attn/query' in line


def test_more_calibration_images_than_there_are_is_refused(trained, tmp_path):
  config = ptq_config(trained, 'int8_static')
  config.ptq.calibration_examples = 5000
  with pytest.raises(ConfigError, match='has only 1437 images'):
    modes.run('ptq', config, str(tmp_path))


def test_a_table_does_not_check_what_it_does_not_read(trained, tmp_path):
  """A schedule and a mesh of a training, calibration where no row looks."""
  config = ptq_config(trained, 'fp32')
  config.ptq.calibration_examples, config.mesh.fsdp = 5000, 8
  config.optim.warmup_steps = config.train.batch_size = 10**6
  config.train.update(
    steps=0, epochs=0.0, accumulate=7, stages=('nothing:1',)
  )
  modes.run('ptq', config, str(tmp_path))
  assert [row['name'] for row in read(tmp_path)['rows']] == ['fp32']


def test_every_default_row_is_known():
  for name in common.get_config().ptq.rows:
    assert rows.parse_row(name).name == name
