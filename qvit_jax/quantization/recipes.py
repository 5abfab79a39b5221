"""The quantization methods by name: what `quant.recipe` may be. Row 4."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qvit_jax.ops import Core, FloatCore, Ops, Site
from qvit_jax.quantization import spec
from qvit_jax.quantization.aqt_core import AqtCore


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A method. A new one is a core of its own file and a line in RECIPES.

  Attributes:
    quantizes: False when the fields of `config.quant` have no effect.
    make_core: Builds the core slot from the plan and `config.quant`.
  """

  quantizes: bool
  make_core: Callable[[spec.QuantPlan, Any], Core]


RECIPES = {
  'none': Recipe(quantizes=False, make_core=lambda *_: FloatCore()),
  'aqt': Recipe(
    quantizes=True,
    make_core=lambda plan, quant: AqtCore(plan, quant.backward_bits),
  ),
}


def build_plan(quant, sites: Sequence[Site]) -> spec.QuantPlan:
  """Returns the plan of `config.quant` for the model's sites.

  Raises:
    QuantError, RuleError: See `spec.resolve`.
  """
  if not RECIPES[quant.recipe].quantizes:
    return spec.float_plan(sites)
  return spec.resolve(
    sites,
    default=quant.default,
    attention=quant.attention,
    rules=quant.rules,
    act_granularity=quant.act_granularity,
  )


def build_ops(quant, plan: spec.QuantPlan) -> Ops:
  """Returns the arithmetic of `config.quant`."""
  return Ops(core=RECIPES[quant.recipe].make_core(plan, quant))
