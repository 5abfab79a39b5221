"""What `--mode=train` does from the first line to the last."""

import functools
import json
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils

from qvit_jax.config import resolve as config_lib
from qvit_jax.data import Data
from qvit_jax.experiment import first_state, sources, statistics
from qvit_jax.experiment.experiment import Experiment, schedule_line
from qvit_jax.modes import MODES, session
from qvit_jax.modes.session import say
from qvit_jax.report import figures
from qvit_jax.store import adapters, files, runs
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training import ends, loop
from qvit_jax.training.console import Console
from qvit_jax.training.writers import Writers, open_writers


def train(config: Any, workdir: str, *, data: Data | None = None) -> None:
  """Trains, evaluates and saves; goes on where the workdir stopped.

  Args:
    config: A validated config.
    workdir: Where to write.
    data: An opened data set; by default the config's is opened.
  """
  with session.opened(workdir) as place:
    experiment = Experiment(config, training=True, data=data)
    session.header('train', experiment, place)
    size = experiment.data.train.size
    say(f'schedule  {schedule_line(experiment.config, size)}')
    if config.train.stages:
      say(f'stages    {", ".join(map(str, experiment.stages))}')
    for line in experiment.model.trained_lines():
      say(f'trained   {line}')
    for line in experiment.precision_lines():
      say(f'precision {line}')
    for line in experiment.model.statistics_lines():
      say(f'norms     {line}')
    for line in experiment.whole:
      say(f'sharding  {line}')
    checkpoints = Checkpoints(place / 'checkpoints', writer=True)
    if jax.process_count() > 1:  # nobody reads before the first has tidied up
      multihost_utils.sync_global_devices('checkpoints')
    if experiment.model.frozen and checkpoints.latest() is None:
      adapters.check_free(config, place)
    state, progress, origin = first_state.initial_state(
      experiment, checkpoints, is_read=is_read
    )
    for line in origin:
      say(f'start     {line}')
    session.add_teacher(experiment)
    first_state.check_teacher(experiment, progress)
    if jax.process_index() == 0:
      resolved = config_lib.to_json(experiment.config)
      files.write_json(place / 'config.json', resolved)
    progress = _train(experiment, place, checkpoints, state, progress)
    session.write_results(
      experiment, place, progress.best, f'step {progress.best_step}'
    )
    session.say_bad_files(experiment)
    if experiment.model.frozen:
      _write_adapter(experiment, place)
    say(
      f'best top1 {progress.best["top1"]:.4f} at step {progress.best_step}; '
      f'results in {place / "results.json"}'
    )


def is_read(field: str) -> bool:
  """Returns whether a field counts here: of others no change is told."""
  return not MODES['train'].ignores_field(field)


def _train(experiment, place, checkpoints, state, progress) -> loop.Progress:
  """Runs the loop; returns its progress."""
  config, total = experiment.config, experiment.total_steps
  done = int(state.step)
  if jax.process_index() == 0:
    writers, where = open_writers(
      place, config_lib.to_json(config), resume_step=done
    )
    say(f'metrics   {where}')
    writers.write_texts(
      done, {'config': json.dumps(config_lib.to_json(config))}
    )
  else:
    writers = Writers([])
  source = None  # where no step is left to do
  # An evaluation that is still to be made up for may be a new best.
  stale = progress.stale if progress.evaluated_step == done else 0
  if not ends.why_over(config.train, done=done, total=total, stale=stale):
    source = session.train_source(experiment, state.variables)

  def make_step(number, state, batch):
    stage = next(s for s in experiment.stages if number <= s.last)
    if config.train.stages:
      say(stage.line)
    say('compiling the train step ...')
    step, seconds = experiment.compile_train_step(
      state, source, batch, stage=stage.name
    )
    say(f'compiled in {seconds:.1f} s')
    given = experiment.given
    return lambda state, batch: step(state, source, batch, given), stage.last

  parts = loop.Parts(
    config=config,
    total_steps=total,
    steps_per_epoch=experiment.steps_per_epoch,
    make_step=make_step,
    train_batches=experiment.train_batches,
    evaluate=experiment.make_evaluator(),
    schedule=experiment.schedule,
    metadata=experiment.metadata(),
    draw_confusion=functools.partial(
      figures.confusion_pixels, names=experiment.data.class_names
    ),
    tick=experiment.tick,
    kept=experiment.model.kept,
    learned=experiment.learned,
    finish=statistics.make_finish(experiment),
  )
  trainer = loop.Trainer(
      parts, state, progress, checkpoints=checkpoints, writers=writers,
      console=Console(total, done, config.train.batch_size),
  )  # fmt: skip
  try:
    return trainer.run()
  finally:
    writers.close()


def _write_adapter(experiment: Experiment, place: pathlib.Path) -> None:
  """Writes the best adapters of a run into a file of their own."""
  run = runs.open_run(place)
  trained = sources.trained(experiment, run)
  whole = jax.jit(lambda x: x, out_shardings=experiment.whole_sharding)
  trained = whole(trained)
  if jax.process_index() == 0:
    path = adapters.path_of(experiment.config, place)
    size = adapters.save(path, trained, run.facts)
    say(f'adapters of step {run.step}: {size:,} bytes in {path}')
