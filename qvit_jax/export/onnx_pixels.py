"""From uint8 pixels of any size to what the model sees, inside an ONNX file.

Resizing is two products with matrices that are made of the image's size as it
comes, since Resize does not smooth before it shrinks in every runtime. The
numbers are those of `data.preprocess.prepare_eval`.
"""

from typing import Any

import numpy as np

from qvit_jax.export.onnx_file import Writer

NAME = 'pixels'


def prepared(w: Writer, size: int, data: Any, batch: str) -> str:
  """Declares the input `pixels`; returns normalised images [b, size, size, 3].

  Args:
    w: What it is written to.
    size: Of the model.
    data: Section of a config: `resize`, `mean` and `std`.
    batch: Name of the batch axis.
  """
  w.path = NAME
  x = w.input(NAME, np.uint8, (batch, 'height', 'width', 3))
  shape = w.node('Shape', x)
  # Divided, as there: a reciprocal would be another float.
  x = w.node('Div', w.cast(x, np.float32), w.constant(255))
  x = w.transpose(x, 0, 3, 1, 2)
  down = _shares(w, w.cut(shape, 0, 1, 2), size, data.resize)
  right = _shares(w, w.cut(shape, 0, 2, 3), size, data.resize)
  x = w.node('MatMul', w.node('MatMul', down, x), w.transpose(right, 1, 0))
  x = w.node('Clip', x, w.constant(0), w.constant(1))  # bicubic overshoots
  x = w.transpose(x, 0, 2, 3, 1)
  x = w.node('Sub', x, w.constant(tuple(data.mean)))
  return w.node('Div', x, w.constant(tuple(data.std)))


def _shares(w: Writer, count: str, size: int, method: str) -> str:
  """Returns what each pixel counts in each new one, [size, count].

  As `jax.image.resize`: a kernel that is as wide as a new pixel, where these
  are larger. Source: Keys 1981, "Cubic convolution interpolation for digital
  image processing", with a = -1/2.

  Args:
    w: What it is written to.
    count: Pixels of the image, [1].
    size: New pixels.
    method: 'bilinear' or 'bicubic'.
  """
  op = lambda name, *x: w.node(name, *x)
  number = w.constant
  step = op('Div', w.cast(count, np.float32), number(size))  # [1]
  centers = op('Mul', number(np.arange(size)[:, None] + 0.5), step)
  centers = op('Sub', centers, number(0.5))
  first, one = number(0, np.int64), number(1, np.int64)
  last = w.reshape(count, ())
  places = w.cast(op('Range', first, last, one), np.float32)  # [count]
  x = op('Abs', op('Sub', centers, places))
  x = op('Div', x, op('Max', step, number(1)))
  if method == 'bilinear':
    shares = op('Relu', op('Sub', number(1), x))
  else:
    shares = _cubic(w, x)
  return op('Div', shares, w.reduce('ReduceSum', shares, 1))


def _cubic(w: Writer, x: str) -> str:
  """Returns the cubic kernel of distances."""

  def polynomial(*factors: float) -> str:
    total = w.constant(factors[0])
    for factor in factors[1:]:
      total = w.node('Add', w.node('Mul', total, x), w.constant(factor))
    return total

  near, far = polynomial(1.5, -2.5, 0, 1), polynomial(-0.5, 2.5, -4, 2)
  is_near = w.node('Less', x, w.constant(1))
  is_far = w.node('Less', x, w.constant(2))
  outer = w.node('Where', is_far, far, w.constant(0))
  return w.node('Where', is_near, near, outer)
