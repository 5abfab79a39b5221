"""Rounds the activations of the sites that are switched on.

The switch of a site is a variable of the running program, so one compilation
serves every site: turning another one on costs no more than a forward pass.
Kernels are rounded by the caller, in `params`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax import tree
from qvit_jax.arithmetic.products import multiply, shared_axes
from qvit_jax.ops import Site
from qvit_jax.quantization import numerics


def switches(sites: Iterable[Site], on: str | None) -> dict[str, Any]:
  """Returns the collection `switch` with one site on, or none.

  Args:
    sites: All of the model.
    on: The path of the site; None: every site computes in float.
  """
  return tree.nest({f'{s.path}/on': jnp.asarray(s.path == on) for s in sites})


def _fake_quantize(
  x: Float[Array, '...'], bits: int, axes: tuple[int, ...]
) -> Float[Array, '...']:
  """Returns x on the levels that `integer_core` finds for dynamic scales."""
  scale, zero = numerics.scale_of(
    x.min(axis=axes, keepdims=True),
    x.max(axis=axes, keepdims=True),
    bits,
    symmetric=False,
  )
  return numerics.round_to_grid(x, scale, zero, bits, symmetric=False)


@dataclasses.dataclass(frozen=True)
class SwitchCore:
  """Float products, their activations rounded where a switch is on.

  Reads a boolean `on` from the collection `switch` of each site. See
  `ops.Core`.

  Attributes:
    bits: Of activations that are rounded. None: switches change nothing.
  """

  bits: int | None
  is_packed = False

  def __call__(self, module, site: Site, lhs, rhs, dims):
    """See `ops.Core`."""
    rhs = rhs.astype(lhs.dtype)
    if self.bits is None:
      return multiply(lhs, rhs, dims)
    on = module.variable('switch', 'on', lambda: jnp.asarray(False)).value

    def rounded(x, axes):
      # A branch, not a select: sites that are off cost nothing.
      return jax.lax.cond(
        on, lambda x: _fake_quantize(x, self.bits, axes), lambda x: x, x
      )

    lhs = rounded(lhs, shared_axes(dims, 0))
    if not site.is_layer:
      rhs = rounded(rhs, shared_axes(dims, 1))
    return multiply(lhs, rhs, dims)
