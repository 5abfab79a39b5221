"""ONNX files beside our own evaluation, in the runtimes themselves."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from qvit_jax import models, tree
from qvit_jax.experiment import parity
from qvit_jax.export import engines, onnx_model
from tests import small_cnns, small_models

KINDS = {
  'vit': {},
  'clip': small_models.CLIP,
  'siglip': small_models.SIGLIP,
  'dinov3': small_models.DINOV3,
  'dinov3_plus': small_models.DINOV3_PLUS,
  'scaled': {'layer_scale': 0.1, 'qk_norm': True, 'pool': 'token_mean'},
  'probed': {'pool': 'token_attention', 'registers': 2},
  'averaged': {'pool': 'patch_mean', 'norm_after_pool': True},
}
ROWS = {
  'fp32': 'float',
  'int8_static': 'qdq',
  'int8_dynamic': 'dynamic',
  'w4a4': 'dynamic',
  'int8_weight_only': 'weight_only',
  'int4_weight_only': 'weight_only',
  'int4_weight_only_g32': 'weight_only',
}
# Each row meets two kinds of backbone, one of them in the slow tests.
PAIRS = [
  pytest.param(kind, row, marks=[pytest.mark.slow] if (i + j) % 8 else [])
  for i, row in enumerate(ROWS)
  for j, kind in enumerate(KINDS)
  if (i + j) % 4 == 0
]


def in_onnxruntime(model, feed):
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  options.add_session_config_entry(
    'session.qdq_matmulnbits_accuracy_level', '1'
  )
  facts = {p.key: p.value for p in model.metadata_props}
  for key, value in json.loads(facts.get('onnxruntime_options', '{}')).items():
    options.add_session_config_entry(key, value)
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=['CPUExecutionProvider']
  )
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(None, feed), strict=True))


def in_openvino(model, feed):
  core = openvino.Core()
  compiled = core.compile_model(
    core.read_model(model.SerializeToString()), 'CPU',
    {'INFERENCE_PRECISION_HINT': 'f32',
     'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0'},
  )  # fmt: skip
  return {
    name: np.asarray(x)
    for key, x in compiled(feed).items()
    for name in key.names
  }


RUNTIMES = {'onnxruntime': in_onnxruntime, 'openvino': in_openvino}


@functools.cache
def vit(kind):
  """Returns config, parameters and statistics of a small backbone."""
  config = small_models.rich_config(**KINDS[kind])
  params = small_models.random_params(config)
  images = [small_models.normal((16, 8, 8, 3), 1)]
  stats = small_models.collect(config, params, images, hessians=True)
  return config, params, stats


@functools.cache
def packed_vit(kind, row):
  config, params, stats = vit(kind)
  return config, small_models.pack(config, row, params, stats)


def images_of(config):
  size = config.model.image_size
  return np.asarray(small_models.normal((5, size, size, 3), 2))


def check_products(config, packed):
  """Every product gives our result of our operands: the codes are equal.

  But for what lies halfway between two levels: XLA multiplies by the inverse of
  a scale, onnxruntime divides.
  """
  run = jax.jit(lambda images: parity.operands(config, packed, images))
  operands, results = jax.device_get(run(images_of(config)))
  model, steps = onnx_model.make_products(config, packed)
  found = in_onnxruntime(model, operands)
  assert set(found) == {site.path for site in packed.plan.sites}
  for path, expected in results.items():
    got, most = found[path].reshape(expected.shape), np.abs(expected).max()
    # One code that is another changes far more than this.
    near = 1e-5 * most + steps.get(path, 0) / 2
    is_equal = np.abs(got - expected) < near
    assert is_equal.mean() > 0.95, path
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * most)


def check_logits(config, packed, profile, **given):
  """Both runtimes give our logits, as far as the profile runs in them."""
  model = onnx_model.make_model(config, packed, **given)
  onnx.checker.check_model(model, full_check=profile != 'dynamic')
  facts = {p.key: p.value for p in model.metadata_props}
  assert facts['profile'] == profile
  images = images_of(config)
  expected = small_models.packed_logits(config, packed, images)
  for name, run in RUNTIMES.items():
    if (name, profile) != ('openvino', 'dynamic'):
      found = run(model, {'images': images})['logits']
      assert found.shape == expected.shape
      error = np.abs(found - expected).max() / np.abs(expected).max()
      near = 1e-5 if profile in ('float', 'weight_only') else 0.05
      if profile == 'qdq' and engines.cuts_sums(name):
        near = 0.3  # see `parity.cautions`
      assert error < near


@pytest.mark.parametrize(('kind', 'row'), PAIRS)
def test_runtimes_give_the_logits_of_a_transformer(kind, row):
  config, packed = packed_vit(kind, row)
  check_logits(config, packed, ROWS[row])


@pytest.mark.parametrize(
  ('kind', 'row'),
  [('vit', 'int8_static'), ('dinov3', 'int8_dynamic'), ('siglip', 'w4a4')],
)
def test_products_of_a_transformer_have_our_codes(kind, row):
  check_products(*packed_vit(kind, row))


@pytest.mark.parametrize('row', ['int8_static', 'int8_dynamic'])
def test_sums_of_the_largest_codes_are_not_cut(row):
  """Two of their products do not fit into 16 bits, which some CPUs add in."""
  config, params, _ = vit('vit')
  rng = np.random.default_rng(0)
  params = params | {
    name: rng.uniform(0.9, 1, x.shape).astype(np.float32)
    for name, x in params.items()
    if name.endswith('kernel')
  }
  images = [small_models.normal((16, 8, 8, 3), 1)]
  stats = small_models.collect(config, params, images, hessians=True)
  packed = small_models.pack(config, row, params, stats)
  check_products(config, packed)
  # What makes it so, where the CPU at hand would not need it.
  model = onnx_model.make_model(config, packed)
  facts = {p.key: p.value for p in model.metadata_props}
  layers = {
    node.input[1]
    for node in model.graph.node
    if node.op_type == 'MatMulIntegerToFloat'
  }
  kinds = {x.data_type for x in model.graph.initializer if x.name in layers}
  if row == 'int8_static':
    options = json.loads(facts['onnxruntime_options'])
    assert options == {'session.x64quantprecision': '1'}
  else:
    assert kinds == {onnx.TensorProto.UINT8}


def packed_cnn(config, row):
  """Returns a packed row of a network without norms, and its config."""
  size = config.model.image_size
  config.model.batch_norm = 'none'
  model = models.build_model(config)
  init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
  rng = np.random.default_rng(0)
  params = {
    name: np.asarray(x) + 0.02 * rng.normal(size=x.shape).astype(np.float32)
    for name, x in tree.flatten(init['params']).items()
  }
  images = [small_models.normal((16, size, size, 3), 1)]
  stats = small_models.collect(config, params, images, hessians=True)
  return config, small_models.pack(config, row, params, stats)


CNNS = {
  'linear': lambda patch: small_cnns.vgg_config(),
  'paper': lambda patch: small_cnns.vgg_config(classifier='paper'),
  'torch': lambda patch: small_cnns.mobilenet_config(patch, padding='torch'),
  'same': lambda patch: small_cnns.mobilenet_config(patch, padding='same'),
}


@pytest.mark.parametrize(
  ('kind', 'row'),
  [
    ('linear', 'fp32'), ('same', 'int8_static'),
    pytest.param('paper', 'int8_static', marks=pytest.mark.slow),
    pytest.param('paper', 'int8_weight_only', marks=pytest.mark.slow),
    pytest.param('torch', 'int4_weight_only_g32', marks=pytest.mark.slow),
    pytest.param('same', 'fp32', marks=pytest.mark.slow),
  ],
)  # fmt: skip
def test_runtimes_give_the_logits_of_a_convolutional_network(
  kind, row, monkeypatch
):
  config, packed = packed_cnn(CNNS[kind](monkeypatch), row)
  check_logits(config, packed, ROWS[row])


@pytest.mark.parametrize('kind', ['linear', 'same'])
def test_products_of_a_convolutional_network_have_our_codes(kind, monkeypatch):
  check_products(*packed_cnn(CNNS[kind](monkeypatch), 'int8_static'))


@pytest.mark.parametrize(
  ('kind', 'row', 'near'),
  [
    ('same', 'int8_static', 0.05),
    pytest.param('paper', 'int8_static', 0.05, marks=pytest.mark.slow),
    pytest.param('same', 'w4a4_static', 0.5, marks=pytest.mark.slow),
  ],
)  # fmt: skip
def test_integer_convolutions_stay_integers_in_both_runtimes(
  kind, row, near, monkeypatch
):
  config, packed = packed_cnn(CNNS[kind](monkeypatch), row)
  missing = onnx_model.missing_ranges(config, packed)
  # What goes into a sum or a mean; VGG's last convolution, for its mean.
  assert bool(missing) and all('depthwise' not in path for path in missing)
  ranges = parity.ranges_of(config, packed, [images_of(config)])
  assert set(ranges) == set(missing)
  model = onnx_model.make_model(config, packed, ranges=ranges)
  expected = small_models.packed_logits(config, packed, images_of(config))
  for name in engines.ENGINES:
    engine = engines.open_engine(name, model)
    # Means over windows of the paper's classifier are two products.
    assert engine.kernels().float <= 2 * (kind == 'paper')
    parity.check_kernels(engine, config, packed)
    assert engine.kernels().integer == len(packed.plan.sites)
    error = np.abs(engine.run(images_of(config)) - expected).max()
    assert error < near * np.abs(expected).max()
