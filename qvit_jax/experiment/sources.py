"""Where arrays come from: the one order in which places are looked at.

What is looked at (eval, predict, ptq, export, a merge) comes from
  1. `checkpoint.path`: a run, one of its steps, or a packed model,
  2. the workdir's own best checkpoint,
  3. `weights.path`.
What a training starts from (see `first_state`) comes from
  1. the workdir's own newest checkpoint: the training goes on,
  2. `checkpoint.path`,
  3. `weights.path`,
  4. random numbers of the seed.
Adapters come from the workdir's own run or from their file; their base is
found as what a training starts from, without 1, and is where it was in their
training if the config names neither path.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.errors import ConfigError, WeightsError
from qvit_jax.experiment import checks, foreign
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import folded
from qvit_jax.quantization import METHODS
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import adapters, files, runs
from qvit_jax.training.state import join_collections


@dataclasses.dataclass(frozen=True)
class Source:
  """A place that arrays come from.

  Attributes:
    kind: 'run', 'packed', 'weights' or 'scratch'.
    path: Of it; '' from scratch.
  """

  kind: str
  path: str = ''


def find(config: Any, workdir: pathlib.Path) -> Source:
  """Returns where what a mode looks at comes from.

  A workdir without a checkpoint where nothing else is named: whoever opens it
  says so.
  """
  if path := config.checkpoint.path:
    kind = 'packed' if runs.kind_of(path) == 'packed' else 'run'
    return Source(kind, path)
  if config.weights.path and not runs.has_steps(workdir):
    return Source('weights', config.weights.path)
  return Source('run', str(workdir))


def find_start(config: Any) -> Source:
  """Returns where a new training, or a base of adapters, comes from.

  Raises:
    ConfigError: Two places are named.
  """
  if config.weights.path and config.checkpoint.path:
    raise ConfigError(
      'weights.path and checkpoint.path are both set, but a run starts from '
      'one of them; leave the other out'
    )
  if config.checkpoint.path:
    return find(config, pathlib.Path())
  path = config.weights.path
  return Source('weights', path) if path else Source('scratch')


def open_packed(config: Any) -> Packed | None:
  """Returns the packed model that `quant.recipe='ptq'` means; else None.

  Raises:
    ConfigError: `quant.recipe` and `checkpoint.path` do not go together.
    WeightsError: The file is damaged, or of another model.
  """
  path, recipe = config.checkpoint.path, config.quant.recipe
  is_packed = runs.kind_of(path) == 'packed'
  if not METHODS[recipe].is_packed:
    if is_packed:
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
  if not is_packed:
    kind = 'does not exist'
    if pathlib.Path(path).exists():
      kind = 'is no packed model, or a damaged one'
    raise ConfigError(
      f"quant.recipe='ptq', but checkpoint.path={path!r} {kind}; {make}, or "
      'evaluate a checkpoint with the quant.recipe of its training'
    )
  config = folded(config)  # as they were packed
  sites, facts = models.list_sites(config), models.architecture(config)
  return runs.open_run(path).read_packed(sites, facts)


def class_names(config: Any, workdir: pathlib.Path) -> tuple[list[str], str]:
  """Returns the names of the classes that `evaluated` will restore.

  And a line that says whence.

  Raises:
    CheckpointError: There is no checkpoint.
  """
  source = find(config, workdir)
  if config.lora.rank:  # the source is their base's
    names = trained_adapters(config, workdir).class_names
  elif source.kind != 'weights':
    names = runs.open_run(source.path).class_names
  else:
    names = _class_names_of_weights(config)
  line = f'{len(names)} class names saved with the model'
  if not names:
    line = 'the model was saved without class names: numbers stand for them'
  return names, line


def _class_names_of_weights(config: Any) -> list[str]:
  """Returns the class names of `weights.path`, [] where it tells none."""
  path = weights.resolve(config.weights.path)[0]
  if runs.kind_of(path) == 'run':
    return runs.open_run(path, field='weights.path').class_names
  source = weights.open_source(pathlib.Path(path))
  names = source.facts.get('class_names', [])
  return names if len(names) == config.model.num_classes else []


def evaluated(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns the variables that `eval` evaluates, and lines that say whence.

  Raises:
    CheckpointError: There is none, or it is damaged or of another model.
    WeightsError: `weights.path` does not fit, or brings no classifier.
  """
  config, packed = experiment.config, experiment.model.packed
  if packed:
    run = runs.open_run(config.checkpoint.path)
    if run.class_names:
      checks.check_classes(experiment, run.class_names, run.place)
    return experiment.replicate(packed.variables), [run.origin]
  if experiment.model.frozen:
    variables, _, lines = adapted(experiment, workdir)
    return variables, lines
  source = find(config, workdir)
  if source.kind == 'weights':
    return _evaluated_weights(experiment, workdir)
  run = runs.open_run(source.path)
  variables = trained(experiment, run)
  place = pathlib.Path(source.path)
  checks.check_classes(experiment, run.class_names, place)
  lines = [f'{run.origin}, digests verified']
  if config.weights.path:
    lines.append('note: there is a checkpoint, so weights.path is not read')
  return variables, lines


def _evaluated_weights(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns the variables of `weights.path`, and lines."""
  config = experiment.config
  path = config.weights.path
  if runs.kind_of(path) == 'run':
    names = runs.open_run(path, field='weights.path').class_names
    checks.check_classes(experiment, names, pathlib.Path(path))
  imported, lines = _imported_weights(experiment, workdir, must_agree=True)
  fresh = sorted(experiment.missing_parameters(imported))
  if fresh:
    raise WeightsError(
      f'weights.path={config.weights.path!r} brings no {", ".join(fresh)} for '
      f'{config.model.num_classes} classes, so there is nothing to evaluate; '
      'train first (--mode=train), or set --config.model.num_classes to theirs'
    )
  if experiment.model.fitted and not experiment.data.only_images:
    lines.append(experiment.open_training_split())
  key = jax.random.key(config.seed)
  return experiment.fresh_variables(key, imported), lines


def trained(
  experiment: Experiment, run: runs.Run, *, same_plan: bool = True
) -> dict[str, Any]:
  """Returns what of a model's variables a run evaluates.

  Args:
    experiment: Whose model they are for.
    run: A step.
    same_plan: Whether bits that differ from the config's are an error.

  Raises:
    CheckpointError: It is damaged, or of another model.
  """
  checks.check_same(experiment.model, run, same_plan=same_plan)
  wanted = experiment.model.kept(experiment.abstract_variables())
  return run.place_evaluated(wanted)


def parameters(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: array} that a training starts from, and lines.

  Parameters, and statistics of norms where there are any.

  Raises:
    CheckpointError, WeightsError: They are damaged or of another model.
  """
  config, source = experiment.config, find_start(experiment.config)
  if source.kind in ('run', 'packed'):
    return parameters_of(experiment, source.path)
  if source.kind == 'scratch':
    return {}, ['starting from scratch (weights.path is not set)']
  try:
    return _imported_weights(experiment, workdir)
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
  """Returns the same of what a run of ours evaluates, and its origin."""
  run = runs.open_run(path)
  if run.kind != 'run':
    raise ConfigError(
      f'checkpoint.path={path!r} is no run but '
      f'{"a packed model" if run.kind == "packed" else "an adapter"}; give '
      'the workdir of a run'
    )
  checks.check_same(experiment.model, run, same_plan=False)
  found = run.read_parameters(experiment.whole_sharding)
  return found, [f'starting from the parameters of {run.origin}']


def _imported_weights(
  experiment: Experiment, workdir: pathlib.Path, *, must_agree: bool = False
) -> tuple[dict[str, Any], list[str]]:
  """Returns {path: parameter} of `weights.path` and the lines of its report.

  The report is written to WORKDIR/weights.json. An address on the hub is
  pinned to its commit in the experiment's config.

  Args:
    experiment: Whose model and classes they are for.
    workdir: Of the run.
    must_agree: Whether class names that differ are an error.

  Raises:
    WeightsError: The weights are unsafe or do not fit the model.
  """
  local, pinned = weights.resolve(experiment.config.weights.path)
  experiment.pin({'weights.path': pinned})
  config = experiment.config
  shapes = experiment.model.float_shapes
  taken, report = weights.read_weights(local, shapes)
  report.notes += checks.compare_facts(report, config)
  foreign.put_classes_in_order(
    taken, report, config, experiment.data.class_names, must_agree=must_agree
  )
  if not must_agree:
    checks.check_fresh(report, config)
  if jax.process_index() == 0:
    files.write_json(workdir / 'weights.json', report.to_json())
  imported = {weights.full_path(name): x for name, x in taken.items()}
  return imported, report.lines()


def trained_adapters(config: Any, workdir: pathlib.Path) -> runs.Run:
  """Returns the adapters that the config asks for: the own run's, or a file's.

  Raises:
    CheckpointError: There are none.
  """
  if runs.has_steps(workdir) and not config.lora.path:
    own = runs.open_run(workdir)
    if own.config.get('lora', {}).get('name') == config.lora.name:
      return own
  path = adapters.path_of(config, workdir)
  return runs.open_adapter(path)


def adapted(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], runs.Run, list[str]]:
  """Returns trained adapters over their base, their run, and lines.

  Raises:
    CheckpointError: There are none, or they are of another model, of other
      classes or of another base.
  """
  run = trained_adapters(experiment.config, workdir)
  if run.kind == 'run':
    variables, place = trained(experiment, run), workdir
    lines = [f'{run.origin}, digests verified']
  else:
    checks.check_same(experiment.model, run, same_plan=True)
    arrays, place = run.read_adapters(), run.place
    variables, lines = _placed(experiment, arrays, run.place), [run.origin]
  checks.check_classes(experiment, run.class_names, place)
  config = experiment.config
  if not (config.weights.path or config.checkpoint.path):
    experiment.pin(
      {
        f'{section}.path': run.config[section]['path']
        for section in ('weights', 'checkpoint')
      }
    )
  base, more = base_variables(experiment, workdir)
  checks.check_base(experiment, run)
  variables = join_collections(base, variables)
  return variables, run, [*lines, *(f'base: {line}' for line in more)]


def base_variables(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
  """Returns fresh adapters over the base that the config names, and lines.

  Raises:
    CheckpointError, WeightsError: The base is not of this model.
  """
  imported, lines = parameters(experiment, workdir)
  key = jax.random.key(experiment.config.seed)
  # Their learned steps are those of the adapters' run.
  variables = experiment.fresh_variables(key, imported, fitted=False)
  return variables, lines


def _placed(
  experiment: Experiment, arrays: dict[str, np.ndarray], place: pathlib.Path
) -> dict[str, Any]:
  """Returns the arrays of a file where the model wants them, nested."""
  wanted = tree.flatten(experiment.model.kept(experiment.abstract_variables()))
  checks.check_arrays(wanted, arrays, place)
  return tree.nest(
    {n: jax.device_put(x, wanted[n].sharding) for n, x in arrays.items()}
  )
