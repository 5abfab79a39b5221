"""What calibration learns about the operands of every product. Row 4.

A tap adds each batch to statistics in the collection `calib`, whose size does
not depend on how many images are seen. Two passes: ranges and Hessians first,
then histograms over the ranges.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import tree
from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import numerics

_BINS = 2048
_SAMPLED = 2**15  # values of an operand and batch that are counted, about
_STRIDES = (1, 3, 7, 13, 29, 59, 127, 251, 509, 1021, 2039, 4093)
RANGES = ('minmax', 'percentile', 'mse')
# Share of the values that a percentile range keeps.
_KEPT = 0.9999


@dataclasses.dataclass
class OperandStats:
  """What was seen of one operand.

  Attributes:
    low: Smallest value.
    high: Largest value.
    counts: Histogram of `_BINS` equal bins from low to high, of a sample;
      None without the second pass.
  """

  low: float
  high: float
  counts: np.ndarray | None


@dataclasses.dataclass
class SiteStats:
  """What was seen at one site.

  Attributes:
    lhs: The left operand (a layer's input).
    rhs: The right operand of an attention product, else None.
    mean: Of a layer's inputs, by input channel [i], or None.
    hessian: X^T X of a layer's inputs [i, i], or None.
  """

  lhs: OperandStats
  rhs: OperandStats | None
  mean: np.ndarray | None
  hessian: np.ndarray | None


def _operands(site: Site, lhs, rhs) -> dict[str, Any]:
  return {'lhs': lhs} if site.is_layer else {'lhs': lhs, 'rhs': rhs}


def _first_tap(hessians: bool):
  def tap(module, site, lhs, rhs):
    for side, x in _operands(site, lhs, rhs).items():
      for name, reduce, start in (
        ('low', jnp.minimum, jnp.inf),
        ('high', jnp.maximum, -jnp.inf),
      ):
        seen = module.variable(
          'calib', f'{side}_{name}', lambda start=start: jnp.float32(start)
        )
        value = x.min() if name == 'low' else x.max()
        seen.value = reduce(seen.value, value.astype(jnp.float32))
    if not site.is_layer:
      return
    x = lhs.reshape(-1, lhs.shape[-1]).astype(jnp.float32)
    for name, value in (
      ('sum', x.sum(axis=0)),
      ('count', jnp.float32(x.shape[0])),
    ):
      seen = module.variable(
        'calib', name, lambda value=value: jnp.zeros_like(value)
      )
      seen.value = seen.value + value
    if hessians:
      seen = module.variable(
        'calib', 'hessian', lambda: jnp.zeros((x.shape[1], x.shape[1]))
      )
      seen.value = seen.value + x.T @ x

  return tap


def _stride(size: int) -> int:
  return next((k for k in _STRIDES if k * _SAMPLED >= size), _STRIDES[-1])


def _second_tap(module, site, lhs, rhs):
  for side, x in _operands(site, lhs, rhs).items():
    low = module.get_variable('calib', f'{side}_low')
    high = module.get_variable('calib', f'{side}_high')
    width = jnp.maximum(high - low, 1e-12) / _BINS
    # Every k-th value will do, and counting all of them would take minutes;
    # a prime k does not always meet the same channel.
    x = x.ravel()[:: _stride(x.size)].astype(jnp.float32)
    at = jnp.clip(((x - low) / width).astype(jnp.int32), 0, _BINS - 1)
    counts = jnp.zeros(_BINS, jnp.float32).at[at].add(1.0)
    seen = module.variable('calib', f'{side}_counts', lambda: jnp.zeros(_BINS))
    seen.value = seen.value + counts


def collect(
  build: Callable[[Ops], Any],
  variables: dict[str, Any],
  batches: Callable[[], Iterable[jax.Array]],
  sites: Iterable[Site],
  *,
  hessians: bool = False,
  histograms: bool = True,
  progress: Callable[[str], None] = lambda text: None,
) -> dict[str, SiteStats]:
  """Returns what was seen at every site.

  Args:
    build: Ops -> model.
    variables: Of the model, in float.
    batches: () -> prepared images [b, h, w, 3]; called twice.
    sites: All of the model.
    hessians: Whether X^T X of every layer's inputs is summed too.
    histograms: Whether the second pass is made.
    progress: Called with a line now and then.

  Raises:
    QuantError: No batch came, or a site was never observed.
  """
  calib: dict[str, Any] = {}
  passes = [('ranges', _first_tap(hessians))]
  if histograms:
    passes.append(('histograms', _second_tap))
  for text, tap in passes:
    model = build(Ops(tap=tap))

    def step(calib, images, model=model):
      given = {**variables, 'calib': calib} if calib else variables
      return model.apply(given, images, mutable=['calib'])[1]['calib']

    step = jax.jit(step)
    count = 0
    for images in batches():
      calib = step(calib, images)
      count += len(images)
    progress(f'calibration: {text} of {count} images')
  found = tree.flatten(calib)
  missing = [s.path for s in sites if f'{s.path}/lhs_low' not in found]
  if missing:
    raise QuantError(
      f'calibration never observed {", ".join(missing[:8])}'
      f'{" and more" if len(missing) > 8 else ""}; raise '
      'ptq.calibration_examples'
    )
  return {site.path: _stats(found, site) for site in sites}


def _stats(found: dict[str, Any], site: Site) -> SiteStats:
  def operand(side):
    low, high = (
      float(found[f'{site.path}/{side}_{name}']) for name in ('low', 'high')
    )
    counts = found.get(f'{site.path}/{side}_counts')
    return OperandStats(
      low, high, None if counts is None else np.asarray(counts)
    )

  hessian = found.get(f'{site.path}/hessian')
  mean = None
  if site.is_layer:
    mean = np.asarray(found[f'{site.path}/sum'] / found[f'{site.path}/count'])
  return SiteStats(
    operand('lhs'),
    None if site.is_layer else operand('rhs'),
    mean,
    None if hessian is None else np.asarray(hessian),
  )


def choose_range(
  stats: OperandStats, bits: int, method: str
) -> tuple[float, float]:
  """Returns the (low, high) that an operand's codes should cover.

  Args:
    stats: What was seen.
    bits: Of the codes; 'mse' needs them.
    method: 'minmax'; 'percentile' (99.99 % of the values); or 'mse', the range
      with the least squared error over the histogram, searched from both.
  """
  if method == 'minmax':
    return stats.low, stats.high
  edges = np.linspace(stats.low, stats.high, _BINS + 1)
  total = np.cumsum(stats.counts)
  cut = (1 - _KEPT) / 2 * total[-1]
  usual = (
    float(edges[np.searchsorted(total, cut)]),
    float(edges[np.searchsorted(total, total[-1] - cut) + 1]),
  )
  if method == 'percentile':
    return usual
  centers = (edges[:-1] + edges[1:]) / 2
  best, chosen = np.inf, usual
  for tried in ((stats.low, stats.high), usual):
    # One end after the other, each from where the last one stopped.
    for side in (0, 1, 0, 1):
      start = tried
      for share in np.linspace(1.1, 0.1, 41):
        ends = list(start)
        ends[side] *= share
        error = _range_error(centers, stats.counts, *ends, bits)
        if error < best:
          best, chosen, tried = error, tuple(ends), tuple(ends)
  return chosen


def _range_error(centers, counts, low, high, bits) -> float:
  """Returns the summed squared error of rounding the bins' centers."""
  low, high = min(low, 0.0), max(high, 0.0)
  most = numerics.code_range(bits, symmetric=False)[1]
  scale = max((high - low) / most, 1e-12)
  zero = np.round(-low / scale)
  codes = np.clip(np.round(centers / scale) + zero, 0, most)
  return float(counts @ np.square((codes - zero) * scale - centers))
