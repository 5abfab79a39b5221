"""What the PTQ report says beside its rows, without a model."""

import json

import numpy as np
import pytest

from qvit_jax import data as data_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import findings, first_state, qat_runs
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
