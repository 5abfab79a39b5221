"""What calibration learns about the operands of every product.

A tap adds each batch to statistics in the collection `calib`, whose size does
not depend on how many images are seen. Two passes: ranges, means and Hessians
first, then histograms over the ranges.

Statistics of an operand are kept for the whole tensor, or for each row of the
product (`per_position`): one scale may stand for every token position, head or
value channel, because the product does not sum over these. In a convolution it
sums over all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import tree
from qvit_jax.arithmetic.products import shared_axes
from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization.finite import check_finite
from qvit_jax.quantization.ptq.inputs import squares, sum_rows

SCALES = ('per_tensor', 'per_position')
_BINS = {'per_tensor': 2048, 'per_position': 512}
_SAMPLED = 2**15  # values of an operand and batch that are counted, about
_STRIDES = (1, 3, 5, 7, 11, 13, 17, 29, 59, 127, 251, 509, 1021, 2039, 4093)
# Share of a batch in the moving average of ranges.
_MOMENTUM = 0.1


@dataclasses.dataclass
class OperandStats:
  """What was seen of one operand.

  Every array has the shape of the operand's static scale: () per tensor; else
  the operand's own with 1 for the batch and the axes summed over.

  Attributes:
    low: Smallest value.
    high: Largest value.
    usual_low: Moving average of the batches' smallest values.
    usual_high: Moving average of the batches' largest values.
    counts: Histogram [*scale, bins] of equal bins from low to high, of a
      sample; None without the second pass.
  """

  low: np.ndarray
  high: np.ndarray
  usual_low: np.ndarray
  usual_high: np.ndarray
  counts: np.ndarray | None


@dataclasses.dataclass
class SiteStats:
  """What was seen at one site.

  Attributes:
    lhs: The left operand (a layer's input).
    rhs: The right operand of an attention product, else None.
    mean: Of a layer's inputs, by row of its kernel [i], or of each group of a
      convolution [g, i]; or None.
    channel_low: Smallest value of each input channel [c] of a layer, or None.
    channel_high: Largest value, the same.
    hessian: X^T X of a layer's inputs (see `inputs.squares`), or None.
    center: c, of the same shape but for the last axis: X^T X - c c^T is that
      of the inputs less their mean; or None.
  """

  lhs: OperandStats
  rhs: OperandStats | None = None
  mean: np.ndarray | None = None
  channel_low: np.ndarray | None = None
  channel_high: np.ndarray | None = None
  hessian: np.ndarray | None = None
  center: np.ndarray | None = None

  def spread(self) -> np.ndarray:
    """Returns `hessian` of the inputs less their mean."""
    c = self.center
    return self.hessian - c[..., :, None] * c[..., None, :]


_OF_LAYERS = ('mean', 'channel_low', 'channel_high', 'hessian', 'center')


def _operands(site: Site, lhs, rhs, dims) -> dict[str, tuple[Any, Any]]:
  """Returns {side: (values, axes summed over)}; kernels are no operands."""
  found = {'lhs': (lhs, shared_axes(dims, 0))}
  if not site.is_layer:
    found['rhs'] = rhs, shared_axes(dims, 1)
  return found


def _axes(summed: tuple[int, ...], scales: str) -> tuple[int, ...] | None:
  return None if scales == 'per_tensor' else (0, *summed)


def _keep(module, name: str, start, update) -> None:
  seen = module.variable('calib', name, lambda: start)
  seen.value = update(seen.value)


def _first_tap(scales: str, hessians: bool):
  def tap(module, site, lhs, rhs, dims):
    for side, (x, summed) in _operands(site, lhs, rhs, dims).items():
      axes = _axes(summed, scales)
      keep = {} if axes is None else {'keepdims': True}
      x = x.astype(jnp.float32)
      for name, value, reduce, start in (
        ('low', x.min(axis=axes, **keep), jnp.minimum, jnp.inf),
        ('high', x.max(axis=axes, **keep), jnp.maximum, -jnp.inf),
      ):
        _keep(
          module, f'{side}_{name}', jnp.full_like(value, start),
          lambda old, value=value, reduce=reduce: reduce(old, value),
        )  # fmt: skip
        # Infinity marks that no batch came before.
        _keep(
          module, f'{side}_usual_{name}', jnp.full_like(value, start),
          lambda old, value=value: jnp.where(
            jnp.isinf(old), value, old + _MOMENTUM * (value - old)
          ),
        )  # fmt: skip
    if site.is_layer:
      _add_inputs(module, lhs, dims, hessians)

  return tap


def _add_inputs(module, lhs, dims, hessians: bool) -> None:
  """Adds a layer's inputs to what is known of them."""
  x = lhs.reshape(-1, lhs.shape[-1]).astype(jnp.float32)
  zeros = jnp.zeros(x.shape[1])
  _keep(
    module, 'channel_low', zeros + jnp.inf,
    lambda old: jnp.minimum(old, x.min(axis=0)),
  )  # fmt: skip
  _keep(
    module, 'channel_high', zeros - jnp.inf,
    lambda old: jnp.maximum(old, x.max(axis=0)),
  )  # fmt: skip
  add = lambda name, value: _keep(
    module, name, jnp.zeros_like(value), lambda old: old + value
  )
  total, count = sum_rows(lhs.astype(jnp.float32), dims)
  add('sum', total)
  add('count', jnp.asarray(count, jnp.float32))
  if hessians:
    square, total, count = squares(lhs.astype(jnp.float32), dims)
    add('hessian', square)
    add('hessian_sum', total)
    add('hessian_count', jnp.asarray(count, jnp.float32))


def _stride(shape: tuple[int, ...]) -> int:
  """Returns a prime step that meets every channel, head and position alike."""
  size = math.prod(shape)
  fitting = [
    k for k in _STRIDES if k == 1 or all(axis % k for axis in shape if axis > 1)
  ]
  return next((k for k in fitting if k * _SAMPLED >= size), fitting[-1])


def _second_tap(scales: str):
  bins = _BINS[scales]

  def tap(module, site, lhs, rhs, dims):
    for side, (x, _) in _operands(site, lhs, rhs, dims).items():
      low = module.get_variable('calib', f'{side}_low')
      high = module.get_variable('calib', f'{side}_high')
      width = jnp.maximum(high - low, 1e-12) / bins
      # Every k-th value will do; counting all of them would take minutes.
      at = jnp.arange(x.size)[:: _stride(x.shape)]
      row = jnp.zeros_like(at)
      if scales == 'per_position':
        shape = jnp.arange(low.size).reshape(low.shape)
        row = jnp.broadcast_to(shape, x.shape).ravel()[at]
      values = x.ravel()[at].astype(jnp.float32)
      part = (values - low.ravel()[row]) / width.ravel()[row]
      part = jnp.clip(part.astype(jnp.int32), 0, bins - 1)
      counts = jnp.zeros((low.size, bins)).at[row, part].add(1.0)
      counts = counts.reshape(*low.shape, bins)
      _keep(
        module, f'{side}_counts', jnp.zeros_like(counts),
        lambda old, counts=counts: old + counts,
      )  # fmt: skip

  return tap


def collect(
  build: Callable[[Ops], Any],
  variables: dict[str, Any],
  batches: Callable[[], Iterable[jax.Array]],
  sites: Iterable[Site],
  *,
  scales: str = 'per_tensor',
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
    scales: One of SCALES.
    hessians: Whether X^T X of every layer's inputs is summed too.
    histograms: Whether the second pass is made.
    progress: Called with a line now and then.

  Raises:
    QuantError: No batch came, or a site was never observed.
  """
  calib: dict[str, Any] = {}
  passes = [('ranges', _first_tap(scales, hessians))]
  if histograms:
    passes.append(('histograms', _second_tap(scales)))
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
  found = {name: np.asarray(x) for name, x in tree.flatten(calib).items()}
  missing = [s.path for s in sites if f'{s.path}/lhs_low' not in found]
  if missing:
    raise QuantError(
      f'calibration never observed {", ".join(missing[:8])}'
      f'{" and more" if len(missing) > 8 else ""}; raise '
      'ptq.calibration_examples'
    )
  for name in [n for n in found if n.endswith('/sum')]:
    site = name.removesuffix('/sum')
    found[f'{site}/mean'] = found.pop(name) / found.pop(f'{site}/count')
    if hessians:
      count = found.pop(f'{site}/hessian_count')
      found[f'{site}/center'] = found.pop(f'{site}/hessian_sum') / count**0.5
  return from_arrays(found)


def to_arrays(stats: dict[str, SiteStats]) -> dict[str, np.ndarray]:
  """Returns the statistics as one array a name, for a file."""
  flat = {}
  for path, site in stats.items():
    for side in ('lhs', 'rhs'):
      if getattr(site, side) is not None:
        for field, value in vars(getattr(site, side)).items():
          flat[f'{path}/{side}_{field}'] = value
    for field in _OF_LAYERS:
      flat[f'{path}/{field}'] = getattr(site, field)
  return {name: x for name, x in flat.items() if x is not None}


def from_arrays(flat: dict[str, np.ndarray]) -> dict[str, SiteStats]:
  """Returns the statistics that `to_arrays` took apart.

  Raises:
    QuantError: One is not finite, so no scale can be made of it.
  """
  check_finite(
    flat,
    'check weights and images, and delete a kept `calibration` folder that '
    'holds them',
  )
  grouped: dict[str, dict[str, np.ndarray]] = {}
  for name, value in flat.items():
    path, _, field = name.rpartition('/')
    grouped.setdefault(path, {})[field] = value

  def operand(fields, side):
    if f'{side}_low' not in fields:
      return None
    names = (field.name for field in dataclasses.fields(OperandStats))
    return OperandStats(**{n: fields.get(f'{side}_{n}') for n in names})

  return {
    path: SiteStats(
      operand(fields, 'lhs'),
      operand(fields, 'rhs'),
      *(fields.get(name) for name in _OF_LAYERS),
    )
    for path, fields in grouped.items()
  }
