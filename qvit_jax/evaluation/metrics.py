"""Sums of an evaluation, kept on the device, and what they come to."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import sklearn.metrics
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class EvalSums:
  """Sums over examples; padding counts nothing.

  Attributes:
    loss: Sum of cross-entropies in nats.
    top5: Examples whose class is among the five best scores.
    confusion: [classes, classes] counts, true class by predicted class.
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
      jnp.zeros((num_classes, num_classes), jnp.int32),
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
    better = (logits > own).sum(axis=1)
    count = mask.astype(jnp.int32)
    return EvalSums(
      # where, because 0 * inf would poison the sum with NaN
      self.loss - jnp.where(mask > 0, own_log_p, 0).sum(),
      self.top5 + (count * (better < 5)).sum(),
      self.confusion.at[labels, logits.argmax(axis=1)].add(count),
    )


def summarize(sums: EvalSums) -> dict[str, Any]:
  """Returns the metrics as plain Python values.

  Returns:
    loss (mean, nats; may be infinite), top1, top5, f1_macro (scikit-learn's
    definition: over the classes that occur as truth or prediction),
    num_examples,
    per_class_top1 (null for a class without examples), confusion.
  """
  confusion = np.asarray(sums.confusion)
  total = int(confusion.sum())
  loss = float(sums.loss) / total
  support = confusion.sum(axis=1)
  truth, predicted = np.nonzero(confusion)
  f1 = sklearn.metrics.f1_score(
      truth, predicted, average='macro', zero_division=0,
      sample_weight=confusion[truth, predicted],
  )  # fmt: skip
  return {
    'loss': loss,
    'top1': int(np.trace(confusion)) / total,
    'top5': int(sums.top5) / total,
    'f1_macro': float(f1),
    'num_examples': total,
    'per_class_top1': [
      int(hit) / int(n) if n else None
      for hit, n in zip(np.diag(confusion), support, strict=True)
    ],
    'confusion': confusion.tolist(),
  }


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
