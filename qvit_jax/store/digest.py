"""Content digests of arrays, computed where the arrays lie.

Not against forgers: against bits that flip on a disk or in a cable.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from qvit_jax import tree


def _mix(x: jax.Array) -> jax.Array:
  # The finalizer of MurmurHash3 (Appleby, public domain): a bijection of
  # uint32 in which every input bit reaches every output bit.
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


@jax.jit
def _digest_array(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  width = x.dtype.itemsize
  if x.dtype.name in ('int4', 'uint4', 'bool'):
    bits = x.astype(jnp.uint8)
  else:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * width}'))
  bits = bits.astype(jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  # Odd weights: a change of one element changes the first sum for certain.
  # Sums modulo 2**32 do not depend on order, so nor on the devices.
  weight = _mix(position) * 2 + 1
  first = jnp.sum(bits * weight, dtype=jnp.uint32)
  second = jnp.sum(_mix(bits ^ weight), dtype=jnp.uint32)
  return first, second


def digests(values: Any) -> dict[str, str]:
  """Returns {path: 16 hexadecimal digits} of the content of every array.

  Depends on values and their places alone, not on how they lie on devices.
  """
  # One after the other: see `devices.max_in_flight`.
  hashes = {
    path: jax.device_get(_digest_array(x))
    for path, x in tree.flatten(values).items()
  }
  return {path: f'{int(a):08x}{int(b):08x}' for path, (a, b) in hashes.items()}


def combined(values: Any) -> str:
  """Returns 16 hexadecimal digits of the content of all arrays together."""
  text = json.dumps(digests(values), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
