"""What the CPU of this machine can do. Knows no JAX."""

import functools
import pathlib
import re


@functools.cache
def _flags() -> frozenset[str]:
  """Returns the features that Linux tells of the first CPU; else none."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return frozenset()
  # 'flags' of x86, 'Features' of ARM.
  found = re.search(r'^(?:flags|Features)\s*:(.*)$', text, re.MULTILINE)
  return frozenset(found[1].split() if found else ())


def has(*features: str) -> bool:
  """Returns whether the CPU has one of some features; False: or nobody knows.

  Args:
    features: As Linux names them: 'avx512f', 'avx512_bf16', 'amx_bf16'.
  """
  return not _flags().isdisjoint(features)
