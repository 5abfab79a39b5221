"""Runtimes that execute ONNX files, as engines: onnxruntime and OpenVINO.

Both multiply integers as the file says and compute the rest in float32: no
hidden bfloat16, no rounding of activations that the file does not ask for. On
x86 without VNNI the pairs of products that OpenVINO adds in 16 bits may not fit
(`cuts_sums`); files tell onnxruntime to take its exact kernels there.
"""

import abc
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qvit_jax.errors import ConfigError, ExportError
from qvit_jax.export import onnx_file

REQUIREMENTS = {
  'onnxruntime': 'requirements-onnx.txt',
  'openvino': 'requirements-openvino.txt',
}
# Operators by how they multiply, in the optimized graphs.
_INTEGER = (
  'QLinearMatMul', 'MatMulInteger', 'MatMulIntegerToFloat',
  'DynamicQuantizeMatMul', 'QGemm', 'QLinearConv', 'ConvInteger',
)  # fmt: skip
_PACKED = ('MatMulNBits',)
_FLOAT = ('MatMul', 'FusedMatMul', 'Gemm', 'FusedGemm', 'Conv', 'FusedConv',
          'NhwcFusedConv', 'Attention', 'MultiHeadAttention')  # fmt: skip
_PRODUCTS = ('FullyConnected', 'MatMul', 'Convolution', 'GroupConvolution',
             'ScaledDotProductAttention')  # fmt: skip
# Names that the writer gives to products of attention.
_IS_PRODUCT = re.compile(r'/(qk|av)/MatMul:\d+$')


@dataclasses.dataclass(frozen=True)
class Kernels:
  """How many products an engine runs in which way.

  Attributes:
    integer: Of two integers.
    packed: Of float activations and packed weights.
    float: Of float numbers.
    names: Operators of the engine and their counts.
  """

  integer: int
  packed: int
  float: int
  names: Mapping[str, int]


class Engine(abc.ABC):
  """An ONNX model that was loaded by a runtime.

  Attributes:
    name: Of the runtime.
    version: Of its package.
    images: Name of the first input.
    shape: Of that input; an axis that is free is no positive number.
  """

  name: str
  version: str
  images: str
  shape: tuple[Any, ...]

  @abc.abstractmethod
  def run_all(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns every output by name, of inputs by name."""

  @abc.abstractmethod
  def kernels(self) -> Kernels:
    """Returns how the products run after the runtime's own optimizations."""

  def run(self, images: np.ndarray) -> np.ndarray:
    """Returns float32 logits [b, classes] of normalised images [b, h, w, 3]."""
    return next(iter(self.run_all({self.images: images}).values()))


@contextlib.contextmanager
def _needed(name: str) -> Iterator[None]:
  """Turns a package that cannot be imported into one line."""
  try:
    yield
  except ImportError as error:
    raise _missing(name) from error


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
  """Keeps OpenVINO from telling its makers that it is imported.

  It does so over the network, from a fork of this process; JAX has threads by
  then, and a fork of those may hang.
  """
  name = 'openvino_telemetry'
  if name in sys.modules:
    yield
    return
  sys.modules[name] = None  # type: ignore[assignment] - cannot be imported
  try:
    yield
  finally:
    del sys.modules[name]


def _missing(name: str) -> ConfigError:
  return ConfigError(
    f'the engine {name} is not installed; run pip install -r '
    f'{REQUIREMENTS[name]}, or leave {name} out'
  )


class _OnnxRuntime(Engine):
  name = 'onnxruntime'

  def __init__(self, content: bytes | str, threads: int):
    with _needed(self.name):
      import onnxruntime
    self.version = onnxruntime.__version__
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = threads
    # Weights are packed, activations stay float32: no level 4 (int8).
    options.add_session_config_entry(
      'session.qdq_matmulnbits_accuracy_level', '1'
    )
    for key, value in _loaded(lambda: _options(content), self).items():
      options.add_session_config_entry(key, value)
    # Threads that wait for work between two calls would slow others down.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'optimized.onnx'
      options.optimized_model_filepath = str(path)
      self._session = _loaded(
        lambda: onnxruntime.InferenceSession(
          content, options, providers=['CPUExecutionProvider']
        ),
        self,
      )
      graph = onnx_file.package().load(path).graph
    self._names = collections.Counter(node.op_type for node in graph.node)
    first = self._session.get_inputs()[0]
    self.images, self.shape = first.name, tuple(first.shape)

  def run_all(self, feed):
    """See `Engine`."""
    names = [output.name for output in self._session.get_outputs()]
    return dict(zip(names, self._session.run(None, feed), strict=True))

  def kernels(self) -> Kernels:
    """See `Engine`."""
    count = lambda names: sum(self._names[name] for name in names)
    return Kernels(count(_INTEGER), count(_PACKED), count(_FLOAT), self._names)


def _options(content: bytes | str) -> dict[str, str]:
  """Returns the session options that a file asks for."""
  onnx = onnx_file.package()
  if isinstance(content, bytes):
    model = onnx.load_from_string(content)
  else:
    model = onnx.load(content, load_external_data=False)
  return json.loads(onnx_file.facts(model).get(onnx_file.OPTIONS, '{}'))


class _OpenVino(Engine):
  name = 'openvino'

  def __init__(self, content: bytes | str, threads: int):
    with _needed(self.name), _unreported():
      import openvino
    self.version = openvino.__version__.partition('-')[0]
    core = openvino.Core()
    wanted = {
      'INFERENCE_PRECISION_HINT': 'f32',
      'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0',
      'PERFORMANCE_HINT': 'LATENCY',  # one image after the other, all cores
    }
    if threads:
      wanted['INFERENCE_NUM_THREADS'] = str(threads)
    self._model = _loaded(
      lambda: core.compile_model(core.read_model(content), 'CPU', wanted), self
    )
    first = self._model.input(0)
    self.images, self.shape = first.any_name, tuple(
      -1 if axis.is_dynamic else axis.get_length()
      for axis in first.partial_shape
    )

  def run_all(self, feed):
    """See `Engine`."""
    return {
      name: np.asarray(x)
      for key, x in self._model(feed).items()
      for name in key.names
    }

  def kernels(self) -> Kernels:
    """See `Engine`."""
    names: collections.Counter = collections.Counter()
    ways: collections.Counter = collections.Counter()
    for node in self._model.get_runtime_model().get_ops():
      facts = node.get_rt_info()
      kind, precision = (
        str(facts[key].astype(str)) for key in ('layerType', 'runtimePrecision')
      )
      count = int(kind in _PRODUCTS)
      if kind == 'Subgraph':  # a whole attention: two products
        made_of = str(facts['originalLayersNames'].astype(str)).split(',')
        count = len(set(filter(_IS_PRODUCT.search, made_of)))
      if count:
        names[f'{kind} {precision}'] += 1
        ways[_way(precision, facts)] += count
    return Kernels(ways['integer'], ways['packed'], ways['float'], names)


def _way(precision: str, facts: Any) -> str:
  """Returns how OpenVINO runs a product."""
  if precision not in ('i8', 'u8', 'i4', 'u4'):
    return 'float'
  kind = str(facts['primitiveType'].astype(str))
  # Decompressed as they are read: the activations are float.
  return 'packed' if precision in ('i4', 'u4') or 'f32' in kind else 'integer'


def _loaded(load: Any, engine: Engine) -> Any:
  """Returns what a runtime makes of a file.

  Raises:
    ExportError: It does not take it.
  """
  try:
    return load()
  except Exception as error:  # runtimes raise what they like
    text = ' '.join(str(error).split())[:200]
    raise ExportError(
      f'{engine.name} {engine.version} does not load the file: {text}; give '
      'another row or another --config.export.profile'
    ) from error


ENGINES = {'onnxruntime': _OnnxRuntime, 'openvino': _OpenVino}


def open_engine(name: str, model: Any, threads: int = 0) -> Engine:
  """Returns an engine that has loaded a model.

  Args:
    name: 'onnxruntime' or 'openvino'.
    model: onnx.ModelProto.
    threads: Of one call; 0: the runtime's own choice, all cores.

  Raises:
    ConfigError: The runtime is not installed.
    ExportError: It does not load the file, or that is too large.
  """
  return ENGINES[name](onnx_file.to_bytes(model), threads)


def open_file(name: str, path: str, threads: int = 0) -> Engine:
  """Returns the same of a file of others; its first input are images.

  Raises:
    ConfigError: The runtime is not installed, or the file is no model.
  """
  try:
    return ENGINES[name](path, threads)
  except ExportError as error:
    raise ConfigError(f'{path!r} is no model: {error}') from error


def check_installed(name: str) -> None:
  """Raises ConfigError where a runtime's package is not there."""
  if name not in installed():
    raise _missing(name)


def installed() -> tuple[str, ...]:
  """Returns the names of the engines whose packages are there."""
  return tuple(
    name for name in ENGINES if importlib.util.find_spec(name) is not None
  )


@functools.cache
def cuts_sums(name: str) -> bool:
  """Returns whether large products of bytes come out too small on this CPU.

  See `onnx_rows.is_wide`.
  """
  width, most = 64, 255
  w = onnx_file.Writer('probe')
  x = w.input('x', np.float32, (1, width, width))
  one, zero = w.constant(1), w.constant(0, np.uint8)
  x = w.node('DequantizeLinear', w.node('QuantizeLinear', x, one, zero),
             one, zero)  # fmt: skip
  codes = w.constant(np.full((width, width), 127), np.int8)
  zeros = w.constant(np.zeros(width), np.int8)
  kernel = w.node(
    'DequantizeLinear', codes, w.constant(np.ones(width)), zeros, axis=1
  )
  y = w.node('Add', w.node('MatMul', x, kernel), w.constant(np.zeros(width)))
  w.output(y, 'y', None)
  facts = {onnx_file.OPTIONS: json.dumps(onnx_file.EXACT)}
  engine = open_engine(name, w.model(facts))
  found = engine.run(np.full((1, width, width), most, np.float32))
  return bool(np.abs(found - most * 127 * width).max() > 1)


def runs_in(name: str, profile: str) -> bool:
  """Returns whether an engine has the operators of a profile."""
  return (name, profile) != ('openvino', 'dynamic')
