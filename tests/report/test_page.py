"""The report of --mode=ptq: what the page says, and that it stands alone."""

import copy
import html.parser
import itertools
import random
import re

import numpy as np
import PIL.Image
import pytest

from qvit_jax.report import figures, page

CLASSES = 10
SITES = ['patch_embed', 'block_00/attn/qk', 'block_00/mlp/fc1', 'head']
VOID = {'meta', 'link', 'br', 'img', 'hr', 'input', 'base', 'col', 'source'}
# Attributes by which a browser fetches something.
FETCHING = {'src', 'href', 'xlink:href', 'data', 'action', 'srcset', 'poster'}


class Reader(html.parser.HTMLParser):
  """Collects ids, references and text; fails on tags that do not pair."""

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.references, self.tags = [], [], [], set()
    self.texts = {}
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    if tag not in VOID:
      self.open.append(tag)
    for key, value in attrs:
      if key == 'id':
        self.ids.append(value)
      if key in FETCHING:
        self.references.append(value)
      self.references += re.findall(r'url\(([^)]*)\)', value or '')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, self.getpos()

  def handle_data(self, data):
    if self.open:
      inner = self.texts.setdefault(self.open[-1], [])
      inner.append(data.strip())


def make_row(name, weights, acts, top1, execution='integer', **more):
  rng = np.random.default_rng(len(name) + weights)
  hits = np.clip(rng.normal(36 * top1, 1, CLASSES), 0, 36).astype(int)
  confusion = np.diag(hits)
  confusion[np.arange(CLASSES), (np.arange(CLASSES) + 1) % CLASSES] += 36 - hits
  sites = None
  if execution != 'float':
    sites = [
      {'path': path, 'kind': 'dense', 'weights': weights, 'acts': acts,
       'sqnr_db': 6.0 * min(weights, acts) + i}
      for i, path in enumerate(SITES)
    ]  # fmt: skip
  row = {
      'name': name, 'method': 'dynamic per token', 'weight_bits': weights,
      'act_bits': acts, 'loss': 0.21, 'top1': top1, 'top5': 0.99,
      'f1_macro': top1, 'num_examples': 360, 'size_bytes': 31_000 * weights,
      'compression': 32 / weights, 'bops': 1e9, 'macs': 1e6,
      'latency_ms': {'median': 4.0, 'p10': 3.5, 'p90': 4.75},
      'images_per_second': 8000.0, 'speedup': 1.125, 'speedup_bf16': None,
      'peak_memory_bytes': 6_100_000, 'execution': execution, 'why': '',
      'per_class_top1': (hits / 36).tolist(), 'confusion': confusion.tolist(),
      'agreement': 0.987654321, 'sqnr_db': 30.25,
      'artifact_bytes': 32_000 * weights, 'seconds': 2.5, 'collapsed': False,
      'suspects': [], 'classes_predicted': CLASSES, 'sites': sites,
  }  # fmt: skip
  return row | more


def timed(**more):
  """What a row says of another runtime."""
  found = {
    'version': '9.1', 'profile': 'qdq', 'images_per_second': 1234.5,
    'latency_ms': {'median': 2.0, 'p10': 1.5, 'p90': 2.5}, 'speedup': 2.75,
    'kernels': {'integer': 18, 'packed': 0, 'float': 0}, 'note': None,
  }  # fmt: skip
  return found | more


def make_results():
  baseline = make_row('fp32', 32, 32, 0.9806, 'float', why='a float row')
  rows = [
    copy.deepcopy(baseline),
    make_row('bf16', 16, 16, 0.9805, 'float', why='a float row', sites=None),
    make_row('int8_static', 8, 8, 0.9778),
    make_row('mixed_variance', 5, 7, 0.9722, weight_bits=4.73, act_bits=6.5),
    make_row('int4_weight_only', 4, 32, 0.9694, 'simulated',
             why='products in float', latency_ms=None, top5=None),
    make_row('w4a4 at $5 & $6', 4, 4, 0.9611, per_class_top1=None),
    make_row('w2a2+plain', 2, 2, 0.1083, collapsed=True, classes_predicted=2,
             suspects=['block_00/mlp/fc1: 1.2 dB', 'head: 2.0 dB']),
  ]  # fmt: skip
  del rows[3]['f1_macro'], rows[3]['suspects'], rows[4]['confusion']
  rows[2]['per_class_top1'][3] = None
  histogram = {
    'kind': 'input of fc1', 'site': SITES[2], 'edges': [-4.0, 8.0],
    'counts': [0, 3, 900, 12000, 700, 5, 0, 1],
    'ranges': {'int8_static': [-3.0, 5.0]},
  }  # fmt: skip
  sites = [
      {'path': path, 'kind': 'dense', 'sqnr_db': 3.5 + i, 'agreement': 0.9}
      for i, path in enumerate(SITES)
  ]  # fmt: skip
  curve = [
      {'name': f'w3a3_seed{seed}', 'spec': 'w3a3', 'recipe': 'lsq',
       'seed': seed, 'settings': 'ab', 'top1_last': 0.9 + 0.02 * seed}
      for seed in range(3)
  ]  # fmt: skip
  return {
    'environment': {'python': '3.11', 'platform': 'cpu', 'device': 'cpu',
                    'num_devices': 1, 'packages': {'jax': '0.10.2'}},
    'config_digest': 'c0ffee', 'weights_digest': 'beef', 'model': 'vit S/4',
    'data': {'name': 'digits', 'split': 'test'}, 'baseline': baseline,
    'rows': rows, 'qat': [make_row('run w3a3', 3, 3, 0.975)],
    'curve': curve,
    'histograms': [histogram], 'sensitivity': {'spec': 'w4a4', 'sites': sites},
  }  # fmt: skip


def make_bare(row):
  """Returns results of one row without a measurement besides."""
  return {'baseline': row, 'rows': [row], 'environment': {}}


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  """The folder of a full report."""
  place = tmp_path_factory.mktemp('report')
  assert page.write(place, make_results()) == place / 'report.html'
  return place


@pytest.fixture(scope='module')
def text(report):
  return (report / 'report.html').read_text(encoding='utf-8')


def table_lines(text):
  """Returns the cells of the main tables, by the name of the row."""
  lines = {}
  for part in text.split('<table class="cards main">')[1:]:
    for line in part.split('</table>')[0].split('<tr')[2:]:
      name, *cells = re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', line)
      lines[name] = lines.get(name, []) + cells
  return lines


def test_every_row_and_its_accuracy_stand_in_the_table(text):
  lines = table_lines(text)
  results = make_results()
  for row in results['rows'] + results['qat']:
    cells = lines[row['name'].replace('&', '&amp;')]
    assert cells[3] == f'{100 * row["top1"]:.2f}'
  assert lines['mixed_variance'][1:3] == ['4.73', '6.5']
  assert lines['int8_static'][10:13] == ['4.00', '3.50', '4.75']
  assert lines['int8_static'][-1] == 'integer'
  names = list(lines)
  assert (
    names.index('run w3a3') == names.index('Quantization-aware training') + 1
  )


def test_what_was_not_measured_is_a_dash(text):
  lines = table_lines(text)
  assert lines['int4_weight_only'][4] == '-'  # top-5 is null
  assert lines['int4_weight_only'][10:13] == ['-', '-', '-']
  assert lines['mixed_variance'][5] == '-'  # no macro F1 at all
  assert 'None' not in text
  assert 'Undefined' not in text


def test_a_row_has_its_interval_and_its_test_against_float(tmp_path):
  row = make_row('w4a4', 4, 4, 0.5) | {
    'top1_interval': [0.4531, 0.5469],
    'paired': {'gained': 3, 'lost': 11, 'p': 0.0574},
  }  # fmt: skip
  text = page.write(tmp_path, make_bare(row)).read_text()
  part = text.split('<table class="cards certainty">')[1].split('</table>')[0]
  line = part[part.index('w4a4') :]
  cells = re.findall(r'<td[^>]*>(.*?)</td>', line)[:4]
  assert cells == ['50.00', '45.3 to 54.7', '+3 -11', '0.057']


def test_rows_not_in_integers_say_why(text):
  part = text.split('do not run in integers')[1].split('</ul>')[0]
  assert '<strong>int4_weight_only</strong> (simulated): products' in part
  assert part.count('a float row') == 2
  assert 'int8_static' not in part


def test_collapsed_rows_are_in_a_banner_with_their_suspects(text):
  banner = text.split('role="alert"')[1].split('</section>')[0]
  assert 'w2a2+plain' in banner
  assert '10.83 % against 98.06 % in float' in banner
  assert '2 of 10 classes predicted' in banner
  assert 'block_00/mlp/fc1: 1.2 dB, head: 2.0 dB' in banner
  assert 'int8_static' not in banner
  assert text.index('role="alert"') < text.index('<dl>')


def test_without_a_collapse_there_is_no_banner(tmp_path):
  row = make_row('fp32', 32, 32, 0.98, 'float')
  bare = {key: row[key] for key in ('name', 'execution', 'collapsed')}
  path = page.write(tmp_path, make_bare(bare))
  assert 'role="alert"' not in path.read_text()


def test_full_precision_is_folded_away(text):
  folded = text.split('<details>', 1)[1]
  assert '0.987654321' in folded
  assert folded.count('<details>') == 2  # and SQNR by site, and sensitivity
  assert 'median 4.0, p10 3.5, p90 4.75' in folded


def test_the_page_is_well_formed_and_its_ids_are_its_own(text):
  reader = Reader(text)
  assert len(reader.ids) == len(set(reader.ids)) > 100
  inner = {r[1:] for r in reader.references if r.startswith('#')}
  assert inner
  assert inner <= set(reader.ids)


def test_the_page_loads_nothing(text):
  reader = Reader(text)
  assert all(r.startswith(('#', 'data:image/png')) for r in reader.references)
  assert not reader.tags & {'script', 'link', 'iframe', 'object', 'base'}
  assert 'http:' not in text
  assert 'https:' not in text
  assert '@import' not in text


def test_every_figure_is_on_the_page_and_a_png(report, text):
  names = {figure.__name__ for figure in page.FIGURES}
  assert len(names) == 10
  assert {p.name for p in (report / 'figures').iterdir()} == {
    f'{name}.png' for name in names
  }
  assert text.count('<svg') == text.count('<figcaption>') == 10
  for path in (report / 'figures').iterdir():
    with PIL.Image.open(path) as image:
      image.load()
      assert image.format == 'PNG'
      assert min(image.size) > 300
      assert len(image.convert('L').getcolors()) > 20  # something is drawn
  words = set(Reader(text).texts['text'])
  assert {'Pareto front', 'w4a4 at $5 & $6', 'block_00/mlp/fc1'} <= words


def test_the_same_results_give_the_same_files(report, text, tmp_path):
  again = page.write(tmp_path, make_results())
  assert again.read_text(encoding='utf-8') == text
  for path in (report / 'figures').iterdir():
    assert (tmp_path / 'figures' / path.name).read_bytes() == path.read_bytes()


def test_names_are_text_never_markup(tmp_path):
  row = make_row('<script>alert(1)</script>', 4, 4, 0.5, 'simulated',
                 why='<b>"why', collapsed=True, suspects=['<i>&'],
                 sites=None, confusion=None)  # fmt: skip
  path = page.write(tmp_path, make_bare(row) | {'model': '<img src=x>'})
  text = path.read_text()
  reader = Reader(text)
  assert not reader.tags & {'script', 'b', 'i', 'img'}
  assert text.count('&lt;script&gt;alert(1)&lt;/script&gt;') >= 5
  assert '&lt;b&gt;&#34;why' in text


def test_figures_that_no_longer_exist_are_removed(tmp_path):
  folder = tmp_path / 'figures'
  folder.mkdir()
  for name in ('confusion.png', 'latency.png', 'mine.png'):
    (folder / name).write_bytes(b'old')
  nothing = dict.fromkeys(make_row('w4a4', 4, 4, 0.5)) | {'name': 'w4a4'}
  path = page.write(tmp_path, make_bare(nothing) | {'qat': None})
  assert [p.name for p in folder.iterdir()] == ['mine.png']
  assert table_lines(path.read_text())['w4a4'] == ['-'] * 20
  Reader(path.read_text())


def test_one_row_gets_its_figures(tmp_path):
  row = make_row('w8a8', 8, 8, 0.9, sites=None)
  page.write(tmp_path, {'rows': [row]})  # not even a baseline
  drawn = {path.stem for path in (tmp_path / 'figures').iterdir()}
  assert drawn == {
      'accuracy_vs_bits', 'accuracy_vs_size', 'latency', 'size', 'confusion',
  }  # fmt: skip


def test_a_baseline_that_is_no_row_comes_first():
  rows = [make_row('w8a8', 8, 8, 0.9)]
  baseline = make_row('fp32', 32, 32, 0.9, 'float')
  found = page.ptq_rows({'baseline': baseline, 'rows': rows})
  assert [row['name'] for row in found] == ['fp32', 'w8a8']
  found = page.ptq_rows({'baseline': baseline, 'rows': found})
  assert [row['name'] for row in found] == ['fp32', 'w8a8']


@pytest.mark.parametrize('seed', range(20))
def test_the_pareto_front_is_what_no_point_beats(seed):
  rng = random.Random(seed)
  points = [(rng.randrange(8), rng.randrange(8)) for _ in range(seed + 1)]

  def beats(a, b):
    return a != b and a[0] <= b[0] and a[1] >= b[1]

  front = figures.pareto_front(points)
  assert sorted(front) == [
    i for i, b in enumerate(points) if not any(beats(a, b) for a in points)
  ]
  for i, j in itertools.pairwise(front):
    assert points[i][0] <= points[j][0]


def with_engines():
  """Results in which one row runs in two runtimes, and one in none."""
  results = make_results()
  why = 'head has activations of 16 bits, for which ONNX has no form'
  nothing = dict.fromkeys(timed()) | {'note': why}
  results['rows'][2]['engines'] = {
    'onnxruntime': timed(),
    'openvino': timed(images_per_second=2345.5, speedup=3.25),
  }
  results['rows'][1]['engines'] = {'onnxruntime': nothing, 'openvino': nothing}
  return results, why


def test_other_runtimes_have_columns_of_their_own(tmp_path):
  results, why = with_engines()
  text = page.write(tmp_path, results).read_text()
  Reader(text)
  table = text.split('<table class="cards main">')[2].split('</table>')[0]
  assert table.count('<th>its float32<small>times</small></th>') == 2
  row = table[table.index('int8_static') :].split('</tr>')[0]
  cells = re.findall(r'<td[^>]*>([^<]*)</td>', row)
  start = cells.index('1234.5')
  assert cells[start : start + 4] == ['1234.5', '2.75', '2345.5', '3.25']
  lengths = {
    line.count('<td') for line in table.split('<tr')[2:] if '<td' in line
  }
  assert len(lengths) == 1  # rows that no runtime has, too
  assert f'<strong>bf16</strong> (onnxruntime, openvino): {why}' in text


def test_the_figure_of_latency_shows_every_runtime(tmp_path):
  results, _ = with_engines()
  lines, engines = page.FIGURES[figures.latency](results)
  assert engines == ['onnxruntime', 'openvino']
  svg, _ = figures.render(figures.latency, lines, engines)
  assert all(f'>{name}<' in svg for name in (*engines, 'ours', 'ours, float'))
  svg, _ = figures.render(figures.latency, *page.FIGURES[figures.latency](
    make_results()
  ))  # fmt: skip
  assert 'ours' not in svg
