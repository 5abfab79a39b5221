"""Signals that ask a run to save and stop.

The handler only raises a flag, which the loop reads between two updates:
saving inside a handler would run in the middle of another save.
"""

import os
import signal

import jax

from qvit_jax.evaluation import devices
from qvit_jax.training import processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
  """Context in which the signals set a flag; a second one exits at once."""

  def __init__(self):
    """Starts with no signal seen."""
    self.received: str | None = None
    self._before = {}
    self._updates = 0

  def __enter__(self) -> 'StopFlag':
    for number in SIGNALS:
      before = signal.signal(number, self._handle)
      self._before[number] = before
      # One that came earlier and did not stop us; see `api/cli.py`.
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
    """Returns True on every process once any of them has seen a signal.

    Call it after every update. No process waits for another: JAX has
    `multihost_utils.reached_preemption_sync_point` for that, but it asks the
    service every time and hears of SIGTERM alone, by a handler of its own.
    """
    if jax.process_count() == 1:
      return self.received is not None
    self._updates += 1
    if self._updates % devices.MOST_IN_FLIGHT:
      return False
    return processes.stop_agreed(
      self._updates, self.received is not None, devices.MOST_IN_FLIGHT
    )
