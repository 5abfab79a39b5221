"""Metrics beside scikit-learn's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from qvit_jax.evaluation import metrics
from qvit_jax.evaluation.metrics import EvalSums, summarize

CLASSES = 12


def logits_of(count, classes=CLASSES, seed=0):
  """Returns logits that favour the label, so that no metric is trivial."""
  random = np.random.default_rng(seed)
  labels = random.integers(0, classes, count).astype(np.int32)
  logits = random.standard_normal((count, classes)) * 1.5
  logits[np.arange(count), labels] += 1.5
  return logits.astype(np.float32), labels


_add = jax.jit(lambda sums, *batch: sums.add(*batch))


def sums_of(logits, labels, mask=None, sizes=None):
  """Returns the sums over batches of the given sizes."""
  mask = np.ones(len(labels)) if mask is None else mask
  sums, start = EvalSums.zeros(logits.shape[1]), 0
  for size in sizes or (len(labels),):
    part = slice(start, start + size)
    sums = _add(
      sums,
      jnp.asarray(logits[part]),
      jnp.asarray(labels[part]),
      jnp.asarray(mask[part], jnp.float32),
    )
    start += size
  assert start == len(labels)
  return sums


def assert_equals_sklearn(metrics, logits, labels):
  classes = np.arange(logits.shape[1])
  predicted = logits.argmax(1)
  exact = logits.astype(np.float64)
  p = np.exp(exact - exact.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  expected = {
    'loss': sklearn.metrics.log_loss(labels, p, labels=classes),
    'top1': sklearn.metrics.accuracy_score(labels, predicted),
    'top5': sklearn.metrics.top_k_accuracy_score(
      labels, exact, k=5, labels=classes
    ),
    'f1_macro': sklearn.metrics.f1_score(
      labels, predicted, average='macro', zero_division=0
    ),
  }
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value, rel=1e-5), name
  confusion = sklearn.metrics.confusion_matrix(
    labels, predicted, labels=classes
  )
  assert metrics['confusion'] == confusion.tolist()
  assert metrics['num_examples'] == len(labels)
  for n, share in enumerate(metrics['per_class_top1']):
    own = predicted[labels == n] == n
    assert share == (pytest.approx(own.mean()) if len(own) else None)


@pytest.mark.parametrize('seed', range(3))
def test_metrics_equal_those_of_scikit_learn(seed):
  logits, labels = logits_of(200, seed=seed)
  metrics = summarize(sums_of(logits, labels))
  assert 0.2 < metrics['top1'] < metrics['top5'] < 1
  assert_equals_sklearn(metrics, logits, labels)


def test_unequal_batches_add_up_to_one_batch():
  logits, labels = logits_of(100)
  metrics = summarize(sums_of(logits, labels, sizes=(1, 64, 7, 28)))
  assert_equals_sklearn(metrics, logits, labels)


def test_masked_examples_count_nothing():
  logits, labels = logits_of(100)
  mask = np.random.default_rng(1).integers(0, 2, 100)
  metrics = summarize(sums_of(logits, labels, mask, sizes=(60, 40)))
  assert metrics['num_examples'] == mask.sum() < 100
  assert_equals_sklearn(metrics, logits[mask == 1], labels[mask == 1])


@pytest.mark.parametrize('poison', [np.nan, np.inf, -np.inf])
def test_masked_rows_do_not_poison_the_sums(poison):
  logits, labels = logits_of(40)
  mask = np.arange(40) % 4 != 0
  spoiled = np.where(mask[:, None], logits, np.float32(poison))
  metrics = summarize(sums_of(spoiled, labels, mask))
  assert_equals_sklearn(metrics, logits[mask], labels[mask])


def test_batch_of_padding_changes_nothing():
  logits, labels = logits_of(40)
  before = sums_of(logits, labels)
  after = before.add(
    jnp.asarray(logits), jnp.asarray(labels), jnp.zeros(len(labels))
  )
  assert summarize(after) == summarize(before)


def test_absent_classes_have_no_accuracy_and_no_part_in_f1():
  logits, labels = logits_of(150)
  present = labels < 7
  logits, labels = logits[present], labels[present]
  logits[:, 10:] = -50  # 10 and 11 occur neither as truth nor as prediction
  metrics = summarize(sums_of(logits, labels))
  assert metrics['per_class_top1'][7:] == [None] * 5
  assert all(share is not None for share in metrics['per_class_top1'][:7])
  assert_equals_sklearn(metrics, logits, labels)


def test_class_that_is_never_hit_counts_zero_in_f1():
  logits, labels = logits_of(150)
  logits[:, 3] = -20
  metrics = summarize(sums_of(logits, labels))
  assert metrics['per_class_top1'][3] == 0
  assert_equals_sklearn(metrics, logits, labels)


def test_perfect_model_has_perfect_metrics():
  labels = np.arange(CLASSES, dtype=np.int32)
  logits = 100 * np.eye(CLASSES, dtype=np.float32)
  metrics = summarize(sums_of(logits, labels))
  names = ('loss', 'top1', 'top5', 'f1_macro')
  assert [metrics[name] for name in names] == [0, 1, 1, 1]


@pytest.mark.parametrize('classes', [2, 5])
def test_top5_of_at_most_five_classes_is_one(classes):
  logits, labels = logits_of(30, classes)
  metrics = summarize(sums_of(logits, labels))
  assert metrics['top5'] == 1 and metrics['top1'] < 1


def test_fifth_best_score_counts_and_sixth_does_not():
  logits = np.arange(CLASSES, 0, -1, dtype=np.float32)[None].repeat(6, 0)
  labels = np.arange(6, dtype=np.int32)
  assert summarize(sums_of(logits, labels))['top5'] == 5 / 6
  assert summarize(sums_of(logits, labels))['top1'] == 1 / 6


def test_equal_scores_are_ranked_as_argmax_ranks_them():
  logits, labels = logits_of(300)
  logits = np.round(logits)  # ties everywhere
  metrics = summarize(sums_of(logits, labels))
  # scikit-learn prefers the last of equal scores, argmax the first.
  turned = sklearn.metrics.top_k_accuracy_score(
    CLASSES - 1 - labels, logits[:, ::-1], k=5, labels=np.arange(CLASSES)
  )
  assert metrics['top5'] == pytest.approx(turned)
  assert metrics['top1'] == (logits.argmax(1) == labels).mean()
  first = [x.argsort(kind='stable')[:5] for x in -logits]
  hits = [label in best for label, best in zip(labels, first, strict=True)]
  assert metrics['top5'] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize('value', [0.0, 3.0, -np.inf])
def test_constant_scores_know_no_more_than_the_first_classes(value):
  labels = np.arange(CLASSES, dtype=np.int32)
  logits = np.full((CLASSES, CLASSES), value, np.float32)
  metrics = summarize(sums_of(logits, labels))
  assert metrics['top1'] == 1 / CLASSES and metrics['top5'] == 5 / CLASSES


@pytest.mark.parametrize('where', [slice(None), 0, 7])
def test_scores_with_a_nan_hit_nothing(where):
  logits, labels = logits_of(60)
  broken = np.arange(60) % 3 == 0
  labels[broken] = 0  # which argmax would name
  spoiled = logits.copy()
  spoiled[broken, where] = np.nan
  metrics = summarize(sums_of(spoiled, labels))
  hit = ~broken & (logits.argmax(1) == labels)
  assert metrics['top1'] == pytest.approx(hit.mean())
  assert metrics['top5'] <= 1 - broken.mean()
  assert metrics['num_examples'] == 60
  assert metrics['per_class_top1'][0] == hit[labels == 0].mean()
  assert np.shape(metrics['confusion']) == (CLASSES, CLASSES)
  assert np.sum(metrics['confusion']) == 40
  assert metrics['f1_macro'] == pytest.approx(
    sklearn.metrics.f1_score(
      labels, np.where(broken, CLASSES, logits.argmax(1)), average='macro',
      labels=np.arange(CLASSES), zero_division=0,
    )
  )  # fmt: skip


def test_metrics_of_logits_far_apart_are_finite():
  logits, labels = logits_of(20)
  metrics = summarize(sums_of(logits * 1e4, labels))
  assert np.isfinite(metrics['loss']) and metrics['loss'] > 100


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_loss_of_a_diverged_model_is_not_finite(poison):
  """Who asked for the metrics raises; see the modes and the loop."""
  logits, labels = logits_of(20)
  logits[3] = poison
  assert not np.isfinite(summarize(sums_of(logits, labels))['loss'])


def test_metrics_are_plain_values():
  logits, labels = logits_of(20)
  for name, value in summarize(sums_of(logits, labels)).items():
    while isinstance(value, list):
      value = value[0]
    assert type(value) in (float, int, type(None)), name


@pytest.mark.parametrize(('right', 'total'), [(0, 10), (3, 10), (1462, 2000)])
def test_intervals_are_those_of_wilson(right, total):
  z, p = 1.959963984540054, right / total
  middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
  half = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
  half /= 1 + z**2 / total
  low, high = metrics.interval(right, total)
  assert low == pytest.approx(max(0, middle - half), abs=1e-9)
  assert high == pytest.approx(middle + half)


def test_a_paired_test_counts_what_changed_alone():
  labels = np.zeros(40, int)
  right, wrong = np.array([1.0, 0.0]), np.array([0.0, 1.0])
  base = np.stack([right] * 20 + [wrong] * 20)
  row = base.copy()
  row[:9], row[20:21] = wrong, right  # nine lost, one gained
  found = metrics.paired(row, base, labels)
  # Both tails of ten coins that show one head or none.
  assert found == {'gained': 1, 'lost': 9, 'p': pytest.approx(2 * 11 / 2**10)}
  assert metrics.paired(base, base, labels) == {'gained': 0, 'lost': 0, 'p': 1}
