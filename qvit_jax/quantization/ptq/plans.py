"""Bits of every product: in a row of the table, and at a choice of the search.

Everything that is said of bits is a default or a rule: those of the user come
first, then those of the row, its budget or the first layer.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvit_jax.errors import QuantError
from qvit_jax.ops import Site, Stream
from qvit_jax.quantization import hadamard, spec
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.ptq.mixed_precision import make_rules
from qvit_jax.quantization.ptq.rows import Row
from qvit_jax.quantization.spec import QuantPlan, QuantSpec


@dataclasses.dataclass(frozen=True)
class Products:
  """The products of a model and what holds for their bits in every row.

  Attributes:
    sites: All products.
    stem: Path of the layer that sees pixels.
    rules: The user's (regex, spec) pairs.
  """

  sites: Sequence[Site]
  stem: str
  rules: Sequence[Any] = ()

  def __post_init__(self):
    """Raises RuleError or QuantError for rules without effect or sense."""
    spec.resolve(self.sites, default='float', rules=self.rules)

  def resolve(
    self,
    default: QuantSpec,
    attention: QuantSpec,
    under: Sequence[tuple[str, str | QuantSpec]] = (),
  ) -> QuantPlan:
    """Returns the plan of a default, of rules under those of the user.

    The first layer has at least 8 bits of its pixels unless a rule says
    otherwise.
    """
    stem = [spec.stem_rule(self.stem, default)] if default.acts else []
    return spec.resolve(
      self.sites,
      default=default,
      attention=attention,
      rules=self.rules,
      under=[*under, *stem],
    )

  def stem_line(self, default: QuantSpec) -> str:
    """Returns the rule of the first layer; '' where it changes nothing."""
    pattern, wanted = spec.stem_rule(self.stem, default)
    is_ruled = any(re.search(rule, self.stem) for rule, _ in self.rules)
    if not default.acts or is_ruled or wanted == default:
      return ''
    return f'{pattern} a{wanted.acts} (first layer)'


def plan_row(
  row: Row,
  products: Products,
  params: Mapping[str, np.ndarray] | None = None,
  chosen: Mapping[str, QuantSpec] | None = None,
) -> QuantPlan:
  """Returns the bits that a quantized row gives every product.

  Args:
    row: What is asked for.
    products: Of the model.
    params: Float parameters, for 'mixed_variance'.
    chosen: Bits of each site, for 'mixed_sensitivity'.
  """
  layers = [site for site in products.sites if site.is_layer]
  own: dict[str, QuantSpec] = {}
  if row.mixed == 'mixed_simple':
    own = {s.path: QuantSpec(4) for s in layers if s.kind == 'dense'}
  elif row.mixed == 'mixed_variance':
    spread = {s.path: float(params[f'{s.path}/kernel'].var()) for s in layers}
    middle = np.median(list(spread.values()))
    own = {path: QuantSpec(4) for path, v in spread.items() if v <= middle}
  elif row.mixed:
    own = dict(chosen)
  everywhere = {site.path: QuantSpec() for site in products.sites}
  under = make_rules(everywhere | own) if own else ()
  return products.resolve(row.default, row.attention, under)


def row_notes(row: Row, products: Products) -> list[str]:
  """Returns what rules change of a row's own bits, for its `method`."""
  notes = []
  if products.stem_line(row.default):
    acts = spec.stem_rule(products.stem, row.default)[1].acts
    notes.append(f'stem activations {acts} bit')
  if products.rules and not row.is_float:
    notes.append('quant.rules')
  return notes


def plan_sites(
  row: Row, plan: QuantPlan, stream: Stream | None
) -> dict[str, SitePlan]:
  """Returns how each product of a quantized row runs.

  Args:
    row: Its solvers and its kind of scales.
    plan: Of `plan_row`.
    stream: Says which layers `hadamard` can help; None: the model has none.
  """
  plans = {}
  for site, bits in zip(plan.sites, plan.specs, strict=True):
    acts, block = bits.acts, 0
    if 'hadamard' in row.solvers and acts and site.path in stream.hidden:
      block = hadamard.hadamard_block(site.rhs_shape[0])
    plans[site.path] = SitePlan(
      bits.weights,
      acts,
      is_static=row.is_static and acts is not None,
      block=block,
      softmax=row.softmax if site.kind == 'av' and acts else 'uniform',
    )
  return plans


def parse_choices(texts: Sequence[Any]) -> dict[str, QuantSpec]:
  """Returns the specs of `ptq.choices` by their text.

  Raises:
    QuantError: One is malformed, 'float' or given twice.
  """
  choices: dict[str, QuantSpec] = {}
  for text in texts:
    found = spec.parse_spec(text, field='ptq.choices')
    if found == QuantSpec():
      raise QuantError(
        f'ptq.choices holds {text!r}, which quantizes nothing; give specs '
        "with bits such as 'w4a4' and 'w8a8'"
      )
    if str(found) in choices:
      raise QuantError(f'ptq.choices holds {text!r} twice; name each spec once')
    choices[str(found)] = found
  return choices


def plan_choices(
  texts: Sequence[Any], products: Products
) -> dict[str, QuantPlan]:
  """Returns what each of `ptq.choices` means at every product.

  Sites that a rule of the user matches have the rule's bits at every choice.

  Raises:
    QuantError: See `parse_choices`.
  """
  return {
    text: products.resolve(choice, QuantSpec(None, choice.acts))
    for text, choice in parse_choices(texts).items()
  }
