"""Fits one file's tensors into the places of our model.

Every name and shape is compared first; only then are the tensors read, one at
a time, so that no second copy of the file lies in memory.
"""

import math
from typing import Any, NoReturn

import numpy as np

from qvit_jax.errors import WeightsError
from qvit_jax.store.entries import Source, printable
from qvit_jax.weights import adapt
from qvit_jax.weights.keymap import KINDS, Names, collapse
from qvit_jax.weights.layouts import Row
from qvit_jax.weights.report import Report

_SHOWN = 40  # problems in one message; blocks count once
# The field that decides whether the model has a parameter.
_FIELDS = {
    'cls': 'model.pool', 'registers': 'model.registers',
    'scale1': 'model.layer_scale', 'scale2': 'model.layer_scale',
    'query_norm': 'model.qk_norm', 'key_norm': 'model.qk_norm',
}  # fmt: skip


class Import:
  """One import: compares everything first, then reads."""

  def __init__(
    self, source: Source, wanted: dict[str, Any], names: Names | None
  ):
    """Prepares it; without `names` the tensors have our own."""
    self.source, self.wanted = source, wanted
    self.names = names
    self.report = Report(
      source.title,
      names.layout.title if names else 'our own',
      notes=list(source.notes),
      facts=source.facts,
    )
    if names:
      self.ours = names.ours
      source.facts.setdefault('norm_eps', names.layout.norm_eps)
      if (
        names.key == 'google'
        and 'encoder/block_00/attn/query/bias' in names.ours
      ):
        bias = self._shape('encoder/block_00/attn/query/bias')
        if len(bias) == 2:  # else refused below
          source.facts.setdefault('heads', bias[0])
    else:
      self.ours = {
        name: (Row(name, name, 'same'), name) for name in source.entries
      }
    self.problems: list[str] = []

  def run(self) -> tuple[dict[str, np.ndarray], Report]:
    """Returns our path -> array, and the report."""
    if self.names:
      self.report.unused += self.names.ignored + self.names.pre_logits
    self._compare_structure()
    self._compare_head()
    self._compare_names()
    self._compare_shapes()
    if self.problems:
      self._refuse()
    return self._read(), self.report

  def _refuse(self) -> NoReturn:
    shown = self.problems[:_SHOWN]
    rest = len(self.problems) - len(shown)
    more = f' and {rest} more' if rest else ''
    text = (
      f'weights {self.source.title} ({self.report.layout} layout) do not fit '
      f'the model: {"; ".join(shown)}{more}; give model.* the values of these '
      'weights, or choose others'
    )
    raise WeightsError(printable(text))

  def _shape(self, ours: str) -> tuple[int, ...] | None:
    """Returns the shape of the file's tensor for a parameter, or None."""
    if ours not in self.ours:
      return None
    return self.source.entries[self.ours[ours][1]].shape

  def _compare_structure(self) -> None:
    """Depth and width in one line each, before a hundred that follow."""
    depth = len({p.split('/')[1] for p in self.wanted if 'block_' in p})
    there = len({p.split('/')[1] for p in self.ours if 'block_' in p})
    if there != depth:
      self.problems.append(f'the depth is {there} there, {depth} here')
    width = self._shape('encoder/norm/scale')
    here = self.wanted['encoder/norm/scale'].shape
    if width is not None and width != here:
      self.problems.append(
        f'the width is {math.prod(width)} there, {here[0]} here'
      )

  def _compare_head(self) -> None:
    """A head of other classes, or none, starts fresh."""
    kernel, bias = 'head/kernel', 'head/bias'
    reason = ''
    there, here = self._shape(bias), self.wanted[bias].shape
    if kernel not in self.ours and bias not in self.ours:
      reason = 'the file has none'
    elif there is not None and there != here:
      reason = f'{math.prod(there)} classes there, {here[0]} here'
      for name in (kernel, bias):
        if name in self.ours:
          self._note_shapes(name)
    elif self.names and self.names.pre_logits:
      reason = 'it follows a pre-logits layer, which the model does not have'
    if reason:
      for name in (kernel, bias):
        self.report.reinitialised[name] = reason
        if name in self.ours:
          self.report.unused.append(self.ours.pop(name)[1])

  def _note_shapes(self, ours: str) -> None:
    self.report.mis_shaped[ours] = (
      f'{list(self._shape(ours))} -> {list(self.wanted[ours].shape)}'
    )

  def _compare_names(self) -> None:
    if 'cls' in self.ours and 'cls' not in self.wanted:
      # Its position goes with it: `_positions` knows that from the shapes.
      self.report.unused.append(self.ours['cls'][1])
    fresh = self.report.reinitialised
    missing = [n for n in self.wanted if n not in self.ours and n not in fresh]
    extra = [n for n in self.ours if n not in self.wanted and n != 'cls']
    self.problems += [
      f'missing {name}{_advice(name)}' for name in collapse(missing)
    ]
    groups: dict[str, tuple[str, list[str]]] = {}
    for name in extra:
      row, theirs = self.ours[name]
      found = groups.setdefault(row.theirs, (name, []))[1]
      if theirs not in found:
        found.append(theirs)
    for name, found in groups.values():
      self.problems += [
        f'no place for {group}{_advice(name)}' for group in collapse(found)
      ]
    if self.names:
      self.problems += [
        f'unknown tensor {name}' for name in collapse(self.names.unknown)
      ]

  def _compare_shapes(self) -> None:
    lines: dict[tuple[str, str], list[str]] = {}
    for name, (row, theirs) in self.ours.items():
      if name not in self.wanted or name in ('pos_embed', 'cls'):
        continue
      found = self.source.entries[theirs].shape
      wanted = self._their_shape(row, self.wanted[name].shape)
      if found == wanted:
        continue
      if name == 'patch_embed/kernel' and self._patch_fits(row, found):
        continue
      text = f'{list(found)} there, {list(wanted)} wanted'
      if theirs not in lines.setdefault((row.theirs, text), []):
        lines[row.theirs, text].append(theirs)
    for (_, text), theirs in lines.items():
      self.problems += [f'{name}: {text}' for name in collapse(theirs)]
    if 'pos_embed' in self.ours and 'pos_embed' in self.wanted:
      self._position_slots()
      width = self.wanted['pos_embed'].shape[-1]
      cls = self._shape('cls')
      if cls not in (None, (1, 1, width)):
        name = self.ours['cls'][1]
        self.problems.append(
          f'{name}: {list(cls)} there, [1, 1, {width}] wanted'
        )

  @staticmethod
  def _their_shape(row: Row, ours: tuple[int, ...]) -> tuple[int, ...]:
    shape = KINDS[row.kind].shape(ours)
    if row.part is not None:
      shape = (3 * shape[0], *shape[1:])
    return shape

  def _patch_fits(self, row: Row, found: tuple[int, ...]) -> bool:
    """Whether patch size or channels can be adapted."""
    if len(found) != 4:
      return False
    there = _as_ours(row, found)
    here = self.wanted['patch_embed/kernel'].shape
    return (
      there[0] == there[1]
      and 0 < there[0] <= 64
      and there[3] == here[3]
      and (there[2] == here[2] or (there[2], here[2]) == (3, 1))
    )

  def _position_slots(self) -> tuple[int, int, str] | None:
    """Returns (grid side there, slots before the grid, their meaning).

    A file says only how many positions it has. With k tokens before the
    patches, k of the positions are theirs, or one, or none; what remains has
    to be a perfect square.
    """
    shape = self._shape('pos_embed')
    registers = self._shape('registers')
    has_cls = 'cls' in self.ours
    num_registers = registers[1] if registers and len(registers) == 3 else 0
    slots = {'all': has_cls + num_registers}
    if num_registers and self.names:
      known = {**slots, 'class': int(has_cls), 'grid': 0}
      slots = {kind: known[kind] for kind in self.names.layout.slots}
    width = self.wanted['pos_embed'].shape[-1]
    if len(shape) == 3 and shape[0] == 1 and shape[2] == width:
      for kind, count in slots.items():
        side = math.isqrt(max(0, shape[1] - count))
        if side and side * side + count == shape[1]:
          return side, count, kind
    tokens = ' or '.join(sorted({str(n) for n in slots.values()}))
    self.problems.append(
      f'{self.ours["pos_embed"][1]} has the shape {list(shape)}, which is no '
      f'square grid of {width} channels after {tokens} other tokens'
    )
    return None

  def _read(self) -> dict[str, np.ndarray]:
    """Reads every tensor once."""
    readers: dict[str, list[tuple[Row, str]]] = {}
    for name, (row, theirs) in self.ours.items():
      readers.setdefault(theirs, []).append((row, name))
    taken: dict[str, np.ndarray] = {}
    bad = []
    for theirs, rows in readers.items():
      with np.errstate(over='ignore'):  # becomes infinite, said below
        values = self.source.entries[theirs].read().astype(np.float32)
      if not np.isfinite(values).all():
        bad.append(theirs)
        continue
      for row, ours in rows:
        # A copy, so that the tensor itself can go.
        taken[ours] = np.ascontiguousarray(self._convert(row, ours, values))
    if bad:
      raise WeightsError(
        f'weights {self.source.title}: infinite or NaN values in '
        f'{", ".join(collapse(bad))}; give other weights'
      )
    if 'pos_embed' in taken:
      taken['pos_embed'] = self._positions(taken['pos_embed'])
    taken.pop('cls', None) if 'cls' not in self.wanted else None
    self.report.matched += [n for n in taken if n not in self.report.adapted]
    return {name: taken[name] for name in self.wanted if name in taken}

  def _convert(self, row: Row, ours: str, values: np.ndarray) -> np.ndarray:
    if row.part is not None:
      size = values.shape[0] // 3
      values = values[row.part * size : (row.part + 1) * size]
    if ours in ('pos_embed', 'cls'):
      return values
    if ours == 'patch_embed/kernel':
      return self._patch(KINDS[row.kind].forward(values, values.shape))
    return KINDS[row.kind].forward(values, self.wanted[ours].shape)

  def _patch(self, kernel: np.ndarray) -> np.ndarray:
    here = self.wanted['patch_embed/kernel'].shape
    done = []
    before = kernel.shape
    if kernel.shape[2] != here[2]:
      # A grey image is three equal channels: their kernels add up.
      kernel = kernel.sum(axis=2, keepdims=True)
      done.append('3 channels summed to 1')
    if kernel.shape[0] != here[0]:
      done.append(
        f'patch {kernel.shape[0]} -> {here[0]} px (pseudo-inverse resize)'
      )
      kernel = adapt.resize_patch(kernel, here[0])
    if done:
      self._note_adapted('patch_embed/kernel', ', '.join(done), before)
    return kernel

  def _note_adapted(self, ours: str, how: str, before) -> None:
    self.report.adapted[ours] = how
    self.report.mis_shaped[ours] = (
      f'{list(before)} -> {list(self.wanted[ours].shape)}'
    )

  def _resize_method(self, has_registers: bool) -> str:
    if self.names is None:
      return 'timm'
    layout = self.names.layout
    return (has_registers and layout.resize_with_registers) or layout.resize

  def _positions(self, values: np.ndarray) -> np.ndarray:
    """Returns positions for the model's tokens and grid."""
    side, count, kind = self._position_slots()
    here = self.wanted['pos_embed'].shape
    # What stands before the grid here: class token, then registers.
    has_cls = 'cls' in self.wanted
    registers = self.wanted.get('registers')
    num_registers = registers.shape[1] if registers is not None else 0
    size = math.isqrt(here[1] - has_cls - num_registers)
    width, done = here[-1], []
    first, grid = values[0, :count], values[0, count:]
    cls = first[:1] if kind != 'grid' and 'cls' in self.ours else first[:0]
    others = first[len(cls) :]
    if has_cls and not len(cls):
      cls = np.zeros((1, width), np.float32)
    if not has_cls and len(cls):
      cls = cls[:0]
      done.append('position of the class token dropped')
    if num_registers and not len(others):
      others = np.zeros((num_registers, width), np.float32)
      done.append('registers without positions get zeros')
    if side != size:
      method = self._resize_method('registers' in self.ours)
      grid = adapt.resize_positions(
        grid.reshape(side, side, width), size, method
      ).reshape(size * size, width)
      text = adapt.RESIZES[method][1]
      done.append(f'grid {side} x {side} -> {size} x {size} ({text})')
    if done:
      self._note_adapted('pos_embed', ', '.join(done), values.shape)
    return np.concatenate([cls, others, grid])[None]


def _as_ours(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the [p, p, c, d] shape of a patch kernel of theirs."""
  out, channels, height, width = shape
  return (height, width, channels, out) if row.kind == 'conv' else shape


def _advice(ours: str) -> str:
  for part in ours.split('/'):
    if part in _FIELDS:
      return f' ({_FIELDS[part]} decides that)'
  return ''
