"""Moves what a channel always is at least into the next layer's bias.

Large biases of a kernel, such as equalization makes, widen the range of what
its layer gives. Where calibration saw no less than c > 0 behind a ReLU, the
first layer gives c less and the bias of the second makes up for it; a ReLU of
x - c is that of x, minus c, for every x above c.

Not where the second layer's window sees zeros around the image, which do not
change by c, nor where the activation reached its ceiling or a mean over the
image lies between.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2. Differs: c is the
least value that calibration saw; there it is three standard deviations below
the mean that BatchNorm gives, and the 0.135 % of the values below are changed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qvit_jax.ops import Pair
from qvit_jax.quantization.ptq.equalize import spread_channels
from qvit_jax.quantization.ptq.solver import Solver, watched


def absorb(
  params: Mapping[str, np.ndarray],
  pairs: Sequence[Pair],
  ranges: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns parameters of the same function with smaller activations.

  Args:
    params: Path to float32 array.
    pairs: Layers with an activation between them.
    ranges: Layer to the smallest and largest value of each input channel, both
      [c].
  """
  p = {name: x.astype(np.float64) for name, x in params.items()}
  for pair in pairs:
    kernel = p[f'{pair.second}/kernel']
    if pair.is_linear or pair.has_mean or max(kernel.shape[:-2], default=1) > 1:
      continue
    bias = p[f'{pair.first}/bias']
    low, high = (x.reshape(-1, len(bias)) for x in ranges[pair.second])
    shift = np.maximum(low.min(axis=0), 0)
    if pair.ceiling is not None:
      inside = high.max(axis=0) < pair.ceiling * (1 - 1e-6)
      shift = np.where(inside, shift, 0)
    p[f'{pair.first}/bias'] = bias - shift
    moved = (kernel * spread_channels(shift, kernel.shape)).reshape(
      -1, kernel.shape[-1]
    )
    p[f'{pair.second}/bias'] = p[f'{pair.second}/bias'] + moved.sum(axis=0)
  return {name: x.astype(np.float32) for name, x in p.items()}


def _transform(params, pairs, observe, seed: int):
  del seed
  ranges = {
    name: (stats.channel_low, stats.channel_high)
    for name, stats in watched(observe).items()
  }
  return absorb(params, pairs, ranges)


SOLVER = Solver(_transform, needs_pairs=True, needs_acts=True)
