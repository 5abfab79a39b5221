"""Packed models as constants of the program that runs them.

A program that is compiled for codes that stay can turn and widen them once,
while it is compiled, instead of each time it runs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(variables: Any) -> tuple[Callable[[Any], Any], Any]:
  """Returns (whole, given): what a program is handed, and what it makes of it.

  `whole(given)`, called inside the function that is compiled, returns the
  variables. A packed model on one CPU is compiled in and `given` is empty.
  Float weights gain nothing by that, codes that lie on several devices stay
  where they are, and for accelerators nobody has measured it: these are handed
  over as they are.

  Args:
    variables: That no call of the program changes.
  """
  leaves = jax.tree.leaves(variables)
  if not (any(map(_is_code, leaves)) and all(map(_is_on_one_cpu, leaves))):
    return (lambda given: given), variables
  return (lambda given: guarded(variables)), ()


def guarded(variables: Any) -> Any:
  """Returns constants of which XLA does not see what the floats are.

  By a scale that it knows it would not divide but multiply by the reciprocal,
  and codes would fall to the other side of a half.
  """
  leaves, structure = jax.tree.flatten(variables)
  floats = [x for x in leaves if not _is_code(x)]
  hidden = iter(jax.lax.optimization_barrier(floats))
  return structure.unflatten(x if _is_code(x) else next(hidden) for x in leaves)


def _is_code(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.integer)


def _is_on_one_cpu(x: Any) -> bool:
  return (
    isinstance(x, jax.Array)
    and x.sharding.num_devices == 1
    and all(device.platform == 'cpu' for device in x.sharding.device_set)
  )
