"""Makes an ONNX model, node by node: the one place that knows the format.

Source: ONNX operators, opset 20 (IR 10); 21 where 4-bit initializers are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qvit_jax.errors import ExportError

OPSET, OPSET_INT4, IR = 20, 21, 10
# Operators of onnxruntime alone.
CONTRIB = 'com.microsoft'
# Fact of a file: a JSON object of the session options that it needs.
OPTIONS = 'onnxruntime_options'
# Products of bytes are exact on x86 without VNNI too.
EXACT = {'session.x64quantprecision': '1'}
_NEED = (
  'ONNX files need the package onnx, which is not installed; run '
  'pip install -r requirements-onnx.txt'
)


def package() -> Any:
  """Returns the package onnx.

  Raises:
    ExportError: It is not installed.
  """
  try:
    import onnx
  except ImportError as error:
    raise ExportError(_NEED) from error
  return onnx


def to_bytes(model: Any) -> bytes:
  """Returns the content of a file.

  Raises:
    ExportError: It would be larger than the format's library allows.
  """
  try:
    return model.SerializeToString()
  except ValueError as error:  # protobuf's limit
    raise ExportError(
      'the model is larger than the 2 GB of one ONNX file; pack it with '
      '--mode=ptq, or set --config.export.format=stablehlo'
    ) from error


def facts(model: Any) -> dict[str, str]:
  """Returns what a ModelProto says of itself, by name."""
  return {p.key: p.value for p in model.metadata_props}


class Writer:
  """Nodes and constants of a model that is being made."""

  def __init__(self, name: str, *, nibbles: bool = False):
    """Starts an empty model.

    Args:
      name: Of the model.
      nibbles: Whether kernels of 4 bits and less are stored two in a byte.
    """
    self._onnx = package()
    self._name, self._opset, self._domains = name, OPSET, {''}
    self._nodes: list[Any] = []
    self._constants: dict[Any, str] = {}
    self._initializers: list[Any] = []
    self.nibbles = nibbles
    self._inputs: list[Any] = []
    self._outputs: list[Any] = []
    self.path = ''  # of what is being written, for names

  def input(self, name: str, dtype: Any, shape: Sequence[Any]) -> str:
    """Declares an input; axes of the shape may be names."""
    self._inputs.append(self._value(name, dtype, shape))
    return name

  def output(
    self, value: str, name: str, shape: Sequence[Any] | None
  ) -> None:
    """Declares a float32 output under a name; its shape may be unknown."""
    self.node('Identity', value, output=name)
    self._outputs.append(self._value(name, np.float32, shape))

  def _value(self, name, dtype, shape):
    kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return self._onnx.helper.make_tensor_value_info(
      name, kind, None if shape is None else list(shape)
    )

  def constant(
    self, x: Any, dtype: Any = np.float32, *, shared: bool = True
  ) -> str:
    """Returns the name of a constant; equal ones that are shared are one."""
    x = np.array(x, dtype, order='C')  # a number stays one
    key = x.dtype.str, x.shape, x.tobytes() if shared else len(self._nodes)
    if key not in self._constants:
      name = f'{self.path or "c"}:{len(self._initializers)}'
      tensor = self._onnx.numpy_helper.from_array(x, name)
      self._initializers.append(tensor)
      self._constants[key] = name
    return self._constants[key]

  def int4(self, codes: np.ndarray) -> str:
    """Returns the name of a constant of codes from -8 to 7, two in a byte."""
    flat = codes.ravel().astype(np.uint8) & 0xF
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    name = f'{self.path or "c"}:{len(self._initializers)}'
    tensor = self._onnx.helper.make_tensor(
      name, self._onnx.TensorProto.INT4, codes.shape,
      (flat[::2] | (flat[1::2] << 4)).tobytes(), raw=True,
    )  # fmt: skip
    self._initializers.append(tensor)
    self._opset = OPSET_INT4
    return name

  def node(
    self, op: str, *inputs: str, output: str = '', domain: str = '', **facts
  ) -> str:
    """Adds an operation; returns the name of its value."""
    name = f'{self.path}/{op}:{len(self._nodes)}'
    output = output or name
    self._domains.add(domain)
    self._nodes.append(
      self._onnx.helper.make_node(
        op, list(inputs), [output], name=name, domain=domain, **facts
      )
    )
    return output

  def filled(self, shape: str, value: Any, dtype: Any) -> str:
    """Returns one number in a shape that is known as the model runs."""
    one = self._onnx.numpy_helper.from_array(np.array([value], dtype))
    return self.node('ConstantOfShape', shape, value=one)

  def cast(self, x: str, dtype: Any) -> str:
    """Returns a value in another dtype."""
    kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return self.node('Cast', x, to=kind)

  def reshape(self, x: str, shape: Sequence[int]) -> str:
    """Returns a value in another shape; 0 keeps an axis, -1 is the rest."""
    return self.node('Reshape', x, self.constant(shape, np.int64))

  def transpose(self, x: str, *axes: int) -> str:
    """Returns a value with its axes in another order."""
    return self.node('Transpose', x, perm=axes)

  def reduce(self, op: str, x: str, *axes: int, keepdims: int = 1) -> str:
    """Returns ReduceMin or another reduction over axes; of all if none."""
    over = (self.constant(axes, np.int64),) if axes else ()
    return self.node(op, x, *over, keepdims=keepdims)

  def cut(self, x: str, axis: int, start: int, stop: int | None) -> str:
    """Returns a part of an axis."""
    last = np.iinfo(np.int64).max if stop is None else stop
    ends = (self.constant([n], np.int64) for n in (start, last, axis))
    return self.node('Slice', x, *ends)

  def model(self, facts: dict[str, str]) -> Any:
    """Returns the ModelProto.

    Args:
      facts: What the file says of itself, by name.
    """
    helper = self._onnx.helper
    graph = helper.make_graph(
      self._nodes, self._name, self._inputs, self._outputs,
      self._initializers,
    )  # fmt: skip
    opsets = [
      helper.make_opsetid(domain, self._opset if not domain else 1)
      for domain in sorted(self._domains)
    ]
    made = helper.make_model(
      graph, opset_imports=opsets, ir_version=IR, producer_name='qvit_jax'
    )
    helper.set_model_props(made, facts)
    return made
