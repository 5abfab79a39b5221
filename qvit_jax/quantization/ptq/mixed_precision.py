"""Picks the bits of every site under a budget, exactly.

Minimise the summed cost over one choice a site, such that the summed bytes,
bit operations, or both stay within what is allowed: an integer program with
one binary for each site and spec. Costs must add up; noise energies relative
to the signal do, nearly, while they are small.

Source: Yao et al. 2021 (HAWQ-V3), arXiv:2011.10680, section 3.4. Differs: the
cost is the measured noise of the logits instead of a Hessian trace.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
import scipy.optimize
import scipy.sparse

from qvit_jax.errors import QuantError
from qvit_jax.ops import Site
from qvit_jax.quantization.spec import FLOAT_BITS, QuantPlan, QuantSpec

_SCALE_BYTES = 4
# Fields of `config.ptq` by the attribute of Option: (name, unit, its text).
_FIELDS = {
  'bytes': ('ptq.budget_mb', 10**6, '10**6 bytes of packed kernels'),
  'bops': ('ptq.budget_gbops', 10**9, '10**9 bit operations an image'),
}
# The solver stops 1e-6 short of the optimum; costs are scaled up against it.
_LARGEST_COST = 1e6


@dataclasses.dataclass(frozen=True)
class Option:
  """What one spec does at one site.

  Attributes:
    cost: To be minimised in sum.
    bytes: Of the packed kernel with its scales.
    bops: Bit operations for one image.
  """

  cost: float
  bytes: int
  bops: int


Options = Mapping[str, Mapping[str, Option]]


def make_option(site: Site, spec: QuantSpec, cost: float) -> Option:
  """Returns cost, bytes and bit operations of a site at a spec."""
  acts = spec.acts or FLOAT_BITS
  if not site.is_layer:
    return Option(cost, 0, site.macs * acts * acts)
  rows, width = site.rhs_shape
  bops = site.macs * acts * (spec.weights or FLOAT_BITS)
  if not spec.weights:
    return Option(cost, rows * width * FLOAT_BITS // 8, bops)
  # As `qtensor` packs: two codes of up to 4 bits in a byte, in pairs of rows.
  size = -(-rows // 2) * width if spec.weights <= 4 else rows * width
  return Option(cost, size + _SCALE_BYTES * width, bops)


def make_options(
  plans: Mapping[str, QuantPlan],
  costs: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, Option]]:
  """Returns the options of every site.

  Args:
    plans: Of `plans.plan_choices`.
    costs: Path to choice to cost.
  """
  options: dict[str, dict[str, Option]] = {}
  for text, plan in plans.items():
    for site, spec in zip(plan.sites, plan.specs, strict=True):
      option = make_option(site, spec, costs[site.path][text])
      options.setdefault(site.path, {})[text] = option
  return options


def total(options: Options, chosen: Mapping[str, str], name: str) -> float:
  """Returns the sum of 'cost', 'bytes' or 'bops' over an assignment."""
  return sum(getattr(options[p][spec], name) for p, spec in chosen.items())


def choose(
  options: Options, *, budget_bytes: float | None, budget_bops: float | None
) -> dict[str, str]:
  """Returns the spec of each site with the least total cost.

  Args:
    options: Path to spec to what it costs.
    budget_bytes: Most bytes in sum, rounded to a whole number; None: any.
    budget_bops: Most bit operations in sum, likewise.

  Raises:
    QuantError: No assignment keeps the budget; names the smallest that one
      does.
  """
  budgets = {'bytes': budget_bytes, 'bops': budget_bops}
  limits = {k: round(v) for k, v in budgets.items() if v is not None}
  chosen = _solve(options, 'cost', limits)
  if chosen is None:
    raise QuantError(_infeasible(options, limits))
  return chosen


def _infeasible(options: Options, limits: dict[str, int]) -> str:
  """Says which budget is too small and what it has to be at least."""
  for name, limit in limits.items():
    others = {k: v for k, v in limits.items() if k != name}
    least = _solve(options, name, others)
    if least is None:  # the other cannot be kept either; its turn comes later
      others, least = {}, _solve(options, name, {})
    smallest = total(options, least, name)
    if smallest > limit:
      break
  field, unit, text = _FIELDS[name]
  beside = ''.join(
    f' beside {_FIELDS[k][0]}={v / _FIELDS[k][1]:.15g}'
    for k, v in others.items()
  )
  return (
    f'{field}={limit / unit:.15g} ({text}) is met by no assignment of '
    f'ptq.choices{beside}; the smallest possible is {smallest / unit:.15g}: '
    f'raise --config.{field} to it or add a choice of fewer bits'
  )


def _solve(
  options: Options, goal: str, limits: dict[str, int]
) -> dict[str, str] | None:
  """Returns the assignment with the least sum of `goal`, or None."""
  pairs = [(path, spec) for path, specs in options.items() for spec in specs]
  column = lambda name: np.array(
    [float(getattr(options[path][spec], name)) for path, spec in pairs]
  )
  cost = column(goal)
  paths = {path: i for i, path in enumerate(options)}
  rows = [paths[path] for path, _ in pairs]
  ones = np.ones(len(pairs))
  each_once = scipy.sparse.csr_array((ones, (rows, range(len(pairs)))))
  constraints = [scipy.optimize.LinearConstraint(each_once, 1, 1)]
  for name, limit in limits.items():
    # In units of the common divisor the solver's tolerance (1e-6 of a unit)
    # is less than the step from one assignment to the next.
    unit = math.gcd(*(int(x) for x in column(name))) or 1
    constraints.append(
      scipy.optimize.LinearConstraint(
        column(name)[None] / unit, -np.inf, limit // unit
      )
    )
  while True:
    found = scipy.optimize.milp(
      cost / (cost.max() or 1.0) * _LARGEST_COST,
      integrality=ones,
      bounds=scipy.optimize.Bounds(0, 1),
      constraints=constraints,
      options={'mip_rel_gap': 0.0},
    )
    if found.x is None:
      return None
    taken = np.round(found.x)
    chosen = dict(p for p, x in zip(pairs, taken, strict=True) if x)
    if all(total(options, chosen, k) <= v for k, v in limits.items()):
      return chosen
    # Over by less than the tolerance: this assignment and no other is out.
    constraints.append(
      scipy.optimize.LinearConstraint(taken[None], -np.inf, len(paths) - 1)
    )


# Rules


def make_rules(specs: Mapping[str, QuantSpec]) -> tuple[tuple[str, str], ...]:
  """Returns `config.quant.rules` that give every path its spec.

  Paths that differ only in their first number (the block) share a rule, so do
  those that want the same spec in the same blocks. Every rule matches exactly
  the paths it is for.

  Returns:
    (regex, spec) pairs, most bits first.
  """
  wanted = set(specs.values())
  most_first = lambda s: (s.weights or FLOAT_BITS, s.acts or FLOAT_BITS)
  return tuple(
    (pattern, str(spec))
    for spec in sorted(wanted, key=most_first, reverse=True)
    for pattern in _patterns(specs, spec)
  )


def _patterns(
  specs: Mapping[str, QuantSpec], wanted: QuantSpec
) -> Iterator[str]:
  """Yields regexes that together match the paths with a spec."""
  there: dict[tuple[str, str], list[str]] = {}  # (before, after): numbers
  here: dict[tuple[str, str], list[str]] = {}
  for path, spec in specs.items():
    found = re.fullmatch(r'(\D*)(\d+)(.*)', path)
    before, number, after = found.groups() if found else (path, '', '')
    there.setdefault((before, after), []).append(number)
    if spec == wanted:
      here.setdefault((before, after), []).append(number)
  groups: dict[tuple[str, str], list[str]] = {}  # (before, numbers): after
  for (before, after), numbers in here.items():
    text = _any_of(numbers)
    if len(numbers) > 1 and numbers == there[before, after]:
      text = r'\d+'
    if after.startswith('/'):  # reads better outside of the brackets
      text, after = f'{text}/', after[1:]
    groups.setdefault((before, text), []).append(re.escape(after))
  for (before, text), after in groups.items():
    yield f'^{re.escape(before)}{text}{_any_of(after)}$'


def _any_of(texts: list[str]) -> str:
  return texts[0] if len(texts) == 1 else f'({"|".join(texts)})'
