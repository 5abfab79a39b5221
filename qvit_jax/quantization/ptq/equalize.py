"""Evens out the ranges of channels between two layers.

Where one scale stands for a whole kernel, channels of small weights are rounded
away. A channel that only passes an activation with f(s x) = s f(x) can be
divided by s before it and multiplied by s behind: the function stays.

A ReLU6 is constant beyond its ceiling of 6, and a channel that is divided by s
meets it at 6 s of before. No channel is stretched until what calibration saw of
it meets the ceiling, and one that calibration saw there stays as it is: Nagel
et al. put ReLUs in place of ReLU6 first, which lets more pass than before.
Where calibration saw only a mean over the image of what the activation gives,
no channel is touched.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1, equation 11.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qvit_jax.ops import Pair
from qvit_jax.quantization.ptq.solver import Solver, watched

_ROUNDS = 100
_STILL = 1e-3  # largest change of a factor, minus 1, that ends the rounds


def equalize(
  params: Mapping[str, np.ndarray],
  pairs: Sequence[Pair],
  highest: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Returns parameters with evener kernels, of the same function.

  But for values beyond a ReLU6's ceiling that calibration did not see.

  Args:
    params: Path to float32 array.
    pairs: Layers between which channels are scaled; chains of them are gone
      through until nothing changes.
    highest: Layer to the largest value of each input channel, [c].
  """
  p = {name: x.astype(np.float64) for name, x in params.items()}
  seen = {
    pair.second: np.maximum(highest[pair.second], 0).astype(np.float64)
    for pair in pairs
  }
  free = {
    pair.second: pair.ceiling is None
    or seen[pair.second] < pair.ceiling * (1 - 1e-6)
    for pair in pairs
  }
  for _ in range(_ROUNDS):
    moved = 0.0
    for pair in pairs:
      s = _factors(p, pair, seen[pair.second], free[pair.second])
      scale_pair(p, pair, s)
      seen[pair.second] = _per_channel(seen[pair.second], len(s)) / s
      moved = max(moved, np.abs(s - 1).max())
    if moved < _STILL:
      break
  return {name: x.astype(np.float32) for name, x in p.items()}


def _factors(p, pair: Pair, highest, free) -> np.ndarray:
  """Returns what each channel is divided by before the activation, [c].

  Args:
    p: Parameters by path.
    pair: Two layers.
    highest: The largest value of each input of the second.
    free: Which of them may be scaled at all.
  """
  first = p[f'{pair.first}/kernel']
  width = first.shape[-1]
  before = np.abs(first).reshape(-1, width).max(axis=0)
  behind = channel_rows(p[f'{pair.second}/kernel'], width).max(axis=0)
  s = np.sqrt(_present(before) / _present(behind))
  if pair.ceiling is None:
    return s
  if pair.has_mean:
    return np.ones_like(s)
  s = np.maximum(s, _per_channel(highest, width) / pair.ceiling)
  return np.where(free.reshape(-1, width).all(axis=0), s, 1)


def _present(ranges: np.ndarray) -> np.ndarray:
  """Returns ranges with the usual one where a channel has none.

  What is behind a channel that is always 0, or before one that nothing reads,
  may have any size and would decide the scale of the whole kernel.
  """
  there = ranges > 0
  usual = np.median(ranges[there]) if there.any() else 1.0
  return np.where(there, ranges, usual)


def _per_channel(values: np.ndarray, width: int) -> np.ndarray:
  """Returns the largest of the inputs that are one channel of the first."""
  return values.reshape(-1, width).max(axis=0)


def channel_rows(kernel: np.ndarray, width: int) -> np.ndarray:
  """Returns the magnitudes of what reads each channel, [n, c].

  Args:
    kernel: [kh, kw, i / groups, o] of a convolution over c channels, or [i, o]
      with c channels inside of i.
    width: c.
  """
  weights = np.abs(kernel)
  if kernel.ndim == 2:
    return weights.reshape(-1, width, kernel.shape[1]).max(axis=2)
  each = kernel.shape[2]
  groups = width // each
  weights = weights.reshape(-1, each, groups, kernel.shape[3] // groups)
  return weights.max(axis=3).swapaxes(1, 2).reshape(-1, width)


def spread_channels(s: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a number of each channel where a kernel reads it.

  Args:
    s: [c].
    shape: Of the kernel, see `channel_rows`.
  """
  if len(shape) == 2:
    return np.tile(s, shape[0] // len(s))[:, None]
  each = shape[2]
  groups = len(s) // each
  return np.repeat(s.reshape(groups, each), shape[3] // groups, axis=0).T


def scale_pair(p: dict[str, np.ndarray], pair: Pair, s: np.ndarray) -> None:
  """Divides the channels of the first layer by s, in place.

  Args:
    p: Parameters by path.
    pair: Two layers.
    s: [c] > 0.
  """
  for name in ('kernel', 'bias'):
    p[f'{pair.first}/{name}'] = p[f'{pair.first}/{name}'] / s
  kernel = p[f'{pair.second}/kernel']
  p[f'{pair.second}/kernel'] = kernel * spread_channels(s, kernel.shape)


def _transform(params, pairs, observe, seed: int):
  del seed
  highest = {
    name: stats.channel_high for name, stats in watched(observe).items()
  }
  return equalize(params, pairs, highest)


SOLVER = Solver(_transform, needs_pairs=True)
