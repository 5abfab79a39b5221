"""Products of a packed model in ONNX, in the forms that runtimes are fast in.

Calibrated codes: QuantizeLinear and DequantizeLinear around float operators,
which onnxruntime and OpenVINO turn into integer kernels. Inputs of layers are
unsigned bytes, kernels signed; queries, keys and values are signed with zero
point 0 where calibration made them symmetric, as OpenVINO's attention asks.
Codes that each row finds are in `onnx_rows`.
"""

import dataclasses
import math

import numpy as np
import scipy.linalg

from qvit_jax.export import onnx_rows
from qvit_jax.export.graph import Codes, Kernel, Product
from qvit_jax.export.onnx_file import Writer

_BYTE, _NIBBLE = 8, 4  # bits
# A bias has at most this many steps of its product.
_MOST_STEPS = 2**30


def layer(w: Writer, x: str, p: Product) -> str:
  """Returns a layer's result, [..., o]; a convolution's image is [b, c, h, w].

  Args:
    w: What it is written to.
    x: The input.
    p: The layer.
  """
  plan, shape = p.plan, p.site.lhs_shape
  if plan.clip:
    x = w.node('Clip', x, w.constant(-plan.clip), w.constant(plan.clip))
  if plan.block:
    x = _turned(w, x, plan.block, shape)
  if plan.acts and not plan.is_static:
    return onnx_rows.layer(w, x, p)
  bias = w.constant(p.bias)
  if plan.acts:
    x = coded(w, x, p.lhs, plan.acts)
  if p.site.window is None:
    is_vector = len(shape) == 1 and plan.acts
    if is_vector:  # onnxruntime makes a float Gemm of two axes and a bias
      x = w.reshape(x, (-1, 1, *shape))
    y = w.node('MatMul', x, _matrix(w, p.kernel))
    if p.kernel.shift is not None:
      total = w.reduce('ReduceSum', x, -1)
      y = w.node('Add', y, w.node('Mul', total, w.constant(p.kernel.shift)))
    y = w.node('Add', y, bias)
    return w.reshape(y, (-1, p.site.rhs_shape[1])) if is_vector else y
  kernel = p.kernel
  if plan.acts:
    kernel, bias = _integer_bias(w, p)
  window = p.site.window
  pads = window.padding
  return w.node(
    'Conv', x, _windows(w, kernel, p), bias, kernel_shape=window.size,
    strides=window.strides, group=window.groups,
    pads=[pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
  )  # fmt: skip


def attention(w: Writer, a: str, b: str, p: Product) -> str:
  """Returns an attention product, [b, k, n, m] or [b, k, n, d].

  Args:
    w: What it is written to.
    a: Queries [b, n, k, d], or attention weights [b, k, n, m].
    b: Keys, or values, [b, m, k, d].
    p: The product.
  """
  plan, is_qk = p.plan, p.site.kind == 'qk'
  if plan.acts and not plan.is_static:
    return onnx_rows.attention(w, a, b, p)
  if is_qk:
    a = w.transpose(a, 0, 2, 1, 3)
  b = w.transpose(b, *((0, 2, 3, 1) if is_qk else (0, 2, 1, 3)))
  if plan.acts:
    a = coded(w, a, p.lhs, plan.acts, may_sign=True)
    b = coded(w, b, p.rhs, plan.acts, may_sign=True)
  return w.node('MatMul', a, b)


def coded(
  w: Writer, x: str, codes: Codes, bits: int, *, may_sign: bool = False
) -> str:
  """Returns a value moved to its calibrated levels.

  Args:
    w: What it is written to.
    x: The value.
    codes: Scale and zero.
    bits: Of a code.
    may_sign: Whether symmetric codes are written as signed bytes.
  """
  scale, zero = (np.float32(np.ravel(c)[0]) for c in codes)
  most = 2**bits - 1
  if bits < _BYTE:
    ends = (w.constant((end - zero) * scale) for end in (0, most))
    x = w.node('Clip', x, *ends)
  is_signed = may_sign and zero == 2 ** (bits - 1)
  point = w.constant(*((0, np.int8) if is_signed else (zero, np.uint8)))
  scale = w.constant(scale)
  x = w.node('QuantizeLinear', x, scale, point)
  return w.node('DequantizeLinear', x, scale, point)


def _turned(w: Writer, x: str, block: int, shape) -> str:
  """Returns blocks of channels turned by a Hadamard matrix."""
  matrix = scipy.linalg.hadamard(block).astype(np.float32) * block**-0.5
  x = w.node('MatMul', w.reshape(x, (-1, block)), w.constant(matrix))
  return w.reshape(x, (-1, *shape))


def _matrix(w: Writer, kernel: Kernel) -> str:
  """Returns a kernel [i, o] in float, from its codes."""
  if kernel.scale is None:
    return w.constant(kernel.codes)
  return _weights(w, kernel)


def _weights(w: Writer, kernel: Kernel) -> str:
  """Returns a packed kernel [i, o], dequantized in the graph."""
  codes, facts, scale = kernel.codes, {'axis': 1}, kernel.scale[0]
  if len(kernel.scale) > 1:
    # Blocks that divide the rows, as OpenVINO asks.
    size = math.gcd(len(codes), kernel.group)
    scale = np.repeat(kernel.scale, kernel.group // size, axis=0)
    facts, scale = {'axis': 0, 'block_size': size}, scale[: len(codes) // size]
  return _dequantized(w, kernel, codes, scale, **facts)


def _dequantized(
  w: Writer, kernel: Kernel, codes: np.ndarray, scale: np.ndarray, **facts: int
) -> str:
  """Returns codes of a kernel, in any shape, times their scales."""
  scales = w.constant(scale)
  is_small = codes.min() >= -8 and codes.max() <= 7
  if w.nibbles and kernel.bits <= _NIBBLE and is_small:
    return w.node('DequantizeLinear', w.int4(codes), scales, **facts)
  # Said, and each by itself: where onnxruntime makes bytes unsigned, it adds a
  # wrong one where there is none, and fails on what it has changed already.
  zero = w.constant(np.zeros(scale.shape), np.int8, shared=False)
  codes = w.constant(codes, np.int8, shared=False)
  return w.node('DequantizeLinear', codes, scales, zero, **facts)


def _windows(w: Writer, kernel: Kernel, p: Product) -> str:
  """Returns the kernel of a convolution, [o, i, kh, kw], in float."""
  shape = p.site.window.kernel_shape(p.site.rhs_shape)
  turn = lambda x: x.reshape(shape).transpose(3, 2, 0, 1)
  if kernel.scale is None:
    return w.constant(turn(kernel.codes))
  if len(kernel.scale) > 1:  # of rows of the matrix
    full = w.reshape(_weights(w, kernel), shape)
    return w.transpose(full, 3, 2, 0, 1)
  return _dequantized(w, kernel, turn(kernel.codes), kernel.scale[0], axis=0)


def _integer_bias(w: Writer, p: Product) -> tuple[Kernel, str]:
  """Returns the kernel and the bias of an integer convolution.

  The bias is a whole number of the product's steps, as integer kernels add it.
  Channels whose codes are all 0 get steps that the bias can be told in.
  """
  first = float(np.ravel(p.lhs[0])[0])
  scale = p.kernel.scale[0].astype(np.float64)
  needed = np.abs(p.bias) / (first * _MOST_STEPS)
  is_dead = ~p.kernel.codes.any(axis=0)
  scale = np.where(is_dead, np.maximum(needed, scale), scale)
  if (scale < needed).any():  # a bias beyond all products
    return p.kernel, w.constant(p.bias)
  scale = scale.astype(np.float32)
  steps = (scale * np.float32(first)).astype(np.float32)
  codes = np.round(p.bias.astype(np.float64) / steps)
  bias = w.node(
    'DequantizeLinear', w.constant(codes, np.int32), w.constant(steps), axis=0
  )
  return dataclasses.replace(p.kernel, scale=scale[None]), bias
