"""Batches that worker processes make, which end with the training."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags

from qvit_jax.errors import DataError

Batch = dict[str, np.ndarray]

# What stops a training; it reaches the workers too where it is sent to the
# whole process group, as by Ctrl-C and by batch systems.
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_GRACE = 60  # seconds that a worker goes on after SIGTERM


def load(
  make: Callable[[int], Batch], *, steps: int, workers: int
) -> Iterator[Batch]:
  """Yields make(0) .. make(steps - 1), in turns by so many processes.

  Raises:
    DataError: One of them was killed.
  """
  if not flags.FLAGS.is_parsed():  # grain has flags of its own
    flags.FLAGS.mark_as_parsed()
  # A whole batch is one element: grain's cost an element is that of a tenth
  # of a small image.
  loader = (
    grain.MapDataset.range(steps)
    .map(make)
    .to_iter_dataset(grain.ReadOptions(num_threads=0))
  )
  options = grain.MultiprocessingOptions(num_workers=workers)
  batches, loaded = iter(loader.mp_prefetch(options, _begin)), None
  try:
    with _held_signals():  # inherited by the processes that this starts
      loaded = next(batches, None)
    while loaded is not None:
      # Copied, because JAX would keep the workers' shared memory in use.
      yield {name: np.array(value) for name, value in loaded.items()}
      loaded = next(batches, None)
  except RuntimeError as error:
    if not str(error).startswith('Worker process was terminated'):
      raise
    raise DataError(
      f'one of data.workers={workers} processes was killed, as happens where '
      'memory or /dev/shm is full; give more of it, or lower '
      '--config.data.workers (0 = threads), and run the same command again'
    ) from error
  finally:
    batches.close()
    # grain's iterators refer to each other; until they are collected, shared
    # memory is left over, of which Python warns at exit.
    del batches, loaded
    gc.collect()


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
  """Holds signals back from this thread and those that it starts."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(index: int, count: int) -> None:
  """Prepares a worker process.

  The training that is asked to stop needs batches until it has saved, and
  closes its workers then. One that is killed closes nothing: its workers see
  to that themselves.
  """
  del index, count
  for number in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *unused: signal.alarm(_GRACE))
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)
