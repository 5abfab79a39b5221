"""Writes compare.html: several runs side by side."""

import json
import pathlib
from typing import Any

from qvit_jax.report import figures, html, page
from qvit_jax.store import files


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
    'compare.html.jinja', {'text': _text}, **result | {'curves': curves}
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
