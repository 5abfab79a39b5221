"""Checks a config by the tables of `fields`, before anything is built.

Checks that need a model, a mesh or data sit where those are built.
"""

import copy
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from qvit_jax.config.fields import LEGAL, NEEDS, UNUSED, UNUSED_TRAINING
from qvit_jax.errors import ConfigError


def flatten(config) -> dict[str, Any]:
  """Returns {'section.field': value}, in the file's order."""
  flat = {}
  for section, fields in config.items():
    if hasattr(fields, 'items'):
      flat |= {f'{section}.{name}': value for name, value in fields.items()}
    else:
      flat[section] = fields
  return flat


def nearest(name: str, config) -> str:
  """Returns the field of the config whose name is most like `name`."""
  return difflib.get_close_matches(name, flatten(config), n=1, cutoff=0.0)[0]


def to_json(config) -> dict[str, Any]:
  """Returns the resolved config as JSON values (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def with_fields(config, fields: Mapping[str, Any]):
  """Returns a copy of a config with other values; the config stays as it is.

  Args:
    config: A whole config, frozen or not.
    fields: {'section.field': value}.
  """
  own = ml_collections.ConfigDict(config.to_dict())
  for name, value in fields.items():
    section, _, field = name.partition('.')
    if field:
      own[section][field] = value
    else:
      own[section] = value
  return ml_collections.FrozenConfigDict(own)


def validate(config, *, mode: str, overrides: Iterable[str]) -> list[str]:
  """Checks every field by itself and the overrides for an effect.

  Args:
    config: The whole config.
    mode: What it will be used for.
    overrides: Fields that the command line sets.

  Returns:
    One line for each override that this mode does not read.

  Raises:
    ConfigError: A value is illegal, or an override has no effect in any mode.
  """
  flat = flatten(config)
  _check_fields(flat)
  _check_whole(config, mode)
  _check_lora(config, mode)
  if mode in ('train', 'benchmark'):
    _check_teacher(config)
  overrides, unused, read = list(overrides), UNUSED[mode], config
  if mode == 'ptq' and config.ptq.qat_specs:
    unused, read = UNUSED_TRAINING, copy.deepcopy(config)
    read.quant.recipe = config.ptq.qat_recipe
  for fields, counts, hint in NEEDS:
    for name in fields:
      if name in overrides and not counts(read):
        raise ConfigError(
          f'{name}={flat[name]!r} would have no effect: {hint}, or leave '
          f'{name} out'
        )
  return [
    f'--config.{name} has no effect in --mode={mode}'
    for name in overrides
    if (name in unused or name.split('.')[0] in unused)
    # The one field of its section that a start from calibration reads.
    and (mode, name, bool(config.quant.calibration_path))
    != ('train', 'ptq.range', True)
  ]


def _check_fields(flat: dict[str, Any]) -> None:
  """Raises ConfigError where a field is missing, unknown or illegal."""
  for name in LEGAL:
    if name not in flat:
      raise ConfigError(
        f'the config has no field {name}; build it with '
        'configs.common.get_config()'
      )
  for name, value in flat.items():
    if name not in LEGAL:
      raise ConfigError(
        f'the config has an unknown field {name}; the nearest is '
        f'{difflib.get_close_matches(name, LEGAL, n=1, cutoff=0.0)[0]}'
      )
    holds, legal = LEGAL[name]
    if not _holds(holds, value):
      raise ConfigError(
        f'{name}={value!r} is not allowed; allowed: {legal}. Set '
        f'--config.{name}=...'
      )


def _check_whole(config, mode: str) -> None:
  """Raises ConfigError where fields do not go together."""
  if not config.train.steps and config.train.epochs <= 0:
    raise ConfigError(
      'train.steps=0 and train.epochs=0 train nothing; set one of them to a '
      'positive number'
    )
  if config.quant.recipe == 'ptq' and mode not in ('eval', 'predict'):
    recipes = 'none'
    if mode not in ('ptq', 'sensitivity'):
      recipes = 'none, aqt, lsq, statsq or qvit'
    raise ConfigError(
      "quant.recipe='ptq' stands for a packed model, which only --mode=eval "
      f'and --mode=predict read; for --mode={mode} set '
      f'--config.quant.recipe={recipes}'
    )
  if config.quant.calibration_path and config.quant.steps == 'per_head':
    raise ConfigError(
      f'quant.calibration_path={config.quant.calibration_path!r} holds no '
      "statistics of each head, which quant.steps='per_head' wants; set "
      '--config.quant.steps=per_tensor or per_position, or leave the path out'
    )


def _check_lora(config, mode: str) -> None:
  """Raises ConfigError where adapters do not go with the rest of the config."""
  lora, train, recipe = config.lora, config.train, config.quant.recipe
  if not lora.rank:
    if lora.targets:
      raise ConfigError(
        f'lora.rank={lora.rank} adapts nothing, but lora.targets is '
        f'{tuple(lora.targets)}; set --config.lora.rank= to 1 or more, or '
        '--config.lora.targets="()"'
      )
    if mode == 'merge_lora':
      raise ConfigError(
        '--mode=merge_lora folds adapters into kernels, but lora.rank is 0; '
        'set lora.* as in their training'
      )
    return
  if mode in ('ptq', 'sensitivity', 'export'):
    raise ConfigError(
      f'--mode={mode} needs a whole model, but lora.rank={lora.rank}: its runs '
      'keep adapters alone; fold them in with --mode=merge_lora and give the '
      'result with --config.lora.rank=0 --config.lora.targets="()"'
    )
  stages = str(train.stages)
  for wrong, text in (
    (not lora.targets,
     f'lora.rank={lora.rank}, but lora.targets names no layer; set '
     '--config.lora.targets="(\'all\',)" or --config.lora.rank=0'),
    (recipe == 'ptq',
     f"quant.recipe='ptq' reads a packed model, which lora.rank={lora.rank} "
     'would not adapt; set --config.lora.rank=0 --config.lora.targets="()"'),
    (config.quant.calibration_path and lora.init == 'pissa',
     f'quant.calibration_path={config.quant.calibration_path!r} is of whole '
     "kernels, out of which lora.init='pissa' takes a part; set "
     '--config.lora.init=zero or leave the path out'),
    (train.trainable != ('auto',) and 'lora' not in train.trainable,
     f'train.trainable={tuple(train.trainable)} leaves the adapters of '
     f'lora.rank={lora.rank} untrained; add \'lora\' or leave it out'),
    (lora.base != 'float' and recipe != 'none',
     f'lora.base={lora.base!r} packs the kernels that quant.recipe={recipe!r} '
     'would round in training; set --config.lora.base=float or '
     '--config.quant.recipe=none'),
    (lora.base != 'float' and config.mesh.tensor > 1,
     f'mesh.tensor={config.mesh.tensor} splits float kernels, not those of '
     f'lora.base={lora.base!r}; set --config.mesh.tensor=1'),
    (lora.base == 'float' and lora.init == 'loftq',
     "lora.init='loftq' makes up for packing, but lora.base is 'float'; set "
     '--config.lora.base=int4 or --config.lora.init=pissa'),
    (lora.dropout and recipe != 'none',
     f'lora.dropout={lora.dropout:g} would have no effect: quant.recipe='
     f'{recipe!r} rounds kernels with the adapters in them, which have no '
     'inputs of their own; set it to 0'),
    ('freeze' in stages or config.quant.dampen,
     f'stage \'freeze\' and quant.dampen hold kernels, which lora.rank='
     f'{lora.rank} freezes anyway; leave them out'),
    (train.stages and lora.base != 'float',
     f'train.stages={tuple(train.stages)} choose what is rounded, but '
     f'lora.base={lora.base!r} is packed for good; leave the stages out'),
  ):  # fmt: skip
    if wrong:
      raise ConfigError(text)


def _check_teacher(config) -> None:
  """Raises ConfigError for a loss without teacher, or one without a loss."""
  train = config.train
  others = {
    'train.feature_weight': train.feature_weight,
    'quant.dgd': config.quant.dgd,
  }
  if not train.teacher:
    for name, value in others.items():
      if value:
        raise ConfigError(
          f'{name}={value:g} compares the model with a teacher, but '
          'train.teacher is empty; set --config.train.teacher=WORKDIR or '
          f'--config.{name}=0'
        )
  elif not any(others.values()) and (
    train.distill == 'none' or not train.distill_weight
  ):
    raise ConfigError(
      f'train.teacher={train.teacher!r} would have no effect: train.distill is '
      f'{train.distill!r} with weight {train.distill_weight:g}, and '
      'train.feature_weight and quant.dgd are 0; set one of them or leave the '
      'teacher out'
    )


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
  try:
    return check(value)
  except TypeError:
    return False
