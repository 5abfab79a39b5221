"""Distribution guided distillation: do tokens resemble each other as they did?

Pure: it is handed queries or keys of a student and of its teacher.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ZERO = 1e-30  # a squared norm below it is that of nothing
# Squared distances below this are rounding; their root has no gradient.
_LEAST = 1e-10


def map_distance(
  x: Float[Array, 'b n k d'], teacher: Float[Array, 'b n k e']
) -> Float[Array, '']:
  """Returns how far similarity maps of tokens are from the teacher's.

  The map of a head is G = x x^T / |x x^T|, [n, n], with Frobenius norms; the
  distance is |G_teacher - G|, summed over heads, averaged over images.

  No map is made: |x x^T| = |x^T x| and <x x^T, t t^T> = |x^T t|^2, so products
  over the head's channels do, at a fraction of the memory.

  Args:
    x: Queries or keys of the student; any scale.
    teacher: Those of the teacher; its heads may have other channels.

  Returns:
    float32, 0 to sqrt(2) for each head.

  Source: Li et al. 2022 (Q-ViT), arXiv:2210.06707, distribution guided
    distillation.
  """

  def inner(a, b):
    # A difference of nearly equal numbers follows: no TF32.
    products = jnp.einsum(
      'bnkd,bnke->bkde', a, b, precision='highest',
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jnp.square(products).sum((-2, -1))  # [b, k], <a a^T, b b^T>

  def norm(a):
    return jnp.sqrt(jnp.maximum(inner(a, a), _ZERO))

  cosine = inner(x, teacher) / (norm(x) * norm(teacher))
  squared = 2 - 2 * cosine
  far = squared > _LEAST
  root = jnp.sqrt(jnp.where(far, squared, 1.0))
  return jnp.where(far, root, 0.0).sum(-1).mean()


def dgd_loss(
  student: list[tuple[jax.Array, jax.Array]],
  teacher: list[tuple[jax.Array, jax.Array]],
) -> Float[Array, '']:
  """Returns the distances of queries and of keys, summed over layers.

  Args:
    student: (queries, keys) of each layer, each [b, n, k, d].
    teacher: The same of the teacher.
  """
  return sum(
    map_distance(x, t)
    for ours, theirs in zip(student, teacher, strict=True)
    for x, t in zip(ours, theirs, strict=True)
  )
