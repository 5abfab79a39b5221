"""What modes have in common: the workdir, printed lines, results."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qvit_jax import tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import (
  checks,
  features,
  in_engines,
  sources,
  statistics,
)
from qvit_jax.experiment import teacher as teacher_lib
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import folded
from qvit_jax.models import batch_norm
from qvit_jax.quantization import METHODS
from qvit_jax.report import rows as report
from qvit_jax.store import files, runs


def say(text: str) -> None:
  """Prints a line on the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[pathlib.Path]:
  """Opens the workdir and keeps other runs out (on the first process)."""
  place = files.open_workdir(workdir)
  is_first = jax.process_index() == 0
  with files.Lock(place) if is_first else contextlib.nullcontext():
    yield place


def header(mode: str, experiment: Experiment, workdir: pathlib.Path) -> None:
  """Prints what runs on what: mode, model, bits, data, devices, workdir."""
  devices = jax.devices()
  mesh = ' x '.join(f'{k}={v}' for k, v in experiment.mesh.shape.items())
  say(f'mode      {mode}')
  say(f'model     {experiment.model.title}')
  say(f'bits      {experiment.model.bits}')
  for line in experiment.model.adapter_lines():
    say(f'lora      {line}')
  say(f'data      {experiment.data.description}')
  for line in experiment.data.notes:
    say(f'data      {line}')
  say(
    f'devices   {len(devices)} x {devices[0].device_kind} ({mesh}), '
    f'{jax.process_count()} process(es)'
  )
  say(f'workdir   {workdir}')


def say_bad_files(experiment: Experiment) -> None:
  """Prints which files could not be read, if any."""
  for line in experiment.data.bad_files.lines():
    say(f'data      {line}')


def add_teacher(experiment: Experiment) -> None:
  """Loads the teacher that the config asks for and says what it is."""
  if experiment.config.train.teacher:
    experiment.teacher = teacher_lib.load_teacher(experiment)
    for line in experiment.teacher.lines:
      say(f'teacher   {line}')


def train_source(experiment: Experiment, variables: dict[str, Any]) -> Any:
  """Returns what training gathers from, on the devices.

  Images, or what a frozen backbone makes of them, as printed.
  """
  experiment.features, line = features.find(experiment)
  if line:
    say(f'features  {line}')
  if not experiment.features:
    return experiment.replicate(experiment.data.train.source)
  tell = lambda text: say(f'features  {text}')
  return experiment.features.compute(experiment, variables, tell)


def write_results(
  experiment: Experiment,
  place: pathlib.Path,
  metrics: dict[str, Any],
  name: str,
  *,
  ran: dict[str, Any] | None = None,
) -> None:
  """Writes results.json with the numbers of one evaluation.

  Args:
    experiment: What was evaluated.
    place: The workdir.
    metrics: Of `make_evaluator`.
    name: Of the row: which weights.
    ran: What is said of how they ran, if not by JAX.
  """
  if jax.process_index() != 0:
    return
  facts = experiment.model.row_facts()
  if experiment.model.packed:
    artifact = pathlib.Path(experiment.config.checkpoint.path)
    facts['artifact_bytes'] = artifact.stat().st_size
  facts |= ran or {'engine': in_engines.facts()}
  row = report.make_row(name=name, **facts, **metrics)
  resolved = config_lib.to_json(experiment.config)
  files.write_json(place / 'results.json', report.results(resolved, row, []))


def check_float(mode: str, config: Any) -> None:
  """Raises ConfigError where a mode cannot start from a float model."""
  if runs.kind_of(config.checkpoint.path) == 'packed':
    raise ConfigError(
      f'checkpoint.path={config.checkpoint.path!r} is already quantized; give '
      'the workdir of a float run, or evaluate the file with --mode=eval '
      '--config.quant.recipe=ptq'
    )
  if METHODS[config.quant.recipe].quantizes:
    raise ConfigError(
      f'--mode={mode} starts from a float model, but quant.recipe is '
      f'{config.quant.recipe!r}; set --config.quant.recipe=none'
    )
  for field in ('checkpoint', 'weights'):
    checks.check_float_run(f'{field}.path', config[field].path)


def float_model(
  experiment: Experiment, place: pathlib.Path
) -> tuple[Experiment, dict[str, np.ndarray]]:
  """Returns what is quantized after training, and its parameters by path.

  Says whence they are. Norms that can be are folded into kernels and biases:
  the experiment is then one of a model without them, on the same data.
  """
  variables, origin = sources.evaluated(experiment, place)
  for line in origin:
    say(f'start     {line}')
  params = statistics.folded_params(experiment.config, variables)
  if names := batch_norm.norms(tree.flatten(variables)):
    say(f'fold      {len(names)} norms into kernels and biases')
    experiment = Experiment(
      folded(experiment.config), training=False, data=experiment.data
    )
  return experiment, params
