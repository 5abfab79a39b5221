"""Accuracy against bits, PTQ beside training: table and figure."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvit_jax.report.figures import PALETTE, Figure, accuracy_axis

HEADS = (
  'bits', 'PTQ', 'PTQ plain', 'trained, mean', 'standard error', 'seeds',
  'last evaluation of each seed', 'training',
)  # fmt: skip
_FLOAT = {'fp32': 32, 'bf16': 16}

Points = list[dict[str, Any]]


def interval(tops: Sequence[float]) -> tuple[float, float | None]:
  """Returns (mean, its standard error); one value has no error.

  The standard error is the sample's standard deviation (n - 1) over sqrt(n).
  """
  error = None
  if len(tops) > 1:
    error = float(np.std(tops, ddof=1) / np.sqrt(len(tops)))
  return float(np.mean(tops)), error


def _bits(spec: str) -> tuple[int, int]:
  """Returns (weights, activations) of 'w4a8' or 'fp32'; 32 is float."""
  if spec in _FLOAT:
    return _FLOAT[spec], _FLOAT[spec]
  found = re.fullmatch(r'(?:w(\d+))?(?:a(\d+))?', spec)
  weights, acts = (int(b or 32) for b in found.groups()) if found else (32, 32)
  return weights, acts


def _tops(results: dict[str, Any]) -> dict[str, float]:
  """Returns the top-1 in percent of every PTQ row by name."""
  return {
    row['name']: 100 * row['top1']
    for row in results.get('rows') or []
    if row.get('top1') is not None
  }


def _trainings(results: dict[str, Any]) -> dict[str, dict[str, Points]]:
  """Returns {training: {spec: points by seed}}.

  A training is a recipe with all its settings besides bits and seed.
  """
  points = results.get('curve') or []
  pairs = sorted({(p['recipe'], p['settings']) for p in points})
  recipes = [recipe for recipe, _ in pairs]
  found: dict[str, dict[str, Points]] = {}
  for recipe, settings in pairs:
    own = [p for p in points if (p['recipe'], p['settings']) == (
        recipe, settings)]  # fmt: skip
    # Only where one recipe was used in two ways is that worth a name.
    ambiguous = recipes.count(recipe) > 1
    name = f'{recipe}, settings {settings}' if ambiguous else recipe
    by_spec = found.setdefault(name, {})
    for point in sorted(own, key=lambda p: (p['seed'], p['name'])):
      by_spec.setdefault(point['spec'], []).append(point)
  return found


def table(results: dict[str, Any]) -> list[list[str]]:
  """Returns lines of text under HEADS, most bits first; [] without a curve.

  Args:
    results: The content of results.json.
  """
  tops, trainings = _tops(results), _trainings(results)
  if not trainings:
    return []
  specs = {spec for by_spec in trainings.values() for spec in by_spec}
  for name in tops:
    base = name.removesuffix('+plain')
    if base in _FLOAT or re.fullmatch(r'w(\d+)a\1', base):
      specs.add(base)
  text = lambda value: '-' if value is None else f'{value:.2f}'
  lines = []
  for spec in sorted(specs, key=_bits, reverse=True):
    start = [spec, text(tops.get(spec)), text(tops.get(f'{spec}+plain'))]
    there = {n: by[spec] for n, by in trainings.items() if spec in by}
    for name, points in there.items():
      last = [100 * p['top1_last'] for p in points]
      mean, error = interval(last)
      seeds = ', '.join(
        f'{top:.2f} (seed {p["seed"]})'
        for top, p in zip(last, points, strict=True)
      )
      lines.append(
        [*start, text(mean), text(error), str(len(last)), seeds, name]
      )
    if not there:
      lines.append([*start, *'-----'])
  return lines


def data(results: dict[str, Any]) -> tuple[list, dict, float | None]:
  """Returns the arguments of `accuracy_curve`."""
  tops = _tops(results)
  trained = []
  for name, by_spec in _trainings(results).items():
    series: dict[str, list] = {}
    for spec in sorted(by_spec, key=_bits):
      weights, acts = _bits(spec)
      label = f'QAT {name}'
      if acts != weights:
        label += f', activations {acts} bits'
      last = [100 * p['top1_last'] for p in by_spec[spec]]
      series.setdefault(label, []).append((weights, last))
    trained += series.items()
  rows: dict[str, list] = {'PTQ': [], 'PTQ plain': []}
  for name, top1 in tops.items():
    base = name.removesuffix('+plain')
    if base in _FLOAT or re.fullmatch(r'w(\d+)a\1', base):
      rows['PTQ' if name == base else 'PTQ plain'].append(
        (_bits(base)[0], top1)
      )
  top1 = (results.get('baseline') or {}).get('top1')
  lines = {name: sorted(line) for name, line in rows.items() if line}
  return trained, lines, None if top1 is None else 100 * top1


def accuracy_curve(trained, rows, base: float | None) -> Figure:
  """Returns top-1 over bits: rows of PTQ, and training with its interval.

  Args:
    trained: (label, (bits, top-1 of each seed in percent) ...) a training.
    rows: {label: (bits, top-1 in percent) ...} of PTQ.
    base: Top-1 of float32 in percent.
  """
  figure = Figure((8.5, 4.6), layout='constrained')
  axes = figure.subplots()
  seen: list[tuple[int, float]] = []
  for (label, line), dash in zip(rows.items(), ('-', ':'), strict=False):
    seen += line
    axes.plot(*zip(*line, strict=True), dash, color='0.5', marker='s',
              markersize=4, label=label)  # fmt: skip
  for index, (label, line) in enumerate(trained):
    color = PALETTE[index % len(PALETTE)]
    bits, tops = zip(*line, strict=True)
    means, errors = zip(*map(interval, tops), strict=True)
    axes.plot(bits, means, color=color, marker='o', label=label)
    for x, mean, error, each in zip(bits, means, errors, tops, strict=True):
      seen += [(x, top) for top in each]
      if error is not None:
        axes.errorbar(x, mean, error, color=color, capsize=4)
        axes.plot([x] * len(each), each, '.', color=color, alpha=0.4)
  axes.set_xscale('log', base=2)
  ticks = sorted({bits for bits, _ in seen})
  axes.set_xticks(ticks, [f'{t:g}' for t in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlabel('bits of weights and activations (log scale)')
  accuracy_axis(axes, [top for _, top in seen], base)
  figure.legend(loc='outside right upper')
  return figure
