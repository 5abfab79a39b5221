"""Other runtimes behind eval, predict, ptq and benchmark; no time is judged."""

import json
import sys

import jax
import numpy as np
import onnx
import openvino
import pytest

from qvit_jax import modes
from qvit_jax.errors import ConfigError, ExportError
from qvit_jax.export import engines
from tests.conftest import (
  EIGHT_DEVICES,
  TINY,
  make_digits_config,
  notes_of,
  run_main,
  start_two,
)
from tests.modes.test_predict import predict, write_images

ENGINES = 'onnxruntime', 'openvino'
STATIC, DYNAMIC = 'int8_static+plain', 'w4a4+plain'


def read(workdir, name):
  return json.loads((workdir / name).read_text())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A float run of a few steps; returns its workdir."""
  workdir = tmp_path_factory.mktemp('engines') / 'run'
  config = make_digits_config()
  config.train.update(steps=30, batch_size=64)
  config.eval.every = 30
  modes.run('train', config, str(workdir))
  return workdir


@pytest.fixture(scope='module')
def table(trained, tmp_path_factory):
  """A PTQ table of it in both runtimes; returns its workdir."""
  workdir = tmp_path_factory.mktemp('engines') / 'ptq'
  config = make_digits_config()
  config.checkpoint.path = str(trained)
  config.ptq.update(
    rows=('fp32', STATIC, DYNAMIC, 'w12a12+plain'), rounds=2,
    calibration_examples=32, latency_batch=4, engines=('auto',),
  )  # fmt: skip
  modes.run('ptq', config, str(workdir))
  return workdir


def evaluated(workdir, tmp_path, engine, **fields):
  """The row that --mode=eval writes."""
  config = make_digits_config()
  config.checkpoint.path = str(workdir)
  config.eval.update(engine=engine, batch_size=100)  # the last one is padded
  config.update_from_flattened_dict(fields)
  modes.run('eval', config, str(tmp_path))
  return read(tmp_path, 'results.json')['baseline']


def test_a_runtime_evaluates_a_float_run_on_the_same_images(trained, tmp_path):
  ours = evaluated(trained, tmp_path, 'jax')
  assert ours['engine'] == {'name': 'jax', 'version': jax.__version__}
  for engine in ENGINES:
    row = evaluated(trained, tmp_path, engine)
    assert row['engine']['name'] == engine
    assert row['engine']['version'] == sys.modules[engine].__version__[
      : len(row['engine']['version'])
    ]
    assert row['engine']['kernels'] == {'integer': 0, 'packed': 0, 'float': 10}
    assert row['execution'] == 'float'
    assert row['loss'] == pytest.approx(ours['loss'], rel=1e-5)
    for key in ('num_examples', 'top1', 'data', 'split', 'confusion'):
      assert row[key] == ours[key]


def test_a_runtime_evaluates_a_packed_file_in_integers(table, tmp_path):
  path = table / 'artifacts' / f'{STATIC}.safetensors'
  packed = {'quant.recipe': 'ptq'}
  ours = evaluated(path, tmp_path, 'jax', **packed)
  for engine in ENGINES:
    row = evaluated(path, tmp_path, engine, **packed)
    assert row['execution'] == 'integer'
    assert row['engine']['kernels'] == {'integer': 10, 'packed': 0, 'float': 0}
    assert row['loss'] == pytest.approx(ours['loss'], rel=1e-3)
    assert row['artifact_bytes'] == path.stat().st_size


def test_a_row_that_a_runtime_has_no_operators_for_is_one_line(table, tmp_path):
  path = table / 'artifacts' / f'{DYNAMIC}.safetensors'
  with pytest.raises(ExportError, match='openvino has no operators.*onnxrunt'):
    evaluated(path, tmp_path, 'openvino', **{'quant.recipe': 'ptq'})


def test_a_runtime_names_the_classes_that_we_name(trained, tmp_path):
  write_images(tmp_path)
  ours = predict(trained, tmp_path)
  for engine in ENGINES:
    found = predict(trained, tmp_path, **{'eval.engine': engine})
    assert list(found) == list(ours)
    for name, classes in found.items():
      expected = ours[name]
      assert [c['name'] for c in classes] == [c['name'] for c in expected]
      np.testing.assert_allclose(
        [c['probability'] for c in classes],
        [c['probability'] for c in expected],
        rtol=1e-3,
      )


def test_a_table_times_every_runtime(table):
  rows = {r['name']: r['engines'] for r in read(table, 'results.json')['rows']}
  assert all(tuple(found) == ENGINES for found in rows.values())
  for name, found in rows.items():
    for engine, timed in found.items():
      runs = name in ('fp32', STATIC) or (name, engine) == (
        DYNAMIC, 'onnxruntime'
      )  # fmt: skip
      assert (timed['note'] is None) == runs
      rate, times = timed['images_per_second'], timed['latency_ms']
      if runs:
        assert rate == pytest.approx(4e3 / times['median'])
        assert timed['speedup'] > 0
      else:
        assert rate is times is timed['speedup'] is timed['kernels'] is None
  assert '12 bits' in rows['w12a12+plain']['onnxruntime']['note']
  assert rows[STATIC]['openvino']['kernels']['integer'] == 10
  page = (table / 'report.html').read_text()
  assert page.count('its float32<small>') == 2


@pytest.mark.slow
def test_rows_are_measured_again_where_a_runtime_is_new(
  trained, tmp_path, capsys
):
  config = make_digits_config()
  config.checkpoint.path = str(trained)
  config.ptq.update(rows=('fp32',), calibration_examples=32, rounds=2,
                    latency_batch=4)  # fmt: skip
  for names, is_done in (
    ((), False), (('openvino',), False), ((), True)
  ):  # fmt: skip
    config.ptq.engines = names
    capsys.readouterr()
    modes.run('ptq', config, str(tmp_path))
    assert ('done before' in capsys.readouterr().out) == is_done
  assert set(read(tmp_path, 'results.json')['rows'][0]['engines']) == {
    'openvino'
  }


def benchmark(workdir, **fields):
  config = make_digits_config()
  config.eval.batch_size = 4
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  modes.run('benchmark', config, str(workdir))
  return read(workdir, 'benchmark.json')['inference']


def save_foreign(folder):
  """A model of others in both forms: channels first, and another name."""
  value = onnx.helper.make_tensor_value_info
  size = onnx.helper.make_tensor('size', 7, (2,), (0, 192))
  kernel = onnx.numpy_helper.from_array(np.ones((192, 10), 'float32'), 'kernel')
  graph = onnx.helper.make_graph(
    [onnx.helper.make_node('Reshape', ['x', 'size'], ['flat']),
     onnx.helper.make_node('MatMul', ['flat', 'kernel'], ['y'])],
    'foreign', [value('x', 1, ('n', 3, 8, 8))], [value('y', 1, ('n', 10))],
    [size, kernel],
  )  # fmt: skip
  model = onnx.helper.make_model(
    graph, opset_imports=[onnx.helper.make_opsetid('', 20)], ir_version=10
  )
  onnx.save(model, folder / 'foreign.onnx')
  openvino.save_model(
    openvino.Core().read_model(folder / 'foreign.onnx'), folder / 'theirs.xml'
  )
  return folder / 'foreign.onnx', folder / 'theirs.xml'


def test_a_packed_file_and_its_rivals_take_turns_in_every_runtime(
  table, tmp_path, capsys
):
  artifacts = table / 'artifacts'
  rivals = save_foreign(tmp_path)
  result = benchmark(tmp_path, **{
    'quant.recipe': 'ptq',
    'checkpoint.path': str(artifacts / f'{STATIC}.safetensors'),
    'eval.rivals': tuple(
      map(str, (artifacts / f'{DYNAMIC}.safetensors', *rivals))
    ),
  })  # fmt: skip
  expected = {
    f'{engine} {model}'
    for engine in ('jax', *ENGINES)
    for model in ('float32', STATIC, DYNAMIC, 'foreign', 'theirs')
  } - {
    f'openvino {DYNAMIC}', 'jax foreign', 'jax theirs', 'onnxruntime theirs'
  }  # fmt: skip
  assert set(result['candidates']) == set(result['samples_seconds']) == expected
  assert list(result['refused']) == [f'openvino {DYNAMIC}']
  kernels = {n: c.get('kernels') for n, c in result['candidates'].items()}
  assert kernels[f'openvino {STATIC}']['integer'] == 10
  assert kernels['onnxruntime float32']['float'] == 10
  assert kernels['onnxruntime foreign']['float'] == 1
  samples = result['samples_seconds']
  faster = result['speedups'][f'openvino {STATIC}']['openvino theirs']
  ours = samples[f'openvino {STATIC}']
  ratios = np.divide(samples['openvino theirs'], ours)
  assert faster['median'] == pytest.approx(np.median(ratios))
  assert f'openvino: {STATIC} is' in capsys.readouterr().out


def test_a_recipe_is_timed_in_the_runtime_that_is_named(tmp_path):
  fields = {'quant.recipe': 'aqt', 'eval.engine': 'onnxruntime'}
  result = benchmark(tmp_path, **fields)
  assert set(result['candidates']) == {
    f'{engine} {model}'
    for engine in ('jax', 'onnxruntime')
    for model in ('float32', 'model')
  }
  kernels = result['candidates']['onnxruntime model']['kernels']
  assert kernels == {'integer': 8, 'packed': 0, 'float': 2}


@pytest.mark.parametrize(
  ('rivals', 'engine', 'says'),
  [
    (('absent.onnx',), 'jax', "'absent.onnx' is no file of a packed model"),
    (('foreign.onnx',), 'jax', 'foreign.onnx.*is no model: onnxruntime'),
    (('wide.onnx',), 'jax', r"takes .'n', 9., but the images here are"),
    (('theirs.xml',), 'onnxruntime', 'is read by openvino alone'),
  ],
)
def test_a_bad_rival_is_one_line(
  rivals, engine, says, table, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'foreign.onnx').write_bytes(b'nothing')
  (tmp_path / 'theirs.xml').write_bytes(b'nothing')
  value = onnx.helper.make_tensor_value_info
  node = onnx.helper.make_node('Relu', ['x'], ['y'])
  wide = [value(name, 1, ('n', 9)) for name in 'xy']
  graph = onnx.helper.make_graph([node], 'wide', wide[:1], wide[1:])
  onnx.save(onnx.helper.make_model(graph, ir_version=10), 'wide.onnx')
  with pytest.raises(ConfigError, match=says):
    benchmark(tmp_path, **{
      'quant.recipe': 'ptq', 'eval.rivals': rivals, 'eval.engine': engine,
      'checkpoint.path': str(table / 'artifacts' / f'{STATIC}.safetensors'),
    })  # fmt: skip


@pytest.mark.parametrize('mode', ['train', 'ptq', 'sites', 'export'])
def test_modes_that_compute_in_jax_take_no_runtime(mode):
  config = make_digits_config()
  config.eval.engine = 'openvino'
  with pytest.raises(ConfigError) as error:
    notes_of(config, mode=mode, overrides=['eval.engine'])
  said = str(error.value)
  assert "eval.engine='openvino'" in said and '\n' not in said
  assert 'eval, predict and benchmark' in said
  assert '--config.eval.engine=jax' in said


def test_an_unknown_runtime_is_told_the_known_ones():
  config = make_digits_config()
  config.eval.engine = 'tensorrt'
  with pytest.raises(ConfigError, match="'jax' . 'onnxruntime' . 'openvino'"):
    notes_of(config, mode='eval')


def test_an_unknown_runtime_of_a_table_is_told_the_known_ones(
  trained, tmp_path
):
  config = make_digits_config()
  config.checkpoint.path = str(trained)
  config.ptq.update(rows=('fp32',), engines=('tensorrt',))
  with pytest.raises(ConfigError, match="names 'tensorrt'; allowed: 'onnxrun"):
    modes.run('ptq', config, str(tmp_path))


def test_adapters_are_folded_in_before_a_runtime_runs_them():
  config = make_digits_config()
  config.lora.update(rank=2, targets=('all',))
  config.eval.engine = 'openvino'
  with pytest.raises(ConfigError, match='lora.rank=2; fold.*merge_lora'):
    notes_of(config, mode='eval')


@pytest.mark.parametrize('engine', ENGINES)
def test_a_missing_runtime_says_what_to_install(
  engine, trained, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, engine, None)
  assert engine not in engines.installed()
  with pytest.raises(ConfigError, match=r'pip install -r requirements-o\w+\.'):
    evaluated(trained, tmp_path, engine)
  assert not (tmp_path / 'results.json').exists()


def test_a_missing_onnx_says_what_to_install(trained, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(ExportError, match='pip install -r requirements-onnx.txt'):
    evaluated(trained, tmp_path, 'onnxruntime')


@pytest.mark.slow
def test_a_runtime_runs_in_one_process(trained, tmp_path):
  processes = start_two(
    *TINY, '--mode=eval', f'--workdir={tmp_path}', '--config.quant.recipe=none',
    '--config.eval.engine=onnxruntime', f'--config.checkpoint.path={trained}',
  )  # fmt: skip
  said = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [2, 2]
  assert all(
    "eval.engine='onnxruntime' runs in one process, but there are 2" in text
    for text in said
  )


@pytest.mark.slow
def test_eight_devices_prepare_the_images_of_a_runtime(trained, tmp_path):
  rows = []
  for engine in ('jax', 'onnxruntime'):
    done = run_main(
      *TINY, '--mode=eval', f'--workdir={tmp_path}',
      '--config.quant.recipe=none', f'--config.eval.engine={engine}',
      f'--config.checkpoint.path={trained}', env=EIGHT_DEVICES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows.append(read(tmp_path, 'results.json')['baseline'])
  ours, theirs = rows
  assert theirs['engine']['name'] == 'onnxruntime'
  assert theirs['loss'] == pytest.approx(ours['loss'], rel=1e-5)
  assert theirs['confusion'] == ours['confusion']
