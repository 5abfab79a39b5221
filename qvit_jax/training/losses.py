"""Training losses. Row 6."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cross_entropy(
  logits: Float[Array, 'b classes'],
  targets: Float[Array, 'b classes'],
  label_smoothing: float = 0.0,
) -> Float[Array, '']:
  """Returns the mean cross-entropy in nats.

  Args:
    logits: Scores before the softmax.
    targets: Probabilities that sum to 1 for each image.
    label_smoothing: Share of each target spread evenly over all classes.
  """
  targets = targets * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
  return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


def top1(
  logits: Float[Array, 'b classes'], targets: Float[Array, 'b classes']
) -> Float[Array, '']:
  """Returns the share of images whose best score is their likeliest target."""
  return jnp.mean(logits.argmax(-1) == targets.argmax(-1))
