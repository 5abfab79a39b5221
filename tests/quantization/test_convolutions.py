"""Convolutions in every core, in calibration and in the rounding of kernels.

References slide their windows by loops over pixels and know no groups: a kernel
of groups is spread to one of all channels with zeros between them.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qvit_jax.arithmetic import exact
from qvit_jax.arithmetic.products import Window
from qvit_jax.errors import ConfigError, QuantError
from qvit_jax.experiment.model import Model
from qvit_jax.ops import Ops, Site, SiteConv, SiteDense
from qvit_jax.quantization import (
  METHODS,
  QuantPlan,
  QuantSpec,
  build_ops,
  build_plan,
  dequantize,
  integer_core,
  parse_spec,
  quantize,
  spec,
)
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.methods.aqt import AqtCore
from qvit_jax.quantization.methods.packing import pack
from qvit_jax.quantization.ptq.switch_core import SwitchCore, switches
from tests import reference
from tests.small_cnns import vgg_config
from tests.small_models import normal, rich_config

SAME = ((1, 1), (1, 1))
# name: (window, input channels, output channels)
WINDOWS = {
  'dense': (Window((3, 3), padding=SAME), 3, 5),
  'strided': (Window((3, 3), (2, 2), ((0, 1), (0, 1))), 3, 4),
  'depthwise': (Window((3, 3), (2, 2), SAME, groups=6), 6, 6),
  'grouped': (Window((3, 3), padding=SAME, groups=2), 4, 6),
  'point': (Window((1, 1)), 7, 5),
}
each_window = pytest.mark.parametrize('name', WINDOWS)
ROWS = (((3,), (0,)), ((), ()))  # dimension numbers of a product of rows


def slow_rows(x, window):
  """What every output pixel sees of all channels, [b, p, q, kh * kw * i]."""
  x = np.pad(np.asarray(x), ((0, 0), *window.padding, (0, 0)))
  (kh, kw), (down, right) = window.size, window.strides
  height = (x.shape[1] - kh) // down + 1
  width = (x.shape[2] - kw) // right + 1
  rows = np.zeros((len(x), height, width, kh * kw * x.shape[3]), x.dtype)
  for i, p, q in np.ndindex(rows.shape[:3]):
    top, left = p * down, q * right
    rows[i, p, q] = x[i, top : top + kh, left : left + kw].ravel()
  return rows


def whole_kernel(w, window, channels):
  """A kernel matrix with the zeros of all other groups' channels."""
  w, taps = np.asarray(w), math.prod(window.size)
  inside, width = channels // window.groups, w.shape[1] // window.groups
  full = np.zeros((taps, channels, w.shape[1]), w.dtype)
  for tap, i, o in np.ndindex(taps, inside, w.shape[1]):
    full[tap, o // width * inside + i, o] = w[tap * inside + i, o]
  return full.reshape(taps * channels, -1)


def own_part(full, window, channels):
  """What a kernel matrix of groups has of `whole_kernel`'s numbers."""
  inside = channels // window.groups
  marks = np.arange(1, math.prod(window.size) * inside * full.shape[1] + 1)
  marks = whole_kernel(marks.reshape(-1, full.shape[1]), window, channels)
  own = np.zeros(marks.max())
  own[marks[marks > 0] - 1] = np.asarray(full)[marks > 0]
  return own.reshape(-1, full.shape[1])


def slow_convolution(x, w, window):
  """The convolution of a kernel matrix in float64, or of whole numbers."""
  return slow_rows(x, window) @ whole_kernel(w, window, x.shape[3])


def operands(name, seed=0, size=7, batch=2):
  window, i, o = WINDOWS[name]
  rows = math.prod(window.size) * i // window.groups
  return (
    window,
    normal((batch, size, size, i), seed) + 0.3,
    normal((rows, o), seed + 1),
  )


def site_of(window, x, w):
  return Site('', 'conv', x.shape[1:], w.shape, 1, window)


class Layer(nn.Module):
  """One convolution by a core."""

  core: object
  window: Window
  shape: tuple

  @nn.compact
  def __call__(self, x, w=None):
    site = Site('', 'conv', x.shape[1:], self.shape, 1, self.window)
    return self.core(self, site, x, w, self.window)


# Whole numbers


@each_window
@pytest.mark.parametrize('form', ['whole_product', 'product_of_patches'])
def test_whole_numbers_are_multiplied_exactly(name, form):
  window, x, w = operands(name)
  rng = np.random.default_rng(0)
  x = rng.integers(-255, 256, x.shape)
  w = rng.integers(-127, 128, w.shape)
  function = functools.partial(getattr(exact, form))
  found = jax.jit(function, static_argnums=2)(
    jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), window
  )
  np.testing.assert_array_equal(found, slow_convolution(x, w, window))
  assert found.dtype == jnp.float32


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('parts', [0, 3])
def test_long_sums_are_those_of_int64(groups, parts):
  window = Window((3, 3), padding=SAME, groups=groups)
  rng = np.random.default_rng(0)
  x = rng.integers(-255, 256, (1, 4, 4, 128 * groups))
  w = rng.integers(-127, 128, (9 * 128, 4))
  x[0, :2], w[:, 0] = 255, 127  # the largest sums, and odd ones
  w[0, 0] = 126
  wanted = slow_convolution(x, w, window)
  assert wanted.max() > 2**24
  found = jax.jit(exact.exact_dot, static_argnums=(2, 3, 4))(
    jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), window,
    255 * 127, parts,
  )  # fmt: skip
  np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_sums_are_cut_no_more_often_than_codes_need():
  rng = np.random.default_rng(0)
  codes = rng.integers(-127, 128, (9 * 64, 300))
  assert exact.parts_needed(codes, 9, 255) == 1
  codes[:, 299] = 127  # 9 * 64 * 127 * 255 = 1.1 * 2**24
  assert exact.parts_needed(codes, 9, 255) == 2
  codes[:] = 127
  assert exact.parts_needed(np.tile(codes, (8, 1)), 9, 255) == 16
  assert exact.parts_needed(np.full((5, 1), 2**23), 1, 255) == 5


# AQT


def aqt_core(window, x, w, text, granularity):
  site = site_of(window, x, w)
  plan = QuantPlan((site,), (parse_spec(text, field='test'),), granularity)
  core = AqtCore(plan)
  return lambda x, w: core(None, site, x, w, window)


@pytest.mark.parametrize('text', ['w4a4', 'w8a8', 'w2'])
@pytest.mark.parametrize('name', ['dense', 'strided', 'point'])
def test_aqts_codes_are_those_of_its_product_of_rows(name, text):
  """Forward to the bit; one image, for which per_tensor is per_image."""
  window, x, w = operands(name, batch=1)
  rows = jnp.asarray(slow_rows(x, window))
  if name == 'strided':  # every pixel is seen
    assert np.abs(rows).max() == np.abs(x).max()
  site = Site('', 'dense', rows.shape[1:], w.shape, 1)
  plan = QuantPlan((site,), (parse_spec(text, field='test'),), 'per_tensor')
  own = jax.jit(lambda rows, w: AqtCore(plan)(None, site, rows, w, ROWS))
  wanted, pull = jax.vjp(own, rows, w)
  for granularity in ('per_token', 'per_tensor'):
    core = jax.jit(aqt_core(window, x, w, text, granularity))
    found, pullback = jax.vjp(core, x, w)
    if text.startswith('w') and 'a' in text:
      np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    g = normal(wanted.shape, 3)
    _, back = jax.vjp(lambda x: slow_like(x, window), x)
    np.testing.assert_allclose(
      pullback(g)[0], back(pull(g)[0])[0], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(pullback(g)[1], pull(g)[1], rtol=1e-4, atol=1e-4)


def slow_like(x, window):
  """`slow_rows` in JAX, by the library's own patches."""
  seen = jax.lax.conv_general_dilated_patches(
    x, window.size, window.strides, window.padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # [b, p, q, i * kh * kw]
  lead = seen.shape[:3]
  seen = seen.reshape(*lead, x.shape[3], -1).swapaxes(3, 4)
  return seen.reshape(*lead, -1)


@pytest.mark.parametrize('name', ['depthwise', 'grouped'])
@pytest.mark.parametrize('granularity', ['per_token', 'per_tensor'])
def test_aqt_rounds_groups_as_the_reference(name, granularity):
  window, x, w = operands(name)
  found, pullback = jax.vjp(
    jax.jit(aqt_core(window, x, w, 'w4a4', granularity)), x, w
  )
  axes = (1, 2, 3) if granularity == 'per_token' else None
  x_near = reference.quantize(x, 4, axes)
  w_near = reference.quantize(w, 4, (0,))
  np.testing.assert_allclose(
    found, slow_convolution(x_near, w_near, window), atol=1e-4
  )
  g = normal(found.shape, 3)
  _, back = jax.vjp(lambda x: slow_like(x, window), x)
  dx, dw = pullback(g)
  whole = whole_kernel(w_near, window, x.shape[3])
  up = jnp.asarray(np.asarray(g, np.float64) @ whole.T, jnp.float32)
  np.testing.assert_allclose(dx, back(up)[0], atol=1e-4)
  down = np.einsum('bpqk,bpqo->ko', slow_rows(x_near, window), g)
  np.testing.assert_allclose(
    dw, own_part(down, window, x.shape[3]), rtol=1e-4, atol=1e-3
  )


def test_rounded_gradients_of_convolutions_are_refused():
  config, plan = tiny('aqt')
  config.quant.backward_bits = 8
  wanted = (
    'but stem is a convolution .one of 4.; set --config.quant.backward_bits=0'
  )
  with pytest.raises(QuantError, match=wanted):
    build_ops(config.quant, plan)


# Learned steps


@each_window
@pytest.mark.parametrize('method', ['step', 'statsq'])
@pytest.mark.parametrize('acts', ['step', 'dynamic'])
def test_learned_steps_are_those_of_a_product_of_rows(name, method, acts):
  window, x, w = operands(name)
  width = w.shape[1]
  if acts == 'step':
    left = jnp.full((1, 1, 1), 0.21), jnp.full((1, 1, 1), 3.2)
  else:
    left = jnp.full((len(x), 1, 1, 1), 0.21), jnp.full((len(x), 1, 1, 1), 3.0)
  coders = (
    lsq.Coder(4, method=acts, share=0.3),
    lsq.Coder(4, method=method, is_signed=True, share=0.7),
  )
  right = None
  if method == 'step':
    right = 0.1 + 0.05 * jnp.abs(normal((width,), 2)), jnp.zeros(width)
  call = jax.jit(
    lambda x, w, left, right: jax.vjp(
      lambda *given: lsq.coded_product(lsq.Product(window, *coders), *given),
      x, w, left, right,
    )[0]
  )  # fmt: skip
  x_codes, x_worth = lsq.encode(x, *left, coders[0])
  w_codes, w_worth = lsq.encode(w, *(right or (None, None)), coders[1])
  wanted = slow_convolution(
    np.asarray(x_codes, np.int64), np.asarray(w_codes, np.int64), window
  )
  wanted = np.float32(wanted) * np.asarray(w_worth) * np.asarray(x_worth)
  found = call(x, w, left, right)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('name', ['dense', 'depthwise'])
def test_gradients_of_learned_steps_are_lsqs(name):
  window, x, w = operands(name)
  step, zero = jnp.full((1, 1, 1), 0.21), jnp.full((1, 1, 1), 3.0)
  kernel_step = 0.1 + 0.05 * jnp.abs(normal((w.shape[1],), 2))
  coders = (
    lsq.Coder(4, share=0.3),
    lsq.Coder(4, is_signed=True, share=0.7),
  )
  product = lsq.Product(window, *coders)
  y, pullback = jax.vjp(
    jax.jit(lambda *given: lsq.coded_product(product, *given)),
    x, w, (step, zero), (kernel_step, jnp.zeros_like(kernel_step)),
  )  # fmt: skip
  g = normal(y.shape, 4)
  dx, dw, (ds, _), (dks, _) = pullback(g)
  near, inside, of_step, _ = reference.lsq(x, step, zero, 0, 15)
  w_near, w_inside, w_of_step, _ = reference.lsq(w, kernel_step, 0, -8, 7)
  _, back = jax.vjp(lambda x: slow_like(x, window), x)
  whole = whole_kernel(w_near, window, x.shape[3])
  up = jnp.asarray(np.asarray(g, np.float64) @ whole.T, jnp.float32)
  up = np.asarray(back(up)[0])
  np.testing.assert_allclose(dx, up * inside, atol=1e-4)
  np.testing.assert_allclose(
    ds, 0.3 * (up * of_step).sum().reshape(1, 1, 1), rtol=1e-3
  )
  down = np.einsum('bpqk,bpqo->ko', slow_rows(near, window), g)
  down = own_part(down, window, x.shape[3])
  np.testing.assert_allclose(dw, down * w_inside, atol=1e-3)
  np.testing.assert_allclose(
    dks, 0.7 * (down * w_of_step).sum(axis=0), rtol=1e-3, atol=1e-3
  )


# Packed integers


def slow_codes(x, bits, axes):
  """Asymmetric codes minus zero, and their scale."""
  x = np.asarray(x)
  low = np.minimum(x.min(axis=axes, keepdims=True), 0)
  high = np.maximum(x.max(axis=axes, keepdims=True), 0)
  scale = (high - low) / np.float32(2**bits - 1)
  zero = np.round(-low / scale)
  codes = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero
  return codes.astype(np.int64), scale


@each_window
@pytest.mark.parametrize(('w_bits', 'a_bits'), [(8, 8), (2, 3)])
@pytest.mark.parametrize('is_static', [True, False])
def test_a_packed_convolution_multiplies_integers(
  name, w_bits, a_bits, is_static
):
  """The zeros around the image are zeros although codes are asymmetric."""
  window, x, w = operands(name)
  kernel = quantize(w, w_bits)
  codes, scale = slow_codes(x, a_bits, None if is_static else (1, 2, 3))
  quant = {'kernel': kernel}
  if is_static:
    zero = np.round(-min(float(x.min()), 0) / scale.item())
    quant |= {'lhs_scale': jnp.asarray(scale.item(), jnp.float32),
              'lhs_zero': jnp.asarray(zero, jnp.float32)}  # fmt: skip
  plan = integer_core.SitePlan(w_bits, a_bits, is_static=is_static)
  layer = Layer(integer_core.IntegerCore((('', plan),)), window, w.shape)
  found = jax.jit(layer.apply)({'quant': quant}, x)
  integers = slow_convolution(codes, np.asarray(kernel.codes, np.int64), window)
  wanted = np.float32(integers) * np.asarray(kernel.scale[0]) * scale
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_groups_of_rows_have_scales_of_their_own():
  window, x, w = operands('dense')  # 27 rows
  kernel = quantize(w, 4, group=8)
  codes, scale = slow_codes(x, 8, (1, 2, 3))
  plan = integer_core.SitePlan(4, 8)
  layer = Layer(integer_core.IntegerCore((('', plan),)), window, w.shape)
  found = jax.jit(layer.apply)({'quant': {'kernel': kernel}}, x)
  near = np.asarray(dequantize(kernel))
  wanted = slow_convolution(codes * scale, near, window)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
  window, x, w = operands('grouped')
  layer = Layer(integer_core.IntegerCore((('', plan),)), window, w.shape)
  with pytest.raises(QuantError, match='a convolution in 2 groups'):
    layer.apply({'quant': {'kernel': quantize(w, 4, group=8)}}, x)


@pytest.mark.parametrize('group', [0, 8])
@pytest.mark.parametrize('name', ['dense', 'depthwise'])
def test_weights_alone_may_be_packed(name, group):
  window, x, w = operands(name)
  kernel = quantize(w, 4, group=group)
  plan = integer_core.SitePlan(4)
  layer = Layer(integer_core.IntegerCore((('', plan),)), window, w.shape)
  found = jax.jit(layer.apply)({'quant': {'kernel': kernel}}, x)
  wanted = slow_convolution(x, np.asarray(dequantize(kernel)), window)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_switched_convolution_rounds_each_image():
  window, x, w = operands('depthwise')
  layer = Layer(SwitchCore(4), window, w.shape)
  apply = jax.jit(layer.apply)
  for on in (True, False):
    found = apply({'switch': {'on': jnp.asarray(on)}}, x, w)
    codes, scale = slow_codes(x, 4, (1, 2, 3))
    near = codes * scale if on else x
    np.testing.assert_allclose(
      found, slow_convolution(near, w, window), rtol=1e-4, atol=1e-4
    )
  assert set(switches([site_of(window, x, w)], None)) == {''}


# A model


class Tiny(nn.Module):
  """Three kinds of convolutions and a dense layer."""

  ops: Ops
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x):
    conv = lambda name, width, window: SiteConv(
      width, window, self.ops, dtype=self.dtype, name=name
    )
    x = nn.relu(conv('stem', 8, Window((3, 3), (2, 2), ((0, 1), (0, 1))))(x))
    y = conv('depthwise', 8, Window((3, 3), padding=SAME, groups=8))(x)
    x = x + conv('project', 8, Window((1, 1)))(jnp.clip(y, 0, 6))
    x = nn.relu(conv('last', 12, Window((3, 3), padding=SAME))(x))
    dense = SiteDense(
      (10,), self.ops, dtype=self.dtype, out_dtype=jnp.float32, name='head'
    )
    return dense(x.mean(axis=(1, 2)))


IMAGES = normal((4, 8, 8, 3))


def tiny(recipe, bits='w4a4', **quant):
  """(config, plan) of a recipe over `Tiny`."""
  config = rich_config()
  config.quant.update(recipe=recipe, default=bits, **quant)
  sites = []
  tap = Ops(tap=lambda module, site, *operands: sites.append(site))
  jax.eval_shape(Tiny(tap).init, jax.random.key(0), IMAGES)
  return config, build_plan(config.quant, sites)


@pytest.mark.parametrize(
  ('recipe', 'bits', 'quant', 'dtype'),
  [
    ('aqt', 'w4a4', {}, 'float32'),
    ('lsq', 'w8a8', {}, 'float32'),
    ('statsq', 'w4a4', {'act_granularity': 'per_position'}, 'float32'),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('aqt', 'w8a8', {'act_granularity': 'per_tensor'}, 'bfloat16'),
        ('aqt', 'w2a8', {}, 'float32'),
        ('lsq', 'w4a4', {'act_granularity': 'per_token'}, 'bfloat16'),
        ('lsq', 'w2a8', {'zero_point': False}, 'float32'),
        ('statsq', 'w8a8', {}, 'bfloat16'),
      )
    ),
  ],
)
def test_training_evaluation_and_packed_file_agree_to_the_bit(
  recipe, bits, quant, dtype
):
  config, plan = tiny(recipe, bits, **quant)
  ops = build_ops(config.quant, plan)
  model = Tiny(ops, jnp.dtype(dtype))
  init = jax.jit(model.init)
  variables = dict(init(jax.random.key(0), IMAGES))
  wanted = jax.jit(model.apply)(variables, IMAGES)
  flat = {
    f'{kind}/{"/".join(path)}': x
    for kind, tree in variables.items()
    for path, x in traverse_util.flatten_dict(tree).items()
  }
  packed = pack(METHODS[recipe], flat, plan, ops, dtype)
  assert packed.execution == 'integer'
  found = jax.jit(Tiny(packed.ops, jnp.dtype(dtype)).apply)(
    packed.variables, IMAGES
  )
  np.testing.assert_array_equal(found, wanted)
  assert float(jnp.abs(wanted).max()) > 0.01


def test_the_listing_of_sites_shows_windows():
  _, plan = tiny('lsq', act_granularity='per_position')
  lines = plan.table().splitlines()
  assert '8x8x3 x 3x3x3x8, stride 2 ' in lines[1]
  assert '4x4x8 x 3x3x1x8, 8 groups ' in lines[2]
  assert f' {4 * 4 * 9 * 8:,} ' in lines[2]
  assert lines[2].endswith('activations per_tensor')
  assert plan.granularity_text() == (
    'per_position (4 convolutions per_tensor)'
  )
  _, plan = tiny('lsq', act_granularity='per_token')
  assert plan.granularity_text() == 'per_token (4 convolutions per_image)'
  assert spec.granularity_of(plan.sites[4], 'per_token') == 'per_token'
  assert plan.by_path['stem'] == QuantSpec(4, 4)


def test_queries_to_rectify_are_asked_for():
  config = vgg_config()
  config.quant.update(recipe='qvit', default='w4a4')
  with pytest.raises(QuantError, match='this model has none. Set .*recipe=lsq'):
    Model(config)


@pytest.mark.parametrize(
  ('features', 'window', 'wanted'),
  [
    (8, Window((3, 3), groups=2),
     'conv has 2 groups, which do not divide its 3 input and 8 output'),
    (8, Window((3, 3), groups=3),
     'conv has 3 groups, which do not divide its 3 input and 8 output'),
    (8, Window((9, 2)), 'conv slides a window of 9 x 2 over 8 x 8 pixels'),
  ],
)  # fmt: skip
def test_windows_that_do_not_fit_are_refused(features, window, wanted):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return SiteConv(features, window, Ops(), name='conv')(x)

  with pytest.raises(ConfigError, match=wanted) as caught:
    jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  assert '\n' not in str(caught.value)
