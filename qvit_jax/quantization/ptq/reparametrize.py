"""Gives all channels of a norm's output one range.

Static scales are one for the tensor, but channels behind a LayerNorm differ
widely. The scale and shift that would suit each channel go into the norm's own,
and their inverses into the layers that read it: the function stays.

Source: Li et al. 2023, RepQ-ViT, arXiv:2212.08254, section 3.2.
"""

from collections.abc import Mapping

import numpy as np

from qvit_jax.ops import Stream
from qvit_jax.quantization.ptq.solver import Solver, watched

_TINY = 1e-5


def reparametrize(
  params: dict[str, np.ndarray],
  stream: Stream,
  ranges: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns parameters of the same function with channels of equal range.

  Args:
    params: Path to float32 array.
    stream: Who reads which norm.
    ranges: Layer to the smallest and largest value of each input channel, both
      [i].
  """
  p = dict(params)
  for norm, layers in stream.readers:
    width = p[f'{norm}/scale'].shape[0]
    seen = [ranges[layer] for layer in layers]
    low = np.min([a.reshape(-1, width).min(axis=0) for a, _ in seen], axis=0)
    high = np.max([b.reshape(-1, width).max(axis=0) for _, b in seen], axis=0)
    span = np.maximum(high - low, _TINY)
    ratio = span / span.mean()
    # The channel, divided by its ratio, begins at low / ratio; all of them are
    # to begin at the mean of the lows.
    shift = low / ratio - low.mean()
    p[f'{norm}/scale'] = p[f'{norm}/scale'] / ratio
    p[f'{norm}/bias'] = p[f'{norm}/bias'] / ratio - shift
    for layer in layers:
      kernel, bias = p[f'{layer}/kernel'], p[f'{layer}/bias']
      rows = kernel.reshape(-1, width, int(np.prod(kernel.shape[1:])))
      rows = rows * ratio[:, None]
      p[f'{layer}/kernel'] = rows.reshape(kernel.shape)
      moved = np.einsum('c,tco->o', shift, rows)
      p[f'{layer}/bias'] = bias + moved.reshape(bias.shape)
  return {name: x.astype(np.float32) for name, x in p.items()}


def _transform(params, stream, observe, seed: int):
  del seed
  ranges = {
    name: (stats.channel_low, stats.channel_high)
    for name, stats in watched(observe).items()
  }
  return reparametrize(params, stream, ranges)


SOLVER = Solver(_transform, needs_stream=True, needs_acts=True)
