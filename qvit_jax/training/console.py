"""What a run tells a person: a progress bar, or plain lines."""

import time

import jax
import rich.console
import rich.progress

# Plain output says something at least this often while updates are slow.
_HEARTBEAT_SECONDS = 30
# What a line shows of the metrics it is given: (key, name, format).
_NUMBERS = (
  ('loss', 'loss', '.4f'),
  ('top1', 'top1', '.4f'),
  ('lr', 'lr', '.2e'),
  ('grad_norm', 'grad norm', '.3f'),
  ('loss_scale', 'loss scale', 'g'),
  ('skipped', 'skipped', 'd'),
)


class Console:
  """Prints lines, and a bar below them when the output is a terminal."""

  def __init__(self, total: int, done: int, batch: int):
    """Args: updates of the run, updates already done, images an update."""
    self._console = rich.console.Console(highlight=False, soft_wrap=True)
    self._total, self._first, self._done = total, done, done
    self._batch = batch
    self._started = self._spoke = time.monotonic()
    self._bar = None
    if self._console.is_terminal and jax.process_index() == 0:
      progress = rich.progress
      self._bar = progress.Progress(
        progress.TextColumn('{task.description}'),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn('{task.fields[numbers]}'),
        progress.TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task(
        'train', total=total, completed=done, numbers=''
      )

  def __enter__(self) -> 'Console':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *unused) -> None:
    if self._bar:
      self._bar.stop()

  def line(self, text: str) -> None:
    """Prints a line (on the first process only)."""
    self._spoke = time.monotonic()
    if jax.process_index() == 0:
      if self._bar:
        self._console.print(text, markup=False)
      else:
        print(text, flush=True)

  def step(self, done: int, loss: float, top1: float) -> None:
    """Moves the bar; `loss` and `top1` are those of the last batch read."""
    self._done = done
    silent = time.monotonic() - self._spoke
    if not self._bar and silent > _HEARTBEAT_SECONDS:
      self.line(f'step {done}/{self._total}  loss {loss:.4f}  top1 {top1:.3f}')
    if self._bar:
      seconds = time.monotonic() - self._started
      rate = (done - self._first) * self._batch / seconds
      self._bar.update(
          self._task, completed=done,
          numbers=f'{rate:.4g} images/s  loss {loss:.4f}  top1 {top1:.3f}',
      )  # fmt: skip

  def log(self, done: int, scalars: dict[str, float]) -> None:
    """Prints a line of training metrics; `done` counts skipped updates too."""
    self._done, left = done, '?'
    elapsed = time.monotonic() - self._started
    if self._done > self._first:
      per_step = elapsed / (self._done - self._first)
      left = _duration(per_step * (self._total - self._done))
    numbers = [
      f'{name} {scalars[key]:{form}}'
      for key, name, form in _NUMBERS
      if key in scalars
    ]
    numbers[1:1] = [
      f'{key.replace("_", " ")} {value:.4f}'
      for key, value in scalars.items()
      if key.endswith('_loss')
    ]
    self.line(
      f'step {self._done}/{self._total}  {"  ".join(numbers)}  '
      f'{scalars["images_per_second"]:.4g} images/s  ETA {left}'
    )


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'
