"""Weights that swing between two levels: who is held, what damps.

Near the boundary of two codes a straight-through gradient pushes a weight back
as soon as it has crossed, so that it never settles.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qvit_jax import tree
from qvit_jax.ops import Site
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.spec import QuantPlan


def near_boundary(
  w: Float[Array, 'i o'], bits: int, *, reach: float
) -> Bool[Array, 'i o']:
  """Returns which weights of a StatsQ kernel are about to change their code.

  Args:
    w: Kernel.
    bits: 2 to 8.
    reach: Most distance from a boundary, in steps of the grid.

  Source: Liu et al. 2023 (OFQ), arXiv:2302.02210, confidence-guided annealing.
    As in its released code, weights beyond the grid lie on a boundary.
  """
  inside = jnp.clip(w / lsq.statsq_size(w), -1, 1 - 1e-6)
  # Rounded is this minus a half, so boundaries are whole numbers.
  scaled = inside * 2 ** (bits - 1)
  return jnp.abs(scaled - jnp.round(scaled)) <= reach


def dampening(
  w: Float[Array, 'i o'], step: Float[Array, '#o'], bits: int
) -> Float[Array, '']:
  """Returns the squared distance of a kernel from its levels, summed.

  The gradient reaches `w` alone, and pulls it to its level; weights beyond the
  grid get none.

  Args:
    w: Kernel.
    step: Of each output channel.
    bits: 2 to 8.

  Source: Nagel et al. 2022, arXiv:2203.11086, section 4.1.
  """
  coder = lsq.Coder(bits, is_signed=True)
  first, last = coder.ends
  step = jax.lax.stop_gradient(jnp.maximum(step, lsq.LEAST))
  codes, _ = lsq.encode(
    jax.lax.stop_gradient(w), step, jnp.zeros_like(step), coder
  )
  return jnp.square(codes * step - jnp.clip(w, first * step, last * step)).sum()


def movable_weights(
  plan: QuantPlan, trained: Any, *, reach: float
) -> dict[str, Bool[Array, '...']]:
  """Returns `near_boundary` of every quantized kernel of the variables.

  Args:
    plan: Which kernels have how many bits.
    trained: Collections.
    reach: See `near_boundary`.
  """
  return {
    path: near_boundary(w.reshape(site.rhs_shape), bits, reach=reach).reshape(
      w.shape
    )
    for path, w, site, bits in _kernels(plan, tree.flatten(trained))
  }


def total_dampening(plan: QuantPlan, variables: Any) -> Float[Array, '']:
  """Returns the sum of `dampening` over all quantized kernels."""
  flat = tree.flatten(variables)
  total = jnp.zeros(())
  for _, w, site, bits in _kernels(plan, flat):
    step = flat[f'quant/{site.path}/kernel_step']
    total += dampening(w.reshape(site.rhs_shape), step, bits)
  return total


def _kernels(
  plan: QuantPlan, flat: dict[str, Any]
) -> Iterator[tuple[str, Array, Site, int]]:
  """Yields (path, kernel, site, bits) of the quantized kernels there are."""
  for site, spec in zip(plan.sites, plan.specs, strict=True):
    path = f'params/{site.path}/kernel'
    if site.is_layer and spec.weights and path in flat:
      yield path, flat[path], site, spec.weights
