"""Runtimes as engines: what they run, and how their kernels are counted."""

import subprocess
import sys

import numpy as np
import onnx
import pytest

from qvit_jax.errors import ConfigError, ExportError
from qvit_jax.export import engines
from tests.conftest import ROOT, run_python

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 16)).astype('float32')
KERNEL = RNG.normal(size=(16, 32)).astype('float32')
SCALE, STEP = np.float32(0.03), np.float32(0.02)
CODES = np.clip(np.round(KERNEL / SCALE), -127, 127).astype('int8')


def make(nodes, arrays, output='y', **domains):
  """A model images [n, 16] -> output, of (operator, inputs, output, facts)."""
  value = onnx.helper.make_tensor_value_info
  graph = onnx.helper.make_graph(
    [onnx.helper.make_node(kind, ins, [out], **facts)
     for kind, ins, out, facts in nodes],
    'small', [value('images', 1, ('n', 16))], [value(output, 1, ('n', 32))],
    [onnx.numpy_helper.from_array(x, name) for name, x in arrays.items()],
  )  # fmt: skip
  opsets = [onnx.helper.make_opsetid(d, v) for d, v in domains.items()]
  opsets.append(onnx.helper.make_opsetid('', 20))
  return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def static():
  """x and the kernel of 8 bits with scales, as QuantizeLinear says."""
  u8 = np.uint8(128)
  return make(
    [('QuantizeLinear', ['images', 'step', 'zero'], 'q', {}),
     ('DequantizeLinear', ['q', 'step', 'zero'], 'x', {}),
     ('DequantizeLinear', ['codes', 'scale', 'none'], 'k', {}),
     ('MatMul', ['x', 'k'], 'z', {}),
     ('QuantizeLinear', ['z', 'wide', 'zero'], 'zq', {}),
     ('DequantizeLinear', ['zq', 'wide', 'zero'], 'y', {})],
    {'step': STEP, 'zero': u8, 'codes': CODES, 'scale': SCALE,
     'none': np.int8(0), 'wide': np.float32(0.2)},
  )  # fmt: skip


def test_a_float_product_is_the_product_and_is_counted_as_float():
  model = make([('MatMul', ['images', 'k'], 'y', {})], {'k': KERNEL})
  for name in engines.ENGINES:
    engine = engines.open_engine(name, model, threads=1)
    np.testing.assert_allclose(engine.run(X), X @ KERNEL, rtol=1e-5, atol=1e-5)
    found = engine.kernels()
    assert (found.integer, found.packed, found.float) == (0, 0, 1)


def test_a_product_of_codes_is_exact_and_is_counted_as_integer():
  codes = np.clip(np.round(X / STEP), -128, 127)
  exact = codes @ CODES * np.float64(STEP) * SCALE
  expected = 0.2 * np.clip(np.round(exact / 0.2), -128, 127)
  for name in engines.ENGINES:
    engine = engines.open_engine(name, static())
    found = engine.kernels()
    assert (found.integer, found.packed, found.float) == (1, 0, 0)
    # But for what lies halfway between two levels.
    assert (np.abs(engine.run(X) - expected) < 1e-5).mean() > 0.99


def test_a_packed_kernel_is_counted_as_packed():
  pairs = CODES.T.astype('int32') // 16 + 8  # 0 .. 15, a row an output
  packed = (pairs[:, 0::2] | pairs[:, 1::2] << 4).astype('uint8')
  model = make(
    [('MatMulNBits', ['images', 'codes', 'scales'], 'y',
      {'K': 16, 'N': 32, 'bits': 4, 'block_size': 16,
       'domain': 'com.microsoft'})],
    {'codes': packed[:, None, :], 'scales': np.full(32, SCALE)},
    **{'com.microsoft': 1},
  )  # fmt: skip
  engine = engines.open_engine('onnxruntime', model)
  expected = X @ ((pairs - 8).T * SCALE)
  np.testing.assert_allclose(engine.run(X), expected, rtol=1e-4, atol=1e-4)
  found = engine.kernels()
  assert (found.integer, found.packed, found.float) == (0, 1, 0)


def test_a_file_that_a_runtime_does_not_load_is_one_line(tmp_path):
  model = make([('Nonsense', ['images', 'k'], 'y', {})], {'k': KERNEL})
  path = tmp_path / 'text.onnx'
  path.write_text('text')
  for name in engines.ENGINES:
    with pytest.raises(ExportError, match=f'^{name} .* does not load') as error:
      engines.open_engine(name, model)
    assert '\n' not in str(error.value)
    with pytest.raises(ConfigError, match='text.onnx.* is no model'):
      engines.open_file(name, str(path))


@pytest.mark.parametrize('name', engines.ENGINES)
def test_a_missing_package_says_what_to_install(name, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  file = engines.REQUIREMENTS[name]
  says = f'{name} is not installed; run pip install -r {file}'
  with pytest.raises(ConfigError, match=says):
    engines.open_engine(name, static())
  with pytest.raises(ConfigError, match=says):
    engines.check_installed(name)
  assert file in {p.name for p in ROOT.glob('*.txt')}


def test_the_package_loads_no_runtime_before_one_is_asked_for():
  code = (
    'import sys, qvit_jax.modes.runner, qvit_jax.modes.ptq;'
    'print({"onnx", "onnxruntime", "openvino"} & set(sys.modules))'
  )
  assert run_python(code) == 'set()\n'


def test_openvino_reports_to_nobody():
  code = (
    'import sys; from qvit_jax.export import engines;'
    'from tests.export.test_engines import static;'
    'sys.modules.pop("openvino_telemetry", None);'
    'engines.open_engine("openvino", static());'
    'print("openvino" in sys.modules, "openvino_telemetry" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code], cwd=ROOT, capture_output=True,
    text=True, check=True,
  )  # fmt: skip
  assert done.stdout == 'True False\n'
