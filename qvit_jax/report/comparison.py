"""Writes compare.html: several runs side by side."""

import json
import pathlib
from typing import Any

from qvit_jax.report import columns, figures, html, page
from qvit_jax.store import files


def _latency(row: columns.Row) -> str:
  median, low, high = (
    f'{row["latency_ms"][key]:.2f}' for key in ('median', 'p10', 'p90')
  )
  return f'{median} ({low} to {high})'


_COLUMNS: tuple[columns.Column, ...] = (
  ('model', '', lambda row: row['model']),
  ('bits', '', lambda row: row['bits']),
  ('evaluated on', '', lambda row: (
    f'{row["num_examples"]:,} of {row["split"]}, {row["data"]["name"]} '
    f'({row["data"]["digest"]})'
  )),
  ('top-1', '%', lambda row: columns.fixed(row['top1'], 100)),
  ('95 %', '%', columns.interval),
  ('against the first', 'images', columns.paired),
  ('chance of that', 'p', columns.chance),
  ('loss', 'nats', lambda row: columns.fixed(row['loss'], digits=4)),
  ('size', 'MB', lambda row: columns.fixed(row['size_bytes'], 1e-6)),
  ('latency', 'ms (p10 to p90)', _latency),
)  # fmt: skip


def write(path: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
  """Writes the page; returns its path.

  Args:
    path: Of the file.
    result: The content of compare.json. Nothing is measured here.
  """
  curves = ''
  if result['curves']:
    svg, _ = figures.render(figures.training_curves, result['curves'])
    curves = page.inline(svg, 'curves')
  content = html.render(
    'compare.html.jinja', {'text': _text},
    table=columns.table(_COLUMNS, result['rows']),
    **result | {'curves': curves},
  )
  files.write_text(path, content)
  return path


def line(row: dict[str, Any]) -> str:
  """Returns a row for a person."""
  low, high = row['top1_interval']
  found = (
    f'{row["run"]:24} top1 {row["top1"]:.4f} ({low:.4f} to {high:.4f})  loss '
    f'{row["loss"]:.4f}  {row["size_bytes"]:,} bytes  '
    f'{row["latency_ms"]["median"]:.2f} ms'
  )
  if paired := row['paired']:
    found += (
      f'  +{paired["gained"]} -{paired["lost"]} images, p {paired["p"]:.3g}'
    )
  return found


def _text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)
