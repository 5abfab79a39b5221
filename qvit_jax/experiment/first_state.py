"""The state that a training starts from; `sources` has the order."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qvit_jax import models, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import CheckpointError, ConfigError
from qvit_jax.experiment import calibration, checks, sources, statistics
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model
from qvit_jax.models import batch_norm
from qvit_jax.quantization.methods.packing import unpack
from qvit_jax.store import adapters, checkpoint, runs
from qvit_jax.training.loop import Progress
from qvit_jax.training.state import TrainState, join_collections

# A resumed run must not change these; other fields may, and are printed.
_FIXED = (
  'seed', 'optim.name', 'data.source', 'data.name', 'train.trainable',
  'model.batch_norm', 'quant.recipe', 'quant.zero_point', 'quant.irm',
  'quant.hadamard',
)  # fmt: skip
# Where one of them changed, other images may be evaluated.
_EVALUATED = {
  'data.train_split', 'data.eval_split', 'data.holdout', 'eval.num_examples',
}  # fmt: skip


def initial_state(
  experiment: Experiment,
  own: checkpoint.Checkpoints,
  *,
  is_read: Callable[[str], bool] = lambda field: True,
) -> tuple[TrainState, Progress, list[str]]:
  """Returns the state to start from, its progress, and lines that say whence.

  Args:
    experiment: Built for training.
    own: Of the workdir.
    is_read: Whether the mode reads a field; others may change unsaid.

  Raises:
    CheckpointError: The checkpoint is damaged or of another model.
    WeightsError: `weights.path` does not fit the model.
    QuantError: `quant.calibration_path` is of another model.
  """
  latest = own.latest()
  if latest is not None:
    return _resume(experiment, own, latest, is_read)
  state, lines = _begin(experiment, own.directory.parent)
  return state, Progress(), lines


def _begin(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[TrainState, list[str]]:
  """Returns the state before the first update, and lines that say whence."""
  source = sources.find_start(experiment.config)
  if not experiment.model.frozen and source.kind == 'packed':
    return _start_from_packed(experiment, source.path)
  if not experiment.model.frozen and source.kind == 'run':
    return _start_from(experiment, source.path)
  imported, lines = sources.parameters(experiment, workdir)
  state, more = _fresh_state(experiment, imported)
  return state, lines + more


def _fresh_state(
  experiment: Experiment, imported: dict[str, Any]
) -> tuple[TrainState, list[str]]:
  """Returns a state with some parameters given, and lines about its steps."""
  config, key = experiment.config, jax.random.key(experiment.config.seed)
  is_learned = experiment.model.method.learns_steps
  is_calibrated = config.quant.calibration_path and is_learned
  if not (is_calibrated or batch_norm.norms(imported)):
    return experiment.fresh_state(key, imported), []
  variables, lines = experiment.fresh_variables(key, imported), []
  if is_calibrated:
    whole = jax.jit(lambda x: x, out_shardings=experiment.whole_sharding)
    # A table of PTQ saw the model without norms.
    params = statistics.folded_params(config, whole(variables))
    steps, line = calibration.learned_start(experiment, params)
    lines.append(line)
    flat = tree.flatten(variables) | steps
    variables = tree.unflatten(flat, variables)
  if batch_norm.norms(imported):
    variables, more = statistics.measured(experiment, variables)
    lines += more
  return experiment.state_of(variables), lines


def _start_from(
  experiment: Experiment, path: str
) -> tuple[TrainState, list[str]]:
  """Returns the state of a run that goes on from another one's variables."""
  run = runs.open_run(path)
  checks.check_order(experiment, run.class_names, run.place)
  learned = {
    name
    for name in tree.flatten(experiment.model.shapes)
    if not name.startswith('params/')
  }
  if run.learned == learned and _is_same_recipe(experiment.model, run):
    given = experiment.config.quant.calibration_path
    if given and experiment.model.fitted:
      raise ConfigError(
        f'quant.calibration_path={given!r} would have no effect: '
        f'checkpoint.path={path!r} brings learned steps; leave it out, or '
        'start from a float run'
      )
    variables = sources.trained(experiment, run, same_plan=False)
    variables, lines = statistics.measured(experiment, variables)
    state = experiment.state_of(variables)
    return state, [f'starting from {run.origin}', *lines]
  # Steps of other bits or none at all: they are fitted to these parameters.
  params, lines = sources.parameters_of(experiment, path)
  state, more = _fresh_state(experiment, params)
  return state, lines + more


def _start_from_packed(
  experiment: Experiment, path: str
) -> tuple[TrainState, list[str]]:
  """Returns the state of a run that goes on from a packed model."""
  model = experiment.model
  facts = models.architecture(experiment.config)
  run = runs.open_run(path)
  checks.check_order(experiment, run.class_names, run.place)
  packed = run.read_packed(model.plan.sites, facts)
  found, lines = unpack(model.method, packed, model.plan, model.ops)
  shapes = tree.flatten(model.shapes)
  found = {
    name: jnp.asarray(x, jnp.float32).reshape(shapes[name].shape)
    for name, x in found.items()
  }
  params = {n: x for n, x in found.items() if n.startswith('params/')}
  variables = experiment.fresh_variables(
    jax.random.key(experiment.config.seed), params
  )
  flat = tree.flatten(variables) | {
    name: experiment.replicate(x)
    for name, x in found.items()
    if name not in params
  }
  state = experiment.state_of(tree.unflatten(flat, variables))
  return state, [f'starting from the packed model {path}', *lines]


def _is_same_recipe(model: Model, run: runs.Run) -> bool:
  if not model.fitted:
    return True  # nothing depends on bits
  there = run.config['quant']
  return run.plan == model.plan.digest_lines() and all(
    there.get(name, model.config.quant[name]) == model.config.quant[name]
    for name in model.method.same
  )


def _resume(
  experiment: Experiment,
  own: checkpoint.Checkpoints,
  step: int,
  is_read: Callable[[str], bool],
) -> tuple[TrainState, Progress, list[str]]:
  """Returns what a run goes on from: its state, progress, and lines."""
  run = runs.open_run(own.directory / str(step))
  checks.check_same(experiment.model, run, same_plan=True)
  checks.check_classes(experiment, run.class_names, run.place)
  there = config_lib.flatten(run.config)
  pinned = {
    name: there[name]
    for name in ('weights.path', 'train.teacher')
    if there.get(name, '').startswith(f'{_field(experiment, name)}@')
  }
  if pinned:  # to the commit it started from
    experiment.pin(pinned)
  changed = _changes(experiment, run.place, there)
  if experiment.model.frozen and {'lora.name', 'lora.path'} & {*changed}:
    adapters.check_free(experiment.config, own.directory.parent)
  lines = [f'resuming at step {step}, digests verified']
  base: dict[str, Any] = {}
  if experiment.model.frozen:
    base, more = sources.base_variables(experiment, own.directory.parent)
    checks.check_base(experiment, run)
    lines += more
  wanted = experiment.abstract_state()
  items = own.restore(
    step,
    {
      'variables': experiment.model.kept(wanted.variables),
      'ema': wanted.ema,
      'training': {'step': wanted.step, 'opt_state': wanted.opt_state},
    },
  )
  state = TrainState(
    step=items['training']['step'],
    variables=join_collections(base, items['variables']),
    opt_state=items['training']['opt_state'],
    ema=items.get('ema', {}),
  )
  lines += [
    f'changed since: {name} {before!r} -> {here!r}'
    for name, (before, here) in changed.items()
    if is_read(name)
  ]
  if run.facts.get('data_digest', '') != experiment.data.digest:
    lines.append('changed since: the files of the data set')
  progress = Progress(**run.facts['progress'])
  lines += _forget_other_data(
    experiment.data.evaluated, progress, list(changed)
  )
  return state, progress, lines


def _forget_other_data(
  here: dict[str, Any], progress: Progress, changed: Sequence[str]
) -> list[str]:
  """Drops the best evaluation where it was of other images; returns lines.

  Args:
    here: What is evaluated now; see `Data.evaluated`.
    progress: Of the run so far; changed.
    changed: The fields that differ from those of the run so far.
  """
  best = progress.best
  if not best:
    return []
  if 'split' in best:
    is_other = any(best[key] != here[key] for key in here)
  else:  # of an older version
    is_other = bool(_EVALUATED & {*changed})
  progress.best = {**here, **best}
  if not is_other:
    return []
  progress.best, progress.best_step = None, None
  progress.stale, progress.evaluated_step = 0, 0
  return [
    f'the best evaluation so far (top1 {best["top1"]:.4f}) was of other '
    f'images than {here["split"]!r} of {here["data"]["name"]} is now: the '
    'best is looked for anew'
  ]


def _field(experiment: Experiment, name: str) -> Any:
  section, field = name.split('.')
  return experiment.config[section][field]


def _changes(
  experiment: Experiment, place: pathlib.Path, there: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns {field: (value before, value now)} of what may have changed.

  Raises:
    CheckpointError: Something changed that must not.
  """
  here = config_lib.flatten(config_lib.to_json(experiment.config))
  changed = {
    name: (there.get(name), value)
    for name, value in here.items()
    if there.get(name) != value
  }
  fixed = _FIXED
  if 'float16' in (there.get('model.dtype'), here['model.dtype']):
    fixed += ('model.dtype',)  # its optimizer has a loss scale
  for name in fixed:
    if name in changed and name in there:  # not a field newer than the run
      raise CheckpointError(
        f'{place} was trained with {name}={there.get(name)!r}, not '
        f'{here[name]!r}; set it back or choose another workdir'
      )
  return changed


def check_teacher(experiment: Experiment, progress: Progress) -> None:
  """Checks that a run goes on with its teacher, which `progress` remembers.

  Raises:
    CheckpointError: The same path holds other weights by now.
  """
  before, teacher = progress.teacher, experiment.teacher
  here = teacher.identity if teacher else {}
  is_same = before.get('digest') == here.get('digest')
  if before.get('path') == here.get('path') and not is_same:
    raise CheckpointError(
      f'train.teacher={here["path"]!r} has other weights now '
      f'({here["origin"]}) than when this run began ({before["origin"]}); '
      'bring them back, choose another workdir, or name the new ones by '
      'another path, such as RUN/checkpoints/STEP'
    )
  progress.teacher = here
