"""The quantization methods by name: what `quant.recipe` may be."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import spec
from qvit_jax.quantization.methods.aqt import AqtCore
from qvit_jax.quantization.methods.learned_core import LearnedCore
from qvit_jax.quantization.methods.qvit import Rectifier


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A method. A new one is a core of its own file and a line in RECIPES.

  Attributes:
    make_ops: (config.quant, plan, layers behind a nonlinearity) -> arithmetic.
    quantizes: False when the fields of `config.quant` have no effect.
    collections: What is trained unless `train.trainable` says otherwise.
    granularity: The field of `config.quant` that says what shares a scale.
  """

  make_ops: Callable[[Any, spec.QuantPlan, tuple[str, ...]], Ops]
  quantizes: bool = True
  collections: tuple[str, ...] = ('params',)
  granularity: str = 'act_granularity'


def _aqt(quant, plan, hidden) -> Ops:
  del hidden
  return Ops(core=AqtCore(plan, quant.backward_bits))


def _lsq(quant, plan, hidden, kernels: str = 'step') -> Ops:
  turned = hidden if quant.hadamard else ()
  core = LearnedCore(plan, kernels, has_zero=quant.zero_point, turned=turned)
  if quant.hadamard and not any(map(core.block, plan.sites)):
    raise QuantError(
      'quant.hadamard=True would have no effect: no layer behind a '
      'nonlinearity rounds its input; give one bits of activations, or leave '
      'hadamard out'
    )
  return Ops(core=core)


def _statsq(quant, plan, hidden) -> Ops:
  return _lsq(quant, plan, hidden, kernels='statsq')


def _qvit(quant, plan, hidden) -> Ops:
  core = LearnedCore(plan, clipped=hidden)
  return Ops(core=core, rectify=Rectifier(quant.irm))


_LEARNED = {'collections': ('params', 'quant'), 'granularity': 'steps'}
RECIPES = {
  'none': Recipe(lambda quant, plan, hidden: Ops(), quantizes=False),
  'aqt': Recipe(_aqt),
  'lsq': Recipe(_lsq, **_LEARNED),
  'statsq': Recipe(_statsq, **_LEARNED),
  'qvit': Recipe(_qvit, **_LEARNED),
}


def build_plan(quant, sites: Sequence[Site]) -> spec.QuantPlan:
  """Returns the plan of `config.quant` for the model's sites.

  Raises:
    QuantError, RuleError: See `spec.resolve`.
  """
  recipe = RECIPES[quant.recipe]
  if not recipe.quantizes:
    return spec.float_plan(sites)
  return spec.resolve(
    sites,
    default=quant.default,
    attention=quant.attention,
    rules=quant.rules,
    act_granularity=quant[recipe.granularity],
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
  return RECIPES[quant.recipe].make_ops(quant, plan, tuple(hidden))
