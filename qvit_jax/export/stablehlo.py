"""A model as one program of StableHLO, with its weights as constants.

`jax.export.deserialize(bytes).call(images)` is all that its reader needs: JAX
and no line of this project. JAX promises to read what it wrote for six months;
the packed file is what lasts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

# Chosen when the program is loaded; on accelerators integers multiply there.
PLATFORMS = ('cpu', 'cuda', 'tpu')


def serialize(apply: Callable[..., Any], variables: Any, size: int) -> bytes:
  """Returns the program images [b, h, w, 3] -> logits [b, classes], float32.

  The batch b is free. Codes stay as they are packed: two of 4 bits in a byte.

  Args:
    apply: Of the model; called with (variables, images).
    variables: By collection.
    size: Height and width of the normalised images in pixels.
  """
  # NumPy would compute with its own arrays here, outside of the program.
  variables = jax.tree.map(jnp.asarray, variables)

  def logits(images):
    return apply(_guarded(variables), images).astype(jnp.float32)

  (batch,) = export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  program = export.export(jax.jit(logits), platforms=PLATFORMS)(images)
  return bytes(program.serialize())


def _guarded(variables: Any) -> Any:
  """Returns variables whose scales XLA does not know while it compiles.

  By a constant it would not divide but multiply by the reciprocal, and codes
  would fall to the other side of a half.
  """
  leaves, structure = jax.tree.flatten(variables)
  is_code = [jnp.issubdtype(x.dtype, jnp.integer) for x in leaves]
  floats = [x for x, code in zip(leaves, is_code, strict=True) if not code]
  hidden = iter(jax.lax.optimization_barrier(floats))
  return structure.unflatten(
    x if code else next(hidden) for x, code in zip(leaves, is_code, strict=True)
  )


def load(content: bytes) -> Callable[[Any], Any]:
  """Returns images -> logits of a program that `serialize` wrote."""
  return jax.jit(export.deserialize(bytearray(content)).call)
