"""What stands in the columns of a table of rows, as text."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from qvit_jax.report import html

NONE = '-'  # what was not measured

Row = dict[str, Any]
# Heading, unit, and what stands there.
Column = tuple[str, str, Callable[[Row], str]]


def number(value: Any) -> float | None:
  """Returns a finite number, or None for anything else."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) if math.isfinite(value) else None


def fixed(value: Any, factor: float = 1, digits: int = 2) -> str:
  """Returns a number with so many decimals; a loss may also be inf."""
  found = number(value)
  if found is None:
    return str(value) if isinstance(value, float) else NONE
  return f'{factor * found:.{digits}f}'


def phrase(value: Any) -> str:
  """Returns any JSON value as text, with floats in full precision."""
  if isinstance(value, dict):
    pairs = (f'{key} {phrase(inner)}' for key, inner in value.items())
    return ', '.join(pairs) or NONE
  if isinstance(value, list):
    return ', '.join(map(phrase, value)) or NONE
  return NONE if html.is_missing(value) or value == '' else str(value)


def _bits(key: str) -> Callable[[Row], str]:
  def text(row: Row) -> str:
    found = number(row.get(key))
    return NONE if found is None else f'{round(found, 2):g}'

  return text


def _number(
  key: str, factor: float = 1, digits: int = 2, within: Sequence[str] = ()
) -> Callable[[Row], str]:
  """Returns what reads a number of a row, or of a part of one."""

  def text(row: Row) -> str:
    for name in within:
      row = row.get(name) or {}
    return fixed(row.get(key), factor, digits)

  return text


def interval(row: Row) -> str:
  """Returns the 95 % interval of top-1, in percent."""
  ends = row.get('top1_interval')
  return ' to '.join(fixed(end, 100, 1) for end in ends) if ends else NONE


def paired(row: Row) -> str:
  """Returns the images that the row alone, and its rival alone, names right."""
  found = row.get('paired')
  return f'+{found["gained"]} -{found["lost"]}' if found else NONE


def chance(row: Row) -> str:
  """Returns the p of such a difference."""
  return fixed((row.get('paired') or {}).get('p'), digits=3)


def _method(row: Row) -> str:
  fallen = ' (collapsed)' if row.get('collapsed') else ''
  return phrase(row.get('method')) + fallen


ACCURACY: tuple[Column, ...] = (
  ('method', '', _method),
  ('weights', 'bits', _bits('weight_bits')),
  ('acts', 'bits', _bits('act_bits')),
  ('top-1', '%', _number('top1', 100)),
  ('top-5', '%', _number('top5', 100)),
  ('macro F1', '%', _number('f1_macro', 100)),
  ('same as float', '%', _number('agreement', 100)),
  ('SQNR', 'dB', _number('sqnr_db', digits=1)),
)
CERTAINTY: tuple[Column, ...] = (
  ('top-1', '%', _number('top1', 100)),
  ('95 %', '%', interval),
  ('against float', 'images', paired),
  ('chance of that', 'p', chance),
)


def cost(engines: Sequence[str]) -> list[Column]:
  """Returns the columns of size and speed.

  Args:
    engines: Runtimes that some row was timed in.
  """
  found: list[Column] = [
    ('artifact', 'MB', _number('artifact_bytes', 1e-6)),
    ('smaller', 'times', _number('compression')),
    ('latency', 'ms', _number('median', within=['latency_ms'])),
    ('p10', 'ms', _number('p10', within=['latency_ms'])),
    ('p90', 'ms', _number('p90', within=['latency_ms'])),
    ('images', 'per s', _number('images_per_second', digits=1)),
    ('speed, float32', 'times', _number('speedup')),
    ('speed, bf16', 'times', _number('speedup_bf16')),
  ]
  for name in engines:
    place = ['engines', name]
    found += [
      (name, 'images per s', _number('images_per_second', 1, 1, place)),
      ('its float32', 'times', _number('speedup', within=place)),
    ]
  return [
    *found,
    ('work', 'GBOP', _number('bops', 1e-9)),
    ('peak memory', 'MB', _number('peak_memory_bytes', 1e-6, 1)),
    ('made in', 's', _number('seconds', digits=1)),
    ('runs as', '', lambda row: phrase(row.get('execution'))),
  ]


def table(columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, Any]:
  """Returns {'heads': (heading, unit), 'lines': (row, texts)}."""
  return {
    'heads': [(heading, unit) for heading, unit, _ in columns],
    'lines': [(row, [text(row) for *_, text in columns]) for row in rows],
  }
