"""Why a run that is started again has nothing left to train."""

import ml_collections
import pytest

from qvit_jax.training import ends

EARLY = 'stopped early at step 6: no better top1 in 2 evaluations'


@pytest.mark.parametrize(
  ('fields', 'stale', 'total', 'reason', 'wanted'),
  [
    ({'steps': 6}, 0, 6, 'all 6 steps (train.steps) are done',
     'set --config.train.steps to more than 6'),
    ({'epochs': 1.5}, 0, 6, 'all 6 steps (train.epochs) are done',
     'set --config.train.steps to more than 6'),
    ({'steps': 3}, 0, 3, 'stopped at step 6: all 3 steps',
     'set --config.train.steps to more than 6'),
    ({'steps': 9, 'patience': 2}, 2, 9, EARLY,
     'set --config.train.patience=3 or more, or 0'),
    ({'steps': 6, 'patience': 2}, 4, 6, 'all 6 steps',
     'than 6 and set --config.train.patience=5'),
  ],
)  # fmt: skip
def test_the_reason_and_what_to_do(fields, stale, total, reason, wanted):
  train = {'steps': 0, 'epochs': 0.0, 'patience': 0} | fields
  config = ml_collections.ConfigDict(train)
  text = ends.why_over(config, done=6, total=total, stale=stale)
  assert reason in text
  assert 'nothing is trained. To go on, ' in text
  assert wanted in text
  assert '\n' not in text


@pytest.mark.parametrize(
  ('patience', 'stale'), [(0, 9), (3, 2), (1, 0)]
)  # fmt: skip
def test_a_run_that_goes_on_says_nothing(patience, stale):
  config = ml_collections.ConfigDict(
    {'steps': 9, 'epochs': 0.0, 'patience': patience}
  )
  assert not ends.why_over(config, done=6, total=9, stale=stale)
