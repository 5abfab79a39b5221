"""The training loop: update, log, evaluate, save, stop.

It is handed compiled functions and batches and knows neither model nor recipe
nor data source.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from qvit_jax import tree
from qvit_jax.errors import DivergedError, Preempted
from qvit_jax.evaluation import devices
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training import ends
from qvit_jax.training.console import Console
from qvit_jax.training.signals import StopFlag
from qvit_jax.training.state import TrainState
from qvit_jax.training.step import SCALING, TICK
from qvit_jax.training.writers import Writers


@dataclasses.dataclass
class Progress:
  """What a run remembers besides its arrays; saved as JSON.

  Attributes:
    window: Sums of the ticks since the last log line, so that a resumed run
      writes the same line.
    window_names: What they are sums of.
    window_size: How many ticks they hold.
    skipped: Updates skipped so far, because float16 overflowed.
    best_step: Step of the best evaluation so far.
    best: All metrics of that evaluation.
    stale: Evaluations since then.
    evaluated_step: Step of the last evaluation.
    finished_step: Step after which `Parts.finish` was done; 0: not yet.
    teacher: What `Teacher.identity` said; {} without a teacher.
  """

  window: list[float] = dataclasses.field(
    default_factory=lambda: [0.0] * len(TICK)
  )
  window_names: list[str] = dataclasses.field(
    default_factory=lambda: list(TICK)
  )
  window_size: int = 0
  skipped: int = 0
  best_step: int | None = None
  best: dict[str, Any] | None = None
  stale: int = 0
  evaluated_step: int = 0
  finished_step: int = 0
  teacher: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Parts:
  """What the loop works with.

  Attributes:
    config: The whole config; `train`, `eval`, `log`, `checkpoint` are read.
    total_steps: Updates of the whole run.
    steps_per_epoch: Updates of one pass over the training split.
    make_step: (number of the next update, state, batch) -> the compiled
      update, (state, batch) -> (state, tick), and the last one it is for.
    train_batches: (first, last) -> placed batches of these updates.
    evaluate: (variables, poll) -> metrics.
    schedule: Learning rate by updates done before.
    metadata: What is saved with every checkpoint.
    draw_confusion: Counts [classes, classes] -> uint8 [1, h, w, 3].
    tick: Names of the numbers that a step reports.
    kept: variables -> what of them a checkpoint holds.
    learned: Paths of what is trained beside parameters.
    finish: What becomes of the state after the last update, before it is
      evaluated: (state) -> (state, a line about it). None: nothing.
  """

  config: Any
  total_steps: int
  steps_per_epoch: int
  make_step: Callable[[int, TrainState, Any], tuple[Callable, int]]
  train_batches: Callable[[int, int], Generator[Any, None, None]]
  evaluate: Callable[[Any, Callable[[], None]], dict[str, Any]]
  schedule: Callable[[int], Any]
  metadata: dict[str, Any]
  draw_confusion: Callable[[Any], Any]
  tick: tuple[str, ...] = TICK
  kept: Callable[[Any], Any] = lambda variables: variables
  learned: tuple[str, ...] = ()
  finish: Callable[[TrainState], tuple[TrainState, str]] | None = None


class _Interrupted(Exception):  # noqa: N818 - control flow, never leaves here
  """A signal came during an evaluation."""


class Trainer:
  """One run from its first or restored state to its end."""

  def __init__(
    self,
    parts: Parts,
    state: TrainState,
    progress: Progress,
    *,
    checkpoints: Checkpoints,
    writers: Writers,
    console: Console,
  ):
    """Takes over `state`, whose arrays the updates donate."""
    self.parts, self.state, self.progress = parts, state, progress
    self._checkpoints, self._writers = checkpoints, writers
    self._console, self._flag = console, StopFlag()
    self._done = int(state.step)
    self._saved = self._done
    self._max_in_flight = devices.max_in_flight()
    self._pending: collections.deque = collections.deque()
    self._clock = time.monotonic()
    self._clocked = self._done  # updates done when the clock was started
    config = parts.config
    self._eval_every = config.eval.every or parts.steps_per_epoch
    if progress.window_names != list(parts.tick):  # new, or other losses
      progress.window_names = list(parts.tick)
      self._clear_window()

  def run(self) -> Progress:
    """Trains to the end and returns the progress.

    Raises:
      DivergedError: Loss or gradient is not finite, and no loss scale from 1
        up makes the gradient finite.
      Preempted: A signal came; the state is saved.
      CheckpointError: The disk took no checkpoint.
    """
    with self._flag, self._console:
      try:
        self._run()
      except _Interrupted:
        self._stop()
      finally:
        self._writers.flush()
      self._checkpoints.close()
    return self.progress

  def _run(self) -> None:
    total = self.parts.total_steps
    self._maintain()  # an evaluation that a signal cut short is made up for
    over = ends.why_over(
      self.parts.config.train,
      done=self._done,
      total=total,
      stale=self.progress.stale,
    )
    if over:
      self._console.line(over)
      return
    step, last = None, self._done
    batches = self.parts.train_batches(self._done + 1, total)
    with contextlib.closing(batches):  # workers end with the training
      for batch in batches:
        if self._done == last:
          self._drain()
          step, last = self.parts.make_step(self._done + 1, self.state, batch)
          self._restart_clock()  # compiling is not training
        self.state, tick = step(self.state, batch)
        self._done += 1
        self._pending.append((self._done, tick))
        if self._saved == self._done - 1:
          self._finish_saving()
        while len(self._pending) >= self._max_in_flight:
          self._read_tick()
        if self._is_log_step(self._done):
          self._drain()  # so that the line's rate is that of finished updates
        stop = self._flag.agreed()
        self._maintain()
        if stop:
          self._stop()
        train, stale = self.parts.config.train, self.progress.stale
        if self._done < total and ends.is_stale(train, stale):
          if self._saved != self._done:
            self._save()
          self._console.line(ends.early_stop(self._done, stale))
          if self.parts.finish:
            self._console.line(ends.UNFINISHED)
          return

  def _maintain(self) -> None:
    """Evaluates and saves if this step is one for it."""
    every = self.parts.config.checkpoint.every
    last = self._done >= self.parts.total_steps
    evaluate = self._done and (last or self._done % self._eval_every == 0)
    evaluate = evaluate and self.progress.evaluated_step != self._done
    if evaluate and last and self.parts.finish:
      self._finish(self.parts.finish)
    is_new_best = evaluate and self._evaluate()
    save = bool(every) and self._done % every == 0 and self._saved != self._done
    if save or is_new_best or (evaluate and (last or not every)):
      self._save()

  def _finish(self, finish: Callable) -> None:
    """Does what comes after the last update, once."""
    if self.progress.finished_step == self._done:
      return  # a signal cut the evaluation short
    self._drain()
    self.state, line = finish(self.state)
    self.progress.finished_step = self._done
    self._console.line(line)

  def _read_tick(self) -> None:
    """Waits for the oldest update in flight and books its numbers."""
    step, tick = self._pending.popleft()
    values = np.asarray(tick).tolist()
    if self.parts.learned:
      *values, broken = values
      if broken >= 0:  # the next update would break all the others
        path = self.parts.learned[int(broken)]
        raise self._diverged(f'{path} is not finite', step)
    count = len(self.parts.tick)
    values, scaling = values[:count], values[count:]
    scaling = dict(zip(SCALING, scaling, strict=True)) if scaling else {}
    if scaling.get('skipped'):
      self._skip(step, scaling['loss_scale'])
    else:
      self._book(step, values)
    if self._is_log_step(step):
      if scaling:
        scaling['skipped'] = self.progress.skipped
      self._log(step, scaling)

  def _skip(self, step: int, scale: float) -> None:
    self.progress.skipped += 1
    if scale < 1:
      raise self._diverged(
        f'gradients overflow float16 although the loss scale fell to {scale:g} '
        '(bfloat16 has the range of float32)',
        step,
      )

  def _book(self, step: int, values: list[float]) -> None:
    for name, value in zip(self.parts.tick, values, strict=True):
      if not np.isfinite(value):
        raise self._diverged(f'{name} is {value}', step)
    window = self.progress.window
    self.progress.window = [a + b for a, b in zip(window, values, strict=True)]
    self.progress.window_size += 1
    self._console.step(step, values[0], values[1])

  def _is_log_step(self, step: int) -> bool:
    every, last = self.parts.config.log.every, self.parts.total_steps
    return step % every == 0 or step == last

  def _diverged(self, what: str, step: int) -> DivergedError:
    self._checkpoints.close()  # what is being written is still good
    latest = self._checkpoints.latest()
    kept = 'no checkpoint was written yet'
    if latest is not None:
      kept = f'the checkpoint of step {latest} is kept'
    variables = self.state.variables
    broken, where = tree.not_finite(variables), ''
    if broken and step == self._done:  # later updates spread it to all arrays
      count = len(jax.tree.leaves(variables))
      where = f' (not finite: {broken[0]}, {len(broken)} of {count} arrays)'
    return DivergedError(
      f'{what} at step {step}{where}; {kept}. Lower optim.lr, lengthen the '
      'warm-up or set optim.clip_norm'
    )

  def _log(self, step: int, scaling: dict[str, float]) -> None:
    progress = self.progress
    means = {}
    if progress.window_size:  # else every update was skipped
      means = {
        name: total / progress.window_size
        for name, total in zip(self.parts.tick, progress.window, strict=True)
      }
    images = (step - self._clocked) * self.parts.config.train.batch_size
    seconds = time.monotonic() - self._clock
    # A skipped update leaves the optimizer and its schedule where they were.
    applied = max(step - progress.skipped, 1)
    scalars = means | {
      'lr': float(self.parts.schedule(applied - 1)),
      'images_per_second': images / seconds,
    }
    scalars |= scaling
    self._writers.write_scalars(
      step, {f'train/{name}': value for name, value in scalars.items()}
    )
    self._console.log(step, scalars)
    self._clear_window()
    self._restart_clock(step)

  def _clear_window(self) -> None:
    progress = self.progress
    progress.window, progress.window_size = [0.0] * len(self.parts.tick), 0

  def _restart_clock(self, step: int | None = None) -> None:
    self._clock = time.monotonic()
    self._clocked = self._done if step is None else step

  def _drain(self) -> None:
    while self._pending:
      self._read_tick()

  def _evaluate(self) -> bool:
    """Evaluates; returns whether it is the best so far."""
    self._drain()
    started = time.monotonic()
    metrics = self.parts.evaluate(self.state.evaluated, self._poll)
    if not np.isfinite(metrics['loss']):
      what = f'the evaluation loss is {metrics["loss"]}'
      raise self._diverged(what, self._done)
    seconds = time.monotonic() - started
    progress = self.progress
    best = progress.best['top1'] if progress.best else -1.0
    is_best = metrics['top1'] >= best
    progress.stale = 0 if metrics['top1'] > best else progress.stale + 1
    if is_best:
      progress.best, progress.best_step = metrics, self._done
    progress.evaluated_step = self._done
    self._write_evaluation(metrics, seconds)
    self._clock += time.monotonic() - started  # evaluation is not training
    return is_best

  def _write_evaluation(self, metrics: dict[str, Any], seconds: float) -> None:
    names = ('loss', 'top1', 'top5', 'f1_macro')
    scalars = {f'eval/{name}': metrics[name] for name in names}
    rate = metrics['num_examples'] / seconds
    self._writers.write_scalars(
      self._done, scalars | {'eval/images_per_second': rate}
    )
    if self._writers.takes_images:
      image = self.parts.draw_confusion(metrics['confusion'])
      self._writers.write_images(self._done, {'eval/confusion': image})
    if self.parts.config.log.histograms:
      self._writers.write_histograms(self._done, self._kernels())
    self._console.line(
      f'evaluation at step {self._done}: '
      + '  '.join(f'{name} {metrics[name]:.4f}' for name in names)
      + f'  ({metrics["num_examples"]} images, {rate:.4g} images/s)'
    )

  def _kernels(self) -> dict[str, np.ndarray]:
    return {
      path: np.asarray(leaf)
      for path, leaf in tree.flatten(self.state.variables).items()
      if path.endswith('kernel') and leaf.is_fully_addressable
    }

  def _poll(self) -> None:
    # With several processes all would have to leave the evaluation together.
    if self._flag.received and jax.process_count() == 1:
      raise _Interrupted

  def _save(self) -> None:
    self._drain()
    started = time.monotonic()
    state = self.state
    # The last update may have overflowed although its gradient was finite.
    if not tree.all_finite(state.variables):
      raise self._diverged('a variable is not finite', self._done)
    self._checkpoints.save(
      self._done,
      {
        'variables': self.parts.kept(state.variables),
        'ema': state.ema,
        'training': {'step': state.step, 'opt_state': state.opt_state},
      },
      self.parts.metadata
      | {'step': self._done, 'progress': dataclasses.asdict(self.progress)},
      best_step=self.progress.best_step,
    )
    self._saved = self._done
    self._clock += time.monotonic() - started

  def _finish_saving(self) -> None:
    # One update runs while a checkpoint is written, not more: a kill costs no
    # more than what came after the newest one, which is one interval.
    started = time.monotonic()
    self._checkpoints.wait()
    self._clock += time.monotonic() - started

  def _stop(self) -> None:
    if self._saved != self._done:
      self._save()
    self._checkpoints.close()
    raise Preempted(
      f'stopped by {self._flag.received or "another process"} after step '
      f'{self._done}; everything is saved'
    )
