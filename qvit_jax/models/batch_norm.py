"""BatchNorm, and what the rest of the project does with its statistics.

Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2. Names,
momentum and the biased variance are those of `flax.linen.BatchNorm`; epsilon
and momentum have the values of torch. Under `jit` with a batch that is split
over devices the means are those of the whole batch.

Behind a layer that has no bias, y = layer * gain + shift with a gain and a
shift of each channel: so the norm can be folded into the layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

COLLECTION = 'batch_stats'
# What norms see, batch by batch, where a caller makes it mutable.
SEEN = 'norm_inputs'
MOMENTUM = 0.9  # share of the former statistics that an update keeps
EPSILON = 1e-5


class BatchNorm(nn.Module):
  """Normalises each channel by statistics over all other axes, in float32.

  Attributes:
    changes: Whether training uses the statistics of the batch and moves the
      kept ones; else it uses the kept ones, as evaluation does.
    dtype: Of the result.
  """

  changes: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b *s c'], train: bool = False
  ) -> Float[Array, 'b *s c']:
    """Returns the normalised x; moves the statistics where `train`."""
    width = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones, width, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, width, jnp.float32)
    kept = (
      self.variable(COLLECTION, 'mean', jnp.zeros, width, jnp.float32),
      self.variable(COLLECTION, 'var', jnp.ones, width, jnp.float32),
    )
    x = x.astype(jnp.float32)
    mean, var = (one.value for one in kept)
    is_new = self.is_initializing()
    if self.is_mutable_collection(SEEN) and not is_new:
      for name, value in zip(('mean', 'var'), _moments(x), strict=True):
        self.put_variable(SEEN, name, value)
    if train and self.changes:
      mean, var = _moments(x)
      for one, seen in zip(kept, (mean, var), strict=True):
        if not is_new:
          seen = jax.lax.stop_gradient(seen)
          one.value = MOMENTUM * one.value + (1 - MOMENTUM) * seen
    gain, shift = affine(scale, bias, mean, var)
    return (x * gain + shift).astype(self.dtype)


def _moments(x: Float[Array, '*s c']) -> tuple[Array, Array]:
  """Returns mean and biased variance of each channel."""
  axes = tuple(range(x.ndim - 1))
  mean = x.mean(axes)
  return mean, jnp.square(x - mean).mean(axes)


def affine(scale: Any, bias: Any, mean: Any, var: Any) -> tuple[Any, Any]:
  """Returns (gain, shift) of each channel: the norm is x * gain + shift."""
  gain = scale / (var + EPSILON) ** 0.5
  return gain, bias - mean * gain


@dataclasses.dataclass(frozen=True)
class Statistics:
  """How a family keeps statistics of what its norms see: a part of its record.

  Attributes:
    layer: Path of a norm -> path of the layer whose output alone it takes.
    changes: config.model -> whether training moves them.
    held: {field: value} of a config whose training leaves them as they are.
    folded: {field: value} of a config whose model has no such norms, and a
      bias in every layer that had one behind it.
  """

  layer: Callable[[str], str]
  changes: Callable[[Any], bool] = lambda model: model.batch_norm == 'train'
  held: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: {'model.batch_norm': 'held'}
  )
  folded: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: {'model.batch_norm': 'none'}
  )


def norms(flat: Mapping[str, Any]) -> list[str]:
  """Returns the paths of norms with statistics among variables by path."""
  start, end = f'{COLLECTION}/', '/mean'
  return [
    path.removeprefix(start).removesuffix(end)
    for path in flat
    if path.startswith(start) and path.endswith(end)
  ]


def without_norms(
  statistics: Statistics, variables: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[Array, Array]]]:
  """Returns variables without norms, and what these do to layers' outputs.

  Args:
    statistics: Of the family.
    variables: {'params/...' or 'batch_stats/...': array}; others stay.

  Returns:
    The others, and {layer path: (gain, shift)}: the norm behind the layer gives
    output * gain + shift, with the very numbers of evaluation.
  """
  names = norms(variables)
  parts = {
    norm: [variables[path] for path in _paths_of(norm)] for norm in names
  }
  found = jax.jit(lambda parts: {n: affine(*x) for n, x in parts.items()})(
    parts
  )
  gone = {path for norm in names for path in _paths_of(norm)}
  rest = {path: x for path, x in variables.items() if path not in gone}
  return rest, {statistics.layer(norm): found[norm] for norm in names}


def _paths_of(norm: str) -> list[str]:
  """Returns the paths of what `affine` takes."""
  return [
    f'{collection}/{norm}/{name}'
    for collection, name in (
      ('params', 'scale'), ('params', 'bias'), (COLLECTION, 'mean'),
      (COLLECTION, 'var'),
    )
  ]  # fmt: skip


def fold(
  statistics: Statistics, variables: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns parameters whose layers do what their norms did.

  Args:
    statistics: Of the family.
    variables: {'params/...' or 'batch_stats/...': array}; others stay.

  Returns:
    The same without norms: kernels times the gain of each output channel, in
    float64 and then rounded to float32, and biases.
  """
  flat = dict(variables)
  for norm in norms(variables):
    gain, shift = _affine_of(variables, norm)
    layer = f'params/{statistics.layer(norm)}'
    for path in _paths_of(norm):
      del flat[path]
    kernel = np.asarray(flat[f'{layer}/kernel'], np.float64) * gain
    flat[f'{layer}/kernel'] = kernel.astype(np.float32)
    if f'{layer}/bias' in flat:
      shift = shift + gain * np.asarray(flat[f'{layer}/bias'], np.float64)
    flat[f'{layer}/bias'] = shift.astype(np.float32)
  return flat


def _affine_of(flat: Mapping[str, Any], norm: str) -> tuple[Any, Any]:
  return affine(*(np.asarray(flat[p], np.float64) for p in _paths_of(norm)))


def are_measured(variables: Mapping[str, Any]) -> bool:
  """Returns whether statistics by path are of anything that norms saw.

  Those of a fresh model are not, nor those beside kernels that norms were
  folded into: every mean is 0.
  """
  return any(
    np.asarray(variables[f'{COLLECTION}/{norm}/mean']).any()
    for norm in norms(variables)
  )


def with_statistics(
  variables: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the same function with other statistics.

  Scales and biases of norms change against them.

  Args:
    variables: {'params/...' or 'batch_stats/...': array}; others stay.
    found: {'batch_stats/...': array} of every norm.
  """
  flat = dict(variables) | dict(found)
  for norm in norms(found):
    gain, shift = _affine_of(variables, norm)
    mean, var = (
      np.asarray(found[f'{COLLECTION}/{norm}/{name}'], np.float64)
      for name in ('mean', 'var')
    )
    scale = gain * (var + EPSILON) ** 0.5
    flat[f'params/{norm}/scale'] = scale.astype(np.float32)
    flat[f'params/{norm}/bias'] = (shift + mean * gain).astype(np.float32)
  return flat
