"""What modes have in common: the workdir, printed lines, results. Row 13."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from qvit_jax import config as config_lib
from qvit_jax import files
from qvit_jax import teacher as teacher_lib
from qvit_jax.evaluation import report
from qvit_jax.experiment import Experiment


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


def write_results(
  experiment: Experiment,
  place: pathlib.Path,
  metrics: dict[str, Any],
  name: str,
) -> None:
  """Writes results.json with the numbers of one evaluation.

  Args:
    experiment: What was evaluated.
    place: The workdir.
    metrics: Of `make_evaluator`.
    name: Of the row: which weights.
  """
  if jax.process_index() != 0:
    return
  facts = experiment.model.row_facts()
  if experiment.model.packed:
    artifact = pathlib.Path(experiment.config.checkpoint.path)
    facts['artifact_bytes'] = artifact.stat().st_size
  row = report.make_row(name=name, **facts, **metrics)
  resolved = config_lib.to_json(experiment.config)
  files.write_json(place / 'results.json', report.results(resolved, row, []))
