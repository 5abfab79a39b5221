"""What is quantized how: specs, and the plan that rules make of them.

A `QuantPlan` is the answer to "which bits has this product": it is resolved
once from the config and the model's sites, printed by `--mode=sites`, saved
with every checkpoint, and read by the cores.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from qvit_jax import rules as rules_lib
from qvit_jax.errors import QuantError
from qvit_jax.ops import Site

MIN_BITS, MAX_BITS = 2, 8
FLOAT_BITS = 32
_STEM_ACTS = 8  # bits at least: pixels do not survive fewer
_SPEC = re.compile(r'(?:w(\d+))?(?:a(\d+))?')


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """Bits of the two operands of a product; None leaves an operand in float.

  Attributes:
    weights: Bits of the kernel, one scale per output channel.
    acts: Bits of the activations (of both operands of an attention product).
  """

  weights: int | None = None
  acts: int | None = None

  def __str__(self) -> str:
    text = f'w{self.weights}' if self.weights else ''
    text += f'a{self.acts}' if self.acts else ''
    return text or 'float'


def parse_spec(text: Any, *, field: str) -> QuantSpec:
  """Returns the spec that 'w4a4', 'w8', 'a8' or 'float' stands for.

  A `QuantSpec` stands for itself, of any bits.

  Raises:
    QuantError: Anything else, or bits outside 2 to 8.
  """
  if isinstance(text, QuantSpec):
    return text
  found = _SPEC.fullmatch(text) if isinstance(text, str) else None
  if text == 'float':
    return QuantSpec()
  if not text or not found:
    raise QuantError(
      f"{field}={text!r} is no spec; write 'wXaY', 'wX', 'aY' (X and Y from "
      f"{MIN_BITS} to {MAX_BITS}) or 'float'"
    )
  bits = [int(b) if b else None for b in found.groups()]
  for b in bits:
    if b is not None and not MIN_BITS <= b <= MAX_BITS:
      raise QuantError(
        f'{field}={text!r} asks for {b} bits; allowed are {MIN_BITS} to '
        f"{MAX_BITS} for weights and activations, such as 'w4a4', or 'float'"
      )
  return QuantSpec(*bits)


@dataclasses.dataclass(frozen=True)
class QuantPlan:
  """The spec of every site, in execution order.

  Attributes:
    sites: All products of the model.
    specs: One for each site.
    act_granularity: 'per_token' (one scale for each row of the product) or
      'per_tensor' (one for the whole batch); of learned steps one of
      `learned_core.STEPS`. See `granularity_of` for convolutions.
  """

  sites: tuple[Site, ...]
  specs: tuple[QuantSpec, ...]
  act_granularity: str

  @functools.cached_property
  def by_path(self) -> dict[str, QuantSpec]:
    """The spec of each site path."""
    return {
      site.path: spec for site, spec in zip(self.sites, self.specs, strict=True)
    }

  @property
  def is_float(self) -> bool:
    """Whether nothing has bits."""
    return not any(spec.weights or spec.acts for spec in self.specs)

  def only(self, operand: str) -> 'QuantPlan':
    """Returns the plan with bits for 'weights' or for 'acts' alone."""
    specs = [QuantSpec(**{operand: getattr(s, operand)}) for s in self.specs]
    return dataclasses.replace(self, specs=tuple(specs))

  def bops(self) -> int:
    """Returns bit operations for one image: MACs x bits x bits over sites."""
    total = 0
    for site, spec in zip(self.sites, self.specs, strict=True):
      acts = spec.acts or FLOAT_BITS
      other = (spec.weights or FLOAT_BITS) if site.is_layer else acts
      total += site.macs * acts * other
    return total

  def macs(self) -> int:
    """Returns multiply-accumulates for one image."""
    return sum(site.macs for site in self.sites)

  def saved_bytes(self) -> int:
    """Returns how much smaller than float32 the kernels are when packed.

    Codes count their bits, each output channel one float32 scale.
    """
    saved = 0
    for site, spec in zip(self.sites, self.specs, strict=True):
      if site.is_layer and spec.weights:
        n = math.prod(site.rhs_shape)
        saved += 4 * n - -(-n * spec.weights // 8) - 4 * site.rhs_shape[1]
    return saved

  def bits(self, operand: str) -> float | None:
    """Returns the mean bits of 'weights' (by element) or 'acts' (by MAC)."""
    weighed = [
      (
        getattr(spec, operand) or FLOAT_BITS,
        math.prod(site.rhs_shape) if operand == 'weights' else site.macs,
      )
      for site, spec in zip(self.sites, self.specs, strict=True)
      if site.is_layer
    ]
    mean = sum(b * n for b, n in weighed) / sum(n for _, n in weighed)
    return int(mean) if mean == int(mean) else round(mean, 3)

  def digest_lines(self) -> list[str]:
    """Returns one line a site, on which a checkpoint must agree."""
    return [
      f'{site.path} {spec} {self.act_granularity if spec.acts else "-"}'
      for site, spec in zip(self.sites, self.specs, strict=True)
    ]

  def table(self) -> str:
    """Returns the plan as aligned text, one line a site, totals below."""
    rows = [('site', 'kind', 'left x right', 'MACs', 'spec', 'scales')]
    for site, spec in zip(self.sites, self.specs, strict=True):
      rows.append((
          site.path, site.kind, _shapes(site), f'{site.macs:,}', str(spec),
          self._scales(site, spec),
      ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
      '  '.join(
        cell.rjust(w) if i == 3 else cell.ljust(w)
        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows
    ]
    in_float = sum(str(spec) == 'float' for spec in self.specs)
    lines.append(
      f'{len(self.sites)} sites, {len(self.sites) - in_float} quantized, '
      f'{in_float} float; {self.macs():,} MACs and {self.bops():,} BOPs an '
      'image'
    )
    return '\n'.join(lines)

  def granularity_text(self) -> str:
    """Returns `act_granularity`, and what becomes of it in convolutions."""
    others: dict[str, int] = {}
    for site, spec in zip(self.sites, self.specs, strict=True):
      shared = granularity_of(site, self.act_granularity)
      if spec.acts and shared != self.act_granularity:
        others[shared] = others.get(shared, 0) + 1
    more = ', '.join(f'{n} convolutions {name}' for name, n in others.items())
    return self.act_granularity + (f' ({more})' if more else '')

  def _scales(self, site: Site, spec: QuantSpec) -> str:
    parts = ['weights per channel'] if spec.weights else []
    if spec.acts:
      shared = granularity_of(site, self.act_granularity)
      parts.append(f'activations {shared}')
    if not parts and not site.is_layer:
      return 'quant.attention is float'
    return ', '.join(parts) or '-'


def granularity_of(site: Site, granularity: str) -> str:
  """Returns what shares a range of a site's activations.

  Windows of a convolution overlap: one range is for all pixels and channels of
  an image, or for all images.

  Args:
    site: What is computed.
    granularity: Of its plan.
  """
  if site.window is None:
    return granularity
  return 'per_image' if granularity == 'per_token' else 'per_tensor'


def _shapes(site: Site) -> str:
  """Returns '32x32x16 x 3x3x1x16, 16 groups, stride 2'."""
  right, more = site.rhs_shape, ''
  if window := site.window:
    right = window.kernel_shape(right)
    more += f', {window.groups} groups' if window.groups > 1 else ''
    if window.strides != (1, 1):
      strides = dict.fromkeys(map(str, window.strides))  # of both axes, once
      more += f', stride {"x".join(strides)}'
  shapes = ('x'.join(map(str, shape)) for shape in (site.lhs_shape, right))
  return ' x '.join(shapes) + more


def stem_rule(stem: str, spec: QuantSpec) -> tuple[str, QuantSpec]:
  """Returns the rule that leaves the first layer enough bits of its pixels.

  Args:
    stem: Path of that layer.
    spec: Of the other layers; the stem has at least 8 bits of activations.
  """
  acts = max(spec.acts or 0, _STEM_ACTS)
  return f'^{re.escape(stem)}$', QuantSpec(spec.weights, acts)


def resolve(
  sites: Sequence[Site],
  *,
  default: str | QuantSpec,
  attention: str | QuantSpec = 'float',
  rules: Sequence[Any] = (),
  under: Sequence[tuple[str, str | QuantSpec]] = (),
  act_granularity: str = 'per_token',
) -> QuantPlan:
  """Returns the plan that specs and rules make of the sites.

  Args:
    sites: All products of the model.
    default: Of layers that no rule matches.
    attention: Of attention products that no rule matches.
    rules: The user's (regex, spec) pairs; each has to have an effect.
    under: Rules that count where those of the user do not, such as
      `stem_rule`.
    act_granularity: See `QuantPlan`.

  Raises:
    QuantError: A spec is malformed or asks for bits outside 2 to 8.
    RuleError: A rule matches no site, or earlier rules hide it.
  """
  layer_spec = parse_spec(default, field='quant.default')
  product_spec = parse_spec(attention, field='quant.attention')
  if product_spec.weights:
    raise QuantError(
      f'quant.attention={attention!r} gives weight bits, but attention '
      "products have no weights; write 'aY' or 'float'"
    )
  is_layer = {site.path: site.is_layer for site in sites}

  def applies(path: str, text: Any) -> bool:
    spec = parse_spec(text, field='quant.rules')
    return is_layer[path] or not spec.weights

  chosen = rules_lib.match(
    rules, is_layer, field='quant.rules', applies=applies
  )
  left = [path for path in is_layer if path not in chosen]
  heard = [r for r in under if any(re.search(r[0], path) for path in left)]
  chosen |= rules_lib.match(heard, left, field='built-in rules')
  specs = []
  for site in sites:
    if site.path in chosen:
      specs.append(parse_spec(chosen[site.path], field='quant.rules'))
    else:
      specs.append(layer_spec if site.is_layer else product_spec)
  return QuantPlan(tuple(sites), tuple(specs), act_granularity)


def float_plan(sites: Sequence[Site]) -> QuantPlan:
  """Returns the plan that quantizes nothing."""
  return QuantPlan(tuple(sites), (QuantSpec(),) * len(sites), 'per_token')
