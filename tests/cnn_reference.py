"""Convolutional networks in slow float64 NumPy, written from the papers."""

import numpy as np

EPSILON = 1e-5


def convolve(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1):
  """One output pixel after the other: x [b, h, w, i], kernel [kh, kw, i/g, o].

  Group n has input channels n * i / g .. and output channels n * o / g ...
  """
  x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
  kernel = np.asarray(kernel, np.float64)
  kh, kw, inside, features = kernel.shape
  outside = features // groups
  rows = (x.shape[1] - kh) // strides[0] + 1
  columns = (x.shape[2] - kw) // strides[1] + 1
  y = np.zeros((len(x), rows, columns, features))
  for p in range(rows):
    for q in range(columns):
      top, left = p * strides[0], q * strides[1]
      seen = x[:, top : top + kh, left : left + kw]
      for g in range(groups):
        own = slice(g * outside, (g + 1) * outside)
        y[:, p, q, own] = np.tensordot(
          seen[..., g * inside : (g + 1) * inside], kernel[..., own], 3
        )
  return y


def gradients(x, kernel, cotangent, strides, padding, groups):
  """Gradients of sum(convolve(x, kernel) * cotangent), pixel by pixel."""
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
  kernel = np.asarray(kernel, np.float64)
  dx, dk = np.zeros_like(padded), np.zeros_like(kernel)
  kh, kw, inside, features = kernel.shape
  outside = features // groups
  for p in range(cotangent.shape[1]):
    for q in range(cotangent.shape[2]):
      top, left = p * strides[0], q * strides[1]
      at = slice(None), slice(top, top + kh), slice(left, left + kw)
      for g in range(groups):
        own = slice(g * outside, (g + 1) * outside)
        of = (*at, slice(g * inside, (g + 1) * inside))
        given = cotangent[:, p, q, own]
        dx[of] += np.tensordot(given, kernel[..., own], (1, 3))
        dk[..., own] += np.tensordot(padded[of], given, (0, 0))
  (top, bottom), (left, right) = padding
  h, w = dx.shape[1:3]
  return dx[:, top : h - bottom, left : w - right], dk


def padding_of(kind, size, stride, height, width):
  """Zeros around an image: torch's, or TensorFlow's SAME."""
  if kind == 'torch':
    return ((size // 2,) * 2,) * 2
  found = []
  for n in (height, width):
    wanted = -(-n // stride)  # pixels of the result
    total = max(0, (wanted - 1) * stride + size - n)
    found.append((total // 2, total - total // 2))
  return tuple(found)


class Net:
  """Layers of a network by path, from {'params/...': array}."""

  def __init__(self, flat):
    self.flat = {k: np.asarray(x, np.float64) for k, x in flat.items()}

  def conv(self, x, path, norm, *, stride=1, depthwise=False, padding='torch'):
    kernel = self.flat[f'params/{path}/kernel']
    pads = padding_of(padding, kernel.shape[0], stride, *x.shape[1:3])
    groups = x.shape[-1] if depthwise else 1
    x = convolve(x, kernel, (stride, stride), pads, groups)
    x = x + self.flat.get(f'params/{path}/bias', 0)
    if f'params/{norm}/scale' not in self.flat:
      return x
    mean, var = (self.flat[f'batch_stats/{norm}/{n}'] for n in ('mean', 'var'))
    x = (x - mean) / np.sqrt(var + EPSILON)
    params = (self.flat[f'params/{norm}/{n}'] for n in ('scale', 'bias'))
    scale, bias = params
    return x * scale + bias

  def dense(self, x, path):
    return x @ self.flat[f'params/{path}/kernel'] + self.flat[
      f'params/{path}/bias'
    ]


def adaptive_mean(x, size):
  """Means over size x size windows that may overlap."""
  b, h, w, c = x.shape
  y = np.zeros((b, size, size, c))
  for i in range(size):
    for j in range(size):
      rows = slice(i * h // size, -(-(i + 1) * h // size))
      columns = slice(j * w // size, -(-(j + 1) * w // size))
      y[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
  return y


def vgg(flat, images, counts, classifier):
  """VGG: `counts` convolutions a stage."""
  net, x = Net(flat), np.asarray(images, np.float64)
  for i, count in enumerate(counts):
    for k in range(count):
      at = f'{i + 1}_{k + 1}'
      x = np.maximum(net.conv(x, f'conv{at}', f'norm{at}'), 0)
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
  if classifier == 'linear':
    return net.dense(x.mean(axis=(1, 2)), 'head')
  x = adaptive_mean(x, 7).reshape(len(x), -1)
  for name in ('fc1', 'fc2'):
    x = np.maximum(net.dense(x, name), 0)
  return net.dense(x, 'head')


def mobilenet(flat, images, stages, padding):
  """MobileNetV2: (expansion, channels, blocks, stride) stages."""
  net = Net(flat)
  cut = lambda x: np.clip(x, 0, 6)
  x = np.asarray(images, np.float64)
  x = cut(net.conv(x, 'stem', 'stem_norm', stride=2, padding=padding))
  block = 0
  for expansion, _, count, first in stages:
    for i in range(count):
      path, y = f'block_{block:02d}', x
      stride = 1 if i else first
      if expansion != 1:
        y = cut(net.conv(y, f'{path}/expand', f'{path}/expand_norm'))
      y = net.conv(
        y, f'{path}/depthwise', f'{path}/depthwise_norm', stride=stride,
        depthwise=True, padding=padding,
      )  # fmt: skip
      y = net.conv(cut(y), f'{path}/project', f'{path}/project_norm')
      x = x + y if stride == 1 and x.shape == y.shape else y
      block += 1
  x = cut(net.conv(x, 'last', 'last_norm'))
  return net.dense(x.mean(axis=(1, 2)), 'head')
