"""What becomes codes has to be finite: NaN and infinity round to a code too.

A cast of NaN to int8 gives 0, so that a broken kernel would be packed as zeros
and its layer would be dead without a word.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qvit_jax.errors import QuantError

_EARLIER = 'give an earlier step by --config.checkpoint.path'
# Names of distances of two levels in packed models. Learned ones are no more
# than bounded from below, in training as in packing (`lsq.LEAST`).
_STEPS = ('_scale', 'kernel/scale')


def check_finite(
  arrays: Mapping[str, Any],
  advice: str = f'{_EARLIER}, or other weights',
) -> None:
  """Refuses values that no code can stand for.

  Does nothing while JAX traces: then there are no values.

  Args:
    arrays: Name to array; of a QTensor the scales are looked at.
    advice: What to do.

  Raises:
    QuantError: An array holds NaN or infinity; it is named.
  """
  floats = {}
  for name, x in arrays.items():
    x = getattr(x, 'scale', x)  # of a QTensor
    if not isinstance(x, jax.core.Tracer) and _is_float(x):
      floats[name] = x
  for name, count in _count_broken(floats).items():
    if count:
      raise QuantError(
        f'{name}: {count:,} of {floats[name].size:,} values are NaN or '
        f'infinite, for which there is no code; {advice}'
      )


def check_learned(quant: Mapping[str, Any]) -> None:
  """Refuses a collection `quant` that would make a layer NaN or dead.

  Args:
    quant: Steps, scales, zero points and kernels by path, learned or packed.

  Raises:
    QuantError: An array is not finite, or a scale not positive; it is named.
  """
  check_finite(quant)
  for name, x in quant.items():
    if hasattr(x, 'scale'):
      name, x = f'{name}/scale', x.scale
    if not name.endswith(_STEPS) or isinstance(x, jax.core.Tracer):
      continue
    x = np.asarray(x)  # small
    if (x <= 0).any():
      raise QuantError(
        f'{name}: {(x <= 0).sum():,} of {x.size:,} scales are not above '
        f'0 (least {float(x.min()):.3g}), so that all codes mean zero; '
        f'{_EARLIER}, or train again with a smaller --config.optim.quant_lr'
      )


@contextlib.contextmanager
def at_site(path: str) -> Iterator[None]:
  """Puts the path of a site before what a QuantError says."""
  try:
    yield
  except QuantError as error:
    raise QuantError(f'{path}: {error}') from error


def _count_broken(arrays: Mapping[str, Any]) -> dict[str, int]:
  """Returns how many values of each array are not finite."""
  found, groups = {}, {}
  for name, x in arrays.items():
    if isinstance(x, jax.Array):  # a program for all on the same devices
      groups.setdefault(frozenset(x.devices()), {})[name] = x
    else:
      found[name] = int((~np.isfinite(x)).sum())
  for group in groups.values():
    found |= jax.device_get(_count_on_device(group))
  return {name: int(found[name]) for name in arrays}


@jax.jit
def _count_on_device(arrays: dict[str, Array]) -> dict[str, Array]:
  return {name: (~jnp.isfinite(x)).sum() for name, x in arrays.items()}


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)
