"""What the PTQ report says beside its rows, without a model."""

import json

import numpy as np
import pytest

from qvit_jax import data as data_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import findings, first_state, qat_runs
from qvit_jax.ops import Site
from qvit_jax.quantization.ptq.calibrate import OperandStats, SiteStats
from qvit_jax.report import rows
from qvit_jax.training.loop import Progress
from tests.conftest import make_digits_config

CLASSES, COUNT = 10, 200
LABELS = np.arange(COUNT) % CLASSES


def collapsed(named, base):
  """Returns the mark of a row that names classes where float names `base`."""
  confusion = np.zeros((CLASSES, CLASSES), int)
  np.add.at(confusion, (LABELS, named), 1)
  metrics = {
    'top1': (named == LABELS).mean(),
    'confusion': confusion,
    'agreement': (named == base).mean(),
  }
  return findings.collapse(metrics, np.eye(CLASSES)[base], LABELS, None)


@pytest.mark.parametrize(
  'base',
  [
    np.full(COUNT, 3),  # barely trained: one class
    np.where(np.arange(COUNT) < 190, 0, LABELS),  # all but one
    LABELS,
    (LABELS + 1) % CLASSES,  # a good model of another order of classes
  ],
)
def test_rows_that_agree_with_float_have_not_collapsed(base):
  assert not collapsed(base, base)['collapsed']
  near = np.where(np.arange(COUNT) < 190, base, 0)
  assert not collapsed(near, base)['collapsed']


@pytest.mark.parametrize(
  ('named', 'base'),
  [
    (np.full(COUNT, 3), LABELS),  # narrow
    (np.where(np.arange(COUNT) < 130, LABELS, 0), LABELS),  # far below
    (np.full(COUNT, 3), np.full(COUNT, 4)),  # nothing of a poor model is left
    ((LABELS + 2) % CLASSES, (LABELS + 1) % CLASSES),
  ],
)
def test_rows_that_lost_float_have_collapsed(named, base):
  assert collapsed(named, base)['collapsed']


# What calibration saw.


@pytest.mark.parametrize('positions', [1, 3])
def test_numbers_of_activations_are_those_of_the_values(positions):
  values = np.random.default_rng(0).normal(1, 2, (40_000, positions))
  values[:40] = 90.0  # outliers
  ends = values.min(axis=0), values.max(axis=0)
  counts = np.stack([
    np.histogram(x, 2048, (x.min(), x.max()))[0] for x in values.T
  ])  # fmt: skip
  shape = (positions,) if positions > 1 else ()
  low, high = (end.astype(np.float32).reshape(shape) for end in ends)
  operand = OperandStats(low, high, low, high, counts.reshape(*shape, 2048))
  bare = OperandStats(low, high, low, high, None)
  site = Site('fc', 'dense', (1,), (1, 1), 1)
  stats = {'fc': SiteStats(operand, bare)}
  found = findings.activation_stats([site], stats)
  assert set(found['fc']) == {'lhs'}
  one = json.loads(json.dumps(found))['fc']['lhs']
  width = (values.max() - values.min()) / 2048
  assert one['low'] == pytest.approx(values.min())
  assert one['high'] == pytest.approx(90)
  assert one['mean'] == pytest.approx(values.mean(), abs=width)
  assert one['std'] == pytest.approx(values.std(), abs=width)
  for percent, value in one['percentiles'].items():
    wanted = np.percentile(values, float(percent))
    assert value == pytest.approx(wanted, abs=2 * width)
  assert one['outliers'] == pytest.approx(40 / 40_000)
  assert ('counts' in one) == (positions == 1)


# What numbers are of.


def evaluated(**fields):
  config = make_digits_config()
  config.update_from_flattened_dict(fields)
  return data_lib.open_data(config, training=False).evaluated


def test_each_split_and_share_has_a_digest_of_its_own():
  test, again = evaluated(), evaluated(**{'eval.batch_size': 7})
  assert test == again
  assert (test['split'], test['data']['name']) == ('test', 'digits')
  others = [
    evaluated(**{'data.eval_split': 'train'}),
    evaluated(**{'eval.num_examples': 200}),
    test,
  ]
  assert len({one['data']['digest'] for one in others}) == 3


def write_qat_run(place, **of):
  """The results.json of a quantized training, of the given images."""
  row = {'method': 'lsq', 'confusion': np.eye(10).tolist(), 'top1': 0.9, **of}
  place.mkdir(exist_ok=True)
  (place / 'results.json').write_text(json.dumps({'baseline': row}))
  return str(place)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'data.eval_split': 'train'}, "of split 'train' of digits"),
    ({'eval.num_examples': 200}, "of split 'test' of digits"),
    (None, 'it does not name'),
  ],
)
def test_runs_evaluated_on_other_images_are_refused(tmp_path, fields, message):
  config, here = make_digits_config(), evaluated()
  path = write_qat_run(tmp_path / 'run', **here)
  assert findings.qat_row(path, config, here)['name'] == 'run'
  of = evaluated(**fields) if fields else {}
  path = write_qat_run(tmp_path / 'run', **of)
  with pytest.raises(ConfigError, match=message) as raised:
    findings.qat_row(path, config, here)
  text = str(raised.value)
  assert '--config.data.eval_split=test' in text and '\n' not in text
  assert '--config.eval.num_examples=0' in text


def test_a_run_evaluated_before_its_data_changed_is_refused(tmp_path):
  config, here = make_digits_config(), evaluated()
  before = {**here, 'data': {**here['data'], 'digest': 'of then'}}
  path = write_qat_run(tmp_path / 'run', **before)
  with pytest.raises(ConfigError) as raised:
    findings.qat_row(path, config, here)
  text = str(raised.value)
  assert "are of split 'test' of digits (digest of then), those of" in text
  assert '--mode=eval' in text and '\n' not in text


def test_results_of_unlike_images_are_not_put_side_by_side():
  of = {**evaluated(), 'num_examples': 360}
  base = rows.make_row(name='fp32', **of)
  found = rows.results({}, base, [base])
  assert {key: found[key] for key in of} == of
  for key, value in (('split', 'train'), ('data', {}), ('num_examples', 2)):
    other = {**base, key: value}
    with pytest.raises(ValueError, match='other data'):
      rows.results({}, base, [base, other])


@pytest.mark.parametrize(
  ('best', 'changed', 'kept'),
  [
    ({}, ['eval.num_examples'], False),  # of an older version
    ({}, ['optim.lr'], True),
    (evaluated(), ['eval.batch_size'], True),
    (evaluated(**{'eval.num_examples': 9}), [], False),
  ],
)
def test_a_resumed_run_forgets_the_best_of_other_images(best, changed, kept):
  progress = Progress(
    best={'top1': 0.5, **best}, best_step=2, stale=1, evaluated_step=2
  )
  lines = first_state._forget_other_data(evaluated(), progress, changed)
  assert bool(lines) != kept
  if kept:
    assert progress.best == {'top1': 0.5, **evaluated()}
  else:
    assert (progress.best, progress.best_step) == (None, None)
    assert (progress.stale, progress.evaluated_step) == (0, 0)


def test_points_of_other_splits_are_left_out_with_a_note():
  config = make_digits_config()
  run = json.loads(json.dumps(config.to_dict()))
  assert qat_runs._reads_alike(run, config)
  run['data']['eval_split'] = 'train'
  assert not qat_runs._reads_alike(run, config)
