"""Sums of an evaluation, kept on the device, and what they come to."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class EvalSums:
  """Sums over examples; padding counts nothing.

  Attributes:
    loss: Sum of cross-entropies in nats.
    top5: Examples whose class is among the five best scores; of equal ones
      the first counts as the best, as in argmax.
    confusion: [classes, classes + 1] counts, true class by predicted class;
      the last column holds examples with a NaN, for which no class is named.
  """

  loss: Any
  top5: Any
  confusion: Any

  @classmethod
  def zeros(cls, num_classes: int) -> 'EvalSums':
    """Returns the sums over nothing."""
    return cls(
      jnp.zeros((), jnp.float32),
      jnp.zeros((), jnp.int32),
      jnp.zeros((num_classes, num_classes + 1), jnp.int32),
    )

  def add(
    self,
    logits: Float[Array, 'b classes'],
    labels: Int[Array, ' b'],
    mask: Float[Array, ' b'],
  ) -> 'EvalSums':
    """Returns the sums with a batch added; `mask` is 0 on padding."""
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    own_log_p = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    # Ties go to the first, else constant scores would put all among the best.
    before = ((logits > own) | (earlier & (logits == own))).sum(axis=1)
    is_broken = jnp.isnan(logits).any(axis=1)
    named = jnp.where(is_broken, logits.shape[1], logits.argmax(axis=1))
    count = mask.astype(jnp.int32)
    return EvalSums(
      # where, because 0 * inf would poison the sum with NaN
      self.loss - jnp.where(mask > 0, own_log_p, 0).sum(),
      self.top5 + (count * (before < 5) * ~is_broken).sum(),
      self.confusion.at[labels, named].add(count),
    )


def summarize(sums: EvalSums) -> dict[str, Any]:
  """Returns the metrics as plain Python values.

  Returns:
    loss (mean, nats; may be infinite or NaN), top1, top1_interval (of 95 %,
    see `interval`), top5, f1_macro
    (scikit-learn's definition: over the classes that occur as truth or
    prediction), num_examples, per_class_top1 (null for a class without
    examples), confusion (square). Examples whose scores hold a NaN are missed
    and stand in no column of confusion.
  """
  counts = np.asarray(sums.confusion)
  total, support = int(counts.sum()), counts.sum(axis=1)
  loss = float(sums.loss) / total
  truth, predicted = np.nonzero(counts)
  confusion = counts[:, :-1]
  f1 = sklearn.metrics.f1_score(
      truth, predicted, average='macro', zero_division=0,
      labels=np.flatnonzero(support + confusion.sum(axis=0)),
      sample_weight=counts[truth, predicted],
  )  # fmt: skip
  return {
    'loss': loss,
    'top1': int(np.trace(confusion)) / total,
    'top1_interval': interval(int(np.trace(confusion)), total),
    'top5': int(sums.top5) / total,
    'f1_macro': float(f1),
    'num_examples': total,
    'per_class_top1': [
      int(hit) / int(n) if n else None
      for hit, n in zip(np.diag(confusion), support, strict=True)
    ],
    'confusion': confusion.tolist(),
  }


def interval(right: int, total: int) -> list[float]:
  """Returns the 95 % confidence interval of a share, [low, high].

  Source: Wilson 1927, "Probable inference, the law of succession, and
  statistical inference", JASA 22.

  Args:
    right: Images that were named right.
    total: Of so many.
  """
  test = scipy.stats.binomtest(right, total)
  found = test.proportion_ci(confidence_level=0.95, method='wilson')
  return [float(found.low), float(found.high)]


def paired(
  logits: np.ndarray, base: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
  """Returns how a model's answers differ from another's on the same images.

  Source: McNemar 1947, "Note on the sampling error of the difference between
  correlated proportions", Psychometrika 12; the exact, binomial form.

  Args:
    logits: [n, classes].
    base: The other model's.
    labels: [n].

  Returns:
    gained: images that only the first one names right; lost: only the other;
    p: the chance of such a difference, or a larger one, between equal models.
  """
  here, there = (x.argmax(axis=1) == labels for x in (logits, base))
  gained, lost = int((here & ~there).sum()), int((there & ~here).sum())
  changed = gained + lost
  p = scipy.stats.binomtest(gained, changed).pvalue if changed else 1.0
  return {'gained': gained, 'lost': lost, 'p': float(p)}


def compare_logits(
  logits: np.ndarray, base: np.ndarray
) -> dict[str, float | None]:
  """Returns how far logits [n, classes] are from float's.

  Returns:
    sqnr_db: Signal to noise, in decibels; None where they are equal.
    agreement: Share of the images with the same top-1 class.
    kl: Mean divergence of the classes' probabilities from float's, in nats.
    noise: Energy of the difference over that of float's logits.
  """
  logits, base = logits.astype(np.float64), base.astype(np.float64)
  noise = float(np.square(logits - base).sum() / np.square(base).sum())
  log_p, log_q = (scipy.special.log_softmax(x, axis=1) for x in (base, logits))
  same = logits.argmax(axis=1) == base.argmax(axis=1)
  return {
    'sqnr_db': (
      -10 * float(np.log10(noise)) if noise and np.isfinite(noise) else None
    ),
    'agreement': float(same.mean()),
    'kl': float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()),
    'noise': noise,
  }
