"""The rows of a PTQ table, by name."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

from qvit_jax.errors import ConfigError
from qvit_jax.quantization.ptq.ranges import AUTO
from qvit_jax.quantization.ptq.solvers import SOLVERS
from qvit_jax.quantization.spec import QuantSpec

UNIFORM_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
MIXED = ('mixed_simple', 'mixed_variance', 'mixed_sensitivity')
_FLOAT = {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}
_CLIPS = ('99.9', '99', '95')


@dataclasses.dataclass(frozen=True)
class Row:
  """What one line of the table does to the model.

  Attributes:
    name: As asked for.
    dtype: Of a float row's arrays, and of what a quantized row leaves in float.
    default: Bits of layers where no rule says otherwise.
    attention: Bits of attention products where no rule says otherwise.
    is_static: Whether activation scales are calibrated; else dynamic.
    range: Which part of what calibration saw static scales cover, one of
      `ranges.RANGES`; '' where none are static, or `clip` says it.
    clip: Percent of the activations that static scales cover; None: `range`.
    group: Input channels that share a weight scale; 0: all.
    mixed: One of MIXED where bits differ from site to site, else ''.
    is_plain: Whether weight scales just cover the largest weight; else they are
      searched for the least squared error.
    solvers: Names, in the order of SOLVERS.
  """

  name: str
  dtype: str = 'float32'
  default: QuantSpec = QuantSpec()
  attention: QuantSpec = QuantSpec()
  is_static: bool = False
  range: str = ''
  clip: float | None = None
  group: int = 0
  mixed: str = ''
  is_plain: bool = False
  solvers: tuple[str, ...] = ()

  @property
  def is_float(self) -> bool:
    """Whether nothing is quantized."""
    return self.default == QuantSpec() and not self.mixed

  @property
  def transforms(self) -> tuple[str, ...]:
    """Solvers that change the float model before anything is rounded."""
    return tuple(s for s in self.solvers if SOLVERS[s].transform)

  @property
  def rounding(self) -> str:
    """The solver that rounds kernels; '' where each weight goes by itself."""
    return ''.join(s for s in self.solvers if SOLVERS[s].rounds)

  @property
  def needs_hessians(self) -> bool:
    """Whether kernels are rounded by what their inputs look like."""
    return bool(self.rounding)

  @property
  def reads_means(self) -> bool:
    """Whether packing reads what inputs are in the mean."""
    return any(SOLVERS[s].reads_means for s in self.solvers)

  @property
  def needs_calibration(self) -> bool:
    """Whether packing the row reads statistics."""
    return self.is_static or self.needs_hessians or self.reads_means

  @property
  def has_one_scale(self) -> bool:
    """Whether one scale is for a whole kernel, not for an output channel."""
    return 'per_tensor' in self.solvers

  @property
  def softmax(self) -> str:
    """Which codes attention weights get: 'uniform', 'log2' or 'twin'."""
    return ''.join(SOLVERS[s].softmax for s in self.solvers) or 'uniform'

  def method(self, notes: Sequence[str] = ()) -> str:
    """Returns one phrase for the report; `notes` are what rules change."""
    if self.is_float:
      return self.dtype
    if self.mixed == 'mixed_simple':
      parts = ['linear kernels 4 bit, the rest bfloat16']
    elif self.mixed == 'mixed_variance':
      parts = ['kernels of low variance 4 bit, the rest bfloat16']
    elif self.mixed:
      parts = ['bits by sensitivity under a budget', 'dynamic per token']
    elif self.default.acts:
      static = f'static {self.range}'.rstrip()
      parts = [static if self.is_static else 'dynamic per token']
    else:
      parts = ['weights only']
    if self.clip is not None:
      parts.append(f'clipped to {self.clip:g} % of the values')
    if self.group:
      parts.append(f'groups of {self.group}')
    parts += notes
    parts += ['plain min-max'] if self.is_plain else self.solvers
    return ', '.join(parts)


def parse_row(text: str, *, has_stream: bool = True, ranges: str = AUTO) -> Row:
  """Returns the row that a name of `ptq.rows` stands for.

  `w4a4+gptq` replaces the solvers that a row has by default; `w4a4+plain` has
  none and scales that cover the largest weight.

  Args:
    text: Its name.
    has_stream: Whether the model has a residual stream; which solvers a row has
      by default depends on it.
    ranges: Of static rows, one of `ranges.RANGES`; AUTO: what measured best at
      the row's bits.

  Raises:
    ConfigError: An unknown row or solver; the nearest is named.
  """
  base, *asked = text.split('+')
  row = _base(base, text)
  if row.is_static and row.clip is None:
    chosen = _usual_range(row, has_stream) if ranges == AUTO else ranges
    row = dataclasses.replace(row, range=chosen)
  if not asked:
    solvers = row.solvers if has_stream else _without_stream(row)
    return dataclasses.replace(row, name=text, solvers=solvers)
  if asked == ['plain']:
    return dataclasses.replace(row, name=text, solvers=(), is_plain=True)
  for solver in asked:
    if solver not in SOLVERS:
      near = difflib.get_close_matches(solver, SOLVERS, 1, 0.0)[0]
      raise ConfigError(
        f'ptq.rows: {text!r} has the unknown solver {solver!r}; the nearest is '
        f'{near!r} (all: {", ".join(SOLVERS)}, or plain)'
      )
  _check_solvers(row, set(asked), text)
  ordered = tuple(s for s in SOLVERS if s in asked)
  return dataclasses.replace(row, name=text, solvers=ordered)


def _check_solvers(row: Row, asked: set[str], text: str) -> None:
  """Refuses solvers that would do nothing in this row."""
  acts = row.default.acts or row.mixed == 'mixed_sensitivity'
  asks = lambda wanted: [
    name for name in SOLVERS if name in asked and wanted(SOLVERS[name])
  ]
  roundings, softmax = asks(lambda s: s.rounds), asks(lambda s: s.softmax)
  for_acts = [name for name, solver in SOLVERS.items() if solver.needs_acts]
  products = row.attention.acts or row.mixed == 'mixed_sensitivity'
  for wrong, why in (
    (row.is_float, 'is in float, which solvers do not change; leave '
                   f'{"+".join(sorted(asked))} out'),
    (row.is_static and 'hadamard' in asked,
     'has ranges of inputs before hadamard turns them; leave it out, or use '
     'dynamic scales'),
    (len(roundings) > 1,
     f'rounds kernels twice; leave {" or ".join(roundings)} out'),
    (row.group and 'per_tensor' in asked,
     'has scales of groups; leave per_tensor out'),
    (len(softmax) > 1, 'has two kinds of softmax codes; leave one out'),
    (softmax and not products,
     'leaves attention products in float; leave the softmax codes out'),
    (not acts and asks(lambda s: s.needs_acts),
     f'leaves activations in float, which {", ".join(for_acts[:-1])} and '
     f'{for_acts[-1]} are for; leave them out'),
  ):  # fmt: skip
    if wrong:
      raise ConfigError(f'ptq.rows: {text!r} {why}')


def _uniform(name: str, weights: int, acts: int, **more: Any) -> Row:
  """Returns a row that has the same bits at every product."""
  return Row(name, default=QuantSpec(weights, acts),
             attention=QuantSpec(None, acts), **more)  # fmt: skip


def _usual_range(row: Row, has_stream: bool) -> str:
  """Returns the range that measured best for a static row; docs/results.md."""
  return 'minmax' if row.default.acts >= 6 and has_stream else 'mse'


def _solvers(weights: int, acts: int) -> tuple[str, ...]:
  """Returns the best composition measured for the bits; docs/results.md."""
  if min(weights, acts) >= 8:
    return ()
  return ('rotate', 'hadamard', 'gptq') if acts <= 5 else ('rotate', 'gptq')


def _static_solvers(weights: int, acts: int) -> tuple[str, ...]:
  """Returns the same for calibrated activations, which no `hadamard` turns."""
  if min(weights, acts) > 8:
    return ()
  if min(weights, acts) == 8:
    return ('smooth_quant', 'bias_correction')
  return ('rotate', 'gptq', 'bias_correction')


def _without_stream(row: Row) -> tuple[str, ...]:
  """Returns the composition where no channels can be turned.

  Rounded kernels of few weights, such as those of depthwise convolutions, give
  outputs of another mean, at 8 bits too. The best of those compared at 8 and 4
  bits, in docs/results.md.
  """
  if row.is_float:
    return ()
  weights = row.default.weights or 0
  if weights > 8:  # gptq was not compared
    return ('bias_correction',)
  tuned = ('tune',) if 0 < weights <= 4 else ()
  return ('gptq', 'bias_correction', *tuned)


def _weights_only(name: str, bits: int, **more: Any) -> Row:
  return Row(name, default=QuantSpec(bits), **more)


def _named_rows() -> dict[str, Row]:
  rows = {name: Row(name, dtype=dtype) for name, dtype in _FLOAT.items()}
  rows |= {
    'int8_dynamic': _uniform('int8_dynamic', 8, 8),
    'int8_static': _uniform(
      'int8_static', 8, 8, is_static=True, solvers=_static_solvers(8, 8)
    ),
    'int8_weight_only': _weights_only('int8_weight_only', 8),
    'int4_weight_only': _weights_only(
      'int4_weight_only', 4, solvers=('gptq',)
    ),
  }
  for group in (32, 64, 128):
    name = f'int4_weight_only_g{group}'
    rows[name] = _weights_only(name, 4, group=group, solvers=('gptq',))
  for name in MIXED:
    solvers = ('rotate', 'gptq') if name == 'mixed_sensitivity' else ('gptq',)
    rows[name] = Row(
      name,
      dtype='float32' if name == 'mixed_sensitivity' else 'bfloat16',
      mixed=name,
      solvers=solvers,
    )
  for bits in (8, 4):
    for clip in _CLIPS:
      name = f'int{bits}_clip_{clip}'
      rows[name] = _uniform(
        name, bits, bits, clip=float(clip), is_static=True
      )
  return rows


_NAMED = _named_rows()


def _base(base: str, text: str) -> Row:
  if base in _NAMED:
    return _NAMED[base]
  found = re.fullmatch(r'w(\d+)a(\d+)(_static)?', base)
  if found:
    weights, acts = map(int, found.groups()[:2])
    if weights in UNIFORM_BITS and acts in UNIFORM_BITS:
      static = found[3] is not None
      solvers = (_static_solvers if static else _solvers)(weights, acts)
      return _uniform(base, weights, acts, solvers=solvers, is_static=static)
    raise ConfigError(
      f'ptq.rows: {text!r} asks for bits outside '
      f'{", ".join(map(str, UNIFORM_BITS))}; choose among them'
    )
  known = [*_NAMED, 'w8a8', 'w4a8', 'w4a4', 'w8a8_static', 'w4a8_static']
  near = difflib.get_close_matches(base, known, 1, 0.0)[0]
  raise ConfigError(
    f'ptq.rows: {text!r} is unknown; the nearest is {near!r} (others: wXaY '
    f'and wXaY_static with X and Y among {", ".join(map(str, UNIFORM_BITS))})'
  )
