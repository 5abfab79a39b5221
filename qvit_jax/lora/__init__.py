"""Low-rank adapters: their math, and what they lie beside."""

from qvit_jax.lora.adapter import (
  Adapter,
  by_layer,
  count_lines,
  merge,
  resolve,
  start,
  unmerge,
)

__all__ = [
    'Adapter', 'by_layer', 'count_lines', 'merge', 'resolve', 'start',
    'unmerge',
]  # fmt: skip
