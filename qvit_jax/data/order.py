"""Which example is read when: a pure function of (seed, step).

Training reads an endless row of examples; number i is the (i mod N)-th of a
fresh permutation of the data set for every epoch i // N. Update `step`
(counted from 1) reads numbers (step - 1) * batch .. step * batch, so a resumed
run needs no iterator state.
"""

import numpy as np


class Order:
  """Maps the numbers of the endless row to indices of the data set."""

  def __init__(self, seed: int, size: int):
    """Args: seed >= 0 of the permutations; size of the data set."""
    self._seed, self._size = seed, size
    self._epochs: dict[int, np.ndarray] = {}

  def __call__(self, numbers: np.ndarray) -> np.ndarray:
    """Returns int32 indices for the given int64 numbers."""
    epochs, positions = np.divmod(numbers, self._size)
    out = np.empty(numbers.shape, np.int32)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      out[here] = self._permutation(int(epoch))[positions[here]]
    return out

  def at(self, number: int) -> int:
    """Returns the index for one number."""
    epoch, position = divmod(number, self._size)
    return int(self._permutation(epoch)[position])

  def _permutation(self, epoch: int) -> np.ndarray:
    known = self._epochs
    if epoch in known:
      return known[epoch]
    # RandomState, because NumPy promises that its stream never changes.
    bits = np.random.MT19937(np.random.SeedSequence((self._seed, epoch)))
    order = np.random.RandomState(bits).permutation(self._size).astype(np.int32)
    # Two are kept, because a batch touches two epochs at the edge. A new dict
    # takes the old one's place in one step: loader threads share this object.
    self._epochs = dict([*known.items(), (epoch, order)][-2:])
    return order


def numbers_of(step: int, batch: int, rows: slice) -> np.ndarray:
  """Returns the numbers that update `step` reads, cut to this process' rows."""
  first = (step - 1) * batch
  return np.arange(first + rows.start, first + rows.stop, dtype=np.int64)
