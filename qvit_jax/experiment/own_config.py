"""The config that a run brings, where the command line names no page.

It is that of `checkpoint.path`, where that is given, or else of the workdir's
own run. Flags count on top of it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from qvit_jax import models
from qvit_jax.config import resolve
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import auto, sources
from qvit_jax.store import files, runs

# Sections that say where arrays come from and what is done with a model, not
# what it is: another value there is no contradiction.
_FREE = ('checkpoint', 'weights', 'eval', 'export', 'log', 'lora', 'mesh',
         'ptq', 'seed')  # fmt: skip
# Of a packed model count what it is and what images went through.
_OF_PACKED = ('model', 'data', 'eval')
_MORE = 'set --config= to the page it was made with'


@dataclasses.dataclass(frozen=True)
class Own:
  """What a command without a page starts from.

  Attributes:
    page: A config with the fields of configs/common.py.
    lines: Say whose it is.
    flags: {'section.field': value} to be read instead of what was given.
  """

  page: Any
  lines: list[str]
  flags: dict[str, str]


def find(mode: str, workdir: str, path: str, pages: str) -> Own:
  """Returns the config of what a command is about.

  Args:
    mode: A key of MODES.
    workdir: Of the command; '' for none.
    path: Its `checkpoint.path`; '' for none.
    pages: Those that there are, for messages.

  Raises:
    ConfigError: There is no run, or one of a newer version.
    CheckpointError, WeightsError: It is damaged.
  """
  if mode == 'compare':  # each of its runs brings its own
    fields = {'model.name': next(iter(models.FAMILIES))}
    page = resolve.with_fields(resolve.defaults(), fields)
    return Own(_unfrozen(page), [], {})
  place = pathlib.Path(resolve.expand(workdir)) if workdir else None
  if path and mode != 'train':
    return of_path(resolve.expand(path))
  if place is not None and mode != 'train' and runs.has_steps(place):
    stored = runs.open_run(place).config
    page = _without_start(page_of(stored, str(place)))
    return Own(page, [f'that of {place}'], {})
  if place is not None and (stored := _last(place)):
    return Own(page_of(stored, str(place)), [f'that of {place}'], {})
  what = f'--workdir={workdir} holds no run' if workdir else 'no workdir'
  other = '' if mode == 'train' else (
    'give the workdir of a run, or --config.checkpoint.path=, or '
  )  # fmt: skip
  raise ConfigError(
    f'no config was given, and {what}; {other}set --config= to one of {pages} '
    'or to your own'
  )


def _last(place: pathlib.Path) -> dict[str, Any] | None:
  """Returns the config of the training that was started last in a workdir.

  The best checkpoint may be of an earlier one. None where there is none.
  """
  found = files.read_json(
    place / 'config.json', 'config of a run', advice='delete it, or ' + _MORE
  )
  if found is None and runs.has_steps(place):
    return runs.open_run(place).config
  return found and resolve.upgraded(found)


def of_path(path: str) -> Own:
  """Returns the config of a run, a packed file or an adapter.

  Raises:
    ConfigError: It is of a newer version.
    CheckpointError, WeightsError: There is none, or it is damaged.
  """
  run = runs.open_run(path)
  lines = [f'that of {run.origin}']
  if run.config is None:  # a packed model of an earlier version
    fields = {
      'model.name': run.architecture['name'],
      'model.size': auto.SIZE,
      'quant.recipe': 'ptq',
    }
    page = _unfrozen(resolve.with_fields(resolve.defaults(), fields))
    lines.append('it does not say how images are prepared: data.* by default')
    return Own(page, lines, {})
  page = page_of(run.config, str(run.place))
  if run.kind == 'packed':
    own = resolve.defaults()
    for section in _OF_PACKED:
      own[section] = page[section]
    own.quant.recipe = 'ptq'
    return Own(own, lines, {})
  if run.kind == 'adapter':
    flags = {
      'checkpoint.path': page.checkpoint.path,
      'lora.path': str(run.place.parent),
      'lora.name': run.place.stem,
    }
    return Own(page, lines, flags)
  return Own(_without_start(page), lines, {})


def loaded(path: str) -> tuple[Any, pathlib.Path, list[str]]:
  """Returns config, workdir and lines by which something of ours is opened.

  Args:
    path: A workdir (one of adapters too), a step, a packed file, an adapter.

  Raises:
    ConfigError: It is of a newer version.
    CheckpointError, WeightsError: There is none, or it is damaged.
  """
  place = pathlib.Path(resolve.expand(path))
  run = runs.open_run(place)
  if run.kind == 'run' and run.holds_adapters:
    return page_of(run.config, str(place)), run.workdir, []
  own = of_path(str(place))
  # An adapter's file is named by other fields.
  flags = own.flags or {'checkpoint.path': str(place)}
  return resolve.with_fields(own.page, flags), place, own.lines[1:]


def page_of(stored: Mapping[str, Any], place: str) -> Any:
  """Returns a stored config as a page.

  Args:
    stored: Of `Run.config`: in today's names, as JSON.
    place: Whose it is, for messages.

  Raises:
    ConfigError: It has fields that this version does not know.
  """
  page = resolve.defaults()
  for name, value in resolve.flatten(stored).items():
    if name not in resolve.FIELDS:
      raise ConfigError(
        f'{place} is a run of another version: its config has the field '
        f'{name}, which this one does not know; update qvit_jax, or {_MORE}'
      )
    section, _, field = name.partition('.')
    if field:
      page[section][field] = _tuples(value)
    else:
      page[section] = value
  return page


def _tuples(value: Any) -> Any:
  """Returns a value of JSON with tuples for lists, as configs have them."""
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _without_start(page: Any) -> Any:
  """Returns a config of a trained run without what its training began from."""
  start = {
    name: field.default
    for name, field in resolve.FIELDS.items()
    if field.section == 'weights' or name == 'checkpoint.path'
  }
  return _unfrozen(resolve.with_fields(page, start))


def _unfrozen(config: Any) -> Any:
  page = resolve.defaults()
  page.update(config.to_dict())
  return page


def differences(mode: Any, config: Any, workdir: str) -> list[str]:
  """Returns a line for each field that is another one in the run itself.

  Args:
    mode: A `modes.Mode` that the config was resolved for; what it ignores does
      not count.
    config: Resolved.
    workdir: Of the command.
  """
  # A training says itself what has changed.
  if mode.trains or mode.name == 'compare' or not workdir:
    return []
  source = sources.find(config, pathlib.Path(resolve.expand(workdir)))
  if source.kind == 'weights' or not runs.kind_of(source.path):
    return []
  run = runs.open_run(source.path)
  if run.config is None:
    return []
  free = _FREE if run.kind == 'run' else (*_FREE, 'quant')
  here, there = resolve.to_json(config), resolve.flatten(run.config)
  return [
    f'{name}={json.dumps(value)}, in {run.origin} {json.dumps(there[name])}'
    for name, value in resolve.flatten(here).items()
    if name.partition('.')[0] not in free
    and not mode.ignores_field(name)
    and name in there
    and there[name] != value
  ]
