"""Learned steps that start from calibration instead of a first batch."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qvit_jax.quantization import numerics
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.methods.learned_core import GELU_CLIP, LearnedCore
from qvit_jax.quantization.ptq.calibrate import OperandStats, SiteStats
from qvit_jax.quantization.ptq.ranges import choose_range


def calibrated_steps(
  core: LearnedCore, stats: Mapping[str, SiteStats], method: str
) -> dict[str, Float[Array, '...']]:
  """Returns the steps and zero points of all activations by path.

  They are the scales of a static row of post-training quantization at the same
  bits, but for query, key and value: a row centres their codes at 0, here a
  zero point is learned. Without learned zero points the codes are those of
  `lsq.fixed_zero`.

  Args:
    core: Its plan names the sites and their bits.
    stats: Of every site, in the float model; its scales are the core's steps.
    method: One of `ranges.RANGES`.

  Returns:
    'SITE/lhs_step', 'SITE/lhs_zero' and so on, in the shape of the statistics.
  """
  found = {}
  for site, spec in zip(core.plan.sites, core.plan.specs, strict=True):
    if spec.acts is None:
      continue
    for side in ('lhs',) if site.is_layer else ('lhs', 'rhs'):
      operand = getattr(stats[site.path], side)
      ends = choose_range(operand, spec.acts, method)
      if site.path in core.clipped:  # nothing beyond reaches the rounding
        ends = [np.clip(end, -GELU_CLIP, GELU_CLIP) for end in ends]
      step, zero = _coder_of(operand, ends, spec.acts, core.has_zero)
      found[f'{site.path}/{side}_step'] = step
      found[f'{site.path}/{side}_zero'] = zero
  return found


def _coder_of(operand: OperandStats, ends, bits: int, has_zero: bool):
  """Returns (step, zero) whose codes cover the ends of a range."""
  low, high = (jnp.asarray(end) for end in ends)
  if has_zero:
    return numerics.scale_of(low, high, bits, symmetric=False)
  zero, levels = lsq.fixed_zero(jnp.asarray(operand.low), lsq.Coder(bits))
  most = jnp.maximum(-low, high)
  return jnp.maximum(most / levels, lsq.LEAST), zero
