"""What the cores can decode at all: Pillow in a loop, nothing else.

The measure of the loader, which also shuffles, resizes and stacks.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qvit_jax.data.decode import FORMATS


def _decode(paths: Sequence[str]) -> tuple[float, float]:
  """Decodes files; returns when that began and ended."""
  started = time.time()
  for path in paths:
    try:
      with Image.open(path, formats=FORMATS) as image:
        np.asarray(image.convert('RGB'))
    except Exception:  # noqa: BLE001 - parsers raise whatever they meet
      continue  # the loader has named it
  return started, time.time()


class BareLoop:
  """A process for each core, which decode their shares. Use it as a context."""

  def __init__(self):
    """Starts the processes and waits until they are up."""
    self.cores = len(os.sched_getaffinity(0))
    # Spawned: a fork would copy the locks of JAX's threads.
    context = multiprocessing.get_context('spawn')
    self._pool = context.Pool(self.cores)
    self._pool.map(_decode, [[]] * (4 * self.cores), chunksize=1)

  def __enter__(self) -> 'BareLoop':
    return self

  def __exit__(self, *unused) -> None:
    self._pool.terminate()
    self._pool.join()

  def seconds(self, paths: Sequence[str]) -> float:
    """Returns how long all of them took together."""
    shares = [paths[i :: self.cores] for i in range(self.cores)]
    spans = self._pool.map(_decode, shares, chunksize=1)
    return max(end for _, end in spans) - min(start for start, _ in spans)
