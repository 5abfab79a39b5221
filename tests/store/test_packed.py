"""Packed models: evaluated from their files, and packed from trained bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qvit_jax import models, modes, tree, weights
from qvit_jax.errors import (
  CheckpointError,
  ConfigError,
  ExportError,
  QvitError,
  WeightsError,
)
from qvit_jax.experiment import ptq_table
from qvit_jax.ops import Site
from qvit_jax.quantization import (
  METHODS,
  QTensor,
  QuantPlan,
  QuantSpec,
  build_ops,
  build_plan,
  numerics,
)
from qvit_jax.quantization.methods import aqt as aqt_core
from qvit_jax.quantization.methods.packing import pack
from qvit_jax.store import artifacts, tensors
from tests import reference
from tests.small_models import CLIP, DINOV3_PLUS, SIGLIP, normal, rich_config

PLANS = {
  'w4a4': {'default': 'w4a4'},
  'w8a8': {'default': 'w8a8', 'attention': 'a8'},
  'mixed': {
    'default': 'w4a4', 'attention': 'a4',
    'rules': (('head', 'float'), ('fc1', 'w3'), ('fc2', 'a5')),
  },
}  # fmt: skip


def small_config(**fields):
  return rich_config(**{'depth': 1, **fields})


def aqt_config(name='w8a8', **fields):
  config = small_config(**fields)
  config.quant.update(recipe='aqt', **PLANS[name])
  return config


def params_of(config):
  """Returns {path: array} of a model in which no parameter is idle."""
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  init = models.build_model(config).init
  shapes = jax.eval_shape(init, jax.random.key(0), images)['params']
  return tree.flatten(reference.random_params(shapes))


def plan_of(config):
  return build_plan(config.quant, models.list_sites(config))


def pack_trained(config, params):
  plan = plan_of(config)
  variables = {f'params/{name}': x for name, x in params.items()}
  ops = build_ops(config.quant, plan)
  method = METHODS[config.quant.recipe]
  return pack(method, variables, plan, ops, config.model.dtype)


def aqts_own(x, w, bits):
  """Returns AQT's codes and scales of both operands of a layer."""
  dims = (((x.ndim - 1,), (0,)), ((), ()))

  def codes(x, w):
    dot = aqt_core._aqt_dot_general(bits, bits, (False, False)).fwd
    dot.dg_quantizer.init_calibration()
    (lhs, _), (rhs, _) = dot.dg_quantizer(
      x, w.astype(x.dtype), dims, dot.lhs.calibration_mode,
      dot.rhs.calibration_mode,
    )  # fmt: skip
    return lhs.qvalue, lhs.scale[0], rhs.qvalue, rhs.scale[0]

  return jax.jit(codes)(x, w)


# From trained bits to integers


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_codes_are_aqts_bit_for_bit(bits, dtype):
  x = normal((4, 30, 96)).astype(dtype).at[0, 0].set(0)
  w = normal((96, 200), 1).at[:, 3].set(0)
  x_codes, x_scale, w_codes, w_scale = aqts_own(x, w, bits)
  rule = jax.jit(numerics.aqt_codes, static_argnums=(1, 2))
  for found, wanted in zip(
    rule(x, bits, (2,)), (x_codes, x_scale), strict=True
  ):
    np.testing.assert_array_equal(found, wanted)
  site = Site('a', 'dense', (30, 96), (96, 200), 1)
  plan = QuantPlan((site,), (QuantSpec(bits, bits),), 'per_token')
  _, kernels = aqt_core.pack_kernels({'a/kernel': w}, plan, dtype)
  np.testing.assert_array_equal(kernels['a/kernel'].codes, w_codes)
  # JAX returns bf16 scales; the products see them before that rounding.
  np.testing.assert_array_equal(
    kernels['a/kernel'].scale.astype(dtype), w_scale
  )
  if dtype == 'float32':
    near = reference.quantize(w, bits, 0)
    scale = np.asarray(kernels['a/kernel'].scale, np.float64)
    np.testing.assert_allclose(w_codes * scale, near, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'granularity', 'dtype', 'fields'),
  [
    ('w8a8', 'per_token', 'bfloat16', {}),
    ('mixed', 'per_token', 'float32', {}),
    ('mixed', 'per_tensor', 'bfloat16', {}),
    ('mixed', 'per_token', 'float16', {}),
    ('w8a8', 'per_token', 'float32', CLIP),
    ('mixed', 'per_token', 'float32', SIGLIP),
    ('w8a8', 'per_tensor', 'bfloat16', DINOV3_PLUS),
  ],
)
def test_a_packed_model_computes_what_training_evaluated(
  name, granularity, dtype, fields
):
  config = aqt_config(name, dtype=dtype, **fields)
  config.quant.act_granularity = granularity
  plan, params = plan_of(config), params_of(config)
  images = normal((32, 8, 8, 3))
  module = models.build_model(config, build_ops(config.quant, plan))
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  wanted = np.asarray(jax.jit(module.apply)(variables, images))
  packed = pack_trained(config, params)
  module = models.build_model(config, packed.ops)
  found = np.asarray(jax.jit(module.apply)(packed.variables, images))
  # Measured: equal bit for bit. One code that falls to the other side of a
  # half is worth about 1e-2 of the logits, a wrong scale more than 1e-1.
  least = 1e-5 if dtype == 'float32' else 1e-2
  assert np.abs(found - wanted).max() <= least * np.abs(wanted).max()
  assert (found.argmax(1) == wanted.argmax(1)).mean() >= 31 / 32


def test_a_packed_model_says_which_products_are_integer():
  packed = pack_trained(aqt_config(), params_of(small_config()))
  assert (packed.execution, packed.why) == ('integer', '')
  mixed = pack_trained(aqt_config('mixed'), params_of(small_config()))
  assert mixed.execution == 'simulated'
  for part in ('1 of packed weights', '1 of float weights with rounded',
               '1 in float'):  # fmt: skip
    assert part in mixed.why
  kernels = mixed.variables['quant']
  block = kernels['encoder']['block_00']
  assert kernels['head']['kernel'].dtype == jnp.float32
  assert block['mlp']['fc2']['kernel'].dtype == jnp.float32
  assert isinstance(block['mlp']['fc1']['kernel'], QTensor)
  left = {n for n in tree.flatten(mixed.variables['params']) if 'kernel' in n}
  assert not left


@pytest.mark.parametrize(('spec', 'least'), [('w8a8', 3.9), ('w4a4', 7.5)])
def test_a_packed_vit_l_is_small(spec, least):
  config = small_config(size='L/16', image_size=224, num_classes=100)
  config.quant.update(recipe='aqt', default=spec)
  plan = plan_of(config)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  params = jax.eval_shape(
    models.build_model(config).init, jax.random.key(0), images
  )['params']
  packed = jax.eval_shape(
    lambda params: aqt_core.pack_kernels(params, plan, 'bfloat16'),
    tree.flatten(params),
  )
  full = tree.num_bytes(params)
  assert full == 4 * 303_404_132
  assert full / tree.num_bytes(packed) >= least


# The modes


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run at 8 bits with averaged weights, packed; a table of imported ones."""
  place = tmp_path_factory.mktemp('runs')
  config = aqt_config()
  config.train.update(steps=60, ema_decay=0.9)
  config.optim.lr = 3e-3
  config.eval.every = 60
  modes.run('train', config, str(place / 'aqt'))
  config.export.format = 'packed'
  modes.run('export', config, str(place / 'aqt'))
  config = small_config()
  params = tree.nest(params_of(config))
  config.weights.path = str(place / 'timm.safetensors')
  tensors.save_tensors(
    weights.translate(params, 'timm'), place / 'timm.safetensors',
    form='safetensors',
  )  # fmt: skip
  config.ptq.update(rows=('w4a4+plain',), rounds=2,
                    calibration_examples=40, latency_batch=4)  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ptq_table.page, 'write', lambda *_: 'no page: it takes long')
    modes.run('ptq', config, str(place / 'table'))
  return place


def packed_of(runs):
  return runs / 'aqt' / 'export' / 'model.packed.safetensors'


def row_of(runs, name):
  return runs / 'table' / 'artifacts' / f'{name}.safetensors'


def evaluate(path, workdir, recipe='ptq', **fields):
  """Returns the row of --mode=eval."""
  config = small_config(**fields)
  config.quant.recipe = recipe
  config.checkpoint.path = str(path)
  modes.run('eval', config, str(workdir))
  return json.loads((workdir / 'results.json').read_text())['baseline']


def test_an_artifact_is_evaluated_like_its_row(runs, tmp_path):
  name = 'w4a4+plain'
  table = json.loads((runs / 'table' / 'results.json').read_text())['rows']
  wanted = next(row for row in table if row['name'] == name)
  # Whatever dtype the config has, the row computed in its own.
  found = evaluate(row_of(runs, name), tmp_path, dtype='bfloat16')
  assert found['loss'] == pytest.approx(wanted['loss'], rel=1e-6)
  for key in ('name', 'top1', 'top5', 'confusion', 'per_class_top1', 'bops',
              'num_examples', 'weight_bits', 'size_bytes', 'artifact_bytes',
              'compression', 'macs', 'execution', 'why'):  # fmt: skip
    assert found[key] == wanted[key], key
  assert found['f1_macro'] == pytest.approx(wanted['f1_macro'])
  config = small_config()
  sites, facts = models.list_sites(config), models.architecture(config)
  plan = artifacts.load(row_of(runs, name), sites, facts).plan
  assert found['act_bits'] == plan.bits('acts')
  assert found['method'] == 'ptq'


def test_a_trained_run_is_evaluated_the_same_when_packed(runs, tmp_path):
  trained = json.loads((runs / 'aqt' / 'results.json').read_text())['baseline']
  found = evaluate(packed_of(runs), tmp_path)
  assert found['confusion'] == trained['confusion']
  assert found['top1'] == trained['top1'] > 0.3
  assert found['loss'] == pytest.approx(trained['loss'], rel=1e-6)
  for key in ('weight_bits', 'act_bits', 'bops', 'macs'):
    assert found[key] == trained[key], key
  assert (trained['execution'], found['execution']) == ('simulated', 'integer')
  assert found['size_bytes'] < found['artifact_bytes']
  assert found['artifact_bytes'] == packed_of(runs).stat().st_size
  parity = json.loads(packed_of(runs).with_name('parity.json').read_text())
  assert parity['equal_classes'] == 1.0
  assert parity['largest_difference'] <= 1e-5 * parity['largest_logit']


def test_the_file_holds_no_float_copy_of_a_kernel(runs):
  tensors = safetensors.numpy.load_file(packed_of(runs))
  kernels = {n: x for n, x in tensors.items() if 'kernel' in n}
  assert len(kernels) == 2 * 8
  for name, values in kernels.items():
    if name.endswith('/data'):
      assert values.dtype == np.int8
    else:
      assert name.endswith('/scale')
      assert values.shape[0] == 1  # one for each output channel


def test_packing_another_export_leaves_one_file(runs, tmp_path):
  config = aqt_config()
  config.checkpoint.path = str(runs / 'aqt')
  for form, name in (('npz', 'model.npz'),
                     ('packed', 'model.packed.safetensors'),
                     ('stablehlo', 'model.stablehlo'),
                     ('npz', 'model.npz')):  # fmt: skip
    config.export.format = form
    modes.run('export', config, str(tmp_path))
    there = {path.name for path in (tmp_path / 'export').iterdir()}
    assert there == {name, 'parity.json', 'README.md'}


@pytest.mark.parametrize('of', ['run', 'weights'])
def test_a_program_is_written_of_a_run_and_of_weights(runs, tmp_path, of):
  config = aqt_config() if of == 'run' else small_config()
  config.export.format = 'stablehlo'
  if of == 'run':
    config.checkpoint.path = str(runs / 'aqt')
  else:
    config.weights.path = str(runs / 'timm.safetensors')
  modes.run('export', config, str(tmp_path))
  parity = json.loads((tmp_path / 'export' / 'parity.json').read_text())
  assert parity['execution'] == {'run': 'integer', 'weights': 'float'}[of]
  assert parity['agreement'] == 1.0
  assert parity['largest_difference'] <= 1e-5 * parity['largest_logit']


# Mistakes


def fails(error, mode, config, workdir, *parts, overrides=()):
  with pytest.raises(error) as found:
    modes.run(mode, config, str(workdir), overrides=overrides)
  assert isinstance(found.value, QvitError)
  text = str(found.value)
  assert '\n' not in text
  for part in parts:
    assert part in text


@pytest.mark.parametrize(
  'mode', [n for n, mode in modes.MODES.items() if not mode.takes_packed]
)
def test_only_some_modes_read_a_packed_model(mode, tmp_path):
  config = small_config()
  config.quant.recipe = 'ptq'
  recipe = 'none'
  if mode not in ('ptq', 'sensitivity', 'compare'):
    recipe = 'none, aqt, lsq, statsq or qvit'
  fails(ConfigError, mode, config, tmp_path,
        'only --mode=eval, predict, export and benchmark read',
        f'for --mode={mode} set --config.quant.recipe={recipe}')  # fmt: skip


def test_eval_of_ptq_wants_a_packed_file(runs, tmp_path):
  config = small_config()
  config.quant.recipe = 'ptq'
  make = ('artifacts/ROW.safetensors', '--config.export.format=packed')
  fails(ConfigError, 'eval', config, tmp_path, 'checkpoint.path is empty',
        *make)  # fmt: skip
  foreign = tmp_path / 'foreign.safetensors'
  safetensors.numpy.save_file({'a': np.zeros(3)}, foreign)
  (tmp_path / 'x.npz').write_bytes(b'PK\x03\x04 no archive')
  for path, part in (
    (runs / 'aqt', 'is no packed model'),
    (runs / 'aqt' / 'checkpoints' / '60', 'is no packed model'),
    (foreign, 'is no packed model'),
    (tmp_path / 'x.npz', 'is no packed model'),
    (tmp_path / 'nothing.safetensors', 'does not exist'),
  ):
    config.checkpoint.path = str(path)
    fails(ConfigError, 'eval', config, tmp_path, str(path), part, *make,
          'quant.recipe of its training')  # fmt: skip


@pytest.mark.parametrize('recipe', ['none', 'aqt'])
def test_a_packed_file_wants_the_recipe_ptq(runs, tmp_path, recipe):
  config = small_config()
  config.quant.recipe = recipe
  config.checkpoint.path = str(packed_of(runs))
  fails(ConfigError, 'eval', config, tmp_path, f'quant.recipe is {recipe!r}',
        '--config.quant.recipe=ptq')  # fmt: skip


@pytest.mark.parametrize('mode', ['ptq', 'sensitivity'])
def test_a_packed_file_is_not_quantized_again(runs, tmp_path, mode):
  config = small_config()
  config.checkpoint.path = str(row_of(runs, 'w4a4+plain'))
  fails(ConfigError, mode, config, tmp_path, 'is already quantized',
        '--mode=eval --config.quant.recipe=ptq')  # fmt: skip


def test_a_packed_file_of_another_model_or_damaged(runs, tmp_path):
  config = small_config(depth=2)
  config.quant.recipe = 'ptq'
  config.checkpoint.path = str(packed_of(runs))
  fails(WeightsError, 'eval', config, tmp_path, 'of another model')
  short = tmp_path / 'short.safetensors'
  short.write_bytes(packed_of(runs).read_bytes()[:-100])
  config.checkpoint.path = str(short)
  fails(QvitError, 'eval', config, tmp_path, 'short.safetensors')


@pytest.mark.parametrize(
  'field', ['quant.default', 'quant.rules', 'model.dtype']
)
def test_fields_that_a_packed_model_brings_have_no_effect(
  runs, tmp_path, field
):
  config = small_config()
  config.quant.recipe = 'ptq'
  config.checkpoint.path = str(packed_of(runs))
  fails(ConfigError, 'eval', config, tmp_path, 'would have no effect', field,
        overrides=[field])  # fmt: skip


def test_what_cannot_be_packed_is_refused(runs, tmp_path):
  config = small_config()
  config.export.format = 'packed'
  fails(ExportError, 'export', config, tmp_path, "quant.recipe is 'none'",
        '--mode=ptq')  # fmt: skip
  config = aqt_config('w4a4')
  config.export.format = 'packed'
  fails(CheckpointError, 'export', config, tmp_path, 'holds no checkpoint')
  config.checkpoint.path = str(runs / 'aqt')
  fails(CheckpointError, 'export', config, tmp_path, 'other bits')
  fails(ConfigError, 'export', config, tmp_path, 'export.layout',
        overrides=['export.layout'])  # fmt: skip
