"""What the report of a PTQ table says beside its rows."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvit_jax.errors import CheckpointError, ConfigError
from qvit_jax.ops import Site, Stream
from qvit_jax.quantization import METHODS
from qvit_jax.quantization.ptq import apply as ptq
from qvit_jax.quantization.ptq.calibrate import OperandStats, SiteStats
from qvit_jax.quantization.ptq.plans import plan_sites
from qvit_jax.quantization.ptq.rows import Row
from qvit_jax.quantization.spec import QuantPlan
from qvit_jax.store import runs

# A row that names another class than float for this share of the images has
# collapsed where its accuracy is as far below float's, or where it names this
# few of the classes that float names; or where it agrees this rarely.
_COLLAPSE_POINTS = 0.2
_COLLAPSE_CLASSES = 0.25
_COLLAPSE_AGREEMENT = 0.25
_SUSPECTS = 3
_BARS = 128
# Percent of the values that lie below; the last three are where rows clip.
_PERCENTILES = (0.1, 1, 50, 95, 99, 99.9)
_OUTLIER = 6  # standard deviations from the mean


def collapse(
  metrics: Mapping[str, Any],
  base: np.ndarray,
  labels: np.ndarray,
  sites: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
  """Returns whether a row fell from float, and the products that may be why.

  A row that agrees with a poor float model has not collapsed.

  Args:
    metrics: Of the row: top1, confusion and agreement with float.
    base: Float logits [n, classes].
    labels: [n].
    sites: The row's products with their sqnr_db.
  """
  named = base.argmax(axis=1)
  before = float((named == labels).mean())
  confusion = np.asarray(metrics['confusion'])
  predicted = int((confusion.sum(axis=0) > 0).sum())
  fell = metrics['top1'] < before - _COLLAPSE_POINTS
  narrow = predicted < _COLLAPSE_CLASSES * len(np.unique(named))
  agreement = metrics['agreement']
  collapsed = agreement < _COLLAPSE_AGREEMENT or (
    agreement < 1 - _COLLAPSE_POINTS and (fell or narrow)
  )
  suspects = []
  if collapsed and sites:
    noisy = [site for site in sites if site['sqnr_db'] is not None]
    noisy.sort(key=lambda site: site['sqnr_db'])
    suspects = [
      f'{site["path"]}: {site["sqnr_db"]:.1f} dB' for site in noisy[:_SUSPECTS]
    ]
  return {
    'collapsed': bool(collapsed),
    'suspects': suspects,
    'classes_predicted': predicted,
  }


def histograms(
  config: Any,
  plans: Mapping[Row, QuantPlan],
  sites: Sequence[Site],
  stream: Stream | None,
  stats: Mapping[str, SiteStats],
) -> list[dict[str, Any]]:
  """Returns what calibration saw at one product of each kind.

  Args:
    config: Its `ptq` has the range method.
    plans: Bits of the static rows, which say where they clip.
    sites: All products.
    stream: Of the model; None: it has none.
    stats: Of the untransformed model.
  """
  if config.ptq.scales != 'per_tensor':
    return []
  drawn = {row: plan_sites(row, plan, stream) for row, plan in plans.items()}
  shown: dict[str, list[Site]] = {}
  for site in sites:
    shown.setdefault(site.path.split('/')[-1], []).append(site)
  found = []
  for kind, alike in shown.items():
    site = alike[len(alike) // 2]  # the middle one stands for all
    for side in ('lhs', 'rhs'):
      operand = getattr(stats[site.path], side)
      if operand is None or operand.counts is None:
        continue
      ranges = {
        row.name: [
          float(end)
          for end in ptq.row_range(
            row, plan[site.path], operand, even=ptq.is_even(site, side)
          )
        ]
        for row, plan in drawn.items()
        if plan[site.path].is_static
      }
      found.append(
        {
          'kind': kind if site.is_layer else f'{kind} {side}',
          'site': site.path,
          'edges': [float(operand.low), float(operand.high)],
          'counts': operand.counts.reshape(_BARS, -1).sum(axis=1).tolist(),
          'ranges': ranges,
        }
      )
  return found


def activation_stats(
  sites: Sequence[Site], stats: Mapping[str, SiteStats]
) -> dict[str, dict[str, Any]]:
  """Returns {site: {side: numbers}} of what calibration saw, for a file.

  `low` and `high` are of every value; the rest is of the histogram's sample,
  each value at the middle of its bin: `mean`, `std`, `percentiles`, `outliers`
  (share of the values more than `outlier_std` deviations from the mean) and
  the histogram itself, of `counts` in equal bins from `low` to `high`. Where
  positions have ranges of their own, the numbers are of all of them and the
  histogram is left out.

  Args:
    sites: All products, in the order of the file.
    stats: Of them; operands without a histogram are left out.
  """
  return {
    site.path: {
      side: _summary(operand)
      for side in ('lhs', 'rhs')
      if (operand := getattr(stats[site.path], side)) is not None
      and operand.counts is not None
    }
    for site in sites
  }


def _summary(operand: OperandStats) -> dict[str, Any]:
  low, high = np.ravel(operand.low), np.ravel(operand.high)
  counts = operand.counts.reshape(low.size, -1).astype(np.float64)
  bins = (np.arange(counts.shape[1]) + 0.5) / counts.shape[1]
  values = (low[:, None] + (high - low)[:, None] * bins).ravel()
  weights = counts.ravel() / counts.sum()
  mean = float(weights @ values)
  std = float(np.sqrt(weights @ np.square(values - mean)))
  order = np.argsort(values)
  below = np.cumsum(weights[order])
  at = np.searchsorted(below, np.array(_PERCENTILES) / 100)
  found = values[order][np.minimum(at, values.size - 1)]
  summary = {
    'low': float(low.min()),
    'high': float(high.max()),
    'mean': mean,
    'std': std,
    'percentiles': {
      f'{p:g}': float(x) for p, x in zip(_PERCENTILES, found, strict=True)
    },
    'outlier_std': _OUTLIER,
    'outliers': float(weights @ (np.abs(values - mean) > _OUTLIER * std)),
  }
  if low.size == 1:
    summary['counts'] = counts.reshape(_BARS, -1).sum(axis=1).tolist()
  return summary


def qat_row(
  path: str, config: Any, evaluated: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the evaluated model of a training run's results.json.

  Args:
    path: Its workdir.
    config: Of the table.
    evaluated: What the table's numbers are of; see `Data.evaluated`.

  Raises:
    ConfigError: There is none, or its numbers are of other images.
  """
  num_classes = config.model.num_classes
  try:
    found = runs.finished(path).row
    method = METHODS[found['method']]
    is_float = not (method.quantizes or method.is_packed)
    if is_float or len(found['confusion']) != num_classes:
      raise ValueError(path)
  except (CheckpointError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f'ptq.qat_runs: {path!r} holds no results.json of a quantization-aware '
      f'training with {num_classes} classes; give workdirs of --mode=train'
    ) from error
  if any(found.get(key) != value for key, value in evaluated.items()):
    split = shlex.quote(evaluated['split'])
    raise ConfigError(
      f'ptq.qat_runs: the numbers of {path!r} are of {_images(found)}, those '
      f'of this table of {_images(evaluated)}; evaluate the run on the same '
      f'(--mode=eval --workdir={shlex.quote(path)} --config.data.eval_split='
      f'{split} --config.eval.num_examples={config.eval.num_examples}) or '
      'leave it out'
    )
  return {**found, 'name': pathlib.Path(path).name}


def _images(row: Mapping[str, Any]) -> str:
  """Returns which images the numbers of a row are of."""
  if not row.get('split'):
    return 'images that it does not name (an older version wrote it)'
  data = row['data']
  return f'split {row["split"]!r} of {data["name"]} (digest {data["digest"]})'
