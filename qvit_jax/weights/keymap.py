"""Recognises a layout by its names and translates shapes and axes."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from qvit_jax.errors import WeightsError
from qvit_jax.weights.averaged import averaged
from qvit_jax.weights.layout import WINDOWS, KeyMap, Row
from qvit_jax.weights.layouts import LAYOUTS

Shape = tuple[int, ...]
_MOST_STARTS = 8  # models in one file that are looked at


@dataclasses.dataclass(frozen=True)
class Kind:
  """How the axes of one of their tensors become ours, and back.

  Attributes:
    shape: Our shape -> the shape that their tensor must have.
    forward: (their tensor, our shape) -> ours.
    backward: ours -> theirs.
  """

  shape: Callable[[Shape], Shape]
  forward: Callable[[np.ndarray, Shape], np.ndarray]
  backward: Callable[[np.ndarray], np.ndarray]


def _linear(in_dims: int) -> Kind:
  """PyTorch's [out, in] to our [*in, *out]."""
  return Kind(
    shape=lambda s: (math.prod(s[in_dims:]), math.prod(s[:in_dims])),
    forward=lambda x, s: x.T.reshape(s),
    backward=lambda x: x.reshape(math.prod(x.shape[:in_dims]), -1).T,
  )


def _windows(shape: Shape) -> Shape:
  """Returns [height, width, in, out] of a layer that sees all windows."""
  return (WINDOWS, WINDOWS, shape[0] // WINDOWS**2, shape[1])


def _from_windows(x: np.ndarray, s: Shape) -> np.ndarray:
  """Returns [out, in, height, width] as our [height * width * in, out]."""
  out, channels = s[1], s[0] // WINDOWS**2
  x = x.reshape(out, channels, WINDOWS, WINDOWS)
  return x.transpose(2, 3, 1, 0).reshape(s)


def _to_windows(x: np.ndarray) -> np.ndarray:
  """Returns our kernel as [out, in, height, width]."""
  return x.reshape(_windows(x.shape)).transpose(3, 2, 0, 1)


KINDS = {
  'same': Kind(lambda s: s, lambda x, s: x.reshape(s), lambda x: x),
  'vector': Kind(
    lambda s: (math.prod(s),), lambda x, s: x.reshape(s), np.ravel
  ),
  # Tokens and positions without the axes of an image in a batch.
  'table': Kind(lambda s: s[1:], lambda x, s: x.reshape(s), lambda x: x[0]),
  'token': Kind(lambda s: s[2:], lambda x, s: x.reshape(s), lambda x: x[0, 0]),
  'linear': _linear(1),
  'linear_in2': _linear(2),
  'conv': Kind(
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, s: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
  ),
  # A dense layer over windows of an image: channels go first there, last here.
  'linear_windows': Kind(
    lambda s: (s[1], s[0]),
    _from_windows,
    lambda x: _to_windows(x).reshape(x.shape[1], x.shape[0]),
  ),
  'conv_windows': Kind(
    lambda s: (s[1], s[0] // WINDOWS**2, WINDOWS, WINDOWS),
    _from_windows,
    _to_windows,
  ),
  'conv_1x1': Kind(
    lambda s: (s[1], s[0], 1, 1),
    lambda x, s: x.reshape(x.shape[:2]).T,
    lambda x: x.T[:, :, None, None],
  ),
}


def as_tokens(row: Row, shape: Shape) -> Shape:
  """Returns their shape of tokens or positions as ours: [1, n, d]."""
  added = {'table': (1, 2), 'token': (2, 1)}.get(row.kind)
  if added and len(shape) == added[1]:
    return (1,) * added[0] + tuple(shape)
  return tuple(shape)


def patch_shape(row: Row, shape: Shape) -> Shape:
  """Returns their shape of a patch kernel as ours: [p, p, c, d]."""
  out, channels, height, width = shape
  return (height, width, channels, out) if row.kind == 'conv' else shape


class Names:
  """The tensor names of one file, read as one layout."""

  def __init__(
    self,
    key: str,
    prefix: str,
    names: Iterable[str],
    start: str = '',
    choice: int = 0,
  ):
    """Sorts the names into those with rows, ignored and unknown ones.

    Args:
      key: Of LAYOUTS.
      prefix: What `~` stands for.
      names: Of the whole file.
      start: What whoever saved the file put before the names of the model;
        names that begin otherwise are not the model's.
      choice: Which of the layout's `choices`.
    """
    self.key, self.layout, self.start = key, LAYOUTS[key], start
    self.prefix, self._all = prefix, list(names)
    self.kind, rows = self.layout.choices[choice]
    self._count = len(rows)
    self.outside: list[str] = []
    self.rows: dict[str, list[tuple[Row, str]]] = {}  # file name -> (row, ours)
    self.constants: dict[str, tuple[str, int]] = {}  # -> (template, block)
    self.ignored: list[str] = []
    self.pre_logits: list[str] = []
    self.unknown: list[str] = []
    self.depth = 0
    by_template: dict[str, list[Row]] = {}
    for row in rows:
      name = row.theirs.replace('~', prefix)
      by_template.setdefault(name, []).append(row)
    block = _block_start(rows).replace('~', prefix)
    numbered = re.compile(re.escape(block) + r'(\d{1,3})(\D.*)')
    constants = dict(self.layout.constants)
    for name in self._all:
      if not name.startswith(start):
        self.outside.append(name)
        continue
      template, number = self.layout.spell(name.removeprefix(start)), 0
      if found := numbered.fullmatch(template):
        number, template = int(found[1]), f'{block}{{i}}{found[2]}'
      if template in by_template:
        self.rows[name] = [
          (row, row.ours.format(i=f'{number:02d}'))
          for row in by_template[template]
        ]
        if found:
          self.depth = max(self.depth, number + 1)
      elif template in constants:
        self.constants[name] = template, number
      elif re.search(self.layout.pre_logits, template):
        self.pre_logits.append(name)
      elif any(re.search(p, template) for p in self.layout.ignored):
        self.ignored.append(name)
      else:
        self.unknown.append(name)

  def gated(self) -> 'Names':
    """Returns the same names as a model whose SwiGLU is one layer."""
    return Names(self.key, self.prefix, self._all, self.start, -1)

  @property
  def ours(self) -> dict[str, tuple[Row, str]]:
    """Our path to (row, file name)."""
    return {
      ours: (row, name)
      for name, rows in self.rows.items()
      for row, ours in rows
    }

  @property
  def title(self) -> str:
    """What the names are of: the layout, and the kind of model if it says."""
    title = self.layout.title
    return title if self.kind == title else f'{title} {self.kind}'

  @property
  def completeness(self) -> float:
    """Returns the share of rows that the file has; 0 to 1."""
    return len(self.ours) / self._count

  @property
  def score(self) -> float:
    """Returns the share of names that the layout explains; 0 to 1."""
    known = self.rows, self.ignored, self.pre_logits, self.constants
    total = sum(map(len, known))
    return total / max(1, total + len(self.unknown))


def _block_start(rows: Iterable[Row]) -> str:
  """Returns what stands before numbers of blocks; '{i}' where none are."""
  return next(
    (row.theirs.partition('{i}')[0] for row in rows if '{i}' in row.theirs),
    '{i}',
  )


def recognise(names: list[str]) -> Names | None:
  """Returns the names read as the layout that explains most of them, or None.

  Training frameworks put the name of an attribute, or several, before every
  tensor of a model ('module.', 'model.', 'student.backbone.'), beside tensors
  of other things. Equally good layouts agree on every name; the first in
  LAYOUTS is taken.

  Raises:
    WeightsError: The file holds several models that are equally good.
  """
  found: dict[str, Names] = {}
  for start in _starts(names):
    for key, layout in LAYOUTS.items():
      for prefix in layout.prefixes:
        read = _read_as(key, layout, prefix, names, start)
        if layout.stem not in read.ours or read.score < 0.5:
          continue
        if start not in found or read.score > found[start].score:
          found[start] = read
  if not found:
    return None
  most = max(len(read.rows) for read in found.values())
  # The same tensors under a longer prefix of the layout are the same model.
  best: dict[frozenset[str], str] = {}
  for start, read in found.items():
    if len(read.rows) == most:
      best.setdefault(frozenset(read.rows), start)
  chosen = averaged([*best.values()])
  if chosen is None:
    raise WeightsError(
      f'the file holds {len(best)} models, under '
      f'{", ".join(map(repr, best.values()))}; save the one that is wanted in '
      'a file of its own'
    )
  return found[chosen]


def _read_as(
  key: str, layout: KeyMap, prefix: str, names: list[str], start: str
) -> Names:
  """Returns the names as the layout's kind of model that explains most."""
  read = (Names(key, prefix, names, start, one) for one in layout.named)
  return max(read, key=lambda one: (one.score, one.completeness))


def _starts(names: list[str]) -> list[str]:
  """Returns what may stand before the names of a model, the shortest first."""
  stems = {
    row.theirs.replace('~', prefix)
    for layout in LAYOUTS.values()
    for row in layout.all_rows
    for prefix in layout.prefixes
    if row.ours == layout.stem
  }
  starts = {
    name.removesuffix(stem)
    for name in names
    for stem in stems
    if name.endswith(stem)
  }
  starts = {s for s in starts if not s or s[-1] in './'}
  return sorted(starts, key=lambda s: (len(s), s))[:_MOST_STARTS]


def nearest(names: list[str]) -> str:
  """Returns the key of the layout whose tensor names are most like these."""
  given = [re.sub(r'\d+', '0', name) for name in names[:50]]

  def likeness(key):
    theirs = {
      row.theirs.replace('~', LAYOUTS[key].prefixes[0]).replace('{i}', '0')
      for row in LAYOUTS[key].all_rows
    }
    return sum(
      difflib.SequenceMatcher(None, name[:80], best[0]).ratio()
      for name in given
      if (best := difflib.get_close_matches(name[:80], theirs, 1, 0.3))
    )

  return max(LAYOUTS, key=likeness)


def collapse(names: Iterable[str]) -> list[str]:
  """Returns names with runs of block numbers as one: 'blocks.{0-11}.norm1'."""
  groups: dict[tuple[str, str], list[str]] = {}
  plain = []
  for name in names:
    found = re.fullmatch(
      r'(.*?(?:block|layer)[a-z_]*[._/]?)(\d{1,3})(\D.*)', name
    )
    if found:
      groups.setdefault((found[1], found[3]), []).append(found[2])
    else:
      plain.append(name)
  for (start, end), numbers in groups.items():
    text = numbers[0]
    if len(numbers) > 1:
      values = [int(number) for number in numbers]
      is_run = max(values) - min(values) == len(set(values)) - 1
      text = f'{{{min(values)}-{max(values)}}}'
      if not is_run:
        text = f'{{{",".join(map(str, sorted(set(values))))}}}'
    plain.append(f'{start}{text}{end}')
  return plain
