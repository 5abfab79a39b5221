"""Where a run's first arrays come from: checkpoints, old and new. Row 10."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import (
  adapters,
  artifacts,
  calibration,
  files,
  models,
  tree,
  weights,
)
from qvit_jax import config as config_lib
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment import Experiment, Model
from qvit_jax.quantization.learned_core import LearnedCore
from qvit_jax.quantization.pack_qat import unpack
from qvit_jax.quantization.ptq import Packed
from qvit_jax.training import checkpoint
from qvit_jax.training.loop import Progress
from qvit_jax.training.state import (
  TrainState,
  join_collections,
  split_collections,
)

# A resumed run must not change these; other fields may, and are printed.
_FIXED = (
  'seed', 'optim.name', 'data.source', 'data.name', 'train.trainable',
  'quant.recipe', 'quant.zero_point', 'quant.irm', 'quant.hadamard',
)  # fmt: skip
# What adapters are must be known to whoever adds them to a kernel.
_OF_ADAPTERS = (
  'rank', 'alpha', 'scaling', 'targets', 'init', 'dora', 'base', 'group',
)  # fmt: skip


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
    QuantError: `quant.calibration_path` is of another model.
  """
  latest = own.latest()
  if latest is not None:
    return _resume(experiment, own, latest)
  state, lines = _begin(experiment, own.directory.parent)
  return state, Progress(), lines


def _begin(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[TrainState, list[str]]:
  """Returns the state before the first update, and lines that say whence."""
  config = experiment.config
  if config.checkpoint.path and not experiment.model.frozen:
    _check_one_source(config)
    return _start_from(experiment, config.checkpoint.path)
  imported, lines = _imported(experiment, workdir)
  state, more = _fresh_state(experiment, imported)
  return state, lines + more


def _check_one_source(config: Any) -> None:
  if config.weights.path and config.checkpoint.path:
    raise ConfigError(
      'weights.path and checkpoint.path are both set, but a run starts from '
      'one of them; leave the other out'
    )


def _imported(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} to start from, and lines that say whence."""
  config = experiment.config
  _check_one_source(config)
  if config.checkpoint.path:
    return _parameters_of(experiment, config.checkpoint.path)
  if not config.weights.path:
    return {}, ['starting from scratch (weights.path is not set)']
  try:
    return import_weights(experiment, workdir)
  except weights.HubUnreachableError as error:
    if config.weights.required:
      raise
    return {}, [
      f'NOT PRETRAINED: {error}',
      'starting from random weights, because weights.required is False',
    ]


def _fresh_state(
  experiment: Experiment, imported: dict[str, Any]
) -> tuple[TrainState, list[str]]:
  """Returns a state with some parameters given, and lines about its steps."""
  config, key = experiment.config, jax.random.key(experiment.config.seed)
  is_learned = isinstance(experiment.model.ops.core, LearnedCore)
  if not (config.quant.calibration_path and is_learned):
    return experiment.fresh_state(key, imported), []
  variables = experiment.fresh_variables(key, imported)
  whole = jax.jit(lambda x: x, out_shardings=experiment.whole_sharding)
  params = tree.flatten(whole(variables['params']))
  params = {name: np.asarray(x) for name, x in params.items()}
  steps, line = calibration.learned_start(experiment, params)
  flat = tree.flatten(variables) | steps
  return experiment.state_of(tree.unflatten(flat, variables)), [line]


def _start_from(
  experiment: Experiment, path: str
) -> tuple[TrainState, list[str]]:
  """Returns the state of a run that goes on from another one's variables."""
  if artifacts.is_artifact(path):
    return _start_from_packed(experiment, path)
  stored, step = find_checkpoint(path)
  metadata = stored.metadata(step)
  if _learned(metadata['arrays']) == _learned(
    {'variables': tree.flatten(experiment.model.shapes)}
  ) and _is_same_recipe(experiment.model, metadata):
    given = experiment.config.quant.calibration_path
    if given and experiment.model.shapes.keys() != {'params'}:
      raise ConfigError(
        f'quant.calibration_path={given!r} would have no effect: '
        f'checkpoint.path={path!r} brings learned steps; leave it out, or '
        'start from a float run'
      )
    variables, origin = restore_variables(experiment, path, same_plan=False)
    return experiment.state_of(variables), [f'starting from {origin}']
  # Steps of other bits or none at all: they are fitted to these parameters.
  params, lines = _parameters_of(experiment, path)
  state, more = _fresh_state(experiment, params)
  return state, lines + more


def _parameters_of(
  experiment: Experiment, path: str
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} that a run of ours evaluates, and its origin."""
  stored, step = find_checkpoint(path)
  metadata, place = stored.metadata(step), stored.directory / str(step)
  _check_same(experiment.model, metadata, place, same_plan=False)
  params: dict[str, Any] = {}
  for item in checkpoint.params_items(metadata):
    shapes = stored.saved_shapes(step, item, experiment.whole_sharding)
    restored = stored.restore(step, {item: shapes})[item]
    params |= tree.flatten({'params': restored['params']})
  origin = stored.directory.parent
  return params, [f'starting from the parameters of step {step} of {origin}']


def _start_from_packed(
  experiment: Experiment, path: str
) -> tuple[TrainState, list[str]]:
  """Returns the state of a run that goes on from a packed model."""
  model = experiment.model
  facts = models.architecture(experiment.config)
  packed = artifacts.load(pathlib.Path(path), model.plan.sites, facts)
  found, lines = unpack(packed, model.plan, model.ops)
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


def _learned(arrays: dict[str, Any]) -> set[str]:
  """Returns the paths of variables that are no parameters."""
  return {p for p in arrays['variables'] if not p.startswith('params/')}


def _is_same_recipe(model: Model, metadata: dict[str, Any]) -> bool:
  if model.shapes.keys() == {'params'}:
    return True  # nothing depends on bits
  there = metadata['config']['quant']
  return metadata['plan'] == model.plan.digest_lines() and all(
    there.get(name, model.config.quant[name]) == model.config.quant[name]
    for name in ('recipe', 'irm', 'zero_point', 'hadamard')
  )


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
  stored, step = find_checkpoint(path)
  metadata = stored.metadata(step)
  place = stored.directory / str(step)
  _check_same(experiment.model, metadata, place, same_plan=same_plan)
  wanted = experiment.model.kept(experiment.abstract_variables())
  items = {'variables': wanted}
  if 'ema' in metadata['arrays']:
    names = metadata['config']['train']['trainable']
    items['ema'] = split_collections(wanted, tuple(names))[0]
  restored = stored.restore(step, items)
  variables = join_collections(restored['variables'], restored.get('ema', {}))
  return variables, f'step {step} of {stored.directory.parent}'


def find_checkpoint(
  path: str, *, field: str = 'checkpoint.path'
) -> tuple[checkpoint.Checkpoints, int]:
  """Returns the checkpoints and the step (the best one) that a path means.

  Raises:
    CheckpointError: There is none.
  """
  directory, step = checkpoint.find_step(path, field=field)
  stored = checkpoint.Checkpoints(directory, writer=False)
  return stored, stored.best() if step is None else step


def _resume(
  experiment: Experiment, own: checkpoint.Checkpoints, step: int
) -> tuple[TrainState, Progress, list[str]]:
  metadata = own.metadata(step)
  place = own.directory / str(step)
  _check_same(experiment.model, metadata, place, same_plan=True)
  _check_classes(experiment, metadata['class_names'], place)
  there = config_lib.flatten(metadata['config'])
  for section, field in (('weights', 'path'), ('train', 'teacher')):
    pinned = there.get(f'{section}.{field}', '')
    if pinned.startswith(f'{experiment.config[section][field]}@'):
      # Of the commit it started from.
      experiment.config[section][field] = pinned
  here = config_lib.flatten(config_lib.to_json(experiment.config))
  changed = [name for name in here if there.get(name) != here[name]]
  fixed = _FIXED
  if 'float16' in (there.get('model.dtype'), here['model.dtype']):
    fixed += ('model.dtype',)  # its optimizer has a loss scale
  for name in fixed:
    if name in changed and name in there:  # not a field newer than the run
      raise CheckpointError(
        f'{place} was trained with {name}={there.get(name)!r}, not '
        f'{here[name]!r}; set it back or choose another workdir'
      )
  lines = [f'resuming at step {step}, digests verified']
  base: dict[str, Any] = {}
  if experiment.model.frozen:
    base, more = base_variables(experiment, own.directory.parent)
    adapters.check_base(experiment, metadata, place)
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
    f'changed since: {name} {there.get(name)!r} -> {here[name]!r}'
    for name in changed
  ]
  if metadata.get('data_digest', '') != experiment.data.digest:
    lines.append('changed since: the files of the data set')
  return state, Progress(**metadata['progress']), lines


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


def read_run(model: Model, path: str) -> tuple[dict[str, Any], str]:
  """Returns {path: array} of the variables to evaluate, and their origin.

  On one device, without opening data.

  Raises:
    CheckpointError: There is none, or it is of another model or other bits.
  """
  stored, step = find_checkpoint(path)
  metadata, place = stored.metadata(step), stored.directory / str(step)
  _check_same(model, metadata, place, same_plan=True)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found: dict[str, Any] = {}
  for item in ('variables', 'ema'):  # averaged ones come last and count
    if item in metadata['arrays']:
      shapes = stored.saved_shapes(step, item, device)
      found |= tree.flatten(stored.restore(step, {item: shapes})[item])
  return found, str(place)


def read_class_names(path: str) -> list[str]:
  """Returns the class names of a run, by label.

  Raises:
    CheckpointError: There is none.
  """
  stored, step = find_checkpoint(path)
  return stored.metadata(step)['class_names']


def _check_classes(
  experiment: Experiment, there: Sequence[str], place: pathlib.Path
) -> None:
  """Raises CheckpointError where labels mean other classes than in training."""
  here = experiment.data.class_names
  if list(there) == list(here):
    return
  what = f'{len(there)} classes there, {len(here)} here'
  pairs = enumerate(zip(there, here, strict=False))
  if differing := [(i, *pair) for i, pair in pairs if pair[0] != pair[1]]:
    what = 'label {} is {!r} there, {!r} here'.format(*differing[0])
  raise CheckpointError(
    f'{place} was trained on other classes than those of the data set: {what}; '
    'give the data set it was trained on, or choose another workdir'
  )


def check_float_run(field: str, path: str) -> None:
  """Raises ConfigError where a path is a run of ours that learned its bits."""
  if not path or not weights.is_run(pathlib.Path(path).expanduser()):
    return
  stored, step = find_checkpoint(path, field=field)
  recipe = stored.metadata(step)['config']['quant']['recipe']
  if recipe != 'none':
    raise ConfigError(
      f'{field}={path!r} is already quantized (recipe {recipe}); give a float '
      'run, or pack this one with --mode=export --config.export.format=packed'
    )


def _check_same(
  model: Model,
  metadata: dict[str, Any],
  place: pathlib.Path,
  *,
  same_plan: bool,
) -> None:
  here, there = (
    models.architecture(model.config),
    metadata['architecture'],
  )
  is_adapted = 'base' in metadata
  if is_adapted and not (same_plan and model.frozen):
    raise CheckpointError(
      f'{place} holds adapters alone, no kernels; fold them in with '
      '--mode=merge_lora and give WORKDIR/merged/NAME, or set lora.* as in '
      'their training'
    )
  lines = [
    f'{name} is {there.get(name)} there, {value} here'
    for name, value in here.items()
    if there.get(name) != value
  ]
  if same_plan and model.frozen:
    here = config_lib.to_json(model.config)['lora']
    there = metadata['config']['lora'] if is_adapted else {'rank': 0}
    lines += [
      f'lora.{name} is {there[name]} there, {here[name]} here'
      for name in _OF_ADAPTERS
      if name in there and there[name] != here[name]
    ]
  if same_plan and not lines:
    plan = model.plan.digest_lines()
    pairs = zip(metadata['plan'], plan, strict=True)
    lines = [f'"{a}" there, "{b}" here' for a, b in pairs if a != b]
    recipes = metadata['config']['quant']['recipe'], model.config.quant.recipe
    if recipes[0] != recipes[1]:
      lines.insert(0, 'quant.recipe is {!r} there, {!r} here'.format(*recipes))
  if lines:
    rest = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
    raise CheckpointError(
      f'{place} is of another model or other bits: {"; ".join(lines[:3])}'
      f'{rest}; use the config it was trained with or another workdir'
    )


def import_weights(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} of `weights.path` and the lines of its report.

  The report is written to WORKDIR/weights.json. An address on the hub is
  pinned to its commit in the config.

  Raises:
    WeightsError: The weights are unsafe or do not fit the model.
  """
  config = experiment.config
  local, config.weights.path = weights.resolve(config.weights.path)
  shapes = experiment.model.float_shapes['params']
  taken, report = weights.read_weights(local, shapes)
  report.notes += compare_facts(report, config)
  if jax.process_index() == 0:
    files.write_json(workdir / 'weights.json', report.to_json())
  imported = {f'params/{name}': values for name, values in taken.items()}
  return imported, report.lines()


def compare_facts(report: weights.Report, config: Any) -> list[str]:
  """Returns a note for each thing that no tensor shows and that differs.

  Raises:
    WeightsError: The number of heads differs.
  """
  facts, model, notes = report.facts, config.model, []
  heads = models.architecture(config)['heads']
  if facts.get('heads', heads) != heads:
    raise WeightsError(
      f'weights {report.source} have {facts["heads"]} attention heads, the '
      f'model {heads}; set --config.model.heads={facts["heads"]} (with '
      '--config.model.size= and the other numbers) or choose other weights'
    )
  if 'heads' not in facts:
    notes.append(f'the file does not tell its attention heads: {heads} assumed')
  there, here = facts.get('norm_eps'), model.norm_eps
  if there is not None and there != here:
    notes.append(
      f'LayerNorm epsilon is {there:g} there, {here:g} here; for equal logits '
      f'set --config.model.norm_eps={there:g}'
    )
  there, here = facts.get('pool'), model.pool
  if there is not None and there != here:
    notes.append(f'model.pool was {there} there, {here} here')
  for name in ('mean', 'std'):
    there, here = facts.get(name), list(config.data[name])
    if there is not None and there != here:
      notes.append(f'images had data.{name}={there} there, {here} here')
  return notes


def open_packed(config: Any) -> Packed | None:
  """Returns the packed model that `quant.recipe='ptq'` asks for, else None.

  Its compute dtype becomes the config's.

  Raises:
    ConfigError: `quant.recipe` and `checkpoint.path` do not go together.
    WeightsError: The file is damaged, or of another model.
  """
  path, recipe = config.checkpoint.path, config.quant.recipe
  if recipe != 'ptq':
    if artifacts.is_artifact(path):
      raise ConfigError(
        f'checkpoint.path={path!r} is a packed model, but quant.recipe is '
        f'{recipe!r}; set --config.quant.recipe=ptq'
      )
    return None
  make = (
    'give a file WORKDIR/artifacts/ROW.safetensors of --mode=ptq or '
    'WORKDIR/export/model.packed.safetensors of --mode=export '
    '--config.export.format=packed'
  )
  if not path:
    raise ConfigError(
      "quant.recipe='ptq' evaluates a packed model, but checkpoint.path is "
      f'empty; {make}'
    )
  if not artifacts.is_artifact(path):
    kind = 'does not exist'
    if pathlib.Path(path).exists():
      kind = 'is no packed model, or a damaged one'
    raise ConfigError(
      f"quant.recipe='ptq', but checkpoint.path={path!r} {kind}; {make}, or "
      'evaluate a checkpoint with the quant.recipe of its training'
    )
  sites, facts = models.list_sites(config), models.architecture(config)
  packed = artifacts.load(pathlib.Path(path), sites, facts)
  config.model.dtype = packed.dtype
  return packed


def class_names_of_eval(
  config: Any, workdir: pathlib.Path
) -> tuple[list[str], str]:
  """Returns the names of the classes that `start_of_eval` will restore.

  And a line that says whence.

  Raises:
    CheckpointError: There is no checkpoint.
  """
  path, names = config.checkpoint.path, []
  own = checkpoint.Checkpoints(workdir / 'checkpoints', writer=False)
  if artifacts.is_artifact(path):
    names = artifacts.read_class_names(pathlib.Path(path))
  elif path or own.steps() or not config.weights.path:
    names = read_class_names(path or str(workdir))
  line = f'{len(names)} class names saved with the model'
  if not names:
    line = 'the model was saved without class names: numbers stand for them'
  return names, line


def base_variables(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns fresh adapters over the base that the config names, and lines.

  Raises:
    CheckpointError, WeightsError: The base is not of this model.
  """
  imported, lines = _imported(experiment, workdir)
  key = jax.random.key(experiment.config.seed)
  return experiment.fresh_variables(key, imported), lines


def adapted_variables(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
  """Returns trained adapters over their base, their metadata, and lines.

  They are the best of the workdir's own run if it has the name that the config
  asks for, else those of a file. A base that the config does not name comes
  from where it came from in training.

  Raises:
    CheckpointError: There are none, or they are of another model or base.
  """
  config = experiment.config
  own = checkpoint.Checkpoints(workdir / 'checkpoints', writer=False)
  facts = own.metadata(own.best()) if own.steps() else {}
  name = facts.get('config', {}).get('lora', {}).get('name')
  if name == config.lora.name and not config.lora.path:
    trained, origin = restore_variables(
      experiment, str(workdir), same_plan=True
    )
    lines = [f'{origin}, digests verified']
  else:
    path = adapters.path_of(config, workdir)
    arrays, facts = adapters.load(path)
    _check_same(experiment.model, facts, path, same_plan=True)
    trained = adapters.place(experiment, arrays, path)
    origin = f'adapter {config.lora.name} of {path.parent}'
    lines = [origin]
  if not (config.weights.path or config.checkpoint.path):
    for section in ('weights', 'checkpoint'):
      config[section].path = facts['config'][section]['path']
  base, more = base_variables(experiment, workdir)
  adapters.check_base(experiment, facts, origin)
  variables = join_collections(base, trained)
  return variables, facts, [*lines, *(f'base: {line}' for line in more)]


def start_of_eval(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns the variables that `eval` evaluates, and lines that say whence.

  In this order: a packed model, `checkpoint.path`, the workdir's own best,
  `weights.path`.

  Raises:
    CheckpointError: There is none, or it is damaged or of another model.
    WeightsError: `weights.path` does not fit, or brings no classifier.
  """
  config, packed = experiment.config, experiment.model.packed
  if packed:
    path = pathlib.Path(config.checkpoint.path)
    if names := artifacts.read_class_names(path):
      _check_classes(experiment, names, path)
    return experiment.replicate(packed.variables), [f'{path.stem} of {path}']
  if experiment.model.frozen:
    variables, _, lines = adapted_variables(experiment, workdir)
    return variables, lines
  own = checkpoint.Checkpoints(workdir / 'checkpoints', writer=False)
  if config.checkpoint.path or own.steps() or not config.weights.path:
    source = config.checkpoint.path or str(workdir)
    variables, origin = restore_variables(experiment, source, same_plan=True)
    names = read_class_names(source)
    _check_classes(experiment, names, pathlib.Path(source))
    lines = [f'{origin}, digests verified']
    if config.weights.path:
      lines.append('note: there is a checkpoint, so weights.path is not read')
    return variables, lines
  imported, lines = import_weights(experiment, workdir)
  fresh = sorted(experiment.missing_parameters(imported))
  if fresh:
    raise WeightsError(
      f'weights.path={config.weights.path!r} brings no {", ".join(fresh)} for '
      f'{config.model.num_classes} classes, so there is nothing to evaluate; '
      'train first (--mode=train), or set --config.model.num_classes to theirs'
    )
  key = jax.random.key(config.seed)
  return experiment.fresh_variables(key, imported), lines
