"""From a page and flags to the one config of a run, which nobody changes.

Checks that need a model, a mesh or data sit where those are built.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from qvit_jax.config import checks
from qvit_jax.config.fields import Field
from qvit_jax.config.sections import (
  compare,
  data,
  model,
  ptq,
  quant,
  running,
  training,
)
from qvit_jax.errors import ConfigError

FIELDS: dict[str, Field] = {
  field.name: field
  for section in (model, quant, data, training, running, ptq, compare)
  for field in section.FIELDS
}
# Fields that became part of others, and what else their value needs.
RENAMED = {
  'quant.steps': 'quant.act_granularity',
  'ptq.qat_recipe': 'quant.recipe',
}


@dataclasses.dataclass(frozen=True)
class Context:
  """What a config is resolved for; tables of higher layers are handed in.

  Attributes:
    mode: A `modes.Mode`.
    methods: Those that `quant.recipe` may name: `quantization.METHODS`.
    families: Those that `model.name` may name: `models.FAMILIES`.
    choices: {field: names that it may be}.
  """

  mode: Any
  methods: Mapping[str, Any]
  families: Mapping[str, Any]
  choices: Mapping[str, Iterable[str]]


def defaults() -> ml_collections.ConfigDict:
  """Returns a config with every field at its default."""
  config = ml_collections.ConfigDict()
  for field in FIELDS.values():
    section, _, name = field.name.partition('.')
    if not name:
      config[section] = field.default
      continue
    if section not in config:
      config[section] = ml_collections.ConfigDict()
    config[section][name] = field.default
  return config


def flatten(config) -> dict[str, Any]:
  """Returns {'section.field': value}."""
  flat = {}
  for section, fields in config.items():
    if hasattr(fields, 'items'):
      flat |= {f'{section}.{name}': value for name, value in fields.items()}
    else:
      flat[section] = fields
  return flat


def check_name(name: str, config: Any = None) -> None:
  """Raises ConfigError for a field that is not, naming the one that is meant.

  Args:
    name: 'section.field'.
    config: Whose fields are known; by default the table's.
  """
  known = FIELDS if config is None else flatten(config)
  if name in RENAMED and name not in known:
    raise ConfigError(
      f'{name} is now {RENAMED[name]}; set --config.{RENAMED[name]}= instead'
    )
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ConfigError(
      f'--config.{name} is unknown; the nearest field is --config.{near} (all '
      'are in configs/common.py)'
    )


def to_json(config) -> dict[str, Any]:
  """Returns the resolved config as JSON values (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of a file in today's names.

  Args:
    stored: {section: {field: value}} as some version of ours wrote it.
  """
  config = {
    name: dict(value) if isinstance(value, Mapping) else value
    for name, value in stored.items()
  }
  section = config.get('quant', {})
  if 'steps' in section:
    # Each recipe read one of the two fields, with a default of its own.
    learned = section.pop('steps')
    usual = 'per_token'
    if section['recipe'] not in ('none', 'aqt', 'ptq'):
      section['act_granularity'], usual = learned, 'per_tensor'
    if section['act_granularity'] == usual:
      section['act_granularity'] = ''
  config.get('ptq', {}).pop('qat_recipe', None)
  return config


def with_fields(
  config, fields: Mapping[str, Any]
) -> ml_collections.FrozenConfigDict:
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


def expand(path: Any) -> Any:
  """Returns a path (or some) with ~ as the home folder; addresses stay."""
  if isinstance(path, (tuple, list)):
    return tuple(expand(one) for one in path)
  return os.path.expanduser(path) if isinstance(path, str) else path


def expanded(config: Any) -> ml_collections.FrozenConfigDict:
  """Returns a config of known fields with all its paths as of `expand`."""
  paths = {
    name: expand(value)
    for name, value in flatten(config).items()
    if FIELDS[name].is_path
  }
  return with_fields(config, paths)


def resolve(
  config: Any,
  context: Context,
  *,
  overrides: Iterable[str] = (),
  page: Any = None,
) -> tuple[ml_collections.FrozenConfigDict, list[str]]:
  """Returns the frozen config of a run, and lines about what it ignores.

  Args:
    config: The page with the overrides in it.
    context: What it is for.
    overrides: Fields that the command line set.
    page: The config before the overrides; by default none changed a value.

  Raises:
    ConfigError: A field is missing, unknown or illegal, fields do not go
      together, or one that somebody set would have no effect.
  """
  overrides = list(overrides)
  check_fields(config, context)
  resolved = expanded(config)
  if 'weights.path' in overrides and 'weights.required' not in overrides:
    # Who names weights wants these.
    resolved = with_fields(resolved, {'weights.required': True})
  checks.check(resolved, context)
  notes = _inert(resolved, context, overrides, config if page is None else page)
  return resolved, notes


def check_fields(config: Any, context: Context) -> None:
  """Raises ConfigError where a field is missing, unknown or illegal."""
  flat = flatten(config)
  for name in FIELDS:
    if name not in flat:
      raise ConfigError(
        f'the config has no field {name}; build it with '
        'configs.common.get_config()'
      )
  for name, value in flat.items():
    if name in RENAMED:
      raise ConfigError(
        f'the config sets {name}={value!r}, which is now {RENAMED[name]}; set '
        f'{RENAMED[name]}={value!r} instead'
      )
    if name not in FIELDS:
      raise ConfigError(
        f'the config has an unknown field {name}; the nearest is '
        f'{difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]}'
      )
    holds, legal = FIELDS[name].check
    if FIELDS[name].choices:
      names = list(context.choices[name])
      holds, legal = names.__contains__, ' | '.join(map(repr, names))
    if not _holds(holds, value):
      raise ConfigError(
        f'{name}={value!r} is not allowed; allowed: {legal}. Set '
        f'--config.{name}=...'
      )


def _holds(check, value: Any) -> bool:
  try:
    return bool(check(value))
  except TypeError:
    return False


def _inert(
  config: Any, context: Context, overrides: list[str], page: Any
) -> list[str]:
  """Returns a line for each field that was set and does not count here.

  A flag without effect in any mode is an error, as is a field of the page that
  has none under the page's own values; what flags switch off is mentioned.
  """
  here, there, notes = flatten(config), flatten(page), []
  for name, field in FIELDS.items():
    if context.mode.ignores_field(name):
      if name in overrides:
        notes.append(
          f'--config.{name} has no effect in --mode={context.mode.name}'
        )
      continue
    is_set = name in overrides or here[name] != field.default
    why = _why_inert(field, config, context) if is_set else ''
    if not why:
      continue
    on_page = name not in overrides
    # A packed model brings what pages say of others.
    packed = context.methods[config.quant.recipe].is_packed
    if on_page and (packed or not _why_inert(field, page, context)):
      notes.append(
        f'{name}={there[name]!r} of the page has no effect with these flags'
      )
      continue
    raise ConfigError(
      f'{name}={here[name]!r} would have no effect: {why}, or leave {name} out'
    )
  return notes


def _why_inert(field: Field, config: Any, context: Context) -> str:
  """Returns why a field does not count and what to do; '' where it does."""
  if field.name in context.mode.counts:
    return ''
  methods, recipe = context.methods, config.quant.recipe
  if field.of_method and field.name not in methods[recipe].reads:
    others = [n for n, method in methods.items() if field.name in method.reads]
    return (
      f'quant.recipe={recipe!r} does not read it; set --config.quant.recipe='
      f'{" or ".join(others)}'
    )
  families, kind = context.families, config.model.name
  if field.of_family and field.name not in families[kind].reads:
    others = [n for n, other in families.items() if field.name in other.reads]
    return (
      f'model.name={kind!r} does not read it; set --config.model.name='
      f'{" or ".join(others)}'
    )
  for need in field.needs:
    if not need.holds(config):
      return need.hint
  return ''
