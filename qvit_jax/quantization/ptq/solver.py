"""What the rest of post-training quantization knows of a solver: one record."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from qvit_jax.quantization.ptq.calibrate import SiteStats

Params = dict[str, np.ndarray]
Observe = Callable[[], Mapping[str, SiteStats]]


@dataclasses.dataclass(frozen=True)
class Solver:
  """A step of a row, which its name asks for after a plus sign.

  Attributes:
    transform: (parameters, residual stream or pairs of layers, gives the
      statistics of these parameters, seed) -> parameters of the same function
      that are easier to round; None: it does something else.
    rounds: (kernel [i, o], X^T X of its inputs, scales [i, o], bits=) ->
      symmetric codes.
    softmax: Codes of attention weights, a key of `softmax_codes.LEVELS`.
    reads_means: Whether it reads what inputs are in the mean.
    needs_stream: Whether it needs an `ops.Stream`.
    needs_pairs: Whether it needs `ops.Pair`s, and is handed these.
    needs_acts: Whether it is for rounded activations alone.
  """

  transform: Callable[[Params, Any, Observe, int], Params] | None = None
  rounds: Callable[..., Array | Any] | None = None
  softmax: str = ''
  reads_means: bool = False
  needs_stream: bool = False
  needs_pairs: bool = False
  needs_acts: bool = False


def watched(observe: Observe) -> dict[str, SiteStats]:
  """Returns the statistics of the layers, channel by channel."""
  return {
    name: stats
    for name, stats in observe().items()
    if stats.channel_low is not None
  }
