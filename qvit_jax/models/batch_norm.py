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
    if train and self.changes:
      axes = tuple(range(x.ndim - 1))
      mean = x.mean(axes)
      var = jnp.square(x - mean).mean(axes)
      if not self.is_initializing():
        for one, seen in zip(kept, (mean, var), strict=True):
          seen = jax.lax.stop_gradient(seen)
          one.value = MOMENTUM * one.value + (1 - MOMENTUM) * seen
    gain, shift = affine(scale, bias, mean, var)
    return (x * gain + shift).astype(self.dtype)


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
  flat = {
    path: x
    for path, x in variables.items()
    if not path.startswith(f'{COLLECTION}/')
  }
  for norm in norms(variables):
    gain, shift = _affine_of(variables, norm)
    layer = f'params/{statistics.layer(norm)}'
    for name in ('scale', 'bias'):
      del flat[f'params/{norm}/{name}']
    kernel = np.asarray(flat[f'{layer}/kernel'], np.float64) * gain
    flat[f'{layer}/kernel'] = kernel.astype(np.float32)
    if f'{layer}/bias' in flat:
      shift = shift + gain * np.asarray(flat[f'{layer}/bias'], np.float64)
    flat[f'{layer}/bias'] = shift.astype(np.float32)
  return flat


def _affine_of(flat: Mapping[str, Any], norm: str) -> tuple[Any, Any]:
  return affine(
    *(
      np.asarray(flat[f'{start}/{norm}/{name}'], np.float64)
      for start, name in (
        ('params', 'scale'), ('params', 'bias'),
        (COLLECTION, 'mean'), (COLLECTION, 'var'),
      )
    )
  )  # fmt: skip


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
