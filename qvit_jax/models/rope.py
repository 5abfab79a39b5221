"""Rotary positions of patches: no parameters, and any image size.

Source: Su et al. 2021, RoFormer, arXiv:2104.09864, section 3.2.2, for each axis
of the image by itself; coordinates, base and which channels are pairs as in
Simeoni et al. 2025, DINOv3, arXiv:2508.10104, and its release.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BASE = 100.0


def angles(
  height: int, width: int, dim: int, first: int
) -> Float[np.ndarray, 'n half']:
  """Returns by how much the pairs of channels of each token are turned.

  Centers of patches lie between -1 and 1 on both axes; half of the pairs turn
  by the row, the rest by the column, with periods from 1 to almost `BASE`.

  Args:
    height: Rows of patches.
    width: Columns.
    dim: Channels of a head; a multiple of 4.
    first: Tokens before the patches, which have no place and are not turned.

  Returns:
    Radians; n = first + height * width, half = dim / 2.
  """
  rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in (height, width))
  places = np.stack(np.meshgrid(rows, columns, indexing='ij'), axis=-1)
  periods = BASE ** (4 * np.arange(dim // 4) / dim)
  turned = 2 * np.pi * places.reshape(-1, 2, 1) / periods
  turned = turned.reshape(height * width, dim // 2)
  still = np.zeros((first, dim // 2))
  return np.concatenate([still, turned]).astype(np.float32)


def turn(
  x: Float[Array, 'b n k dim'], by: Float[Array, 'n half']
) -> Float[Array, 'b n k dim']:
  """Returns queries or keys with channels i and i + dim / 2 turned together."""
  cos, sin = jnp.cos(by)[:, None], jnp.sin(by)[:, None]
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [left * cos - right * sin, right * cos + left * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
