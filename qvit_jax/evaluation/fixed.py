"""Codes of a packed model as constants of the program that runs it.

A program that is compiled for codes that stay can turn and widen them once,
while it is compiled, instead of each time it runs. Scales stay arguments: XLA
would multiply by the reciprocal of a constant instead of dividing by it, and
codes of activations would fall to the other side of a half.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(variables: Any) -> tuple[Callable[[Any], Any], Any]:
  """Returns (whole, given): what a program is handed, and what it makes of it.

  `whole(given)`, called inside the function that is compiled, returns the
  variables. What `given` lacks is compiled in: all integers, on one CPU.
  Float weights gain nothing by that, and codes that lie on several devices
  stay where they are.

  Args:
    variables: That no call of the program changes.
  """
  leaves, structure = jax.tree.flatten(variables)
  held = [x if _is_held(x) else None for x in leaves]
  given = [x if c is None else None for x, c in zip(leaves, held, strict=True)]

  def whole(given: Any) -> Any:
    return structure.unflatten(
      x if c is None else c for x, c in zip(given, held, strict=True)
    )

  return whole, given


def _is_held(x: Any) -> bool:
  return (
    jax.default_backend() == 'cpu'
    and isinstance(x, jax.Array)
    and jnp.issubdtype(x.dtype, jnp.integer)
    and len(x.sharding.device_set) == 1
  )
