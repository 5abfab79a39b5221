"""--mode=export --config.export.format=onnx: files, numbers, mistakes."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from qvit_jax import models, modes
from qvit_jax.data import preprocess
from qvit_jax.errors import QvitError
from qvit_jax.export import engines
from qvit_jax.store import artifacts
from tests import small_models
from tests.conftest import make_digits_config


def small_config(**fields):
  config = small_models.rich_config(**fields)
  config.quant.recipe = 'ptq'
  config.export.format = 'onnx'
  config.eval.update(batch_size=64, num_examples=100)
  return config


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Packed files of some rows of a model with random weights."""
  place = tmp_path_factory.mktemp('rows')
  config = small_config()
  params = small_models.random_params(config)
  images = [small_models.normal((16, 8, 8, 3), 1)]
  stats = small_models.collect(config, params, images, hessians=True)
  rows = ('int8_static', 'w4a4', 'int4_weight_only', 'w4a4+log2_softmax',
          'w16a16')  # fmt: skip
  for row in rows:
    packed = small_models.pack(config, row, params, stats)
    facts = models.architecture(config)
    artifacts.save(packed, place / f'{row}.safetensors', facts)
  return place


def export(files, row, workdir, **fields):
  config = small_config()
  config.checkpoint.path = str(files / f'{row}.safetensors')
  config.export.update(fields)
  modes.run('export', config, str(workdir))
  folder = workdir / 'export'
  return folder, json.loads((folder / 'parity.json').read_text())


@pytest.mark.parametrize(
  ('row', 'profile', 'runtimes'),
  [
    ('int8_static', 'qdq', {'onnxruntime', 'openvino'}),
    ('w4a4', 'dynamic', {'onnxruntime'}),
    ('int4_weight_only', 'weight_only', {'onnxruntime', 'openvino'}),
  ],
)
def test_an_exported_row_is_measured_in_the_runtimes(
  row, profile, runtimes, files, tmp_path, capsys
):
  folder, parity = export(files, row, tmp_path)
  assert parity['profile'] == profile
  assert parity['bytes'] == (folder / 'model.onnx').stat().st_size
  assert set(parity['engines']) == runtimes
  assert (parity['split'], parity['num_examples']) == ('test', 100)
  for found in parity['engines'].values():
    assert found['loss'] == pytest.approx(parity['jax']['loss'], abs=0.05)
    kernels = found['kernels']
    counts = kernels['integer'], kernels['packed']
    assert counts == ((0, 14) if profile == 'weight_only' else (18, 0))
  assert parity['products']['products'] == 18
  assert parity['products']['equal'] > 0.98
  said = capsys.readouterr().out
  assert 'agreement' in said
  config = small_config()
  config.checkpoint.path = str(files / f'{row}.safetensors')
  modes.run('eval', config, str(tmp_path))
  own = json.loads((tmp_path / 'results.json').read_text())['baseline']
  assert own['loss'] == pytest.approx(parity['jax']['loss'], rel=1e-5)
  assert own['top1'] == parity['jax']['top1']


def test_pixels_of_any_size_are_prepared_inside(files, tmp_path):
  plain, _ = export(files, 'int8_static', tmp_path / 'plain')
  (tmp_path / 'whole' / 'export').mkdir(parents=True)
  stale = tmp_path / 'whole' / 'export' / 'model.stablehlo'
  stale.write_bytes(b'of another form')
  whole, _ = export(files, 'int8_static', tmp_path / 'whole', preprocess=True)
  assert not stale.exists()
  pixels = np.random.default_rng(0).integers(0, 256, (3, 21, 13, 3), np.uint8)
  config = small_config()
  images = np.asarray(
    preprocess.prepare_eval(jnp.asarray(pixels), data=config.data, size=8)
  )
  for name in engines.installed():
    inside = engines.open_file(name, str(whole / 'model.onnx'))
    outside = engines.open_file(name, str(plain / 'model.onnx'))
    expected, found = outside.run(images), inside.run(pixels)
    # A code on the other side of a half may differ.
    near = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=near)
  model = onnx.load(whole / 'model.onnx')
  facts = {p.key: p.value for p in model.metadata_props}
  assert json.loads(facts['mean']) == list(config.data.mean)
  assert json.loads(facts['std']) == list(config.data.std)
  assert facts['resize'] == config.data.resize
  assert json.loads(facts['class_names'])[3] == '3'


def test_a_failed_export_leaves_the_former_file(files, tmp_path, monkeypatch):
  folder, parity = export(files, 'int8_static', tmp_path)
  before = (folder / 'model.onnx').read_bytes()
  # A runtime that does not know the pattern: all its products are float.
  monkeypatch.setattr(
    engines._OnnxRuntime, 'kernels',
    lambda self: engines.Kernels(0, 0, 18, {'MatMul': 18}),
  )  # fmt: skip
  with pytest.raises(QvitError, match='runs 18 products in float, where') as e:
    export(files, 'int8_static', tmp_path)
  assert '\n' not in str(e.value)
  assert (folder / 'model.onnx').read_bytes() == before
  assert json.loads((folder / 'parity.json').read_text()) == parity


@pytest.mark.parametrize(
  ('row', 'fields', 'parts'),
  [
    ('w4a4+log2_softmax', {}, ['log2 softmax codes', 'stablehlo']),
    ('w16a16', {}, ['activations of 16 bits', 'stablehlo']),
    ('w4a4', {'profile': 'qdq'},
     ["export.profile='qdq'", '--config.export.profile=dynamic']),
    ('int8_static', {'profile': 'float'}, ['--config.export.profile=qdq']),
  ],
)  # fmt: skip
def test_what_no_profile_holds_is_one_line(
  row, fields, parts, files, tmp_path
):
  with pytest.raises(QvitError) as found:
    export(files, row, tmp_path, **fields)
  text = str(found.value)
  assert '\n' not in text
  assert all(part in text for part in parts)
  assert not (tmp_path / 'export' / 'model.onnx').exists()


def test_a_target_that_cannot_be_written_is_one_line(files, tmp_path):
  (tmp_path / 'export' / 'model.onnx').mkdir(parents=True)
  with pytest.raises(QvitError, match='model.onnx') as found:
    export(files, 'int8_static', tmp_path)
  assert '\n' not in str(found.value)


def test_a_file_of_a_newer_format_is_one_line(files, tmp_path, monkeypatch):
  monkeypatch.setattr(artifacts, '_FORMAT', 2)  # an older reader
  with pytest.raises(QvitError, match='format 3.*up to 2; update') as found:
    export(files, 'w4a4', tmp_path)
  assert '\n' not in str(found.value)


def test_export_without_the_package_says_what_to_install(
  files, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'onnx', None)  # as if it were not there
  with pytest.raises(QvitError, match='requirements-onnx.txt'):
    export(files, 'int8_static', tmp_path)


@pytest.mark.parametrize(
  ('recipe', 'bits'),
  [
    pytest.param('lsq', 'w8a8', marks=pytest.mark.slow),
    pytest.param('aqt', 'w8a8', marks=pytest.mark.slow),
    pytest.param('qvit', 'w8a8', marks=pytest.mark.slow),
    # Its codes of 8 bits are odd ones of nine.
    pytest.param('statsq', 'w4a4', marks=pytest.mark.slow),
  ],
)
def test_a_trained_run_is_written_with_its_codes(recipe, bits, tmp_path):
  config = make_digits_config()
  config.quant.update(recipe=recipe, default=bits)
  config.train.steps = config.eval.every = 6
  modes.run('train', config, str(tmp_path))
  config.export.format = 'onnx'
  modes.run('export', config, str(tmp_path))
  parity = json.loads((tmp_path / 'export' / 'parity.json').read_text())
  found = parity['engines']['onnxruntime']
  assert found['loss'] == pytest.approx(parity['jax']['loss'], abs=0.02)
  assert parity['products']['equal'] > 0.98
  assert found['kernels']['float'] <= 2
