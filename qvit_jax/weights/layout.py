"""What a layout of weights is: rows of our paths and others' names."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qvit_jax import tree

# Facts of our models, which this package does not import: a test compares them.
COLLECTION = 'batch_stats'  # statistics of norms
EPSILON = 1e-5  # of norms with statistics
ROPE_BASE = 100.0  # of rotary positions
WINDOWS = 7  # along each axis, that the classifier of VGG's paper sees


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter of ours.

  Attributes:
    ours: Its path in the collection `params`, or that of a statistic of a norm
      with its collection before it: 'batch_stats/...'.
    theirs: Tensor name.
    kind: Key of `keymap.KINDS`: how the axes go.
    part: Which part of a fused tensor it is; None where it is the whole.
    parts: Of how many, along the first axis.
  """

  ours: str
  theirs: str
  kind: str
  part: int | None = None
  parts: int = 3


@dataclasses.dataclass(frozen=True)
class KeyMap:
  """One layout.

  Attributes:
    title: What it is called in reports.
    rows: What is where.
    variants: (name, rows) of each model whose numbers of layers say other
      things, in place of `rows`.
    gated: The rows of models with a SwiGLU whose first layer has the names of
      a plain one, and twice its outputs.
    stem: Our path of the kernel that every model has.
    ignored: Regexes of tensors that play no part in classification.
    optional: Regexes of our paths that a file has although models of the layout
      may do without: left behind where the model here does.
    constants: (name, function of heads and channels a head) of the tensors that
      follow from the shape: compared when read, and written.
    key_mask: The one of them that takes the bias from keys.
    pre_logits: Regex of the tensors of a layer between encoder and head; a
      head that follows one is of no use without it.
    prefixes: What `~` may stand for; the first is the one we write.
    aliases: (regex, replacement) pairs that turn other spellings into this.
    slots: Which tokens have positions, the likeliest first: 'all', 'class'
      (class token and patches, not registers) or 'grid' (patches alone).
    resize: Key of `adapt.RESIZES`: how its own library resizes positions.
    resize_with_registers: The same for models with registers, if it differs.
    norm_eps: Epsilon of LayerNorm in its library; None where there is none.
    pre_norm_eps: The same of models with a norm before the blocks, whose patch
      embedding has no bias there; None where the layout has no such models.
    pools: What its models can have as `model.pool`; () where they have no such
      choice.
    counters: Whether norms with statistics count their updates.
    registers: How many `model.registers` they have; None: any number.
    biases: Whether its queries, keys and values always have biases.
    separate_biases: Whether each of the three may have biases by itself.
    has_positions: Whether the positions of its models are learned.
    is_dinov3: Whether rotary positions are those of DINOv3 in all of them.
    last_norm: Whether they all have a norm behind the blocks or the pooling.
    normless: The poolings of `pools` that read tokens before that norm.
    has_pre_norm: Whether they all have a norm before the blocks.
    has_scales: Whether they all have LayerScale.
    register_prefix: The prefix that is written with registers, if another.
    transformers: How the names of its classes in transformers begin, where that
      is its library, which wants a config.json.
  """

  title: str
  rows: tuple[Row, ...] = ()
  variants: tuple[tuple[str, tuple[Row, ...]], ...] = ()
  gated: tuple[Row, ...] = ()
  stem: str = 'patch_embed/kernel'
  ignored: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  constants: tuple[tuple[str, Callable[[int, int], np.ndarray]], ...] = ()
  key_mask: str = ''
  pre_logits: str = r'(?!)'
  prefixes: tuple[str, ...] = ('',)
  aliases: tuple[tuple[str, str], ...] = ()
  slots: tuple[str, ...] = ('all',)
  resize: str = 'timm'
  resize_with_registers: str = ''
  norm_eps: float | None = 1e-6
  pre_norm_eps: float | None = None
  pools: tuple[str, ...] = ('token',)
  registers: int | None = 0
  biases: bool = False
  separate_biases: bool = False
  has_positions: bool = True
  is_dinov3: bool = False
  last_norm: bool = True
  normless: tuple[str, ...] = ()
  has_pre_norm: bool = False
  has_scales: bool = False
  register_prefix: str = ''
  transformers: str = ''
  counters: bool = False

  @property
  def choices(self) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """(name, rows) of every kind of model of the layout."""
    choices = self.variants or ((self.title, self.rows),)
    return (*choices, ('with SwiGLU', self.gated)) if self.gated else choices

  @property
  def named(self) -> range:
    """Which of `choices` names alone can tell."""
    return range(len(self.choices) - bool(self.gated))

  @property
  def all_rows(self) -> tuple[Row, ...]:
    """The rows of all kinds."""
    return tuple(row for _, rows in self.choices for row in rows)

  def spell(self, name: str) -> str:
    """Returns a tensor name in the spelling of the rows."""
    for pattern, replacement in self.aliases:
      name = re.sub(pattern, replacement, name)
    return name


def flatten_model(variables: Any) -> dict[str, Any]:
  """Returns {our path: leaf} of what weights of others can bring.

  Args:
    variables: Collections, of which parameters and statistics of norms count;
      or the tree of `params` alone.
  """
  if not (isinstance(variables, Mapping) and 'params' in variables):
    return tree.flatten(variables)
  found = tree.flatten(variables['params'])
  if COLLECTION in variables:
    found |= tree.flatten({COLLECTION: variables[COLLECTION]})
  return found


def full_path(ours: str) -> str:
  """Returns the path of a row of ours among all collections."""
  return ours if ours.startswith(f'{COLLECTION}/') else f'params/{ours}'
