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
  for name, x in arrays.items():
    x = getattr(x, 'scale', x)  # of a QTensor
    if isinstance(x, jax.core.Tracer) or not _is_float(x):
      continue
    ours = jnp if isinstance(x, jax.Array) else np
    if not ours.isfinite(x).all():
      count = int((~ours.isfinite(x)).sum())
      raise QuantError(
        f'{name}: {count:,} of {x.size:,} values are NaN or infinite, for '
        f'which there is no code; {advice}'
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
    if (x <= 0).any():
      raise QuantError(
        f'{name}: {int((x <= 0).sum()):,} of {x.size:,} scales are not above '
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


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)
