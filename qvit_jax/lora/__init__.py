"""Low-rank adapters: their math, and what they lie beside."""

from qvit_jax.lora.adapter import (
  HEAD,
  Adapter,
  by_layer,
  count_lines,
  merge,
  resolve,
  start,
  unmerge,
)

__all__ = [
    'HEAD', 'Adapter', 'by_layer', 'count_lines', 'merge', 'resolve', 'start',
    'unmerge',
]  # fmt: skip
