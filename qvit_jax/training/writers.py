"""Where metrics go: metrics.jsonl, and TensorBoard through CLU.

Both have the interface of CLU's MetricWriter. CLU imports TensorFlow, which
takes seconds and would take the GPU; that happens here alone and only when
TensorBoard files are asked for.
"""

import json
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from qvit_jax.errors import ConfigError


class JsonlWriter:
  """Appends one JSON object a line: the source of truth of a run."""

  def __init__(self, path: pathlib.Path, *, resume_step: int):
    """Opens the file and drops what lies beyond the restored step.

    Args:
      path: metrics.jsonl.
      resume_step: Updates done; a killed run may have logged later ones.
    """
    kept = []
    if path.exists():
      for line in path.read_text('utf-8', 'replace').splitlines():
        try:
          if json.loads(line)['step'] <= resume_step:
            kept.append(line + '\n')
        except (ValueError, KeyError, TypeError):
          continue  # the line that was being written when the run was killed
    temporary = path.with_name(f'.{path.name}')
    temporary.write_text(''.join(kept), encoding='utf-8')
    temporary.replace(path)
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Appends {'step', 'split', name: value}; names are 'split/name'."""
    splits: dict[str, dict[str, Any]] = {}
    for name, value in scalars.items():
      split, _, key = name.partition('/')
      splits.setdefault(split, {'step': step, 'split': split})[key] = value
    for row in splits.values():
      self._file.write(json.dumps(row) + '\n')
    self._file.flush()

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Does nothing: images go to TensorBoard."""

  def write_histograms(
    self, step: int, arrays: Mapping[str, Any], num_buckets: Any = None
  ) -> None:
    """Does nothing: histograms go to TensorBoard."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Does nothing: the config is in config.json."""

  def flush(self) -> None:
    """Writes out what is buffered."""
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class WandbWriter:
  """Hands on to Weights & Biases, with the interface of CLU's MetricWriter."""

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
    """Starts its run, or goes on with that of the workdir.

    Args:
      workdir: Of the run; its files lie in `wandb` there.
      config: The resolved config, as JSON.

    Raises:
      ConfigError: The package is not installed, or does not start.
    """
    try:
      import wandb
    except ImportError as error:
      raise ConfigError(
        "log.tracker='wandb' needs the package wandb, which is not installed; "
        'run pip install -r requirements-wandb.txt, or leave log.tracker out'
      ) from error
    self._wandb, path = wandb, workdir / 'wandb.json'
    if path.is_file():
      name = json.loads(path.read_text(encoding='utf-8'))['id']
    else:
      name = secrets.token_hex(4)
      path.write_text(json.dumps({'id': name}) + '\n', encoding='utf-8')
    try:
      self._run = wandb.init(
        project='qvit_jax', name=workdir.name, id=name, resume='allow',
        dir=str(workdir), config=dict(config),
        settings=wandb.Settings(silent=True),
      )  # fmt: skip
    except (wandb.Error, OSError) as error:
      raise ConfigError(
        f'wandb does not start ({" ".join(str(error).split())[:200]}); log in '
        'with `wandb login`, set WANDB_MODE=offline, or leave log.tracker out'
      ) from error

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Logs numbers under their names, 'split/name'."""
    self._run.log(dict(scalars), step=step)

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Logs images, uint8 [1, h, w, 3]."""
    found = {name: self._wandb.Image(x[0]) for name, x in images.items()}
    self._run.log(found, step=step)

  def write_histograms(
    self, step: int, arrays: Mapping[str, Any], num_buckets: Any = None
  ) -> None:
    """Does nothing: histograms go to TensorBoard."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Does nothing: the config is handed over at the start."""

  def flush(self) -> None:
    """Does nothing: a process of its own writes."""

  def close(self) -> None:
    """Ends the run there until it is resumed."""
    self._run.finish()


class Writers:
  """All writers of a run as one."""

  def __init__(self, writers: list[Any], *, takes_images: bool = False):
    """Takes them.

    Args:
      writers: With the interface of CLU's MetricWriter.
      takes_images: Whether one of them keeps images.
    """
    self._writers, self.takes_images = writers, takes_images

  def __getattr__(self, name: str):
    """Forwards a call to each writer."""

    def forward(*args, **kwargs):
      for writer in self._writers:
        try:
          getattr(writer, name)(*args, **kwargs)
        except Exception as error:
          _raise_if_from_tensorflow(error)
          raise

    return forward


def _raise_if_from_tensorflow(error: Exception) -> None:
  """Raises a ConfigError for an error of TensorFlow's file system."""
  if type(error).__module__.startswith('tensorflow'):
    raise ConfigError(
      f'TensorBoard events cannot be written ({str(error).splitlines()[0]}); '
      'free some space or set --config.log.tensorboard=false'
    ) from error


def open_writers(
  workdir: pathlib.Path, config: Mapping[str, Any], *, resume_step: int
) -> tuple[Writers, str]:
  """Returns the writers of a run and one line that says where they write.

  Args:
    workdir: Of the run.
    config: Resolved, as JSON; its section `log` says which.
    resume_step: Updates done.

  Raises:
    ConfigError: A tracker is not there.
  """
  log, writers = config['log'], []
  if log['tracker'] == 'wandb':
    writers.append(WandbWriter(workdir, config))
  more = ', wandb' if writers else ''
  writers.insert(
    0, JsonlWriter(workdir / 'metrics.jsonl', resume_step=resume_step)
  )
  if not log['tensorboard']:
    return Writers(writers, takes_images=bool(more)), (
      f'metrics.jsonl{more} (log.tensorboard is off)'
    )
  try:
    import tensorflow as tf
    from clu.metric_writers import summary_writer
  except ImportError as error:
    return Writers(writers, takes_images=bool(more)), (
      f'metrics.jsonl{more}; no TensorBoard events, {error.name} is not '
      'installed'
    )
  tf.config.set_visible_devices([], 'GPU')  # or TensorFlow takes its memory
  try:
    events = summary_writer.SummaryWriter(str(workdir / 'tensorboard'))
  except Exception as error:
    _raise_if_from_tensorflow(error)
    raise
  writers.append(events)
  where = f'metrics.jsonl, tensorboard/{more}'
  return Writers(writers, takes_images=True), where
