"""Where a run's first arrays come from: checkpoints, old and new. Row 8."""

import pathlib
from typing import Any

import jax

from qvit_jax import config as config_lib
from qvit_jax import models, tree
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment import Experiment
from qvit_jax.training import checkpoint
from qvit_jax.training.loop import Progress
from qvit_jax.training.state import TrainState

# A resumed run must not change these; other fields may, and are printed.
_FIXED = ('seed', 'optim.name', 'data.source', 'data.name', 'train.trainable')


def initial_state(
  experiment: Experiment, own: checkpoint.Checkpoints
) -> tuple[TrainState, Progress, list[str]]:
  """Returns the state to start from, its progress, and lines that say whence.

  Tried in this order: (1) the workdir's own newest checkpoint, (2) the
  variables of `checkpoint.path`, (3) fresh ones, with what fits of
  `weights.path` in their place.

  Raises:
    CheckpointError: The checkpoint is damaged or of another model.
    WeightsError: `weights.path` does not fit the model.
  """
  config = experiment.config
  latest = own.latest()
  if latest is not None:
    return _resume(experiment, own, latest)
  if config.weights.path and config.checkpoint.path:
    raise ConfigError(
      'weights.path and checkpoint.path are both set, but a run starts from '
      'one of them; leave the other out'
    )
  if config.checkpoint.path:
    variables, origin = restore_variables(
      experiment, config.checkpoint.path, same_plan=False
    )
    state = experiment.state_of(variables)
    return state, Progress(), [f'starting from {origin}']
  imported, origin = {}, 'starting from scratch (weights.path is not set)'
  if config.weights.path:
    imported, origin = _import_weights(experiment, config.weights.path)
  state = experiment.fresh_state(jax.random.key(config.seed), imported)
  return state, Progress(), [origin]


def restore_variables(
  experiment: Experiment, path: str, *, same_plan: bool
) -> tuple[dict[str, Any], str]:
  """Returns the variables to evaluate of a checkpoint, and their origin.

  Args:
    experiment: Whose model they are for.
    path: A workdir (its best step counts) or WORKDIR/checkpoints/STEP.
    same_plan: Whether bits that differ from the config's are an error.

  Raises:
    CheckpointError: It is missing, damaged or of another model.
  """
  stored, step = _find(path)
  metadata = stored.metadata(step)
  place = stored.directory / str(step)
  _check_same(experiment, metadata, place, same_plan=same_plan)
  wanted = experiment.abstract_variables()
  items = {'variables': wanted}
  if 'ema' in metadata['arrays']:
    names = metadata['config']['train']['trainable']
    items['ema'] = {name: wanted[name] for name in names}
  restored = stored.restore(step, items)
  variables = {**restored['variables'], **restored.get('ema', {})}
  return variables, f'step {step} of {stored.directory.parent}'


def _find(
  path: str, *, field: str = 'checkpoint.path'
) -> tuple[checkpoint.Checkpoints, int]:
  directory, step = checkpoint.find_step(path, field=field)
  stored = checkpoint.Checkpoints(directory, writer=False)
  return stored, stored.best() if step is None else step


def _resume(
  experiment: Experiment, own: checkpoint.Checkpoints, step: int
) -> tuple[TrainState, Progress, list[str]]:
  metadata = own.metadata(step)
  place = own.directory / str(step)
  _check_same(experiment, metadata, place, same_plan=True)
  there = config_lib.flatten(metadata['config'])
  here = config_lib.flatten(config_lib.to_json(experiment.config))
  changed = [name for name in here if there.get(name) != here[name]]
  for name in _FIXED:
    if name in changed:
      raise CheckpointError(
        f'{place} was trained with {name}={there.get(name)!r}, not '
        f'{here[name]!r}; set it back or choose another workdir'
      )
  wanted = experiment.abstract_state()
  items = own.restore(
    step,
    {
      'variables': wanted.variables,
      'ema': wanted.ema,
      'training': {'step': wanted.step, 'opt_state': wanted.opt_state},
    },
  )
  state = TrainState(
    step=items['training']['step'],
    variables=items['variables'],
    opt_state=items['training']['opt_state'],
    ema=items.get('ema', {}),
  )
  lines = [f'resuming at step {step}, digests verified']
  lines += [
    f'changed since: {name} {there.get(name)!r} -> {here[name]!r}'
    for name in changed
  ]
  return state, Progress(**metadata['progress']), lines


def _check_same(
  experiment: Experiment,
  metadata: dict[str, Any],
  place: pathlib.Path,
  *,
  same_plan: bool,
) -> None:
  here, there = (
    models.architecture(experiment.config),
    metadata['architecture'],
  )
  lines = [
    f'{name} is {there.get(name)} there, {value} here'
    for name, value in here.items()
    if there.get(name) != value
  ]
  if same_plan and not lines:
    plan = experiment.model.plan.digest_lines()
    pairs = zip(metadata['plan'], plan, strict=True)
    lines = [f'"{a}" there, "{b}" here' for a, b in pairs if a != b]
  if lines:
    rest = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
    raise CheckpointError(
      f'{place} is of another model or other bits: {"; ".join(lines[:3])}'
      f'{rest}; use the config it was trained with or another workdir'
    )


def _import_weights(
  experiment: Experiment, path: str
) -> tuple[dict[str, jax.Array], str]:
  """Returns {path: parameter} of another run of ours, and one line.

  A head for another class count is left out, so that it starts fresh.
  """
  stored, step = _find(path, field='weights.path')
  arrays = stored.metadata(step)['arrays']
  item = 'ema' if 'ema' in arrays else 'variables'
  saved = stored.saved_shapes(step, item, experiment.whole_sharding)
  found = {n: tree.describe(x) for n, x in tree.flatten(saved).items()}
  params = {'params': experiment.model.shapes['params']}
  wanted = {n: tree.describe(x) for n, x in tree.flatten(params).items()}
  fresh = [
    name
    for name in wanted
    if name.startswith('params/head/') and found.get(name) != wanted[name]
  ]
  compared = lambda names: {
    name: text
    for name, text in names.items()
    if name.startswith('params/') and name not in fresh
  }
  lines = tree.differences(compared(wanted), compared(found))
  if lines:
    raise WeightsError(
      f'weights.path={path!r} does not fit the model in '
      f'{len(lines)} places: {"; ".join(lines[:4])}; give model.* the values '
      'of that run, or choose other weights'
    )
  restored = tree.flatten(stored.restore(step, {item: saved})[item])
  taken = {name: restored[name] for name in wanted if name not in fresh}
  notice = f'; re-initialised: {", ".join(fresh)}' if fresh else ''
  return taken, f'weights of step {step} of {stored.directory.parent}{notice}'
