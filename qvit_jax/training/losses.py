"""Training losses."""

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


def soft_distillation(
  logits: Float[Array, 'b classes'],
  teacher: Float[Array, 'b classes'],
  temperature: float,
) -> Float[Array, '']:
  """Returns T^2 times the mean KL divergence from the teacher, in nats.

  Args:
    logits: Of the student.
    teacher: Logits of the teacher.
    temperature: T, which divides both; > 0.

  Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2; T^2 keeps
    the gradient's size when T changes.
  """
  student = jax.nn.log_softmax(logits / temperature)
  teacher = jax.nn.log_softmax(teacher / temperature)
  divergence = (jnp.exp(teacher) * (teacher - student)).sum(-1)
  return temperature**2 * divergence.mean()


def hard_distillation(
  logits: Float[Array, 'b classes'], teacher: Float[Array, 'b classes']
) -> Float[Array, '']:
  """Returns the mean cross-entropy to the teacher's first choice, in nats.

  Source: Touvron et al. 2020 (DeiT), arXiv:2012.12877, section 4, eq. 3.
  """
  choice = jax.nn.one_hot(teacher.argmax(-1), teacher.shape[-1])
  return cross_entropy(logits, choice)


def feature_distance(
  features: Float[Array, 'b d'],
  teacher: Float[Array, 'b d'],
  directions: Float[Array, 'd m'],
) -> Float[Array, '']:
  """Returns the mean squared difference of features along directions.

  Args:
    features: Of the student, before its head.
    teacher: Those of the teacher.
    directions: Orthonormal; the main ones of the teacher's features.

  Source: GPLQ 2025, arXiv:2506.11784 (L_PCA). Both sides are centred with the
    teacher's mean there, which leaves the difference as it is.
  """
  difference = features.astype(jnp.float32) - teacher.astype(jnp.float32)
  parts = jnp.matmul(difference, directions, precision='highest')
  return jnp.square(parts).mean()


def top1(
  logits: Float[Array, 'b classes'], targets: Float[Array, 'b classes']
) -> Float[Array, '']:
  """Returns the share of images whose best score is their likeliest target."""
  return jnp.mean(logits.argmax(-1) == targets.argmax(-1))
