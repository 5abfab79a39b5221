"""What a field of a config is: default, meaning, legal values, when it counts.

The rows themselves lie in `sections/`, a row a field. Knows no JAX, so that
`--help` answers at once.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

Check = tuple[Callable[[Any], bool], str]


@dataclasses.dataclass(frozen=True)
class Need:
  """A condition under which a field counts.

  Attributes:
    holds: Says of a config whether it does.
    hint: Why it does not, and what to do.
  """

  holds: Callable[[Any], bool]
  hint: str


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of a config.

  Attributes:
    name: 'section.field'.
    default: Its value where nobody sets one.
    check: (holds, text): what it may be.
    text: What it means, its unit and its legal values, for a person.
    needs: It counts only where all of these hold.
    of_method: Whether it counts only where `quant.recipe` reads it.
    of_family: Whether it counts only where the family `model.name` reads it.
    is_path: Whether it holds a path (or some), in which ~ is the home folder.
    choices: Whether its legal values are names of a table of the package.
  """

  name: str
  default: Any
  check: Check
  text: str
  needs: tuple[Need, ...] = ()
  of_method: bool = False
  of_family: bool = False
  is_path: bool = False
  choices: bool = False

  @property
  def section(self) -> str:
    """The part of the name before the dot."""
    return self.name.partition('.')[0]


# Legal values.


def one_of(*values: str) -> Check:
  """Allows some words."""
  return (lambda v: v in values), ' | '.join(repr(v) for v in values)


def number(low: float, high: float = math.inf, *, open_low=False) -> Check:
  """Allows finite numbers from `low` (not it if open) to below `high`."""

  def holds(v):
    return math.isfinite(v) and (low < v if open_low else low <= v) and v < high

  text = f'a number {">" if open_low else ">="} {low:g}'
  return holds, text + (f' and < {high:g}' if high < math.inf else '')


def channels(*, positive: bool) -> Check:
  """Allows a number for each of the three channels."""

  def holds(v):
    return len(v) == 3 and all(
        isinstance(x, (int, float)) and math.isfinite(x) for x in v
    ) and not (positive and min(v) <= 0)  # fmt: skip

  return holds, f'three {"positive " if positive else ""}numbers'


def randaugment() -> Check:
  """Allows (whole number of operations, magnitude), or an empty tuple."""

  def holds(v):
    if v == ():
      return True
    count, magnitude = v if len(v) == 2 else (0, 0)
    return type(count) is int and 1 <= count <= 14 and 0 <= magnitude <= 30

  return holds, '() or two numbers: 1 to 14 operations, a magnitude of 0 to 30'


def strings() -> Check:
  """Allows a tuple of texts, at least one."""
  return (
    lambda v: bool(v) and all(isinstance(x, str) and x for x in v)
  ), "a tuple of names such as ('params',)"


def names(text: str) -> Check:
  """Allows a tuple of texts, or an empty one."""
  return (
    lambda v: v == () or strings()[0](v) and not isinstance(v, str)
  ), text


ANY: Check = ((lambda v: True), '')
BOOL: Check = ((lambda v: isinstance(v, bool)), 'True or False')
ONE_UP = number(1)
ZERO_UP = number(0)
BELOW_ONE = number(0, 1)
SHARE: Check = ((lambda v: 0 <= v <= 1), 'a number from 0 to 1')
FILE_NAME: Check = (
  (lambda v: bool(re.fullmatch(r'[\w][\w.-]*', v))),
  'letters, digits, _ . and -',
)
STAGES: Check = (
  (lambda v: isinstance(v, (tuple, list))),
  "a tuple of stages such as ('acts:0.3', 'all:0.7')",
)

# Conditions under which fields count.

ADAPTS = Need(
  lambda c: c.lora.rank > 0,
  'lora.rank is 0; set --config.lora.rank=8 and --config.lora.targets=',
)
PACKS = Need(
  lambda c: c.lora.base != 'float',
  'no kernel is packed; set --config.lora.base=int4',
)
LEARNS_STEPS = Need(
  lambda c: c.quant.act_granularity != 'per_token',
  'no step of activations is learned; set '
  '--config.quant.act_granularity=per_tensor',
)
FREEZES = Need(
  lambda c: 'freeze' in str(c.train.stages),
  "no stage is named 'freeze'; set --config.train.stages="
  "\"('all:0.9', 'freeze:0.1')\"",
)
SCALES_LOSS = Need(
  lambda c: c.model.dtype == 'float16',
  'only float16 needs it; set --config.model.dtype=float16',
)
SPLITS = Need(
  lambda c: c.mesh.fsdp > 1,
  'mesh.fsdp is 1 and splits no array; set --config.mesh.fsdp=2 or more',
)
# Forms of an ONNX file; `export.profiles` says which holds what.
PROFILES = ('qdq', 'dynamic', 'weight_only', 'float')
WRITES_ONNX = Need(
  lambda c: c.export.format == 'onnx',
  'no ONNX file is written; set --config.export.format=onnx',
)
HAS_LAYOUT = Need(
  lambda c: c.export.format in ('safetensors', 'npz'),
  'only weights in the names of others have it; set '
  '--config.export.format=safetensors',
)
TIMES_PACKED = Need(
  lambda c: c.checkpoint.path,
  'they take turns with a packed file; set --config.quant.recipe=ptq and '
  '--config.checkpoint.path=',
)
NO_SIZE = Need(
  lambda c: not c.model.size, 'model.size is set; add --config.model.size='
)
READS_FILES = Need(
  lambda c: c.data.source == 'folder' or c.eval.images,
  'no image files are read; set --config.data.source=folder',
)
RESIDENT = Need(
  lambda c: c.data.source == 'tfds',
  'folders are always streamed, digits never; set --config.data.source=tfds',
)
STREAMS = Need(
  lambda c: c.data.source != 'digits' or c.eval.images,
  'digits are arrays in memory, nothing is decoded; set '
  '--config.data.source=folder or tfds',
)
SGD = Need(
  lambda c: c.optim.name == 'sgd',
  'only sgd has it; set --config.optim.name=sgd',
)
ADAM = Need(
  lambda c: c.optim.name in ('adamw', 'lamb'),
  'only adamw and lamb have it; set --config.optim.name=adamw',
)
DECAYS_LR = Need(
  lambda c: c.optim.schedule != 'constant',
  'the schedule is constant; set --config.optim.schedule=cosine',
)
DECAYS = Need(
  lambda c: c.optim.weight_decay > 0, 'optim.weight_decay is 0; raise it'
)
WARMS = Need(
  lambda c: c.optim.warmup_steps or c.optim.warmup_epochs,
  'there is no warm-up; set --config.optim.warmup_steps=',
)
WARMS_BY_EPOCH = Need(
  lambda c: c.optim.warmup_steps == 0,
  'optim.warmup_steps is set; add --config.optim.warmup_steps=0',
)
WRITES_EVENTS = Need(
  lambda c: c.log.tensorboard,
  'log.tensorboard is off; set --config.log.tensorboard=true',
)
RANGES = Need(
  lambda c: (
    c.quant.calibration_path or any('static' in row for row in c.ptq.rows)
  ),
  'no row of ptq.rows is static; add int8_static',
)
MIXES = Need(
  lambda c: any('mixed_sensitivity' in row for row in c.ptq.rows),
  'no row of ptq.rows is mixed_sensitivity; add it',
)
STATIC = Need(
  lambda c: any('static' in r or 'clip' in r for r in c.ptq.rows),
  'no row of ptq.rows is static; add int8_static',
)
CURVE = Need(
  lambda c: c.ptq.qat_specs,
  'ptq.qat_specs is empty; set --config.ptq.qat_specs="(\'w4a4\',)"',
)
IMPORTS = Need(
  lambda c: c.weights.path, 'weights.path is empty; set --config.weights.path='
)
BY_EPOCHS = Need(
  lambda c: c.train.steps == 0,
  'train.steps is set; add --config.train.steps=0',
)
TEACHER = Need(
  lambda c: c.train.teacher,
  'train.teacher is empty; set --config.train.teacher=',
)
DISTILLS = Need(
  lambda c: c.train.distill != 'none',
  "train.distill is 'none'; set --config.train.distill=soft",
)
SOFT = Need(
  lambda c: c.train.distill == 'soft',
  'only soft distillation has it; set --config.train.distill=soft',
)
FEATURES = Need(
  lambda c: c.train.feature_weight > 0, 'train.feature_weight is 0; raise it'
)
