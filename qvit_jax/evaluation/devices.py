"""What the devices at hand allow."""

import jax

MOST_IN_FLIGHT = 2


def max_in_flight() -> int:
  """Returns how many programs may wait for the devices at once.

  Two hide the host's work, and a signal is answered within a step or two.
  Several CPU devices share one pool of threads, in which the collectives of
  two programs can wait for each other for ever: there it is one.
  """
  shared = jax.default_backend() == 'cpu' and jax.local_device_count() > 1
  return 1 if shared else MOST_IN_FLIGHT
