"""Compares one file's names and shapes with the places of our model."""

import re
from typing import Any, NoReturn

from qvit_jax.errors import WeightsError
from qvit_jax.store.entries import Source, printable
from qvit_jax.weights import advice, positions, tell, unneeded
from qvit_jax.weights.keymap import (
  KINDS,
  Names,
  as_tokens,
  collapse,
  patch_shape,
)
from qvit_jax.weights.layout import Row
from qvit_jax.weights.positions import Slots, Tokens
from qvit_jax.weights.report import Report

_SHOWN = 40  # problems in one message; blocks count once
_MOST_SHAPES = 20  # lines of shapes that differ


class Comparison:
  """What fits of a file, and every problem; reads no tensor.

  Attributes:
    source: The file.
    wanted: Our path -> what lies there, for its shape.
    names: The file's names as a layout; None where they are our own.
    ours: Our path -> (row, name in the file) of what the file brings.
    report: What is known so far.
    problems: One phrase for each thing that does not fit.
  """

  def __init__(
    self, source: Source, wanted: dict[str, Any], names: Names | None
  ):
    """Prepares it; without `names` the tensors have our own."""
    self.source, self.wanted = source, wanted
    self.names = names = unneeded.with_gate(source, names)
    self.report = Report(
      source.title,
      names.title if names else 'our own',
      notes=list(source.notes),
      facts=source.facts,
    )
    if names:
      self.ours = names.ours
      tell.complete_facts(source, names)
    else:
      self.ours = {
        name: (Row(name, name, 'same'), name) for name in source.entries
      }
    self.problems: list[str] = []

  def compare(self) -> None:
    """Compares everything; raises WeightsError with every problem."""
    if self.names:
      self.report.unused += self.names.ignored + self.names.pre_logits
      self.report.unused += self.names.outside
      unneeded.check_patch(self)
      unneeded.check_pool(self)
      unneeded.drop_empty(self)
      unneeded.drop_optional(self)
      self._find_zeros()
      unneeded.drop_masked(self)
    self._compare_structure()
    self._compare_pool()
    self._compare_head()
    self._compare_names()
    self._compare_shapes()
    if self.problems:
      self._refuse()

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

  def shape(self, ours: str) -> tuple[int, ...] | None:
    """Returns the shape of the file's tensor for a parameter, or None."""
    if ours not in self.ours:
      return None
    row, theirs = self.ours[ours]
    return as_tokens(row, self.source.entries[theirs].shape)

  def _compare_structure(self) -> None:
    """Depth and width in one line each, before a hundred that follow."""
    there, depth = (
      len({found[0] for p in paths if (found := re.search(r'block_\d+', p))})
      for paths in (self.ours, self.wanted)
    )
    if there != depth:
      self.problems.append(f'the depth is {there} there, {depth} here')
    if 'patch_embed/kernel' not in self.wanted:
      return
    there = self.shape('cls') or self.shape('pos_embed') or ()
    here = self.wanted['patch_embed/kernel'].shape[-1]
    if len(there) == 3 and there[-1] != here:
      self.problems.append(f'the width is {there[-1]} there, {here} here')

  def _find_zeros(self) -> None:
    """Layers that have no bias in any block there get zeros: it is the same.

    Norms without a bias are not: they may be of another kind.
    """
    kinds: dict[str, list[str]] = {}
    for name in self.wanted:
      layer, _, last = name.rpartition('/')
      if last == 'bias' and f'{layer}/kernel' in self.ours:
        kinds.setdefault(re.sub(r'block_\d+', '', layer), []).append(name)
    for names in kinds.values():
      if not any(name in self.ours for name in names):
        self.report.zeros |= dict.fromkeys(names, 'the file has no such bias')

  def _compare_pool(self) -> None:
    """An attention pooling that the file has nothing of starts fresh."""
    pool = [name for name in self.wanted if name.startswith('pool/')]
    if not any(name.startswith('pool/') for name in self.ours):
      for name in pool:
        self.report.reinitialised[name] = 'the file has none'

  def _compare_head(self) -> None:
    """A head of other classes, or behind another pooling, starts fresh."""
    kernel, bias = 'head/kernel', 'head/bias'
    reason = self._drop_hidden()
    if self.report.reinitialised:
      reason = 'it follows another pooling there'
    there = tell.head_classes(self.source, self.ours)
    here = self.wanted[bias].shape[0]
    if kernel not in self.ours and bias not in self.ours:
      reason = 'the file has none'
    elif there is not None and there != here:
      reason = f'{there} classes there, {here} here'
      for name in (kernel, bias):
        if name in self.ours:
          self._note_shapes(name)
    elif not reason and self.names and self.names.pre_logits:
      reason = 'it follows a pre-logits layer, which the model does not have'
    if reason:
      for name in (kernel, bias):
        self.report.reinitialised[name] = reason
        self.report.zeros.pop(name, None)
        if name in self.ours:
          self.report.unused.append(self.ours.pop(name)[1])

  def _drop_hidden(self) -> str:
    """Leaves hidden layers behind that the model has not; returns why."""
    hidden = [name for name in self.ours if re.match(r'fc\d/', name)]
    if not hidden or any(re.match(r'fc\d/', name) for name in self.wanted):
      return ''
    for name in hidden:
      self.report.unused.append(self.ours.pop(name)[1])
      self.report.zeros.pop(name, None)
    return 'it follows hidden layers, which the model does not have'

  def _note_shapes(self, ours: str) -> None:
    self.report.mis_shaped[ours] = (
      f'{list(self.shape(ours))} -> {list(self.wanted[ours].shape)}'
    )

  def _compare_names(self) -> None:
    if 'cls' in self.ours and 'cls' not in self.wanted:
      # Its position goes with it: `_positions` knows that from the shapes.
      self.report.unused.append(self.ours['cls'][1])
    known = {*self.ours, *self.report.reinitialised, *self.report.zeros}
    missing = [name for name in self.wanted if name not in known]
    extra = [n for n in self.ours if n not in self.wanted and n != 'cls']
    both = all(map(advice.has_norms, (self.ours, self.wanted)))
    missing, lines = advice.grouped({name: name for name in missing}, both)
    self.problems += [f'missing {line}' for line in lines]
    self.problems += [
      f'missing {n}{advice.of_path(n)}' for n in collapse(missing)
    ]
    extra, lines = advice.grouped({n: self.ours[n][1] for n in extra}, both)
    self.problems += [f'no place for {line}' for line in lines]
    groups: dict[str, tuple[str, list[str]]] = {}
    for name in extra:
      row, theirs = self.ours[name]
      found = groups.setdefault(row.theirs, (name, []))[1]
      if theirs not in found:
        found.append(theirs)
    for name, found in groups.values():
      why = advice.of_path(name)
      self.problems += [f'no place for {x}{why}' for x in collapse(found)]
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
      if (
        name == 'patch_embed/kernel'
        and self._patch_fits(row, found)
        and self._may_resize(row, found)
      ):
        continue
      text = f'{list(found)} there, {list(wanted)} wanted'
      if theirs not in lines.setdefault((row.theirs, text), []):
        lines[row.theirs, text].append(theirs)
    problems = [
      f'{name}: {text}'
      for (_, text), theirs in lines.items()
      for name in collapse(theirs)
    ]
    if len(problems) > _MOST_SHAPES:
      problems[3:] = [f'{len(problems) - 3} other shapes differ']
    self.problems += problems
    if 'pos_embed' in self.ours and 'pos_embed' in self.wanted:
      self.find_slots()
    if 'patch_embed/kernel' in self.wanted:
      width = self.wanted['patch_embed/kernel'].shape[-1]
      cls = self.shape('cls')
      if cls not in (None, (1, 1, width)):
        name = self.ours['cls'][1]
        self.problems.append(
          f'{name}: {list(cls)} there, [1, 1, {width}] wanted'
        )

  @staticmethod
  def _their_shape(row: Row, ours: tuple[int, ...]) -> tuple[int, ...]:
    shape = KINDS[row.kind].shape(ours)
    if row.part is not None:
      shape = (row.parts * shape[0], *shape[1:])
    return shape

  def _patch_fits(self, row: Row, found: tuple[int, ...]) -> bool:
    """Whether patch size or channels can be adapted."""
    if len(found) != 4:
      return False
    there = patch_shape(row, found)
    here = self.wanted['patch_embed/kernel'].shape
    return (
      there[0] == there[1]
      and 0 < there[0] <= 64
      and there[3] == here[3]
      and (there[2] == here[2] or (there[2], here[2]) == (3, 1))
    )

  def _may_resize(self, row: Row, found: tuple[int, ...]) -> bool:
    """Whether patches may be resized: not where rotary positions count them."""
    there = patch_shape(row, found)
    here = self.wanted['patch_embed/kernel'].shape
    if there[0] == here[0] or not self.names or self.names.layout.has_positions:
      return True
    self.problems.append(
      f'model.patch is {there[0]} there, {here[0]} here, and rotary positions '
      'are of patches of one size'
    )
    return False

  def tokens(self) -> tuple[Tokens, Tokens]:
    """Returns what stands before the patches there and here."""
    there = self.shape('registers') or ()
    here = self.wanted.get('registers')
    return (
      Tokens('cls' in self.ours, there[1] if len(there) == 3 else 0),
      Tokens('cls' in self.wanted, here.shape[1] if here is not None else 0),
    )

  def told_grid(self) -> positions.Grid | None:
    """Returns the file's grid by what stands beside it; None where it is not.

    Where nothing tells the patch, the kernel does: timm writes none.
    """
    facts, kernel = dict(self.source.facts), 'patch_embed/kernel'
    shape = self.shape(kernel) or ()
    if len(shape) == 4:
      patch = patch_shape(self.ours[kernel][0], shape)[:2]
      facts.setdefault('patch', list(patch))
    return positions.grid_of(facts)

  def find_slots(self) -> Slots | None:
    """Returns what the file's positions are of; what fits not is a problem."""
    shape, width = self.shape('pos_embed'), self.wanted['pos_embed'].shape[-1]
    there, _ = self.tokens()
    kinds = self.names.layout.slots if self.names else ('all',)
    told = self.told_grid()
    if len(shape) == 3 and shape[0] == 1 and shape[2] == width:
      slots = positions.find_slots(shape[1], there, kinds, told)
      if slots is not None:
        return slots
    grid = 'square grid'
    if told and told[0] != told[1]:
      grid = f'grid of {told[0]} x {told[1]}, which config.json tells,'
    self.problems.append(
      f'{self.ours["pos_embed"][1]} has the shape {list(shape)}, which is no '
      f'{grid} of {width} channels after {there.cls + there.registers} other '
      'tokens'
    )
    return None
