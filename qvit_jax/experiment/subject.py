"""The model that eval, predict, ptq and merge_lora look at."""

import pathlib
from typing import Any

import jax

from qvit_jax import models, weights
from qvit_jax.errors import ConfigError, WeightsError
from qvit_jax.experiment import restore
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import adapters, artifacts, checkpoint
from qvit_jax.training.state import join_collections


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
  if config.lora.rank:  # checkpoint.path is their base's
    names = _trained_adapters(config, workdir)[1]['class_names']
  elif artifacts.is_artifact(path):
    names = artifacts.read_class_names(pathlib.Path(path))
  elif path or own.steps() or not config.weights.path:
    names = restore.read_class_names(path or str(workdir))
  else:
    names = _class_names_of_weights(config)
  line = f'{len(names)} class names saved with the model'
  if not names:
    line = 'the model was saved without class names: numbers stand for them'
  return names, line


def _class_names_of_weights(config: Any) -> list[str]:
  """Returns the class names of `weights.path`, [] where it tells none."""
  path = pathlib.Path(weights.resolve(config.weights.path)[0]).expanduser()
  if weights.is_run(path):
    return restore.read_class_names(str(path))
  names = weights.open_source(path).facts.get('class_names', [])
  return names if len(names) == config.model.num_classes else []


def _trained_adapters(
  config: Any, workdir: pathlib.Path
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """Returns (arrays, metadata) of the adapters that the config asks for.

  The arrays are None where they are those of the workdir's own run.

  Raises:
    CheckpointError: There are none.
  """
  own = checkpoint.Checkpoints(workdir / 'checkpoints', writer=False)
  facts = own.metadata(own.best()) if own.steps() else {}
  name = facts.get('config', {}).get('lora', {}).get('name')
  if name == config.lora.name and not config.lora.path:
    return None, facts
  return adapters.load(adapters.path_of(config, workdir))


def adapted_variables(
  experiment: Experiment, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
  """Returns trained adapters over their base, their metadata, and lines.

  They are the best of the workdir's own run if it has the name that the config
  asks for, else those of a file. A base that the config does not name comes
  from where it came from in training.

  Raises:
    CheckpointError: There are none, or they are of another model, of other
      classes or of another base.
  """
  config = experiment.config
  arrays, facts = _trained_adapters(config, workdir)
  path = workdir
  if arrays is None:
    trained, origin = restore.restore_variables(
      experiment, str(workdir), same_plan=True
    )
    lines = [f'{origin}, digests verified']
  else:
    path = adapters.path_of(config, workdir)
    restore.check_same(experiment.model, facts, path, same_plan=True)
    trained = restore.place_adapters(experiment, arrays, path)
    origin = f'adapter {config.lora.name} of {path.parent}'
    lines = [origin]
  restore.check_classes(experiment, facts['class_names'], path)
  if not (config.weights.path or config.checkpoint.path):
    for section in ('weights', 'checkpoint'):
      config[section].path = facts['config'][section]['path']
  base, more = restore.base_variables(experiment, workdir)
  restore.check_base(experiment, facts, origin)
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
      restore.check_classes(experiment, names, path)
    return experiment.replicate(packed.variables), [f'{path.stem} of {path}']
  if experiment.model.frozen:
    variables, _, lines = adapted_variables(experiment, workdir)
    return variables, lines
  own = checkpoint.Checkpoints(workdir / 'checkpoints', writer=False)
  if config.checkpoint.path or own.steps() or not config.weights.path:
    source = config.checkpoint.path or str(workdir)
    variables, origin = restore.restore_variables(
      experiment, source, same_plan=True
    )
    names = restore.read_class_names(source)
    restore.check_classes(experiment, names, pathlib.Path(source))
    lines = [f'{origin}, digests verified']
    if config.weights.path:
      lines.append('note: there is a checkpoint, so weights.path is not read')
    return variables, lines
  place = pathlib.Path(config.weights.path).expanduser()
  if weights.is_run(place):
    names = restore.read_class_names(str(place))
    restore.check_classes(experiment, names, place)
  imported, lines = restore.import_weights(
    experiment, workdir, must_agree=True
  )
  fresh = sorted(experiment.missing_parameters(imported))
  if fresh:
    raise WeightsError(
      f'weights.path={config.weights.path!r} brings no {", ".join(fresh)} for '
      f'{config.model.num_classes} classes, so there is nothing to evaluate; '
      'train first (--mode=train), or set --config.model.num_classes to theirs'
    )
  key = jax.random.key(config.seed)
  return experiment.fresh_variables(key, imported), lines
