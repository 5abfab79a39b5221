"""How much noise each product of a packed model carries."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import tree
from qvit_jax.ops import Core, FloatCore, Ops
from qvit_jax.quantization.packed import Packed

# Decibels that stand for NaN and infinity, which JSON does not know.
_NOTHING_BUT_NOISE = -300.0


@dataclasses.dataclass(frozen=True)
class _Watch:
  """A core that leaves what it computes in the collection `seen`."""

  core: Core

  @property
  def is_packed(self) -> bool:
    """See `ops.Core`."""
    return self.core.is_packed

  def __call__(self, module, site, lhs, rhs, dims):
    y = self.core(module, site, lhs, rhs, dims)
    module.variable('seen', 'y', lambda: y)
    return y


def site_sqnr(
  build: Callable[[Ops, str], Any],
  packed: Packed,
  teacher: dict[str, Any],
  batches: Iterable[jax.Array],
) -> dict[str, float | None]:
  """Returns the signal-to-quantization-noise ratio of each product, in dB.

  The noise is what has gathered up to there: each model runs on its own
  activations. None stands for no noise at
  all, -300 for noise that is not finite.

  Args:
    build: (Ops, compute dtype) -> model.
    packed: The quantized model.
    teacher: Variables of the float model of the same function, site by site:
      transformed as the packed one was.
    batches: Prepared images; small batches, because all outputs of a batch are
      held at once.
  """
  models = (
    (build(Ops(core=_Watch(FloatCore())), 'float32'), teacher),
    (build(Ops(core=_Watch(packed.ops.core)), packed.dtype), packed.variables),
  )

  @jax.jit
  def sums(variables, images):
    seen = [
      tree.flatten(model.apply(v, images, mutable=['seen'])[1]['seen'])
      for (model, _), v in zip(models, variables, strict=True)
    ]
    wanted, found = seen
    return {
      name.removesuffix('/y'): jnp.stack(
        [jnp.square(y).sum(), jnp.square(found[name] - y).sum()]
      )
      for name, y in wanted.items()
    }

  total: dict[str, np.ndarray] = {}
  for images in batches:
    part = sums([variables for _, variables in models], images)
    for name, values in part.items():
      total[name] = total.get(name, 0) + np.asarray(values, np.float64)
  found = {}
  for name, (signal, noise) in total.items():
    if noise == 0:
      found[name] = None
    elif not np.isfinite(noise) or signal == 0:
      found[name] = _NOTHING_BUT_NOISE
    else:
      found[name] = 10 * float(np.log10(signal / noise))
  return found
