"""Draws figures of reports from numbers already chosen."""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import sklearn.isotonic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

# Okabe and Ito's palette without its yellow, which vanishes on white.
_BLUE, _ORANGE, _GREEN, _RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
PALETTE = (_BLUE, _RED, _GREEN, _ORANGE, '#56B4E9', '#CC79A7', '#000000')
_MARKERS = 'osD^vPX*<>h'
_DASHES = ('-', '--', ':', '-.')
_LOOKS = {
  'float': ('o', '0.35'), 'simulated': ('^', _ORANGE), 'integer': ('s', _BLUE),
}  # fmt: skip
_STYLE = {
    'font.family': 'sans-serif', 'font.size': 9, 'axes.grid': True,
    'axes.axisbelow': True, 'grid.color': '0.9', 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.titlesize': 9, 'legend.fontsize': 8,
    'legend.frameon': False, 'savefig.dpi': 150, 'svg.fonttype': 'none',
    'svg.hashsalt': 'qvit_jax',
    # Room for a browser whose letters are wider than matplotlib's.
    'figure.constrained_layout.w_pad': 0.12,
    'figure.constrained_layout.h_pad': 0.06,
    'text.parse_math': False,  # a row's name may hold a dollar sign
}  # fmt: skip
_PAPER = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5}
_MOST_SHOWN = 25  # classes of a confusion matrix with names
_NEAR = 8.0  # points below float that get most of an accuracy axis


def render(figure: Callable[..., Figure], *data: Any) -> tuple[str, bytes]:
  """Returns a figure of this file, drawn from its data, as (SVG, PNG)."""
  with matplotlib.rc_context(_STYLE):
    drawn = figure(*data)
    text, image = io.StringIO(), io.BytesIO()
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    drawn.savefig(text, format='svg', metadata=nothing)
    drawn.set_layout_engine('none')  # keep that layout: it takes longest
    drawn.savefig(image, format='png', metadata={'Software': None})
  return text.getvalue(), image.getvalue()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
  """Returns the indices of points that no other beats, smallest first.

  Args:
    points: (size, accuracy). A point beats another if it is no larger, no
      less accurate, and better in one of the two; equal points both stay.
  """
  front: list[int] = []
  order = sorted(
    range(len(points)), key=lambda i: (points[i][0], -points[i][1])
  )
  for i in order:
    best = points[front[-1]] if front else None
    if best is None or points[i][1] > best[1] or points[i] == best:
      front.append(i)
  return front


def accuracy_vs_bits(points, base: float | None) -> Figure:
  """Returns top-1 over weight bits, with one marker per activation width.

  Args:
    points: (weight bits, activation bits or None, top-1 in percent, whether
      the row was trained quantized).
    base: Top-1 of float32 in percent.
  """
  figure = Figure((8.5, 4.6), layout='constrained')
  axes = figure.subplots()
  lines = ((False, '0.6', '-', 'best PTQ'), (True, _BLUE, '--', 'best QAT'))
  for trained, color, dash, label in lines:
    best: dict[float, float] = {}
    for bits, _, top, is_trained in points:
      if is_trained == trained:
        best[bits] = max(top, best.get(bits, top))
    if len(best) > 1:
      line = sorted(best.items())
      axes.plot(*zip(*line, strict=True), dash, color=color, label=label)
  groups = sorted({p[1] for p in points}, key=lambda acts: acts or 0)
  for (index, acts), trained in itertools.product(enumerate(groups), (0, 1)):
    own = [(p[0], p[2]) for p in points if (p[1], p[3]) == (acts, trained)]
    if own:
      # Beside each other, so that equal accuracies do not hide a marker.
      shift = 2 ** (0.22 * (index + 0.5 - len(groups) / 2) / len(groups))
      color = PALETTE[index % len(PALETTE)]
      axes.scatter(
          [x * shift for x, _ in own], [y for _, y in own], zorder=3,
          marker=_MARKERS[index % len(_MARKERS)], s=70 if trained else 36,
          facecolor='white' if trained else color, edgecolor=color,
          label=f'activations {"-" if acts is None else f"{acts:g}"} bits'
          + (', QAT' if trained else ''),
      )  # fmt: skip
  axes.set_xscale('log', base=2)
  ticks = sorted({p[0] for p in points if p[0] == round(p[0])})
  axes.set_xticks(ticks, [f'{t:g}' for t in ticks])
  axes.set_xticks([], minor=True)
  axes.set_xlabel('weight bits (mean where sites differ; log scale)')
  accuracy_axis(axes, [p[2] for p in points], base)
  figure.legend(loc='outside right upper')
  return figure


def accuracy_axis(axes, tops: list[float], base: float | None) -> None:
  """Gives accuracies near float most of the height, and the rest a strip."""
  axes.set_ylabel('top-1 accuracy (%)')
  if base is not None:
    axes.axhline(base, color='black', linewidth=1, linestyle='--', zorder=1)
    axes.annotate(
        f'float32 {base:.2f} %', (0, base), xytext=(4, 3), fontsize=8,
        xycoords=('axes fraction', 'data'), textcoords='offset points',
    )  # fmt: skip
    tops = [*tops, base]
  near = [t for t in tops if t >= (base or max(tops)) - _NEAR]
  margin = max(0.5, 0.1 * (max(near) - min(near)))
  knee, high = min(near) - margin, max(near) + 1.5 * margin
  if min(tops) >= knee:
    axes.set_ylim(knee, high)
    return
  low = min(tops) - 0.08 * (knee - min(tops))
  slope = (high - knee) / 3 / (knee - low)  # a quarter of the height
  bend = lambda y, by: np.where(y < knee, knee - (knee - y) * by, y)
  axes.set_yscale(
      'function',
      functions=(lambda y: bend(y, slope), lambda y: bend(y, 1 / slope)),
  )  # fmt: skip
  axes.set_ylim(low, high)
  fine = [t for t in MaxNLocator(6).tick_values(knee, high) if knee < t < high]
  rough = [t for t in MaxNLocator(3).tick_values(low, knee) if low < t]
  axes.set_yticks([t for t in rough if 0 <= t < knee - 2] + fine)
  axes.axhspan(low, knee, color='0.95', zorder=0)
  axes.set_ylabel('top-1 accuracy (%; compressed where grey)')


def accuracy_vs_size(points, base: float | None) -> Figure:
  """Returns top-1 over artifact size, every point named, with the front.

  Args:
    points: (name, MB, top-1 in percent, execution, whether QAT).
    base: Top-1 of float32 in percent.
  """
  high = max(4.2, 0.16 * len(points))
  full = high + 0.9
  figure = Figure((9, full))
  axes = figure.add_axes((0.08, 0.55 / full, 0.91, high / full))
  points = sorted(points, key=lambda p: p[1])
  front = pareto_front([(p[1], p[2]) for p in points])
  axes.step(
      [points[i][1] for i in front], [points[i][2] for i in front],
      where='post', color=_GREEN, label='Pareto front', zorder=2,
  )  # fmt: skip
  for execution, trained in sorted({p[3:] for p in points}):
    own = [p for p in points if p[3:] == (execution, trained)]
    marker, color = _LOOKS.get(execution, ('D', '0.6'))
    axes.scatter(
        [p[1] for p in own], [p[2] for p in own], zorder=3, marker=marker,
        edgecolor=color, facecolor='white' if trained else color, s=40,
        label=execution + (', QAT' if trained else ''),
    )  # fmt: skip
  axes.set_xscale('log')
  axes.set_xlabel('artifact on disk (MB, log scale)')
  axes.xaxis.set(
    major_locator=LogLocator(subs=(1, 2, 5)), major_formatter='{x:g}'
  )
  axes.xaxis.minorticks_off()
  accuracy_axis(axes, [p[2] for p in points], base)
  _name_points(axes, points, 0.91 * 9, 0.15 / high)
  axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=5)
  return figure


def _name_points(axes, points, inches: float, gap: float) -> None:
  """Names points, sorted by size, in columns that no point lies in."""
  logs = [math.log2(p[1]) for p in points]
  widths = [0.35 + 0.066 * len(p[0]) for p in points]
  per_inch = ((logs[-1] - logs[0]) or 1) / (inches - max(widths) - 0.5)
  left = logs[0] - 0.3 * per_inch
  axes.set_xlim(2**left, 2 ** (left + inches * per_inch))
  columns: list[list[int]] = []
  for i, x in enumerate(logs):
    column = columns[-1] if columns else []
    room = max((widths[j] for j in column), default=0) + 0.1
    if column and x < logs[column[-1]] + room * per_inch:
      column.append(i)
    else:
      columns.append([i])
  where = axes.transScale + axes.transLimits  # data to shares of the axes
  for column in columns:
    column.sort(key=lambda i: points[i][2])
    x = (logs[max(column)] - left) / per_inch / inches + 0.2 / inches
    steps = gap * np.arange(len(column))
    wanted = [where.transform(points[i][1:3])[1] for i in column] - steps
    heights = steps + sklearn.isotonic.isotonic_regression(
      wanted, y_min=0.02, y_max=0.98 - steps[-1]
    )
    for i, y in zip(column, heights, strict=True):
      axes.annotate(
          points[i][0], points[i][1:3], (x, y), textcoords='axes fraction',
          va='center', fontsize=8, zorder=4, bbox=_PAPER, arrowprops={
              'arrowstyle': '-', 'color': '0.6', 'linewidth': 0.5,
              'shrinkA': 0, 'shrinkB': 3, 'relpos': (0, 0.5)},
      )  # fmt: skip


def _lines(names: Sequence[str], panels: int = 1, size: float = 8):
  """Returns a figure with a named line for each row, read from the top."""
  high = 1.2 + 0.025 * size * max(len(names), 5)
  figure = Figure((8.5, high), layout='constrained')
  panes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
  _name_lines(panes[0], names, size)
  for axes in panes:
    axes.tick_params(axis='y', length=0)
    axes.grid(axis='y', visible=False)
  return figure, panes


def _name_lines(axes, names: Sequence[str], size: float = 8) -> None:
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.set_yticks(range(len(names)), names, fontsize=size)


def latency(lines, engines: Sequence[str] = ()) -> Figure:
  """Returns the median batch time of each row, with its p10 and p90.

  Args:
    lines: (name, median, p10, p90 in ms, whether float32 or bfloat16, the three
      times in other runtimes by name, or None).
    engines: Those runtimes.
  """
  figure, (axes,) = _lines([line[0] for line in lines])
  figure.set_figheight(figure.get_figheight() * (1 + 0.25 * len(engines)))

  def draw(y, times, marker, color, label):
    middle, low, high = times
    axes.plot([low, high], [y, y], color=color, linewidth=2.5, alpha=0.5)
    axes.plot(middle, y, marker, color=color, markersize=5, label=label)

  step = 0.7 / (len(engines) + 1)  # below each other, within a row's height
  for row, (_, *times, is_float, others) in enumerate(lines):
    look = _LOOKS['float' if is_float else 'integer']
    draw(row - step * len(engines) / 2, times, *look,
         'ours, float' if is_float else 'ours')  # fmt: skip
    if is_float:
      axes.axvline(times[0], color=look[1], linewidth=0.8, linestyle=':')
    for i, name in enumerate(engines):
      if others.get(name):
        y = row + step * (i + 1 - len(engines) / 2)
        look = _MARKERS[2 + i], (_RED, _GREEN)[i % 2]
        draw(y, others[name], *look, name)
  if engines:
    _legend(figure, 'outside upper center')
  axes.set_xlim(left=0)
  axes.set_xlabel('latency of a batch (ms): median, bar from p10 to p90')
  return figure


def size(lines) -> Figure:
  """Returns bars of the artifacts; `lines`: (name, MB, what to write by it)."""
  figure, (axes,) = _lines([line[0] for line in lines])
  bars = axes.barh(range(len(lines)), [line[1] for line in lines], color=_BLUE)
  axes.bar_label(bars, [line[2] for line in lines], padding=3, fontsize=8)
  axes.margins(x=0.2)
  axes.set_xlabel('artifact on disk (MB)')
  return figure


def per_class_change(lines, hurt_name: str, hurt) -> Figure:
  """Returns how top-1 of the classes moved in each row, and the worst ones.

  Args:
    lines: (name, changes in points, one a class).
    hurt_name: The row that the second panel is of.
    hurt: (change in points, name of the class), most hurt first.
  """
  figure = Figure((8.5, 1 + 0.2 * max(len(lines), 10)), layout='constrained')
  axes, right = figure.subplots(1, 2, width_ratios=(2, 1))
  axes.boxplot(
      [line[1] for line in lines], positions=range(len(lines)), whis=(0, 100),
      orientation='horizontal', manage_ticks=False, widths=0.6,
      patch_artist=True, boxprops={'facecolor': '#56B4E9', 'linewidth': 0.6},
      medianprops={'color': 'black', 'linewidth': 1.5},
  )  # fmt: skip
  _name_lines(axes, [line[0] for line in lines])
  axes.set_xscale('symlog', linthresh=10)
  ticks = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100)
  axes.set_xticks(ticks, [f'{t:+d}' if t else '0' for t in ticks], fontsize=7)
  axes.set_xlabel('change of a class (points; log beyond 10)')
  right.barh(range(len(hurt)), [change for change, _ in hurt], color=_RED)
  _name_lines(right, [name for _, name in hurt])
  right.set(title=f'most hurt by {hurt_name}', xlabel='change (points)')
  for pane in (axes, right):
    pane.axvline(0, color='black', linewidth=0.8)
    pane.grid(axis='y', visible=False)
  return figure


def confusion(panels) -> Figure:
  """Returns confusion matrices; `panels`: (title, counts, truth by row)."""
  figure = Figure((3.1 * len(panels) + 1, 3.7), layout='constrained')
  panes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for axes, (title, counts) in zip(panes, panels, strict=True):
    counts = np.asarray(counts, float)
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = np.ma.masked_equal(100 * counts / total, 0)
    image = axes.imshow(
        shares, cmap='viridis_r', norm=LogNorm(0.5, 100), interpolation='none'
    )  # fmt: skip
    axes.set(title=title, xlabel='predicted class')
    axes.grid(visible=False)
    if len(counts) <= 12:
      for (y, x), count in np.ndenumerate(counts):
        dark = 100 * count / total[y, 0] > 15
        axes.text(
            x, y, f'{count:.0f}' if count else '', ha='center', va='center',
            fontsize=6, color='white' if dark else 'black',
        )  # fmt: skip
  panes[0].set_ylabel('true class')
  bar = figure.colorbar(image, ax=list(panes), shrink=0.8)
  bar.set_label('share of the true class (%), log; white: none')
  bar.set_ticks([1, 10, 100], labels=['1', '10', '100'])
  return figure


def named_confusion(
  counts: Sequence[Sequence[int]], names: Sequence[str]
) -> Figure:
  """Returns a confusion matrix with names and counts.

  Args:
    counts: [classes, classes], true class by predicted class. Of many classes
      those are drawn that are confused most.
    names: By label; numbers stand for labels without one.
  """
  table = np.asarray(counts)
  wrong = table - np.diag(np.diag(table))
  most = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind='stable')
  shown = np.sort(most[:_MOST_SHOWN])
  labels = [names[i] if i < len(names) else str(i) for i in shown]
  part = table[np.ix_(shown, shown)]
  shares = part / np.maximum(table.sum(axis=1)[shown], 1)[:, None]
  figure = Figure((7.5, 7), layout='constrained', dpi=100)
  axes = figure.subplots()
  axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='none')
  axes.grid(visible=False)
  axes.set_xticks(range(len(shown)), labels, rotation=90)
  axes.set_yticks(range(len(shown)), labels)
  axes.set(xlabel='predicted class', ylabel='true class')
  if len(shown) < len(table):
    axes.set_title(f'the {len(shown)} of {len(table)} classes confused most')
  for (y, x), count in np.ndenumerate(part):
    if count:
      axes.text(
          x, y, str(count), ha='center', va='center', fontsize=6,
          color='white' if shares[y, x] > 0.5 else 'black',
      )  # fmt: skip
  return figure


def confusion_pixels(
  counts: Sequence[Sequence[int]], names: Sequence[str]
) -> np.ndarray:
  """Returns `named_confusion` as uint8 [1, h, w, 3], for TensorBoard."""
  with matplotlib.rc_context(_STYLE):
    canvas = FigureCanvasAgg(named_confusion(counts, names))
    canvas.draw()
  return np.asarray(canvas.buffer_rgba())[None, :, :, :3].copy()


def training_curves(runs: Sequence[dict[str, Any]]) -> Figure:
  """Returns loss and top-1 of evaluations by updates.

  Args:
    runs: {'run', 'steps', 'loss', 'top1'} of each.
  """
  figure = Figure((9, 3.6), layout='constrained')
  panes = figure.subplots(1, 2)
  for axes, key, factor, label in (
    (panes[0], 'loss', 1, 'loss'), (panes[1], 'top1', 100, 'top-1 (%)'),
  ):  # fmt: skip
    for number, one in enumerate(runs):
      axes.plot(
          one['steps'], [factor * y for y in one[key]],
          color=PALETTE[number % len(PALETTE)], marker='o', markersize=3,
          linestyle=_DASHES[number // len(PALETTE) % len(_DASHES)],
          label=one['run'],
      )  # fmt: skip
    axes.set(xlabel='updates', ylabel=label)
  _legend(figure, 'outside lower center')
  return figure


def _legend(figure: Figure, place: str) -> None:
  """Names every line of all panels once."""
  found = {
    label: line
    for axes in figure.axes
    for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  if found:
    figure.legend(found.values(), found.keys(), loc=place, ncols=4)


def activation_histograms(histograms) -> Figure:
  """Returns what calibration saw at some sites, and what static rows keep.

  Args:
    histograms: As in results.json.
  """
  rows = sorted({name for h in histograms for name in h.get('ranges') or {}})
  high = 2.1 * math.ceil(len(histograms) / 3) + 0.25 * (1 + len(rows) // 4)
  figure = Figure((9, high + 0.3), layout='constrained')
  for index, one in enumerate(histograms):
    axes = figure.add_subplot(math.ceil(len(histograms) / 3), 3, index + 1)
    counts = np.asarray(one['counts'], float)
    edges = np.linspace(*one['edges'], len(counts) + 1)
    axes.stairs(counts, edges, baseline=0.5, fill=True, color='0.75')
    # Brackets at falling heights: equal ranges do not hide each other.
    top = max(counts.max(), 1) / 0.5
    axes.set(yscale='log', ylim=(0.5, 0.5 * top ** (1.1 + 0.06 * len(rows))))
    for place, name in enumerate(rows):
      kept = (one.get('ranges') or {}).get(name)
      if kept:
        low, high = kept
        level = 0.98 - 0.05 * place
        axes.plot(
            (low, low, high, high), (0, level, level, 0), linewidth=1.2,
            color=PALETTE[place % len(PALETTE)], linestyle=_DASHES[place % 4],
            transform=axes.get_xaxis_transform(), label=name,
        )  # fmt: skip
    axes.yaxis.set_major_formatter('{x:g}')
    axes.minorticks_off()
    axes.set_title(f'{one["kind"]}\n{one["site"]}', fontsize=7.5)
    axes.tick_params(labelsize=7)
    if index % 3 == 0:
      axes.set_ylabel('count (log)')
  _legend(figure, 'outside lower center')
  return figure


def site_sqnr(paths: Sequence[str], lines) -> Figure:
  """Returns SQNR along the model; `lines`: (name, dB or NaN by path)."""
  figure = Figure((9.5, 5.2), layout='constrained')
  axes = figure.subplots()
  for index, (name, values) in enumerate(lines):
    axes.plot(
        values, _DASHES[index // len(PALETTE) % 4], label=name, linewidth=1,
        marker=_MARKERS[index], markersize=3.5, color=PALETTE[index % 7],
    )  # fmt: skip
  every = math.ceil(len(paths) / 80)
  axes.set_xticks(
      range(0, len(paths), every), paths[::every], rotation=90,
      fontsize=8 if len(paths) < 40 else 5.5,
  )  # fmt: skip
  axes.set(ylabel='SQNR of the output (dB)', xlim=(-0.5, len(paths) - 0.5))
  _legend(figure, 'outside upper center')
  return figure


def sensitivity(sites, spec: str) -> Figure:
  """Returns what quantizing one site alone does to the model's output.

  Args:
    sites: (path, kind, SQNR in dB, agreement in percent), most sensitive
      first; NaN where it is not known.
    spec: The bits that each site got.
  """
  small = 8 if len(sites) < 25 else 6.5
  figure, panes = _lines([site[0] for site in sites], 2, small)
  kinds = sorted({site[1] for site in sites})
  for axes, column, label in zip(
      panes, (2, 3), (f'SQNR of the logits, site in {spec} (dB)',
                      'same prediction as float (%)'), strict=True,
  ):  # fmt: skip
    for y, site in enumerate(sites):
      place = kinds.index(site[1]) % len(PALETTE)
      look = {'color': PALETTE[place], 'label': site[1]}
      if column == 2:
        axes.barh(y, site[2], **look)
      else:
        axes.plot(site[3], y, _MARKERS[place], markersize=4, **look)
    axes.set_xlabel(label)
  _legend(figure, 'outside upper center')
  return figure
