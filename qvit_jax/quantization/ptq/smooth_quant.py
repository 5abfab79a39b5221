"""Moves the outliers of activations into kernels.

A channel of a norm's output (or of an attention's values) is divided by s, the
rows of the kernels that read it are multiplied by s: the function stays.

Source: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438, equation 4. Values of
attention are our addition: softmax weights sum over tokens, so a channel's
factor passes through them.
"""

from collections.abc import Mapping

import numpy as np

from qvit_jax.ops import Stream
from qvit_jax.quantization.ptq.solver import Solver, watched

_TINY = 1e-5


def smooth(
  params: dict[str, np.ndarray],
  stream: Stream,
  largest: Mapping[str, np.ndarray],
  *,
  strength: float = 0.5,
) -> dict[str, np.ndarray]:
  """Returns parameters of the same function with evener activations.

  Args:
    params: Path to float32 array.
    stream: Who reads which norm.
    largest: Layer to the absolute maximum of each input channel, [i] > 0.
    strength: Share of the unevenness that goes into the kernels, 0 to 1.
  """
  p = dict(params)
  for norm, layers in stream.readers:
    width = p[f'{norm}/scale'].shape[0]
    acts = np.max(
      [largest[layer].reshape(-1, width).max(axis=0) for layer in layers],
      axis=0,
    )
    rows = [_rows(p[f'{layer}/kernel'], width) for layer in layers]
    kernels = np.max([np.abs(r).max(axis=(0, 2)) for r in rows], axis=0)
    s = _factors(acts, kernels, strength)
    p[f'{norm}/scale'] = p[f'{norm}/scale'] / s
    p[f'{norm}/bias'] = p[f'{norm}/bias'] / s
    for layer, r in zip(layers, rows, strict=True):
      shape = p[f'{layer}/kernel'].shape
      p[f'{layer}/kernel'] = (r * s[:, None]).reshape(shape)
  for value, out in stream.values:
    kernel = p[f'{out}/kernel']  # [k, dim, d]
    acts = largest[out].reshape(kernel.shape[:2])
    s = _factors(acts, np.abs(kernel).max(axis=-1), strength)
    p[f'{value}/kernel'] = p[f'{value}/kernel'] / s
    p[f'{value}/bias'] = p[f'{value}/bias'] / s
    p[f'{out}/kernel'] = kernel * s[..., None]
  return {name: x.astype(np.float32) for name, x in p.items()}


def _rows(kernel: np.ndarray, width: int) -> np.ndarray:
  """Returns [times, width, o]; times is 2 behind token and mean."""
  return kernel.reshape(-1, width, int(np.prod(kernel.shape[1:])))


def _factors(acts, kernels, strength: float) -> np.ndarray:
  acts, kernels = np.maximum(acts, _TINY), np.maximum(kernels, _TINY)
  return acts**strength / kernels ** (1 - strength)


def _transform(params, stream, observe, seed: int):
  del seed
  largest = {
    name: np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high))
    for name, stats in watched(observe).items()
  }
  return smooth(params, stream, largest)


SOLVER = Solver(_transform, needs_stream=True, needs_acts=True)
