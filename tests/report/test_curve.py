"""Accuracy against bits: which runs, their points, intervals, the page."""

import json
import math

import pytest

from configs import scaling_law
from qvit_jax import models, modes
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import CheckpointError, ConfigError, Preempted
from qvit_jax.experiment import calibration
from qvit_jax.experiment import qat_runs as curve
from qvit_jax.modes import ptq as ptq_mode
from qvit_jax.quantization import build_plan
from qvit_jax.quantization.ptq import plans
from qvit_jax.quantization.ptq import rows as rows_lib
from qvit_jax.report import curves
from qvit_jax.store import files
from tests.conftest import make_digits_config, notes_of
from tests.small_models import products
from tests.training.test_resume import end_state, rows, stop_after


def curve_config(start, **fields):
  """Two seeds of four updates at 4 bits, beside one row."""
  config = make_digits_config()
  config.checkpoint.path = str(start)
  config.quant.rules = (('patch_embed', 'w8a8'),)
  config.train.steps, config.eval.every = 4, 2
  config.ptq.update(
      rows=('fp32', 'w4a4+plain'), calibration_examples=16, rounds=2,
      latency_batch=4, qat_specs=('w4a4',), qat_seeds=2,
  )  # fmt: skip
  config.quant.recipe = fields.pop('recipe', 'aqt')
  config.ptq.update(fields)
  return config


def read(place):
  return json.loads((place / 'results.json').read_text())


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """The workdir of a float run."""
  config = make_digits_config()
  config.train.steps = config.eval.every = 60
  config.optim.lr = 3e-3
  workdir = tmp_path_factory.mktemp('float')
  modes.run('train', config, str(workdir))
  return workdir


@pytest.fixture(scope='module')
def measured(start, tmp_path_factory):
  """The workdir of a table whose first training was stopped once."""
  place = tmp_path_factory.mktemp('curve')
  with pytest.MonkeyPatch.context() as context:
    stop_after(context, 3)
    with pytest.raises(Preempted, match='SIGTERM after step 3'):
      modes.run('ptq', curve_config(start), str(place))
  assert not (place / 'results.json').exists()
  modes.run('ptq', curve_config(start), str(place))
  return place


@pytest.mark.slow
def test_points_are_those_of_ordinary_runs(start, measured, tmp_path):
  """The second seed by hand; the first one was stopped and went on."""
  points = read(measured)['curve']
  assert [p['name'] for p in points] == ['w4a4_seed0', 'w4a4_seed1']
  for seed, point in enumerate(points):
    config = curve_config(start)
    config.seed = seed
    config.quant.update(recipe='aqt', default='w4a4', attention='a4')
    modes.run('train', config, str(tmp_path / str(seed)))
    alone, own = tmp_path / str(seed), measured / 'qat' / point['name']
    assert rows(own) == rows(alone)
    assert end_state(own)[1] == end_state(alone)[1]
    last, best = rows(alone, 'eval')[-1], read(alone)['baseline']
    assert (point['top1_last'], point['step_last']) == (last['top1'], 4)
    assert point['top1_best'] == best['top1']
    assert (point['recipe'], point['seed']) == ('aqt', seed)
    assert point['weight_bits'] == best['weight_bits'] > 4  # the stem's 8
  assert points[0]['settings'] == points[1]['settings']
  # The same runs given by path are the same points.
  found = curve.given([str(tmp_path / '0'), str(tmp_path / '1')])
  assert [p | {'name': ''} for p in found] == [p | {'name': ''} for p in points]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('file', 'old', 'new'),
  [
    ('config.json', '"quant"', '"qvant"'),
    ('config.json', '', '[]'),
    ('metrics.jsonl', '"step"', '"stdp"'),
    ('results.json', '"act_bits"', '"act_cits"'),
  ],
)
def test_numbers_of_a_run_that_are_damaged_are_one_error(
  file, old, new, measured, tmp_path
):
  for name in ('config.json', 'metrics.jsonl', 'results.json'):
    text = (measured / 'qat' / 'w4a4_seed0' / name).read_text()
    (tmp_path / name).write_text(text)
  assert len(curve.given([str(tmp_path)])) == 1
  text = (tmp_path / file).read_text()
  (tmp_path / file).write_text(text.replace(old, new) if old else new)
  with pytest.raises(CheckpointError, match='no results of a finished'):
    curve.given([str(tmp_path)])


@pytest.mark.slow
def test_a_second_call_trains_nothing(start, measured, monkeypatch, capsys):
  def train(*given, **more):
    raise AssertionError('trained again')

  monkeypatch.setattr(ptq_mode, 'train', train)
  before = read(measured)
  # Neither the table's rows nor log lines change what a run is, and a run
  # that is named besides is no further seed.
  again = str(measured / 'qat' / 'w4a4_seed0')
  config = curve_config(start, rows=('fp32',), qat_runs=(again,))
  config.log.every = 1
  modes.run('ptq', config, str(measured))
  out = capsys.readouterr().out
  assert 'qat       2 runs: w4a4, 2 seed(s) each, recipe aqt, 4 steps' in out
  assert 'rules: 1 of quant.rules in every row; fp32 stay float\n' in out
  assert 'qat 1/2 w4a4 seed 0: done before, top1 ' in out
  assert 'qat 2/2 w4a4 seed 1: done before, top1 ' in out
  assert read(measured)['curve'] == before['curve']
  modes.run('ptq', curve_config(start), str(measured))


@pytest.mark.slow
def test_a_run_of_other_settings_or_weights_is_refused(
  start, measured, tmp_path
):
  config = curve_config(start)
  config.optim.lr = 0.5
  with pytest.raises(ConfigError, match=r'optim\.lr=0\.001, not 0\.5; set it'):
    modes.run('ptq', config, str(measured))
  run = curve.plan(curve_config(start), notes_of)[0]
  place = measured / 'qat' / run.name
  with pytest.raises(ConfigError, match='from other float weights; delete'):
    curve._record(place, run, 'another digest')
  (tmp_path / 'point.json').write_text('{}')
  with pytest.raises(ConfigError, match='no record of a run .KeyError'):
    curve._record(tmp_path, run, '')


def test_a_point_of_images_that_changed_is_refused(start, tmp_path):
  config = curve_config(start)
  run = curve.plan(config, notes_of)[0]
  folder = tmp_path / 'qat' / run.name
  folder.mkdir(parents=True)
  record = curve._record(folder, run, calibration.digest({}))
  here = {'split': 'test', 'data': {'name': 'digits', 'digest': 'of now'}}
  there = {'split': 'test', 'data': {'name': 'digits', 'digest': 'of then'}}
  record['point'] = there
  files.write_json(folder / 'point.json', record)
  with pytest.raises(ConfigError, match="other images than 'test' of digits"):
    curve.measure(
      [run], config, params={}, place=tmp_path, train=modes.run, say=print,
      evaluated=here,
    )  # fmt: skip


@pytest.mark.slow
def test_the_page_shows_means_and_seeds(measured):
  result = read(measured)
  tops = [100 * p['top1_last'] for p in result['curve']]
  (plain,) = (r for r in result['rows'] if r['name'] == 'w4a4+plain')
  # The rule of the page reached the row: the stem has 8 bits, so that the mean
  # is above 4, as in the runs.
  runs = result['curve'][0]
  assert plain['weight_bits'] == runs['weight_bits'] > 4
  assert plain['act_bits'] == runs['act_bits']
  assert plain['method'] == 'dynamic per token, quant.rules, plain min-max'
  error = abs(tops[0] - tops[1]) / 2  # of two values
  lines = {line[0]: line for line in curves.table(result)}
  assert lines['fp32'][1] == f'{100 * result["baseline"]["top1"]:.2f}'
  assert lines['w4a4'] == [
    'w4a4', '-', f'{100 * plain["top1"]:.2f}', f'{sum(tops) / 2:.2f}',
    f'{error:.2f}', '2',
    f'{tops[0]:.2f} (seed 0), {tops[1]:.2f} (seed 1)', 'aqt',
  ]  # fmt: skip
  text = (measured / 'report.html').read_text()
  part = text.split('<table class="curve">')[1].split('</table>')[0]
  for cell in lines['w4a4']:
    assert f'>{cell}</td>' in part
  assert 'last evaluation' in text
  assert 'QAT aqt' in text
  assert (measured / 'figures' / 'accuracy_curve.png').stat().st_size > 5000


def make_point(spec, seed, top1, settings='a', recipe='lsq'):
  return {
    'name': f'{spec}_{seed}', 'spec': spec, 'seed': seed, 'recipe': recipe,
    'settings': settings, 'top1_last': top1,
  }  # fmt: skip


def test_the_standard_error_of_three_seeds():
  mean, error = curves.interval([90.0, 93.0, 96.0])
  assert mean == pytest.approx(93.0)
  assert error == pytest.approx(3 / math.sqrt(3))
  assert curves.interval([90.0]) == (90.0, None)


def test_trainings_are_kept_apart():
  """Other settings of one recipe, and other bits of activations."""
  points = [
    make_point('w4a4', 1, 0.5), make_point('w4a4', 0, 0.25),
    make_point('w2a2', 0, 0.125), make_point('w4a8', 0, 0.75),
    make_point('w4a4', 0, 0.625, settings='b'),
    make_point('w4a4', 0, 0.875, recipe='aqt'),
  ]  # fmt: skip
  table = [
    {'name': 'w4a4', 'top1': 0.5}, {'name': 'bf16', 'top1': 1.0},
    {'name': 'int8_static', 'top1': 0.9},
  ]  # fmt: skip
  results = {'curve': points, 'rows': table, 'baseline': {'top1': 1.0}}
  found = [(line[0], line[3], line[5]) for line in curves.table(results)]
  assert found == [
    ('bf16', '-', '-'), ('w4a8', '75.00', '1'), ('w4a4', '87.50', '1'),
    ('w4a4', '37.50', '2'), ('w4a4', '62.50', '1'), ('w2a2', '12.50', '1'),
  ]  # fmt: skip
  trained, lines, base = curves.data(results)
  assert trained == [
    ('QAT aqt', [(4, [87.5])]),
    ('QAT lsq, settings a', [(2, [12.5]), (4, [25.0, 50.0])]),
    ('QAT lsq, settings a, activations 8 bits', [(4, [75.0])]),
    ('QAT lsq, settings b', [(4, [62.5])]),
  ]
  assert lines == {'PTQ': [(4, 50.0), (16, 100.0)]}
  assert base == 100.0
  assert curves.table({'rows': table}) == []


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'qat_specs': ('w4',)}, "'w4' gives no bits to activations; write wXaY"),
    ({'qat_specs': ('a4',)}, "'a4' gives no bits to weights"),
    ({'qat_specs': ('float',)}, "'float' gives no bits to weights"),
    ({'qat_specs': ('int4',)}, "ptq.qat_specs='int4' is no spec"),
    ({'qat_specs': ('w1a4',)}, '1 bits; allowed are 2 to 8'),
    ({'qat_specs': ('w4a4', 'w4a4')}, 'names w4a4 twice'),
    ({'recipe': 'none'}, "quant.recipe='none' trains no bits; set"),
    ({'recipe': 'ptq'}, "quant.recipe='ptq' stands for a packed model"),
    ({'qat_seeds': 0}, 'ptq.qat_seeds=0 is not allowed; allowed: a number >='),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, fields, message):
  config = curve_config('nowhere', **fields)
  with pytest.raises(ConfigError) as error:
    modes.run('ptq', config, str(tmp_path / 'new'))
  assert message in str(error.value)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'new').exists()


def test_a_config_that_cannot_train_is_refused_first():
  config = curve_config('nowhere')
  config.quant.rules = (('blok', 'w8a8'),)
  with pytest.raises(ConfigError, match="'blok' matches nothing"):
    curve.plan(config, notes_of)
  config.quant.rules = ('patch_embed',)  # no pair
  with pytest.raises(ConfigError, match=r'quant\.rules'):
    curve.plan(config, notes_of)
  config = curve_config('nowhere')
  config.train.feature_weight = 1.0  # of a teacher that there is not
  with pytest.raises(ConfigError, match=r'train\.teacher is empty'):
    curve.plan(config, notes_of)


def test_training_fields_count_where_the_table_trains():
  config = curve_config('nowhere')
  validate = lambda *names: notes_of(
    config, mode='ptq', overrides=names
  )
  assert validate('optim.lr', 'train.steps', 'quant.rules', 'log.every') == []
  assert validate('quant.default', 'export.layout') == [
    '--config.quant.default has no effect in --mode=ptq',
    '--config.export.layout has no effect in --mode=ptq',
  ]
  with pytest.raises(ConfigError, match="quant.recipe='aqt' does not read it"):
    validate('quant.zero_point')
  config.quant.recipe = 'lsq'
  assert validate('quant.zero_point') == []
  config.ptq.update(qat_specs=(), qat_seeds=1)
  assert len(validate('optim.lr', 'log.every')) == 2
  with pytest.raises(ConfigError, match=r'ptq\.qat_specs is empty'):
    validate('ptq.qat_seeds')


@pytest.mark.parametrize(
  ('recipe', 'steps', 'trained'),
  [
    ('aqt', 'per_tensor', ('params',)),
    ('statsq', 'per_tensor', ('params', 'quant')),
    ('statsq', 'per_token', ('params',)),
  ],
)
def test_runs_train_what_there_is(recipe, steps, trained):
  config = curve_config('nowhere')
  config.quant.recipe, config.quant.act_granularity = recipe, steps
  runs = curve.plan(config, notes_of)
  assert {run.config.train.trainable for run in runs} == {trained}
  assert [run.config.seed for run in runs[:2]] == [0, 1]
  assert config.train.trainable == ('auto',)


@pytest.mark.slow
def test_the_config_asks_for_five_widths_and_three_seeds():
  runs = curve.plan(scaling_law.get_config(), notes_of)
  assert [run.name for run in runs[:4]] == [
    'w8a8_seed0', 'w8a8_seed1', 'w8a8_seed2', 'w6a6_seed0',
  ]  # fmt: skip
  assert len(runs) == 15
  quant = runs[-1].config.quant
  assert (quant.recipe, quant.default, quant.attention) == ('lsq', 'w2a2', 'a2')
  assert runs[-1].config.train.trainable == ('params', 'quant')
  # The stem as in the rows of PTQ.
  config = runs[-1].config
  there = plans.plan_row(rows_lib.parse_row('w2a2'), products(config))
  here = build_plan(quant, models.list_sites(config))
  assert here.by_path == there.by_path
  assert str(here.by_path['patch_embed']) == 'w2a8'


def test_rules_reach_the_runs_and_the_rows_of_the_curve():
  config = curve_config('nowhere', qat_specs=('w3a3',))
  config.quant.rules = (('head|fc1', 'w8a6'), ('block_00/attn/qk', 'a5'))
  run = curve.plan(config, notes_of)[0].config
  there = plans.plan_row(
    rows_lib.parse_row('w3a3'), products(config, config.quant.rules)
  )
  here = build_plan(run.quant, models.list_sites(run))
  assert here.by_path == there.by_path
  assert str(here.by_path['head']) == 'w8a6'
  assert str(here.by_path['patch_embed']) == 'w3a8'


def write_run(place, seed, spec='w4a4', **fields):
  """The files of a finished training that the curve reads."""
  config = make_digits_config()
  config.seed = seed
  stem = (('^patch_embed$', f'{spec[:2]}a8'),)
  config.quant.update(
    recipe='lsq', default=spec, attention=spec[2:], rules=stem
  )
  config.update_from_flattened_dict(fields)
  place.mkdir()
  row = {'weight_bits': 4, 'act_bits': 4}
  (place / 'results.json').write_text(json.dumps({'baseline': row}))
  (place / 'config.json').write_text(json.dumps(config_lib.to_json(config)))
  line = {'split': 'eval', 'step': 2, 'top1': 0.5}
  (place / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  return str(place)


def test_only_runs_of_one_start_are_seeds_of_one_training(tmp_path):
  start = {'checkpoint.path': 'runs/float'}
  paths = [
    write_run(tmp_path / '0', 0, **start),
    write_run(tmp_path / '1', 1, spec='w2a2', **start),
    write_run(tmp_path / '2', 1, **{'checkpoint.path': 'runs/other'}),
    write_run(tmp_path / '3', 1),
    write_run(tmp_path / '4', 1, **start, **{
        'quant.rules': (('^patch_embed$', 'w8a8'),)}),
  ]  # fmt: skip
  found = [point['settings'] for point in curve.given(paths)]
  assert found[0] == found[1]  # the stem's bits go along the curve
  assert len(set(found)) == 4


def test_the_range_counts_where_steps_start_from_calibration():
  config = curve_config('nowhere', recipe='lsq', range='minmax')
  settings = lambda: curve._settings(config_lib.to_json(config))
  assert 'ptq.range' not in settings()
  config.quant.calibration_path = 'somewhere'
  assert settings()['ptq.range'] == 'minmax'
