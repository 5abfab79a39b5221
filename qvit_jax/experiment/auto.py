"""`model.size='auto'`: the model is the one that weights or a run are of.

Everything that they tell becomes a field of the config, and a line; what a page
or a flag says otherwise is an error.
"""

import math
import pathlib
from collections.abc import Collection
from typing import Any

from qvit_jax import data, models, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import checks, sources
from qvit_jax.store import adapters, runs
from qvit_jax.weights import Told

SIZE = 'auto'
# What is said of a field that is as the config has it.
UNTOLD = 'nothing tells it'
# Fields that it reads, whatever a mode reads of them.
READ = ('checkpoint.path', 'weights.path', 'lora.path')
# What runs leave out where it is at its default; see `models.architecture`.
_LEFT_OUT = (
  'activation', 'position', 'last_norm', 'norm_after_pool', 'pre_norm',
)  # fmt: skip


def filled(
  config: Any,
  workdir: str,
  *,
  trains: bool,
  reads_data: bool,
  overrides: Collection[str] = (),
  assumes: bool = False,
) -> tuple[Any, list[str]]:
  """Returns a config whose model is that of its weights or run, and lines.

  Args:
    config: With `model.size='auto'` and legal fields; it stays as it is.
    workdir: Of the run; '' for none.
    trains: Whether the mode trains, so that a workdir's own run goes on and
      the data decides how many classes there are.
    reads_data: Whether the mode reads a labelled data set.
    overrides: Fields that the command line sets.
    assumes: Whether heads are the usual ones of the width where nothing tells
      them.

  Raises:
    ConfigError: Nothing names a model, or fields say otherwise than it does.
    WeightsError, CheckpointError: What is named cannot be read.
  """
  if not models.family(config).tells:
    others = [name for name, one in models.FAMILIES.items() if one.tells]
    raise ConfigError(
      "model.size='auto' is not known of model.name="
      f'{config.model.name!r}; set --config.model.size= to one of its sizes, '
      f'or --config.model.name={" or ".join(others)}'
    )
  config = config_lib.expanded(config)
  origin, told, is_whole = _told(config, workdir, trains)
  given = {
    name: value
    for name, value in config_lib.flatten(config).items()
    if name in overrides or value != config_lib.FIELDS[name].default
  }
  _check_pool(origin, told, given)
  if reads_data and not trains:
    _check_classes(config, origin, told)
  fields: dict[str, Any] = {'model.size': ''}
  lines = [f'the model of {origin}']
  for name, one in told.items():
    if name == 'model.num_classes' and trains and not is_whole:
      continue  # the head starts fresh where the data has other classes
    value, place = one.value, one.place
    if name == 'model.layer_scale' and name in given:
      is_same = bool(given[name]) == bool(value)  # else only how it starts
    else:
      is_same = _is_same(given.get(name, value), value)
    if not is_same:
      is_free = _is_free(name, given[name], told)
      if is_whole or one.is_sure and not is_free:
        raise ConfigError(
          f'{name}={_text(given[name])} of the config, but {origin} says '
          f'{_text(value)} ({place}); leave {name} out, or choose other weights'
        )
      place = f'of the config; {_text(value)} by {place}'
      value = given[name]
    fields[name] = value
    lines.append(f'{name}={_text(value)}: {place}')
  for name, value, place in _untold(
    config, told, given, fields, reads_data=reads_data, assumes=assumes
  ):
    fields[name] = value
    lines.append(f'{name}={_text(value)}: {place}')
  return config_lib.with_fields(config, fields), lines


def _check_pool(
  origin: str, told: dict[str, Told], given: dict[str, Any]
) -> None:
  """Raises ConfigError where a page's pooling asks for what is not there."""
  pool, there = given.get('model.pool'), told['model.pool'].value
  if pool == 'token_attention' and there in ('mean', 'attention'):
    raise ConfigError(
      f'model.pool={pool} of the config asks a class token too, but {origin} '
      'has none; set --config.model.pool=attention, or choose other weights'
    )
  behind = told.get('model.norm_after_pool')
  if pool in ('attention', 'token_attention') and behind and behind.value:
    raise ConfigError(
      f'model.pool={pool} of the config asks tokens behind a norm, but '
      f'{origin} has its last norm behind the pooling ({behind.place}); leave '
      'model.pool out, or choose other weights'
    )


def _check_classes(config: Any, origin: str, told: dict[str, Told]) -> None:
  """Raises ConfigError where data have more classes than a trained head."""
  head = told.get('model.num_classes')
  if head and data.count_classes(config) > head.value:
    raise ConfigError(
      f'{origin} has {head.value} classes ({head.place}), but the data set has '
      f'{data.count_classes(config)}; train on it first (--mode=train), or '
      'give data of the classes that it knows'
    )


def _is_free(name: str, value: Any, told: dict[str, Told]) -> bool:
  """Returns whether a page may say otherwise than the file.

  Positions are resized; a head starts fresh, and so does a pooling with
  parameters; what a file without a head would pool nobody has trained.
  """
  if name == 'model.pool':
    fresh = value in ('attention', 'token_attention')
    return fresh or 'model.num_classes' not in told
  return name in ('model.image_size', 'model.num_classes')


def _told(
  config: Any, workdir: str, trains: bool
) -> tuple[str, dict[str, Told], bool]:
  """Returns what is looked at, what it tells, and whether it is all the model.

  A training may give a file another head, but goes on with a run as it is.
  """
  place = pathlib.Path(config_lib.expand(workdir))
  has_own = bool(workdir) and runs.has_steps(place)
  if has_own and trains:
    return *_of_run(config, runs.open_run(place)), True
  # What is looked at comes from where `sources` finds it; the base of adapters
  # may have had other classes than they.
  path = adapters.path_of(config, place)
  there = has_own or config.lora.path or path.is_file()
  if config.lora.rank and not trains and there:
    return *_of_run(config, sources.trained_adapters(config, place)), True
  if (has_own or config.checkpoint.path) and not (config.lora.rank or trains):
    source = sources.find(config, place)
  else:
    source = sources.find_start(config)
  if source.kind == 'scratch':
    raise ConfigError(
      "model.size='auto' is the model of weights or of a run, but none is "
      'named; set --config.weights.path= (a file, a folder, hf://OWNER/NAME) '
      'or --config.checkpoint.path=, or --config.model.size=S/16'
    )
  if source.kind != 'weights':
    return *_of_run(config, runs.open_run(source.path)), True
  local = pathlib.Path(weights.resolve(source.path)[0])
  if runs.kind_of(local) == 'run':
    run = runs.open_run(local, field='weights.path')
    return *_of_run(config, run), False
  opened, names = weights.open_named(local)
  return opened.title, weights.tell(opened, names), False


def _of_run(config: Any, run: runs.Run) -> tuple[str, dict[str, Told]]:
  """Returns what a run, a packed model or adapters of ours tell."""
  facts = dict(run.architecture)
  if (name := facts.pop('name')) != config.model.name:
    raise ConfigError(
      f'model.name={config.model.name!r} of the config, but {run.origin} is of '
      f'a model {name!r}; set --config.model.name={name} and '
      '--config.model.size= to its own'
    )
  for name in _LEFT_OUT:
    facts.setdefault(name, config_lib.FIELDS[f'model.{name}'].default)
  model, scaled = (run.config or {}).get('model', {}), facts['layer_scale']
  facts['layer_scale'] = model.get('layer_scale', 1e-5) if scaled else 0.0
  told = {f'model.{name}': value for name, value in facts.items()}
  for name, value in (run.preprocessing or {}).items():
    if name != 'image_size':
      told[f'data.{name}'] = tuple(value) if name != 'resize' else value
  return run.origin, {name: Told(x, 'its config') for name, x in told.items()}


def _untold(
  config: Any,
  told: dict[str, Told],
  given: dict[str, Any],
  fields: dict[str, Any],
  *,
  reads_data: bool,
  assumes: bool,
):
  """Yields (field, value, why) of what the file does not tell."""
  if 'model.heads' not in told and 'model.heads' not in given:
    width = told['model.width'].value
    usual = weights.usual_heads(width)
    if assumes and usual:
      yield 'model.heads', usual, f'usual for the width {width}, {UNTOLD}'
      given = given | {'model.heads': usual}
  if 'model.heads' not in told and 'model.heads' not in given:
    advice = f', which divides the width {width}'
    if usual:
      advice = f' ({usual} is usual for the width {width})'
    raise ConfigError(
      f'weights.path={config.weights.path!r} does not tell its attention '
      'heads: no tensor shows them, and no config.json beside it says them; '
      f'set --config.model.heads={usual or ""}{advice}'
    )
  if 'model.heads' not in told and 'model.heads' not in fields:
    yield 'model.heads', given['model.heads'], f'of the config, {UNTOLD}'
  if 'model.image_size' not in told:
    size, patch = config.model.image_size, fields['model.patch']
    why = f'of the config, {UNTOLD}'
    if 'model.image_size' not in given and size % patch:
      why = f'whole patches in the {size} of the config, {UNTOLD}'
      size = max(1, size // patch) * patch
    yield 'model.image_size', size, why
  for name in ('data.mean', 'data.std', 'data.resize'):
    if name not in told:
      value = config_lib.flatten(config)[name]
      yield name, value, f'of the config, {UNTOLD}'
  if 'model.num_classes' not in fields:
    if 'model.num_classes' in given:
      yield 'model.num_classes', given['model.num_classes'], 'of the config'
    elif reads_data:
      count = max(2, data.count_classes(config))
      yield 'model.num_classes', count, 'classes of the data set'
    else:
      count = config.model.num_classes
      yield 'model.num_classes', count, f'of the config, {UNTOLD}'


def _is_same(here: Any, there: Any) -> bool:
  """Returns whether two values of a field mean the same."""
  if isinstance(there, (tuple, list)):
    return checks.same_channels(there, here)
  if isinstance(there, float) or isinstance(here, float):
    return math.isclose(here, there, rel_tol=1e-6)
  return here == there


def _text(value: Any) -> str:
  """Returns a value for a line, as a flag takes it."""
  if isinstance(value, (tuple, list)):
    return f'({", ".join(f"{x:.6g}" for x in value)})'
  return f'{value:g}' if isinstance(value, float) else str(value)
