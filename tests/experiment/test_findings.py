"""What the PTQ report says beside its rows, without a model."""

import numpy as np
import pytest

from qvit_jax.experiment import findings

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
