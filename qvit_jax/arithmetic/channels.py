"""Numbers of each channel, and sums over everything else.

A sum over the leading axes of an image is slow on CPUs: XLA walks through
memory in strides there. Added elementwise first, a few rows to one, it costs
what reading the image costs. The gradients of a bias, of a scale and of
statistics are such sums, so they are written out here.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Most rows that are added to one before the rest is summed.
_CHAIN = 16


def channel_sum(
  term: Callable[..., Array], *images: Float[Array, 'b h w c']
) -> Float[Array, ' c']:
  """Returns the sum of an elementwise term over all pixels of a batch.

  Args:
    term: (some pixels of each image) -> what is summed of them.
    *images: Of one shape.
  """
  plain = lambda *images: term(*images).sum(axis=(0, 1, 2))
  chained = functools.partial(_chained, term)
  return jax.lax.platform_dependent(*images, cpu=chained, default=plain)


def _chained(term, *images):
  height = images[0].shape[1]
  parts = max(n for n in range(1, _CHAIN + 1) if height % n == 0)
  rows = height // parts
  total = sum(
    term(*(x[:, i * rows : (i + 1) * rows] for x in images))
    for i in range(parts)
  )
  return total.sum(axis=(0, 1, 2))


@jax.custom_vjp
def add_bias(
  x: Float[Array, 'b h w c'], bias: Float[Array, ' c']
) -> Float[Array, 'b h w c']:
  """Returns x + bias."""
  return x + bias


add_bias.defvjp(
  lambda x, bias: (add_bias(x, bias), None),
  lambda _, cotangent: (cotangent, channel_sum(lambda g: g, cotangent)),
)


@jax.custom_vjp
def scale_shift(
  x: Float[Array, 'b h w c'],
  gain: Float[Array, ' c'],
  shift: Float[Array, ' c'],
) -> Float[Array, 'b h w c']:
  """Returns x * gain + shift."""
  return x * gain + shift


def _scale_shift_backward(kept, cotangent):
  x, gain = kept
  return (
    cotangent * gain,
    channel_sum(lambda x, g: x * g, x, cotangent),
    channel_sum(lambda g: g, cotangent),
  )


scale_shift.defvjp(
  lambda x, gain, shift: (scale_shift(x, gain, shift), (x, gain)),
  _scale_shift_backward,
)


@jax.custom_vjp
def moments(
  x: Float[Array, 'b h w c'], near: Float[Array, ' c']
) -> tuple[Float[Array, ' c'], Float[Array, ' c']]:
  """Returns mean and biased variance of each channel, in one reading.

  Args:
    x: Float32.
    near: A guess of the means, of which the variance is the more exact the
      nearer it is: within some deviations nothing is lost.
  """
  count = x.size // x.shape[-1]
  first = channel_sum(lambda x: x - near, x) / count
  second = channel_sum(lambda x: jnp.square(x - near), x) / count
  return first + near, jnp.maximum(second - jnp.square(first), 0)


def _moments_backward(kept, cotangents):
  x, mean = kept
  of_mean, of_var = (g / (x.size // x.shape[-1]) for g in cotangents)
  return of_mean + 2 * (x - mean) * of_var, jnp.zeros_like(mean)


def _moments_forward(x, near):
  found = moments(x, near)
  return found, (x, found[0])


moments.defvjp(_moments_forward, _moments_backward)
