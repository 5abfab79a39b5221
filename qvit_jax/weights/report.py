"""What an import took, changed, left out and left behind."""

import dataclasses
import re
from typing import Any

from qvit_jax.errors import WeightsError
from qvit_jax.weights.keymap import collapse

# What models of images and texts have beside their image tower.
_TEXT = re.compile(
  r'(^|\.)(text(_model)?\.|token_embedding\.|ln_final\.|text_projection'
  r'|logit_(scale|bias)$)|^transformer\.resblocks\.|^positional_embedding$'
)
_COUNTER = 'num_batches_tracked'  # of updates of statistics; nothing reads it


@dataclasses.dataclass
class Report:
  """Every tensor of the file and every parameter of the model, once.

  Attributes:
    source: Where the weights lie, and in which container.
    layout: Whose names they have.
    matched: Our parameters that were taken as they are.
    adapted: Our parameter -> what was done to its tensor.
    reinitialised: Our parameter -> why it starts fresh.
    zeros: Our biases and positions that are zero -> why: a model without them
      computes the same.
    unused: Their tensors that the model has no use for.
    missing: Our parameters without a tensor; never non-empty in a report that
      `load_weights` returns, since that is an error.
    mis_shaped: Our parameter -> 'their shape -> our shape', for those that were
      adapted or re-initialised because of it.
    notes: Whatever else a user should know.
    facts: What a config beside the weights says, in our field names.
  """

  source: str
  layout: str
  matched: list[str] = dataclasses.field(default_factory=list)
  adapted: dict[str, str] = dataclasses.field(default_factory=dict)
  reinitialised: dict[str, str] = dataclasses.field(default_factory=dict)
  zeros: dict[str, str] = dataclasses.field(default_factory=dict)
  unused: list[str] = dataclasses.field(default_factory=list)
  missing: list[str] = dataclasses.field(default_factory=list)
  mis_shaped: dict[str, str] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)

  def compare(self, shape: dict[str, Any]) -> list[str]:
    """Returns a note for each thing of a model that no tensor shows.

    Args:
      shape: As `models.architecture` gives it.

    Raises:
      WeightsError: The number of heads, or the activation, differs.
    """
    facts, notes = self.facts, []
    heads = shape.get('heads')  # a model without attention has none
    if heads and facts.get('heads', heads) != heads:
      raise WeightsError(
        f'weights {self.source} have {facts["heads"]} attention heads, the '
        f'model {heads}; set --config.model.heads={facts["heads"]} (with '
        '--config.model.size= and the other numbers) or choose other weights'
      )
    if heads and 'heads' not in facts:
      notes.append(
        f'the file does not tell its attention heads: {heads} assumed'
      )
    if heads:
      notes += self._compare_function(shape)
    there, here = facts.get('norm_eps'), shape.get('norm_eps')
    if None not in (there, here) and there != here:
      notes.append(
        f'LayerNorm epsilon is {there:g} there, {here:g} here; for equal '
        f'logits set --config.model.norm_eps={there:g}'
      )
    there, here = facts.get('pool'), shape.get('pool')
    if None not in (there, here) and there != here:
      notes.append(f'model.pool was {there} there, {here} here')
    there, here = facts.get('last_norm'), shape.get('last_norm', True)
    if heads and there not in (None, here):
      notes.append(f'model.last_norm was {there} there, {here} here')
    return notes

  def _compare_function(self, shape: dict[str, Any]) -> list[str]:
    there, here = self.facts.get('activation'), shape.get('activation', 'gelu')
    notes = []
    if there is None and shape.get('pre_norm'):  # CLIPs have one or the other
      notes.append(f'the file does not tell its activation: {here} assumed')
    if shape.get('position') == 'rope' and 'position' not in self.facts:
      notes.append(
        'the file does not tell its rotary positions: those of DINOv3 assumed'
      )
    if there not in (None, here):
      raise WeightsError(
        f'weights {self.source} are of a model with activation {there!r}, but '
        f'model.activation={here!r}; set --config.model.activation={there}'
      )
    return notes

  def lines(self) -> list[str]:
    """Returns the report for the terminal."""
    taken = len(self.matched) + len(self.adapted)
    total = taken + len(self.reinitialised) + len(self.zeros)
    lines = [f'weights of {self.source}, {self.layout} layout']
    lines.append(
      f'{taken} of {total} parameters taken, {len(self.matched)} of them as '
      'they are'
    )
    lines += [f'adapted: {name}: {how}' for name, how in self.adapted.items()]
    lines += _by_reason('zeros', self.zeros)
    lines += _by_reason('re-initialised', self.reinitialised)
    counters = [name for name in self.unused if name.endswith(_COUNTER)]
    texts = [name for name in self.unused if _TEXT.search(name)]
    rest = {*self.unused} - {*counters, *texts}
    if unused := [name for name in self.unused if name in rest]:
      lines.append(f'unused: {", ".join(collapse(unused))}')
    if texts:
      parts = ', '.join(sorted({x.partition('.')[0] for x in texts}))
      lines.append(f'unused: {len(texts)} tensors of the text tower ({parts})')
    if counters:
      lines.append(f'unused: {len(counters)} times {_COUNTER}')
    return lines + [f'note: {note}' for note in self.notes]

  def to_json(self) -> dict[str, Any]:
    """Returns it for weights.json."""
    return dataclasses.asdict(self)


def _by_reason(word: str, reasons: dict[str, str]) -> list[str]:
  """Returns one line for each reason, with all its parameters."""
  names: dict[str, list[str]] = {}
  for name, why in reasons.items():
    names.setdefault(why, []).append(name)
  return [
    f'{word}: {", ".join(collapse(found))}: {why}'
    for why, found in names.items()
  ]
