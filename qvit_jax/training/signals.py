"""Signals that ask a run to save and stop.

The handler only raises a flag, which the loop reads between two updates:
saving inside a handler would run in the middle of another save.
"""

import os
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
  """Context in which the signals set a flag; a second one exits at once."""

  def __init__(self):
    """Starts with no signal seen."""
    self.received: str | None = None
    self._before = {}

  def __enter__(self) -> 'StopFlag':
    for number in SIGNALS:
      before = signal.signal(number, self._handle)
      self._before[number] = before
      # One that came earlier and did not stop us; see main.py.
      self.received = self.received or getattr(before, 'received', None)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame) -> None:
    if self.received:
      os._exit(128 + number)
    self.received = signal.Signals(number).name

  def agreed(self) -> bool:
    """Returns True on every process once any of them has seen a signal."""
    if jax.process_count() == 1:
      return self.received is not None
    flags = multihost_utils.process_allgather(
      np.asarray(self.received is not None)
    )
    return bool(flags.any())
