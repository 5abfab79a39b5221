"""Reads runs and weights: their arrays, facts and class names."""

import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment import foreign
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model
from qvit_jax.store import checkpoint, files
from qvit_jax.training.state import join_collections, split_collections

# What adapters are must be known to whoever adds them to a kernel.
_OF_ADAPTERS = (
  'rank', 'alpha', 'scaling', 'targets', 'init', 'dora', 'base', 'group',
)  # fmt: skip


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
  check_same(experiment.model, metadata, place, same_plan=same_plan)
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


def read_run(model: Model, path: str) -> tuple[dict[str, Any], str]:
  """Returns {path: array} of the variables to evaluate, and their origin.

  On one device, without opening data.

  Raises:
    CheckpointError: There is none, or it is of another model or other bits.
  """
  stored, step = find_checkpoint(path)
  metadata, place = stored.metadata(step), stored.directory / str(step)
  check_same(model, metadata, place, same_plan=True)
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


def check_classes(
  experiment: Experiment, there: Sequence[str], place: pathlib.Path
) -> None:
  """Raises CheckpointError where labels mean other classes than in training."""
  here = experiment.data.class_names
  # One name has two Unicode forms, and file systems choose.
  there, here = (
    [unicodedata.normalize('NFC', name) for name in names]
    for names in (there, here)
  )
  if there == here:
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


def check_same(
  model: Model,
  metadata: dict[str, Any],
  place: pathlib.Path,
  *,
  same_plan: bool,
) -> None:
  """Raises CheckpointError where a checkpoint is not of the model.

  Args:
    model: Of the config.
    metadata: Of the checkpoint.
    place: Where it is, for the message.
    same_plan: Whether bits that differ from the config's are an error.
  """
  here, there = (
    models.architecture(model.config),
    metadata['architecture'],
  )
  is_adapted = 'base' in metadata
  if is_adapted and not (same_plan and model.frozen):
    how = (
      'name them by lora.path and lora.name if they are what is wanted'
      if model.frozen
      else 'set lora.* as in their training'
    )
    raise CheckpointError(
      f'{place} holds adapters alone, no kernels; fold them in with '
      f'--mode=merge_lora and give WORKDIR/merged/NAME, or {how}'
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
    there, here = metadata['config']['quant'], model.config.quant
    fields = ['recipe']
    if here.recipe in ('lsq', 'statsq'):  # it has no variables to differ by
      fields.append('hadamard')
    lines[:0] = [
      f'quant.{name} is {there[name]!r} there, {here[name]!r} here'
      for name in fields
      if name in there and there[name] != here[name]
    ]
  if lines:
    rest = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
    raise CheckpointError(
      f'{place} is of another model or other bits: {"; ".join(lines[:3])}'
      f'{rest}; use the config it was trained with or another workdir'
    )


def check_one_source(config: Any) -> None:
  """Raises ConfigError if two places are named to start from."""
  if config.weights.path and config.checkpoint.path:
    raise ConfigError(
      'weights.path and checkpoint.path are both set, but a run starts from '
      'one of them; leave the other out'
    )


def imported_parameters(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} to start from, and lines that say whence."""
  config = experiment.config
  check_one_source(config)
  if config.checkpoint.path:
    return parameters_of(experiment, config.checkpoint.path)
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


def parameters_of(
  experiment: Experiment, path: str
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} that a run of ours evaluates, and its origin."""
  stored, step = find_checkpoint(path)
  metadata, place = stored.metadata(step), stored.directory / str(step)
  check_same(experiment.model, metadata, place, same_plan=False)
  params: dict[str, Any] = {}
  for item in checkpoint.params_items(metadata):
    shapes = stored.saved_shapes(step, item, experiment.whole_sharding)
    restored = stored.restore(step, {item: shapes})[item]
    params |= tree.flatten({'params': restored['params']})
  origin = stored.directory.parent
  return params, [f'starting from the parameters of step {step} of {origin}']


def base_variables(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns fresh adapters over the base that the config names, and lines.

  Raises:
    CheckpointError, WeightsError: The base is not of this model.
  """
  imported, lines = imported_parameters(experiment, workdir)
  key = jax.random.key(experiment.config.seed)
  return experiment.fresh_variables(key, imported), lines


def import_weights(
  experiment: Experiment, workdir: pathlib.Path, *, must_agree: bool = False
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} of `weights.path` and the lines of its report.

  The report is written to WORKDIR/weights.json. An address on the hub is
  pinned to its commit in the config.

  Args:
    experiment: Whose model and classes they are for.
    workdir: Of the run.
    must_agree: Whether class names that differ are an error.

  Raises:
    WeightsError: The weights are unsafe or do not fit the model.
  """
  config = experiment.config
  local, config.weights.path = weights.resolve(config.weights.path)
  shapes = experiment.model.float_shapes['params']
  taken, report = weights.read_weights(local, shapes)
  report.notes += compare_facts(report, config)
  foreign.put_classes_in_order(
    taken, report, config, experiment.data.class_names, must_agree=must_agree
  )
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
  there, here = facts.get('resize'), config.data.resize
  if there is not None and there != here:
    notes.append(f'images were resized by {there} there, {here} here')
  return notes


def place_adapters(
  experiment: Experiment, arrays: dict[str, np.ndarray], origin: Any
) -> dict[str, Any]:
  """Returns the arrays of a file where the model wants them, nested.

  Raises:
    CheckpointError: They are not those of the model's adapters.
  """
  wanted = tree.flatten(experiment.model.kept(experiment.abstract_variables()))
  lines = tree.differences(
    {name: tree.describe(x) for name, x in wanted.items()},
    {name: tree.describe(x) for name, x in arrays.items()},
  )
  if lines:
    raise CheckpointError(
      f'{origin} is of another model: {"; ".join(lines[:4])}; use the config '
      'it was trained with'
    )
  return tree.nest(
    {n: jax.device_put(x, wanted[n].sharding) for n, x in arrays.items()}
  )


def check_base(
  experiment: Experiment, facts: dict[str, Any], origin: Any
) -> None:
  """Checks that adapters lie on the base that they were trained beside.

  Raises:
    CheckpointError: It is another one.
  """
  here, there = experiment.base_digest, facts['base']
  if here == there:
    return
  section = facts['config']
  source = section['weights']['path'] or section['checkpoint']['path']
  where = f'that came from {source}' if source else 'random from its seed'
  raise CheckpointError(
    f'{origin} holds adapters for the base {there} ({where}), but the base '
    f'here is {here}; give weights.path or checkpoint.path the one it was '
    'made for'
  )
