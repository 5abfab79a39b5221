"""Writes the report of a PTQ run: one HTML page and PNG figures."""

import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from qvit_jax.report import columns, curves, figures, html
from qvit_jax.report.columns import fixed, number, phrase
from qvit_jax.store import files

# More than these cannot be told apart in a figure.
_MOST_LINES, _MOST_BARS, _MOST_CLASSES = 8, 40, 10
# Too long for a table; the page draws them and results.json holds them.
_ARRAYS = ('per_class_top1', 'confusion', 'sites')

Row = dict[str, Any]


def write(place: pathlib.Path, results: dict[str, Any]) -> pathlib.Path:
  """Writes `place`/report.html and `place`/figures/*.png.

  Figures of an earlier report that this one does not have are removed.

  Args:
    place: A folder that exists.
    results: The content of results.json. Nothing is measured here.

  Returns:
    The path of the page.
  """
  folder = place / 'figures'
  folder.mkdir(exist_ok=True)
  drawn = {}
  for figure, choose in FIGURES.items():
    name, data = figure.__name__, choose(results)
    path = folder / f'{name}.png'
    if not data[0]:
      path.unlink(missing_ok=True)
      continue
    svg, image = figures.render(figure, *data)
    drawn[name] = inline(svg, name)
    _write_bytes(path, image)
  path = place / 'report.html'
  files.write_text(path, _html(results, drawn))
  return path


def _write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Replaces a file in one step, as files.write_text does for text."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def inline(svg: str, name: str) -> str:
  """Returns an SVG file as an element of an HTML page.

  Its ids start with `name`, so that those of several figures differ, and
  nothing in it names an address.
  """
  svg = svg[svg.index('<svg') :]  # an element has no prolog and no DTD
  svg = re.sub(r'<style.*?</style>|<!--.*?-->', '', svg, flags=re.DOTALL)

  def in_tag(found: re.Match) -> str:
    tag = re.sub(r'\sxmlns(:\w+)?="[^"]*"', '', found[0])
    return re.sub(r'(\sid="|href="#|url\(#)', rf'\g<1>{name}-', tag)

  # Matplotlib escapes the brackets of text: what they enclose is a tag.
  return re.sub(r'<[^>]+>', in_tag, svg)


def _html(results: dict[str, Any], drawn: dict[str, str]) -> str:
  rows = all_rows(results)
  return html.render(
    'page.html.jinja',
    {'fixed': fixed, 'phrase': phrase},
    results=results,
    accuracy=columns.table(columns.ACCURACY, rows),
    certainty=columns.table(columns.CERTAINTY, rows),
    cost=columns.table(columns.cost(_engines(results)), rows),
    ptq=ptq_rows(results),
    rows=rows,
    figures=drawn,
    curve=curves.table(results),
    curve_heads=curves.HEADS,
    tables=_tables(results),
    engines=_engines(results),
    refused=_refused(results),
  )


def _tables(results: dict[str, Any]) -> list[tuple[str, list, list]]:
  """Returns what is folded away: (title, headings, lines of text)."""
  rows = [
    {key: row[key] for key in row if key not in _ARRAYS}
    for row in all_rows(results)
  ]
  heads = list(dict.fromkeys(key for row in rows for key in row))
  lines = [[phrase(row.get(key)) for key in heads] for row in rows]
  tables = [('Every row in full precision', heads, lines)]
  paths, found = _by_site(results)
  if paths:
    lines = [
      [path, *(fixed(decibels.get(path)) for _, decibels in found)]
      for path in paths
    ]
    heads = ['site', *(name for name, _ in found)]
    tables.append(('SQNR of every site in every row (dB)', heads, lines))
  alone = results.get('sensitivity') or {}
  if alone.get('sites'):
    heads = ['path', 'kind', 'sqnr_db', 'agreement', 'kl', 'noise']
    lines = [[phrase(s.get(key)) for key in heads] for s in alone['sites']]
    title = f'Each site alone in {phrase(alone.get("spec"))}'
    tables.append((title, heads, lines))
  return tables


# What each figure draws: its arguments, the first of them empty for no figure.


def ptq_rows(results: dict[str, Any]) -> list[Row]:
  """Returns the PTQ rows, after the float baseline if it is none of them."""
  rows, baseline = list(results.get('rows') or []), results.get('baseline')
  if baseline and all(row.get('name') != baseline.get('name') for row in rows):
    rows.insert(0, baseline)
  return rows


def all_rows(results: dict[str, Any]) -> list[Row]:
  """Returns the PTQ rows, then those of quantization-aware training."""
  return ptq_rows(results) + list(results.get('qat') or [])


def _name(row: Row) -> str:
  name = phrase(row.get('name'))
  return name if len(name) <= 40 else f'{name[:37]}...'


def _engines(results: dict[str, Any]) -> list[str]:
  """Returns the runtimes that some row was timed in."""
  timed = (row.get('engines') or {} for row in all_rows(results))
  return list(dict.fromkeys(name for found in timed for name in found))


def _refused(results: dict[str, Any]) -> list[tuple[str, list[str], str]]:
  """Returns what runtimes cannot run: (row, runtimes, why)."""
  found: dict[tuple[str, str], list[str]] = {}
  for row in all_rows(results):
    for name, timed in (row.get('engines') or {}).items():
      if why := timed.get('note'):
        found.setdefault((phrase(row.get('name')), why), []).append(name)
  return [(row, names, why) for (row, why), names in found.items()]


def _with_top1(results, key: str) -> Iterator[tuple[Row, float, float, bool]]:
  """Yields (row, its `key`, top-1 in percent, whether QAT) where known."""
  trained = len(ptq_rows(results))
  for index, row in enumerate(all_rows(results)):
    value, top1 = number(row.get(key)), number(row.get('top1'))
    if value and top1 is not None:  # no artifact has 0 bytes, no weight 0 bits
      yield row, value, 100 * top1, index >= trained


def _base(results) -> float | None:
  top1 = number((results.get('baseline') or {}).get('top1'))
  return None if top1 is None else 100 * top1


def _bits_data(results):
  points = []
  for row, bits, top1, is_qat in _with_top1(results, 'weight_bits'):
    acts = number(row.get('act_bits'))
    points.append((bits, None if acts is None else round(acts), top1, is_qat))
  return points, _base(results)


def _accuracy_data(results):
  points = [
    (_name(row), found / 1e6, top1, phrase(row.get('execution')), is_qat)
    for row, found, top1, is_qat in _with_top1(results, 'artifact_bytes')
  ]
  return points, _base(results)


def _times(timed: dict[str, Any]) -> list[float] | None:
  """Returns median, p10 and p90 in milliseconds, None where one is missing."""
  times = timed.get('latency_ms') or {}
  found = [number(times.get(key)) for key in ('median', 'p10', 'p90')]
  return None if None in found else found


def _latency_data(results):
  lines = []
  for row in all_rows(results):
    if found := _times(row):
      is_float = row.get('name') in ('fp32', 'bf16')
      others = row.get('engines') or {}
      rival = {name: _times(timed) for name, timed in others.items()}
      lines.append((_name(row), *found, is_float, rival))
  return lines, _engines(results)


def _size_data(results):
  lines = [
    (_name(row), found / 1e6,
     f'{found / 1e6:.2f} MB, {fixed(row.get("compression"))}x')
    for row in all_rows(results)
    if (found := number(row.get('artifact_bytes'))) is not None
  ]  # fmt: skip
  return (lines,)


def _class_data(results):
  baseline = results.get('baseline') or {}
  before = baseline.get('per_class_top1') or []
  classes = results.get('class_names') or [
    f'class {index}' for index in range(len(before))
  ]
  lines, worst = [], None
  for row in all_rows(results):
    after = row.get('per_class_top1') or []
    moved = [
      (100 * (new - old), index)
      for index, (old, new) in enumerate(zip(before, after, strict=False))
      if number(old) is not None and number(new) is not None
    ]
    if not moved or row.get('name') == baseline.get('name'):
      continue
    lines.append((_name(row), [change for change, _ in moved]))
    mean = sum(change for change, _ in moved) / len(moved)
    rank = (bool(row.get('collapsed')), mean)
    if worst is None or rank < worst[0]:
      hurt = [(change, classes[i]) for change, i in sorted(moved)]
      worst = rank, _name(row), hurt[:_MOST_CLASSES]
  return (lines, *worst[1:]) if worst else (lines,)


def _confusion_data(results):
  rows = [row for row in all_rows(results) if row.get('confusion')]
  with_top1 = [row for row in rows if number(row.get('top1')) is not None]
  packed = [
    row
    for row in with_top1
    if row.get('execution') == 'integer'
    and not row.get('collapsed')
    and number(row.get('weight_bits')) is not None
  ]
  by_bits = lambda row: (
    row['weight_bits'], number(row.get('act_bits')) or math.inf, -row['top1']
  )  # fmt: skip
  chosen = [results.get('baseline') or {}]
  chosen += sorted(packed, key=by_bits)[:1]
  chosen += sorted(with_top1, key=lambda row: row['top1'])[:1]
  panels = {
    f'{_name(row)}\ntop-1 {fixed(row.get("top1"), 100)} %': row['confusion']
    for row in chosen
    if row.get('confusion')
  }
  return (list(panels.items()),)


def _histogram_data(results):
  found = results.get('histograms') or []
  return ([one for one in found if one.get('counts') and one.get('edges')],)


def _by_site(results):
  """Returns (paths in execution order, [(row, SQNR or None by path)])."""
  rows = {}
  for row in all_rows(results):
    found = {
      site['path']: number(site.get('sqnr_db'))
      for site in row.get('sites') or []
    }
    if any(value is not None for value in found.values()):
      rows[_name(row)] = found
  paths = list(dict.fromkeys(path for found in rows.values() for path in found))
  return paths, list(rows.items())


def _sqnr_data(results):
  paths, rows = _by_site(results)
  lines = [
    (name, [math.nan if found.get(p) is None else found[p] for p in paths])
    for name, found in rows
  ]
  if len(lines) > _MOST_LINES:  # the best, the worst, and evenly between
    known = [[v for v in values if v == v] for _, values in lines]
    means = [sum(values) / len(values) for values in known]
    ranked = sorted(range(len(lines)), key=lambda i: means[i])
    step = (len(lines) - 1) / (_MOST_LINES - 1)
    kept = {ranked[round(i * step)] for i in range(_MOST_LINES)}
    lines = [line for i, line in enumerate(lines) if i in kept]
  return paths, lines


def _sensitivity_data(results):
  found = results.get('sensitivity') or {}
  sites = [
    (site['path'], phrase(site.get('kind')),
     *(math.nan if (value := number(site.get(key))) is None else by * value
       for key, by in (('sqnr_db', 1), ('agreement', 100))))
    for site in (found.get('sites') or [])[:_MOST_BARS]
  ]  # fmt: skip
  return sites, phrase(found.get('spec'))


# In the order of the page; the function's name is the stem of the PNG.
FIGURES: dict[Callable[..., Any], Callable[[dict[str, Any]], tuple]] = {
  curves.accuracy_curve: curves.data,
  figures.accuracy_vs_bits: _bits_data,
  figures.accuracy_vs_size: _accuracy_data,
  figures.latency: _latency_data,
  figures.size: _size_data,
  figures.per_class_change: _class_data,
  figures.confusion: _confusion_data,
  figures.activation_histograms: _histogram_data,
  figures.site_sqnr: _sqnr_data,
  figures.sensitivity: _sensitivity_data,
}
