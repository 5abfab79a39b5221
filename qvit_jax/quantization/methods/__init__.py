"""The quantization methods by name: what `quant.recipe` may be."""

import importlib
from collections.abc import Sequence

from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import spec
from qvit_jax.quantization.methods.method import Method

# What `quant.recipe` says: 'file:record' in this folder.
_TABLE = {
  'none': 'method:NONE',
  'aqt': 'aqt:METHOD',
  'lsq': 'learned_core:LSQ',
  'statsq': 'learned_core:STATSQ',
  'qvit': 'qvit:METHOD',
  'ptq': 'method:PACKED',
}


def _record(place: str) -> Method:
  file, _, name = place.partition(':')
  return getattr(importlib.import_module(f'{__name__}.{file}'), name)


METHODS: dict[str, Method] = {n: _record(p) for n, p in _TABLE.items()}


def build_plan(quant, sites: Sequence[Site]) -> spec.QuantPlan:
  """Returns the plan of `config.quant` for the model's sites.

  Raises:
    QuantError, RuleError: See `spec.resolve`.
  """
  recipe = METHODS[quant.recipe]
  if not recipe.quantizes:
    return spec.float_plan(sites)
  return spec.resolve(
    sites,
    default=quant.default,
    attention=quant.attention,
    rules=quant.rules,
    act_granularity=quant.act_granularity or recipe.granularities[0],
  )


def build_ops(
  quant, plan: spec.QuantPlan, *, hidden: Sequence[str] = ()
) -> Ops:
  """Returns the arithmetic of `config.quant`.

  Args:
    quant: The section.
    plan: Bits of every site.
    hidden: Layers behind a nonlinearity (`ops.Stream.hidden`).
  """
  return METHODS[quant.recipe].make_ops(quant, plan, tuple(hidden))
