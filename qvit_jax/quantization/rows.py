"""The rows of a PTQ table, by name. Row 4."""

import dataclasses
import difflib
import re

from qvit_jax.errors import ConfigError

UNIFORM_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
STEM_ACTS = 8  # bits at least: pixels do not survive fewer
SOLVERS = ('rotate', 'gptq', 'bias_correction')
_FLOAT = {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}


@dataclasses.dataclass(frozen=True)
class Row:
  """What one line of the table does to the model.

  Attributes:
    name: As asked for.
    dtype: Of a float row's arrays and products.
    weights: Bits of the kernels; None: float.
    acts: Bits of the activations; None: float.
    is_static: Whether activation scales are calibrated; else dynamic.
    group: Input channels that share a weight scale; 0: all.
    attention: Whether attention products are quantized too.
    solvers: In the order of SOLVERS.
  """

  name: str
  dtype: str = 'float32'
  weights: int | None = None
  acts: int | None = None
  is_static: bool = False
  group: int = 0
  attention: bool = False
  solvers: tuple[str, ...] = ()

  @property
  def needs_calibration(self) -> bool:
    """Whether the row reads statistics."""
    return self.is_static or bool(
      {'gptq', 'bias_correction'} & set(self.solvers)
    )

  @property
  def method(self) -> str:
    """One phrase for the report."""
    if self.weights is None and self.acts is None:
      return self.dtype
    parts = []
    if self.acts:
      parts.append('static' if self.is_static else 'dynamic per token')
    else:
      parts.append('weights only')
    if self.group:
      parts.append(f'groups of {self.group}')
    if self.acts and self.acts < STEM_ACTS:
      parts.append(f'stem activations {STEM_ACTS} bit')
    return ', '.join([*parts, *self.solvers])


def parse_row(text: str) -> Row:
  """Returns the row that a name of `ptq.rows` stands for.

  `w4a4+gptq` replaces the solvers that a row has by default, `w4a4+plain` by
  none.

  Raises:
    ConfigError: An unknown row or solver; the nearest is named.
  """
  base, *asked = text.split('+')
  row = _base(base, text)
  if not asked:
    return dataclasses.replace(row, name=text)
  if asked == ['plain']:
    return dataclasses.replace(row, name=text, solvers=())
  for solver in asked:
    if solver not in SOLVERS:
      near = difflib.get_close_matches(solver, SOLVERS, 1, 0.0)[0]
      raise ConfigError(
        f'ptq.rows: {text!r} has the unknown solver {solver!r}; the nearest is '
        f'{near!r} (all: {", ".join(SOLVERS)}, or plain)'
      )
  if row.weights is None:
    raise ConfigError(
      f'ptq.rows: {text!r} is in float, which solvers do not change; leave '
      f'{"+".join(asked)} out'
    )
  if row.group and 'gptq' in asked:
    raise ConfigError(
      f'ptq.rows: {text!r} has weight scales in groups, gptq wants one for '
      'each output channel; use int4_weight_only, or leave gptq out'
    )
  ordered = tuple(s for s in SOLVERS if s in asked)
  return dataclasses.replace(row, name=text, solvers=ordered)


def _base(base: str, text: str) -> Row:
  if base in _FLOAT:
    return Row(base, dtype=_FLOAT[base])
  named = {
    'int8_dynamic': Row(base, weights=8, acts=8, attention=True),
    'int8_static': Row(base, weights=8, acts=8, is_static=True, attention=True),
    'int8_weight_only': Row(base, weights=8),
    'int4_weight_only': Row(base, weights=4, solvers=('gptq',)),
  }
  for group in (32, 64, 128):
    name = f'int4_weight_only_g{group}'
    named[name] = Row(name, weights=4, group=group)
  if base in named:
    return named[base]
  found = re.fullmatch(r'w(\d+)a(\d+)', base)
  if found:
    weights, acts = map(int, found.groups())
    if weights in UNIFORM_BITS and acts in UNIFORM_BITS:
      solvers = () if min(weights, acts) >= 8 else ('rotate', 'gptq')
      return Row(
        base, weights=weights, acts=acts, attention=True, solvers=solvers
      )
    raise ConfigError(
      f'ptq.rows: {text!r} asks for bits outside '
      f'{", ".join(map(str, UNIFORM_BITS))}; choose among them'
    )
  known = [*_FLOAT, *named, 'w8a8', 'w4a8', 'w4a4']
  near = difflib.get_close_matches(base, known, 1, 0.0)[0]
  raise ConfigError(
    f'ptq.rows: {text!r} is unknown; the nearest is {near!r} (others: wXaY '
    f'with X and Y among {", ".join(map(str, UNIFORM_BITS))})'
  )
