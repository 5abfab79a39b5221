"""A config's model with its plan and arithmetic, before any array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qvit_jax import models, tree
from qvit_jax.config.resolve import with_fields
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import norms
from qvit_jax.lora import frozen as frozen_lib
from qvit_jax.models import batch_norm
from qvit_jax.ops import FloatCore, Ops
from qvit_jax.quantization import METHODS, QuantPlan, build_ops, build_plan
from qvit_jax.quantization.methods import Method
from qvit_jax.quantization.packed import Packed
from qvit_jax.training.state import split_collections


def folded(config: Any) -> Any:
  """Returns the config of the same model without norms that can be folded."""
  statistics = models.statistics(config)
  return with_fields(config, statistics.folded) if statistics else config


class Model:
  """A model, its plan and its arithmetic; makes no array."""

  def __init__(self, config, packed: Packed | None = None):
    """Builds it.

    Args:
      config: A validated config; `config` of the model says what 'auto' means.
      packed: What to build instead of `config.quant`; `shapes` are then those
        of the float model that was packed.

    Raises:
      QvitError: The config describes no possible model.
    """
    if packed:  # it computes in the dtype that it was packed with
      config = with_fields(folded(config), {'model.dtype': packed.dtype})
    self.config, self.packed = config, packed
    sites = models.list_sites(config)
    self.frozen = None if packed else frozen_lib.build(config, sites)
    self.plan = packed.plan if packed else build_plan(config.quant, sites)
    if self.frozen:
      self.plan = self.frozen.plan(self.plan)
    self.ops: Ops = packed.ops if packed else self._make_ops(self.plan)
    self._build()
    size = config.model.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    # As initialised; `shapes` are those after kernels were packed.
    self.float_shapes = jax.eval_shape(self.init, jax.random.key(0), images)
    if config.train.trainable == ('auto',) and not packed:
      self.config = with_fields(
        config, {'train.trainable': self._trainable()}
      )
    # Why statistics stay as they are, for a person.
    self.held = self._hold_statistics()
    self.shapes = self.float_shapes
    if self.frozen:
      self.shapes = jax.eval_shape(self.frozen.settle, self.shapes)

  def _build(self) -> None:
    """Builds the modules of the config."""
    self.module = models.build_model(self.config, self.ops)
    self._trained = self.module
    if self.ops.core.is_packed:  # kernels are made in float
      ops = Ops()
      if not self.packed:
        ops = dataclasses.replace(self.ops, core=FloatCore())
      self._trained = models.build_model(self.config, ops)

  def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Returns fresh variables, by collection."""
    return dict(self._trained.init(key, images))

  def _make_ops(self, plan: QuantPlan) -> Ops:
    stream, quant = models.stream(self.config), self.config.quant
    if stream is None and quant.hadamard:
      raise ConfigError(
        'quant.hadamard=True turns layers that write to a residual stream; '
        f'{self.config.model.name} has none. Set --config.quant.hadamard=False'
      )
    ops = build_ops(quant, plan, hidden=stream.hidden if stream else ())
    return self.frozen.ops(ops) if self.frozen else ops

  def _trainable(self) -> tuple[str, ...]:
    """Returns what is trained where the config leaves it to the method."""
    collections = self.method.collections
    # StatsQ kernels with ranges of each token have nothing to learn there.
    collections = tuple(c for c in collections if c in self.float_shapes)
    if not self.frozen:
      return collections
    more = tuple(name for name in collections if name != 'params')
    return self.frozen.collections + more

  def _hold_statistics(self) -> str:
    """Holds statistics of norms that training leaves as they are.

    Returns:
      Why they are held; '' where they change, or where there are none.
    """
    statistics = models.statistics(self.config)
    why = norms.why_held(self.config, self.float_shapes)
    if why and statistics.changes(self.config.model):
      self.config = with_fields(self.config, statistics.held)
      self._build()
    return why

  @property
  def changing(self) -> tuple[str, ...]:
    """Collections that training changes without gradients."""
    has_any = batch_norm.COLLECTION in self.float_shapes
    return (batch_norm.COLLECTION,) if has_any and not self.held else ()

  def statistics_lines(self) -> list[str]:
    """One line: what becomes of statistics of norms, where there are any."""
    return norms.lines(self.float_shapes, self.held)

  @property
  def fitted(self) -> tuple[str, ...]:
    """Collections that follow from what the layers see."""
    return ('quant',) if 'quant' in self.float_shapes else ()

  def kept(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a model's variables a checkpoint holds.

    The base of adapters is told by its digest.
    """
    if not self.frozen:
      return variables
    names = dict.fromkeys(
      (*self.config.train.trainable, *self.fitted, *self.changing)
    )
    return split_collections(variables, tuple(names))[0]

  def adapter_lines(self) -> list[str]:
    """Returns what is trained and what is not, where adapters are."""
    if not self.frozen:
      return []
    return self.frozen.lines(self.shapes, self.kept(self.shapes))

  def trained_lines(self) -> list[str]:
    """One line: how many numbers train, where only parts of them do."""
    names = self.config.train.trainable
    if self.frozen or not any('/' in name for name in names):
      return []
    part, _ = split_collections(self.shapes, names)
    return [
      f'{tree.num_elements(part):,} of {tree.num_elements(self.shapes):,} '
      f'numbers: {", ".join(names)}'
    ]

  def rounding(self, operand: str, *, holds: bool = False) -> Any:
    """Returns the module of a stage.

    Args:
      operand: 'weights' or 'acts': it quantizes these alone; '': as planned.
      holds: Whether its statistics stay as they are in training.
    """
    if not (operand or holds):
      return self.module
    ops = self._make_ops(self.plan.only(operand)) if operand else self.ops
    config = self.config
    if holds:
      config = with_fields(config, models.statistics(config).held)
    return models.build_model(config, ops)

  @property
  def title(self) -> str:
    """One line: what it is and how many numbers it learns."""
    model = self.config.model
    name = models.family(self.config).title(model)
    count = tree.num_elements(self.float_shapes['params'])
    return (
      f'{model.name} {name}, {model.image_size} px, {model.num_classes} '
      f'classes, {count:,} parameters, '
      f'{model.dtype}'
    )

  @property
  def method(self) -> Method:
    """The record of `quant.recipe`."""
    return METHODS[self.config.quant.recipe]

  @property
  def bits(self) -> str:
    """One line: recipe, bits, and what stays in float."""
    quant, plan = self.config.quant, self.plan
    if plan.is_float:
      return 'float (recipe none)'
    counts: dict[str, int] = {}
    for site, spec in zip(plan.sites, plan.specs, strict=True):
      kind = 'layers' if site.is_layer else 'attention products'
      key = f'{kind} {spec}'
      counts[key] = counts.get(key, 0) + 1
    listed = ', '.join(f'{n} {key}' for key, n in counts.items())
    if self.ops.core.is_packed and not self.packed:
      return f'{listed}, frozen and packed'
    more = self.method.note(quant, self.ops, plan)
    return (
      f'{listed} (recipe {quant.recipe}, activations '
      f'{plan.granularity_text()}{more})'
    )

  def size_bytes(self) -> int:
    """Returns the bytes of the parameters at the plan's bits."""
    if self.packed:
      return self.packed.num_bytes()
    if self.ops.core.is_packed:
      return tree.num_bytes(self.shapes)
    return tree.num_bytes(self.shapes['params']) - self.plan.saved_bytes()

  def row_facts(self) -> dict[str, Any]:
    """Returns what a row of results.json says of the model itself."""
    recipe, size = self.config.quant.recipe, self.size_bytes()
    facts = {
      'method': recipe,
      'weight_bits': self.plan.bits('weights'),
      'act_bits': self.plan.bits('acts'),
      'size_bytes': size,
      'compression': tree.num_bytes(self.float_shapes['params']) / size,
      'bops': self.plan.bops(),
      'macs': self.plan.macs(),
      # Training and evaluation round to the grid but keep float arrays.
      'execution': 'float' if self.plan.is_float else 'simulated',
    }
    if self.packed:
      facts |= {'execution': self.packed.execution, 'why': self.packed.why}
    return facts
