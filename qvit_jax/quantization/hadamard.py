"""Turns channels by blocks of a Hadamard matrix while the model runs.

For what a nonlinearity puts out, which no kernel before it can turn. Source:
Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 4, stage 1c.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float


def hadamard_block(width: int, most: int = 64) -> int:
  """Returns the largest power of two up to `most` that divides a width."""
  return min(width & -width, most)


def turn_blocks(x: Float[Array, '... i'], block: int) -> Float[Array, '... i']:
  """Returns x with every block of channels turned by a Hadamard matrix.

  It is symmetric and its own inverse. One product with a small matrix, because
  that is several times faster on a CPU than log2(block) rounds of additions;
  neither MACs nor BOPs of a plan count it.

  Args:
    x: Activations, or a kernel with its input channels last.
    block: A power of two that divides the channels.
  """
  matrix = scipy.linalg.hadamard(block).astype(np.float32) * block**-0.5
  blocks = x.reshape(-1, block)
  turned = jnp.matmul(blocks, matrix, precision=jax.lax.Precision.HIGHEST)
  return turned.reshape(x.shape)
