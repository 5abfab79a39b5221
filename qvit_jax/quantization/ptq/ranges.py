"""Which part of what calibration saw the codes should cover."""

import numpy as np

from qvit_jax.quantization import numerics
from qvit_jax.quantization.ptq.calibrate import OperandStats

RANGES = ('minmax', 'moving_average', 'percentile', 'mse', 'entropy')
# As a config's choice: what measured best at a row's bits, `rows.parse_row`.
AUTO = 'auto'
# Percent of the values that a percentile range keeps.
_KEPT = 99.99
_STEPS = 41
_TINY = 1e-12

_Range = tuple[np.ndarray, np.ndarray]


def choose_range(
  stats: OperandStats,
  bits: int,
  method: str,
  *,
  kept: float = _KEPT,
  even: bool = False,
) -> _Range:
  """Returns the (low, high) that an operand's codes should cover.

  Args:
    stats: What was seen; scales of any shape.
    bits: Of the codes; 'mse' and 'entropy' need them.
    method: 'minmax', everything seen; 'moving_average' of the batches' ranges;
      'percentile', the middle `kept` percent of the values; 'mse', the range
      with the least squared error over the histogram (Choukroun et al. 2019,
      arXiv:1902.06822); 'entropy', the one whose codes keep the most of the
      distribution, by Kullback-Leibler divergence (Migacz 2017, "8-bit
      inference with TensorRT").
    kept: Percent.
    even: Whether codes lie evenly about 0 (`numerics.even_scale_of`); then low
      is -high.

  Returns:
    Two float32 arrays of the scale's shape.
  """
  shape = np.shape(stats.low)
  if method == 'minmax':
    ends = stats.low, stats.high
  elif method == 'moving_average':
    ends = stats.usual_low, stats.usual_high
  else:
    first, last = np.ravel(stats.low), np.ravel(stats.high)
    counts = stats.counts.reshape(first.size, -1).astype(np.float64)
    if method == 'percentile':
      ends = _percentile(first, last, counts, kept)
    elif method == 'mse':
      search = _least_even_error if even else _least_error
      ends = search(first, last, counts, bits)
    else:
      seen = first, last, counts
      ends = _entropy(*(_evened(*seen) if even else seen), bits)
  if even:
    most = np.maximum(np.abs(ends[0]), np.abs(ends[1]))
    ends = -most, most
  low, high = (np.asarray(end, np.float32).reshape(shape) for end in ends)
  return low, high


def _percentile(low, high, counts, kept: float) -> _Range:
  total = np.cumsum(counts, axis=1)
  total /= np.maximum(total[:, -1:], 1)
  cut = (1 - kept / 100) / 2
  # A shade to the side, or rounding decides at a bin without values.
  first = (total <= cut - 1e-12).sum(axis=1)
  last = (total < 1 - cut - 1e-12).sum(axis=1) + 1
  width = (high - low) / counts.shape[1]
  ends = low + first * width, np.minimum(low + last * width, high)
  seen = total[:, -1] > 0  # else the sample has missed it
  return np.where(seen, ends[0], low), np.where(seen, ends[1], high)


def _least_error(low, high, counts, bits: int) -> _Range:
  """Searches one end after the other, from everything and from percentiles."""
  centers = _centers(low, high, counts)
  usual = _percentile(low, high, counts, _KEPT)
  best = np.full(low.shape, np.inf)
  chosen = [usual[0].copy(), usual[1].copy()]
  for ends in ((low, high), usual):
    tried = [end.copy() for end in ends]
    own = np.full(low.shape, np.inf)
    for side in (0, 1, 0, 1):
      start = [end.copy() for end in tried]
      for share in np.linspace(1.1, 0.1, _STEPS):
        now = [end.copy() for end in start]
        now[side] = now[side] * share
        error = _squared_error(centers, counts, *_coder(*now, bits), bits)
        better = error < own
        own = np.where(better, error, own)
        for end, value in zip(tried, now, strict=True):
          end[better] = value[better]
    better = own < best
    best = np.where(better, own, best)
    for end, value in zip(chosen, tried, strict=True):
      end[better] = value[better]
  return chosen[0], chosen[1]


def _least_even_error(low, high, counts, bits: int) -> _Range:
  """Searches the magnitude, from everything and from percentiles."""
  centers = _centers(low, high, counts)
  last = numerics.code_range(bits, symmetric=True)[1]
  best, chosen = np.full(low.shape, np.inf), np.zeros(low.shape)
  for ends in ((low, high), _percentile(low, high, counts, _KEPT)):
    most = np.maximum(np.abs(ends[0]), np.abs(ends[1]))
    for share in np.linspace(1.1, 0.1, _STEPS):
      scale = np.maximum(most * share / last, _TINY)[:, None]
      error = _squared_error(centers, counts, scale, last + 1, bits)
      chosen = np.where(error < best, most * share, chosen)
      best = np.minimum(error, best)
  return -chosen, chosen


def _centers(low, high, counts) -> np.ndarray:
  """Returns the middles of the bins, [s, bins]."""
  bins = (np.arange(counts.shape[1]) + 0.5) / counts.shape[1]
  return low[:, None] + (high - low)[:, None] * bins


def _evened(low, high, counts):
  """Returns (-m, m, histograms between them) of what reaches m at most."""
  most = np.maximum(np.abs(low), np.abs(high))
  size, wide = counts.shape[1], []
  for first, last, end, own in zip(low, high, most, counts, strict=True):
    below = np.append(0, np.cumsum(own))
    edges = np.linspace(first, max(last, first + _TINY), size + 1)
    wide.append(
      np.diff(np.interp(np.linspace(-end, end, size + 1), edges, below))
    )
  return -most, most, np.asarray(wide)


def _coder(low, high, bits: int):
  """Returns (scale, zero) [s, 1] of codes from low to high."""
  low, high = np.minimum(low, 0)[:, None], np.maximum(high, 0)[:, None]
  most = numerics.code_range(bits, symmetric=False)[1]
  scale = np.maximum((high - low) / most, _TINY)
  return scale, np.round(-low / scale)


def _squared_error(centers, counts, scale, zero, bits: int) -> np.ndarray:
  """Returns the summed squared error of rounding the bins' centers, [s]."""
  most = numerics.code_range(bits, symmetric=False)[1]
  codes = np.clip(np.round(centers / scale) + zero, 0, most)
  return (counts * np.square((codes - zero) * scale - centers)).sum(axis=1)


def _entropy(low, high, counts, bits: int) -> _Range:
  """Shrinks both ends alike, each histogram by itself."""
  ends = [low.copy(), high.copy()]
  for i, histogram in enumerate(counts):
    best = np.inf
    for share in np.linspace(1, 0.1, _STEPS):
      now = min(low[i] * share, 0.0), max(high[i] * share, 0.0)
      distance = _divergence(low[i], high[i], histogram, *now, bits)
      if distance < best:
        best, (ends[0][i], ends[1][i]) = distance, now
  return ends[0], ends[1]


def _divergence(low, high, counts, first, last, bits: int) -> float:
  """Returns KL(what was seen, clipped || what codes keep of it), in nats."""
  size = len(counts)
  width = max((high - low) / size, _TINY)
  begin = int(np.clip(round((first - low) / width), 0, size - 1))
  end = int(np.clip(round((last - low) / width), begin + 1, size))
  kept = counts[begin:end].copy()
  coded = kept.copy()  # what is cut off is not in it: that is what it costs
  kept[0] += counts[:begin].sum()
  kept[-1] += counts[end:].sum()
  level = np.arange(len(coded)) * 2**bits // len(coded)
  mass = np.bincount(level, coded)
  full = np.bincount(level, coded > 0)
  coded = np.where(coded > 0, (mass / np.maximum(full, 1))[level], 0)
  p, q = kept / max(kept.sum(), 1), coded / max(coded.sum(), 1)
  there = p > 0
  return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-9))).sum())
