"""What calibration and solvers make of convolutions, and of pairs of layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.arithmetic.products import Window
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError, QuantError
from qvit_jax.ops import Ops, Pair, Site
from qvit_jax.quantization import numerics, qtensor
from qvit_jax.quantization.ptq import (
  absorb,
  adaround,
  equalize,
  gptq,
  inputs,
  mixed_precision,
  row_checks,
  rows,
  tune,
)
from qvit_jax.quantization.ptq import apply as ptq
from qvit_jax.quantization.ptq.ranges import choose_range
from qvit_jax.quantization.spec import QuantSpec
from qvit_jax.store import artifacts
from tests.conftest import make_digits_config
from tests.quantization.test_convolutions import (
  SAME,
  WINDOWS,
  Tiny,
  each_window,
  operands,
  slow_rows,
)
from tests.small_cnns import mobilenet_config, vgg_config
from tests.small_models import (
  collect,
  normal,
  pack,
  packed_logits,
  random_params,
  rich_config,
)

TINY = models.Family(
  from_config=lambda model, ops: Tiny(ops),
  architecture=lambda model: {'name': model.name},
  title=lambda model: 'four convolutions',
  tensor_rules=(),
  stem='stem',
  head='head',
  targets={'all': ''},
  reads=(),
  pairs=lambda model: (
    Pair('depthwise', 'project', 6.0), Pair('last', 'head', has_mean=True)
  ),
)  # fmt: skip
IMAGES = normal((8, 8, 8, 3))


@pytest.fixture(scope='module')
def model():
  """(config, parameters, statistics) of `Tiny`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.FAMILIES, 'tiny', TINY)
    config = rich_config(name='tiny')
    params = random_params(config)
    stats = collect(config, params, [IMAGES], hessians=True)
    yield config, params, stats


def seen_by(config, params):
  """Inputs of every layer of the float model, by path."""
  found = {}

  def tap(module, site, x, w, dims):
    found[site.path] = x

  def run(variables):
    models.build_model(config, Ops(tap=tap)).apply(variables, IMAGES)
    return dict(found)

  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  return jax.tree.map(np.asarray, jax.jit(run)(variables))


def own_rows(x, window):
  """What kernels of one group after the other see, [g, n, i]."""
  full = slow_rows(x, window).reshape(-1, np.prod(window.size), x.shape[3])
  parts = np.split(full, window.groups, axis=2)
  return np.stack([part.reshape(len(part), -1) for part in parts])


# Statistics


@each_window
def test_sums_are_over_what_a_kernel_meets(name):
  window, x, _ = operands(name)
  seen = own_rows(x, window)
  total, count = jax.jit(inputs.sum_rows, static_argnums=1)(x, window)
  squares, again, n = jax.jit(inputs.squares, static_argnums=1)(x, window)
  wanted = seen.sum(axis=1), seen.swapaxes(1, 2) @ seen
  if window.groups == 1:
    wanted = [one[0] for one in wanted]
  assert count == n == seen.shape[1]
  np.testing.assert_allclose(total, wanted[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(again, wanted[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(squares, wanted[1], rtol=1e-4, atol=1e-3)


def test_of_a_large_image_some_windows_are_taken(monkeypatch):
  window, x, _ = operands('dense', size=8)
  monkeypatch.setattr(inputs, '_WINDOWS', 16)
  found, _, count = inputs.squares(x, window)
  assert count == 2 * 4 * 4
  seen = slow_rows(x, window)[:, ::2, ::2].reshape(-1, 27)
  np.testing.assert_allclose(found, seen.T @ seen, rtol=1e-4, atol=1e-3)


def test_calibration_sees_channels_and_rows(model):
  config, params, stats = model
  seen = seen_by(config, params)
  for path, window in (
    ('stem', Window((3, 3), (2, 2), ((0, 1), (0, 1)))),
    ('depthwise', Window((3, 3), padding=SAME, groups=8)),
  ):
    x, found = seen[path], stats[path]
    np.testing.assert_allclose(found.channel_low, x.min((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.channel_high, x.max((0, 1, 2)), atol=1e-5)
    own = own_rows(x, window)
    np.testing.assert_allclose(
      found.mean.reshape(len(own), -1), own.mean(axis=1), atol=1e-4
    )
    centered = own - own.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
      found.spread().reshape(len(own), *found.hessian.shape[-2:]),
      centered.swapaxes(1, 2) @ centered, rtol=1e-3, atol=1e-3,
    )  # fmt: skip
  assert stats['depthwise'].hessian.shape == (8, 9, 9)
  positions = collect(config, params, [IMAGES], scales='per_position')
  assert positions['stem'].lhs.low.shape == (1, 1, 1, 1)  # windows overlap


def test_codes_behind_a_relu6_cover_0_to_6(model):
  """No range needs to be clamped: nothing else is seen."""
  config, params, _ = model
  loud = params | {'depthwise/kernel': 30 * params['depthwise/kernel']}
  stats = collect(config, loud, [IMAGES])['project'].lhs
  assert (float(stats.low), float(stats.high)) == (0, 6)
  for method in ('minmax', 'percentile', 'entropy'):
    low, high = choose_range(stats, 8, method)
    assert low == 0
    assert 5.9 < high <= 6
    ends = jnp.asarray(low), jnp.asarray(high)
    scale, zero = numerics.scale_of(*ends, 8, symmetric=False)
    assert float(zero) == 0
    assert float(scale) == pytest.approx(6 / 255, rel=0.02)


# Rounding


@pytest.mark.parametrize('solver', [gptq, adaround])
def test_each_group_is_rounded_by_itself(solver):
  window, x, w = operands('depthwise')
  hessian, _, _ = inputs.squares(x, window)
  row = rows.parse_row(f'w3a8+{solver.__name__.split(".")[-1]}')
  packed = ptq.round_kernel(row, w, hessian, 3)
  scale = qtensor.group_scales(w, 3)
  for channel in range(w.shape[1]):
    own = slice(channel, channel + 1)
    alone = solver.SOLVER.rounds(
      w[:, own], hessian[channel], jnp.broadcast_to(scale[:, own], (9, 1)),
      bits=3,
    )  # fmt: skip
    np.testing.assert_array_equal(packed.codes[:, own], alone)
  np.testing.assert_array_equal(packed.scale, scale)


def test_few_inputs_are_rounded_by_the_best_of_all_codes():
  """Nine weights: every combination of up and down, by loops."""
  window, x, w = operands('depthwise')
  hessian, _, _ = inputs.squares(x, window)
  packed = ptq.round_kernel(rows.parse_row('w3a8+gptq'), w, hessian, 3)
  error = lambda codes, channel: (
    lambda e: e @ np.asarray(hessian[channel], np.float64) @ e
  )(codes * scale[channel] - np.asarray(w[:, channel], np.float64))
  scale = np.asarray(packed.scale, np.float64)[0]
  gains = []
  for channel in range(3):
    down = np.floor(np.asarray(w[:, channel], np.float64) / scale[channel])
    best = min(
      error(np.clip(down + ups, -3, 3), channel)
      for ups in itertools.product((0, 1), repeat=9)
    )
    found = error(np.asarray(packed.codes[:, channel], np.float64), channel)
    assert found <= best * (1 + 1e-4)
    own = slice(channel, channel + 1)
    first = gptq.round_by_outputs(
      w[:, own], hessian[channel],
      jnp.broadcast_to(packed.scale[:, own], (9, 1)), bits=3,
    )  # fmt: skip
    gains.append(error(np.asarray(first[:, 0], np.float64), channel) / found)
  assert min(gains) >= 1 - 1e-4
  assert max(gains) > 1.001  # so it is not GPTQ's alone


def test_wide_layers_are_rounded_in_parts(monkeypatch):
  monkeypatch.setattr(inputs, '_INPUTS', 30)
  assert [inputs.parts_of(n) for n in (30, 31, 60, 75)] == [1, 31, 2, 3]
  x, w = normal((50, 60)), normal((60, 4), 1)
  hessian, total, count = inputs.squares(x, (((1,), (0,)), ((), ())))
  assert (hessian.shape, total.shape, count) == ((2, 30, 30), (2, 30), 50)
  row = rows.parse_row('w3a8+gptq')
  packed = ptq.round_kernel(row, w, hessian, 3)
  full = jnp.broadcast_to(qtensor.group_scales(w, 3), w.shape)
  for part in (slice(0, 30), slice(30, 60)):
    seen = x[:, part]
    alone = gptq.round_by_outputs(w[part], seen.T @ seen, full[part], bits=3)
    np.testing.assert_array_equal(packed.codes[part], alone)
  site = Site('wide', 'dense', (60,), (60, 4), 240)
  assert row_checks.solver_notes([row], [site], None) == [
    'wide has 60 inputs, which gptq rounds in 2 parts'
  ]


def test_one_scale_may_be_for_a_whole_kernel():
  w = normal((27, 8)) * jnp.arange(1, 9)
  row = rows.parse_row('int8_static+per_tensor')
  packed = ptq.round_kernel(row, w, None, 4)
  assert packed.scale.shape == (1, 8)
  assert len(np.unique(packed.scale)) == 1
  wanted = qtensor.quantize(w.reshape(-1, 1), 4)
  np.testing.assert_array_equal(packed.codes.ravel(), wanted.codes.ravel())
  with pytest.raises(ConfigError, match='scales of groups; leave per_tensor'):
    rows.parse_row('int4_weight_only_g32+per_tensor')


@pytest.mark.parametrize('path', ['depthwise', 'stem', 'last'])
def test_corrected_biases_keep_the_mean_of_outputs(model, path):
  """Zeros around the image count, and each group has its own inputs."""
  config, params, stats = model
  row = rows.parse_row('w2a8+bias_correction')
  x = seen_by(config, params)[path]
  site = next(s for s in models.list_sites(config) if s.path == path)
  w = jnp.asarray(params[f'{path}/kernel'].reshape(site.rhs_shape))
  near = qtensor.dequantize(ptq.round_kernel(row, w, None, 2))
  found = ptq.mean_output(stats[path].mean, w - near)
  own = own_rows(x, site.window)
  parts = np.split(np.asarray(w - near), len(own), axis=1)
  wanted = np.concatenate(
    [(seen @ part).mean(axis=0) for seen, part in zip(own, parts, strict=True)]
  )
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert np.abs(wanted).max() > 1e-3


def test_bias_correction_needs_biases(model):
  config, params, stats = model
  less = {name: x for name, x in params.items() if name != 'stem/bias'}
  with pytest.raises(QuantError, match='stem has no bias.*fold the norm'):
    pack(config, 'w4a8+bias_correction', less, stats)


# Rows


@pytest.mark.parametrize(
  'name',
  ['w4a4', 'int8_static+per_tensor+equalize+absorb', *(
    pytest.param(name, marks=pytest.mark.slow) for name in (
      'w2a8', 'int8_static', 'int8_clip_99', 'int4_weight_only_g32',
      'mixed_simple', 'mixed_variance', 'w12a12',
   )
  )],
)  # fmt: skip
def test_rows_of_a_model_of_convolutions(model, tmp_path, name):
  """Packed, written, read, and near float."""
  config, params, stats = model
  packed = pack(config, name, params, stats)
  path = tmp_path / 'row.safetensors'
  artifacts.save(packed, path, {})
  read = artifacts.load(path, models.list_sites(config), {})
  found = packed_logits(config, read, IMAGES)
  np.testing.assert_array_equal(found, packed_logits(config, packed, IMAGES))
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  wanted = np.asarray(models.build_model(config).apply(variables, IMAGES))
  noise = np.square(found - wanted).sum() / np.square(wanted).sum()
  least = {'w2a8': 4, 'w4a4': 10, 'int8_static': 25}.get(name, 10)
  assert -10 * np.log10(noise) > least


@pytest.mark.parametrize('name', ['int4_weight_only', 'int4_clip_99'])
def test_convolutions_are_tuned(model, name):
  """Codes stay, biases and scales move, and the logits come closer."""
  config, params, stats = model
  packed = pack(config, f'{name}+bias_correction', params, stats)
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  tuned = tune.tune(
    lambda ops: models.build_model(config, ops), packed, variables,
    np.asarray(IMAGES), steps=20,
  )  # fmt: skip
  wanted = models.build_model(config).apply(variables, IMAGES)
  distance = lambda one: float(
    tune.divergence(wanted, jnp.asarray(packed_logits(config, one, IMAGES)))
  )
  assert distance(tuned) < distance(packed)
  before, after = (tree.flatten(p.variables) for p in (packed, tuned))
  moved = {n for n in before if np.any(before[n] != after[n])}
  assert not any(n.endswith('kernel/data') for n in moved)
  assert {'params/stem/bias', 'quant/stem/kernel/scale'} <= moved
  assert any(n.endswith('lhs_scale') for n in moved) == ('clip' in name)


def test_a_default_row_has_no_solver_that_the_model_lacks(model):
  config = model[0]
  sites, pairs = models.list_sites(config), models.pairs(config)
  names = config_lib.to_json(make_digits_config())['ptq']['rows']
  found = [rows.parse_row(name, has_stream=False) for name in names]
  row_checks.check_model(found, sites, models.stream(config), pairs)
  by_name = {row.name: row.solvers for row in found}
  for name in ('w8a8', 'int8_static', 'int8_weight_only'):
    assert by_name[name] == ('gptq', 'bias_correction')
  for name in ('w4a4', 'w4a8', 'int4_weight_only'):
    assert by_name[name] == ('gptq', 'bias_correction', 'tune')
  assert by_name['w16a16'] == ('bias_correction',)
  assert by_name['bf16'] == ()
  assert by_name['w4a4+plain'] == ()


@pytest.mark.parametrize(
  ('name', 'family', 'wanted'),
  [
    ('w4a4+equalize', 'vit', 'equalize, which need layers between which'),
    ('w4a4+log2_softmax+gptq', 'tiny',
     r"log2_softmax, which need attention products; .* Write 'w4a4\+gptq'"),
    ('w4a4+smooth_quant', 'tiny', r"residual stream; .* Write 'w4a4\+plain'"),
  ],
)  # fmt: skip
def test_what_a_model_lacks_is_named(model, name, family, wanted):
  config = model[0] if family == 'tiny' else rich_config()
  with pytest.raises(ConfigError, match=wanted):
    row_checks.check_model(
      [rows.parse_row(name)], models.list_sites(config),
      models.stream(config), models.pairs(config),
    )  # fmt: skip


def test_other_ranges_of_convolutions_are_said(model):
  sites = models.list_sites(model[0])
  asked = [rows.parse_row(n) for n in ('int8_dynamic', 'int8_static', 'fp32')]
  assert row_checks.scale_notes(asked, sites, 'per_position') == [
    'dynamic ranges of 4 convolutions are per_image, not per_token: their '
    'windows overlap',
    'static ranges of 4 convolutions are per_tensor, not per_position: their '
    'windows overlap',
  ]
  assert row_checks.scale_notes(asked[1:], sites, 'per_tensor') == []
  vit = models.list_sites(rich_config())
  assert row_checks.scale_notes(asked, vit, 'per_position') == []


@pytest.mark.parametrize(('bits', 'least'), [(8, 3.9), (4, 7.5)])
def test_a_packed_vgg_is_small(bits, least):
  config = vgg_config(channels=64, num_classes=100, batch_norm='none')
  sites = models.list_sites(config)
  weights = sum(np.prod(site.rhs_shape) for site in sites)
  biases = sum(site.rhs_shape[1] for site in sites)
  packed = sum(
    mixed_precision.make_option(site, QuantSpec(bits, bits), 0.0).bytes
    for site in sites
  )
  assert weights + biases == 9_271_780
  assert 4 * (weights + biases) / (packed + 4 * biases) > least


# Pairs of layers


def pair_params(window, inside, width, outside, rng):
  shape = (*window.size, width // window.groups, outside)
  draw = lambda *s: rng.normal(size=s).astype(np.float32)
  return {
    'a/kernel': draw(1, 1, inside, width) * np.exp(2 * draw(width)),
    'a/bias': draw(width),
    'b/kernel': draw(*shape),
    'b/bias': draw(outside),
  }


def run_pair(p, x, window, ceiling):
  """a, ReLU up to a ceiling, b; with the largest of what b reads."""
  y = slow_rows(x, Window((1, 1))) @ p['a/kernel'][0, 0] + p['a/bias']
  y = np.clip(y, 0, ceiling or np.inf)
  kernel, width = p['b/kernel'], y.shape[-1]
  parts = np.split(slow_rows(y, window).reshape(-1, *window.size, width),
                   window.groups, axis=3)  # fmt: skip
  kernels = np.split(kernel, window.groups, axis=3)
  out = [
    np.einsum('nhwi,hwio->no', *both)
    for both in zip(parts, kernels, strict=True)
  ]
  return np.concatenate(out, axis=1) + p['b/bias'], y


@pytest.mark.parametrize('ceiling', [None, 6.0])
@pytest.mark.parametrize('name', ['dense', 'depthwise', 'grouped', 'point'])
def test_equalized_kernels_have_one_range_a_channel(name, ceiling):
  window, width, outside = WINDOWS[name]
  rng = np.random.default_rng(0)
  p = pair_params(window, 3, width, outside, rng)
  x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
  if ceiling:  # which nothing reaches, by the little of four channels in five
    _, seen = run_pair(p, x, window, None)
    shrink = np.minimum(1, 4 / np.maximum(seen.max(axis=(0, 1, 2)), 1e-9))
    p['a/kernel'], p['a/bias'] = p['a/kernel'] * shrink, p['a/bias'] * shrink
  wanted, seen = run_pair(p, x, window, ceiling)
  highest = {'b': seen.max(axis=(0, 1, 2))}
  found = equalize.equalize(p, [Pair('a', 'b', ceiling)], highest)
  y, after = run_pair(found, x, window, ceiling)
  np.testing.assert_allclose(y, wanted, rtol=1e-3, atol=1e-3)
  before = np.abs(found['a/kernel']).max(axis=(0, 1, 2))
  behind = equalize.channel_rows(found['b/kernel'], width).max(axis=0)
  if ceiling is None:
    np.testing.assert_allclose(before, behind, rtol=1e-5)
  else:  # no channel is stretched beyond it
    held = after.max(axis=(0, 1, 2)) > 6 - 1e-3
    np.testing.assert_allclose(before[~held], behind[~held], rtol=1e-5)
    assert (before[held] < behind[held] * (1 + 1e-5)).all()
  # Each input of b by itself: its largest weight, over pixels and outputs.
  kernel = p['b/kernel']
  if name == 'depthwise':
    of_b = np.abs(kernel).max(axis=(0, 1, 2))
    np.testing.assert_array_equal(
      equalize.channel_rows(kernel, width).max(axis=0), of_b
    )


def test_a_channel_at_the_ceiling_stays_as_it_is():
  rng = np.random.default_rng(0)
  p = pair_params(Window((1, 1)), 3, 7, 5, rng)
  x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
  wanted, seen = run_pair(p, x, Window((1, 1)), 6.0)
  highest = seen.max(axis=(0, 1, 2))
  met = highest > 6 - 1e-3
  assert 0 < met.sum() < 7
  found = equalize.equalize(p, [Pair('a', 'b', 6.0)], {'b': highest})
  moved = (found['a/kernel'] != p['a/kernel']).any(axis=(0, 1, 2))
  np.testing.assert_array_equal(moved, ~met)
  y, _ = run_pair(found, x, Window((1, 1)), 6.0)
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('ceiling', [None, 6.0])
def test_what_reads_a_channel_of_zeros_gets_a_usual_range(ceiling):
  """Folded norms leave any weights there: 900 beside 2 in a MobileNetV2."""
  rng = np.random.default_rng(0)
  p = pair_params(Window((1, 1)), 3, 7, 5, rng)
  p['a/kernel'][..., 2], p['a/bias'][2] = 0, -1
  p['b/kernel'][:, :, 2] *= 1e3
  x = 0.01 * rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
  wanted, seen = run_pair(p, x, Window((1, 1)), ceiling)
  highest = {'b': seen.max(axis=(0, 1, 2))}
  found = equalize.equalize(p, [Pair('a', 'b', ceiling)], highest)
  y, _ = run_pair(found, x, Window((1, 1)), ceiling)
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
  each = equalize.channel_rows(found['b/kernel'], 7).max(axis=0)
  assert each[2] <= np.delete(each, 2).max() * (1 + 1e-5)


def test_a_ceiling_behind_a_mean_leaves_the_pair():
  p = pair_params(Window((1, 1)), 3, 7, 5, np.random.default_rng(0))
  pair = Pair('a', 'b', 6.0, has_mean=True)
  found = equalize.equalize(p, [pair], {'b': np.ones(7)})
  for name in p:
    np.testing.assert_array_equal(found[name], p[name])


@pytest.mark.parametrize('ceiling', [None, 6.0])
def test_what_a_channel_always_has_is_absorbed(ceiling):
  rng = np.random.default_rng(0)
  p = pair_params(Window((1, 1)), 3, 7, 5, rng)
  p['a/kernel'] = 0.1 * np.clip(p['a/kernel'], -1, 1)
  p['a/bias'] = np.array([3, 2, -1, 0, 5.9, 1, 1], np.float32)
  x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
  wanted, seen = run_pair(p, x, Window((1, 1)), ceiling)
  ranges = {'b': (seen.min(axis=(0, 1, 2)), seen.max(axis=(0, 1, 2)))}
  found = absorb.absorb(p, [Pair('a', 'b', ceiling)], ranges)
  y, after = run_pair(found, x, Window((1, 1)), ceiling)
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
  moved = p['a/bias'] - found['a/bias']
  low = seen.min(axis=(0, 1, 2))
  if ceiling:
    low = np.where(seen.max(axis=(0, 1, 2)) < 6 - 1e-5, low, 0)
  np.testing.assert_allclose(moved, low, atol=1e-6)
  assert moved.max() > 1
  for other in (
    Pair('a', 'b', ceiling, is_linear=True),
    Pair('a', 'b', ceiling, has_mean=True),
  ):
    left = absorb.absorb(p, [other], ranges)
    np.testing.assert_array_equal(left['a/bias'], p['a/bias'])
  p = pair_params(Window((3, 3), padding=SAME), 3, 7, 5, rng)
  left = absorb.absorb(p, [Pair('a', 'b')], {'b': (np.ones(7), np.ones(7))})
  np.testing.assert_array_equal(left['a/bias'], p['a/bias'])


@pytest.mark.parametrize('family', ['vgg', 'mobilenet_v2'])
def test_families_name_pairs_that_may_be_scaled(family, monkeypatch):
  if family == 'vgg':
    config = vgg_config(batch_norm='none')
  else:
    config = mobilenet_config(monkeypatch, batch_norm='none')
  size = config.model.image_size
  images = normal((4, size, size, 3))
  model = models.build_model(config)
  init = jax.jit(model.init)(jax.random.key(0), images)['params']
  rng = np.random.default_rng(0)
  params = {
    name: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    for name, x in tree.flatten(init).items()
  }
  changed = ptq.transform(
    rows.parse_row('int8_static+equalize+absorb'), params, None,
    lambda done, p: collect(config, p, [images], histograms=False),
    seed=0, pairs=models.pairs(config),
  )  # fmt: skip
  apply = jax.jit(model.apply)
  wanted, found = (
    np.asarray(apply({'params': tree.nest(p)}, images))
    for p in (params, changed)
  )
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found, wanted, atol=1e-4 * scale)
  first = f'{models.pairs(config)[1].first}/kernel'
  assert np.abs(changed[first] - params[first]).max() > 0.01
