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

from qvit_jax.evaluation.fixed import guarded

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
    return apply(guarded(variables), images).astype(jnp.float32)

  (batch,) = export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  program = export.export(jax.jit(logits), platforms=PLATFORMS)(images)
  return bytes(program.serialize())


def load(content: bytes) -> Callable[[Any], Any]:
  """Returns images -> logits of a program that `serialize` wrote."""
  return jax.jit(export.deserialize(bytearray(content)).call)
