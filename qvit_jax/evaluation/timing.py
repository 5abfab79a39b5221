"""Times of functions beside each other in one process.

Machines are shared and drift, so the candidates take turns: every round times
each of them once, and a ratio is formed within a round before the median is
taken over rounds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

# Dense bf16 peaks in FLOP/s, from the makers' data sheets, by device kind.
_PEAK_FLOPS = {
  'NVIDIA A100': 312e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
}


_SHORT = 0.02  # seconds of a call


def peak_flops() -> float | None:
  """Returns the bf16 peak of all devices in FLOP/s, or None if unknown."""
  kind = jax.devices()[0].device_kind
  hits = [name for name in _PEAK_FLOPS if kind.startswith(name)]
  if not hits:
    return None
  return _PEAK_FLOPS[max(hits, key=len)] * jax.device_count()


def compile_timed(function: Any, *args: Any) -> tuple[Any, float]:
  """Returns a jitted function compiled for these arguments, and seconds."""
  started = time.perf_counter()
  compiled = function.lower(*args).compile()
  return compiled, time.perf_counter() - started


def interleave(
  calls: dict[str, Callable[[], Any]], *, rounds: int
) -> dict[str, list[float]]:
  """Returns {name: seconds of each round}; the calls take turns.

  Args:
    calls: Functions that return arrays; each is called once to warm up, and
      short ones again before every turn: what others left in the caches, and
      threads that sleep, would be most of their time.
    rounds: Timed turns of each.
  """
  for call in calls.values():
    jax.block_until_ready(call())
  short = {name for name, call in calls.items() if _seconds(call) < _SHORT}
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      if name in short:
        jax.block_until_ready(call())
      seconds[name].append(_seconds(call))
  return seconds


def _seconds(call: Callable[[], Any]) -> float:
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
  """Returns the median and the 10th and 90th percentile."""
  cuts = statistics.quantiles(values, n=10, method='inclusive')
  return {
    'median': statistics.median(values),
    'p10': cuts[0],
    'p90': cuts[-1],
  }


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
  """Returns the spread of the round-by-round ratio of two timings."""
  return spread([a / b for a, b in zip(of, to, strict=True)])


def memory(compiled: Any) -> dict[str, int | None]:
  """Returns what XLA planned for a compiled function, in bytes.

  `peak` counts arguments, results and temporaries, results that reuse an
  argument's memory once. None where the backend does not say.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return {'arguments': None, 'temporaries': None, 'peak': None}
  arguments = analysis.argument_size_in_bytes
  temporaries = analysis.temp_size_in_bytes
  results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return {
    'arguments': arguments,
    'temporaries': temporaries,
    # XLA's own figure alone counts what is compiled in.
    'peak': max(
      arguments + temporaries + results, analysis.peak_memory_in_bytes
    ),
  }
