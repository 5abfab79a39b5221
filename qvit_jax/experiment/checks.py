"""Whether what was found is of this model, these classes, this base."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model
from qvit_jax.quantization import METHODS
from qvit_jax.store import runs

# What adapters are must be known to whoever adds them to a kernel.
_OF_ADAPTERS = (
  'rank', 'alpha', 'scaling', 'targets', 'init', 'dora', 'base', 'group',
)  # fmt: skip


def check_classes(
  experiment: Experiment, there: Sequence[str], place: pathlib.Path
) -> None:
  """Raises CheckpointError where labels mean other classes than in training."""
  there, here = (
    [weights.one_form(name) for name in names]
    for names in (there, experiment.data.class_names)
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


def check_order(
  experiment: Experiment, there: Sequence[str], place: pathlib.Path
) -> None:
  """Raises CheckpointError where a start has these classes in another order.

  Other classes are no error: a training may start from them.
  """
  here = experiment.data.class_names
  if weights.is_reordered(there, here):
    raise CheckpointError(
      f'{place} was trained on the same classes in another order (label 0 is '
      f'{there[0]!r} there, {here[0]!r} here), so its head would name others; '
      'give the data set it was trained on, or export it with '
      '--config.export.layout=hf and start from that by weights.path, which '
      'puts the head in order'
    )


def check_float_run(field: str, path: str) -> None:
  """Raises ConfigError where a path is a run of ours that learned its bits."""
  if runs.kind_of(path) != 'run':
    return
  recipe = runs.open_run(path, field=field).config['quant']['recipe']
  if METHODS[recipe].quantizes:
    raise ConfigError(
      f'{field}={path!r} is already quantized (recipe {recipe}); give a float '
      'run, or pack this one with --mode=export --config.export.format=packed'
    )


def check_same(model: Model, run: runs.Run, *, same_plan: bool) -> None:
  """Raises CheckpointError where a checkpoint is not of the model.

  Args:
    model: Of the config.
    run: The checkpoint or adapter.
    same_plan: Whether bits that differ from the config's are an error.
  """
  here, there = models.architecture(model.config), run.architecture
  is_adapted = run.holds_adapters
  if is_adapted and not (same_plan and model.frozen):
    how = (
      'name them by lora.path and lora.name if they are what is wanted'
      if model.frozen
      else 'set lora.* as in their training'
    )
    raise CheckpointError(
      f'{run.place} holds adapters alone, no kernels; fold them in with '
      f'--mode=merge_lora and give WORKDIR/merged/NAME, or {how}'
    )
  lines = [
    f'{name} is {there.get(name)} there, {here.get(name)} here'
    for name in (*here, *(there.keys() - here.keys()))
    if there.get(name) != here.get(name)
  ]
  if same_plan and model.frozen:
    here = config_lib.to_json(model.config)['lora']
    there = run.config['lora'] if is_adapted else {'rank': 0}
    lines += [
      f'lora.{name} is {there[name]} there, {here[name]} here'
      for name in _OF_ADAPTERS
      if name in there and there[name] != here[name]
    ]
  if same_plan and not lines:
    plan = model.plan.digest_lines()
    pairs = zip(run.plan, plan, strict=True)
    lines = [f'"{a}" there, "{b}" here' for a, b in pairs if a != b]
    there, here = run.config['quant'], model.config.quant
    lines[:0] = [
      f'quant.{name} is {there[name]!r} there, {here[name]!r} here'
      for name in model.method.same
      if name in there and there[name] != here[name]
    ]
  if lines:
    rest = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
    raise CheckpointError(
      f'{run.place} is of another model or other bits: {"; ".join(lines[:3])}'
      f'{rest}; leave --config out, so that its own counts, or use another '
      'workdir'
    )


def check_arrays(
  wanted: Mapping[str, Any], arrays: Mapping[str, Any], place: pathlib.Path
) -> None:
  """Raises CheckpointError where arrays are not those that a model wants.

  Args:
    wanted: {path: shape and type}.
    arrays: {path: array}.
    place: The file, for the message.
  """
  lines = tree.differences(
    {name: tree.describe(x) for name, x in wanted.items()},
    {name: tree.describe(x) for name, x in arrays.items()},
  )
  if lines:
    raise CheckpointError(
      f'{place} is of another model: {"; ".join(lines[:4])}; use the config '
      'it was trained with'
    )


def check_fresh(report: weights.Report, config: Any) -> None:
  """Raises WeightsError where what starts fresh would stay as it is drawn."""
  fresh = [f'params/{name}' for name in report.reinitialised]
  starts = tuple(f'{name}/' for name in config.train.trainable)
  still = [n for n in fresh if not f'{n}/'.startswith(starts)]
  if still:
    parts = dict.fromkeys('/'.join(name.split('/')[:2]) for name in still)
    raise WeightsError(
      f'weights {report.source} bring no {still[0].removeprefix("params/")}, '
      f'which train.trainable={tuple(config.train.trainable)} would leave '
      f'random; add {", ".join(map(repr, parts))} to it or give other weights'
    )


def compare_facts(report: weights.Report, config: Any) -> list[str]:
  """Returns a note for each thing that no tensor shows and that differs.

  Raises:
    WeightsError: The model would be another one.
  """
  facts, notes = report.facts, report.compare(models.architecture(config))
  _check_padding(report, config)
  for name in ('mean', 'std'):
    there, here = facts.get(name), list(config.data[name])
    if there is not None and not same_channels(there, here):
      notes.append(f'images had data.{name}={there} there, {here} here')
  there, here = facts.get('resize'), config.data.resize
  if there is not None and there != here:
    notes.append(f'images were resized by {there} there, {here} here')
  return notes


def same_channels(there: Sequence[float], here: Sequence[float]) -> bool:
  """Returns whether two means, or deviations, of channels are the same.

  A page may round them: a tenth of a step of 8 bits is nothing.
  """
  return len(there) == len(here) and np.allclose(there, here, rtol=0, atol=4e-4)


def _check_padding(report: weights.Report, config: Any) -> None:
  """Raises WeightsError unless it is known that a model pads as its weights.

  No tensor shows it, and with other zeros around images it is another model.
  """
  if 'model.padding' not in models.family(config).reads:
    return
  there, here = report.facts.get('padding'), config.model.padding
  if there is None and not here:
    raise WeightsError(
      f'weights {report.source} do not say how their model pads images, which '
      'no tensor shows; set --config.model.padding=torch if they were trained '
      'by PyTorch, or --config.model.padding=same if by TensorFlow'
    )
  here = models.architecture(config)['padding']
  if there not in (None, here):
    raise WeightsError(
      f'weights {report.source} are of a model with padding {there!r}, but '
      f'model.padding={here!r}; set --config.model.padding={there}'
    )


def check_base(experiment: Experiment, run: runs.Run) -> None:
  """Checks that adapters lie on the base that they were trained beside.

  Raises:
    CheckpointError: It is another one.
  """
  here, there = experiment.base_digest, run.facts['base']
  if here == there:
    return
  section = run.config
  source = section['weights']['path'] or section['checkpoint']['path']
  where = f'that came from {source}' if source else 'random from its seed'
  raise CheckpointError(
    f'{run.origin} holds adapters for the base {there} ({where}), but the base '
    f'here is {here}; give weights.path or checkpoint.path the one it was '
    'made for'
  )
