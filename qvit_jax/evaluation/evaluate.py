"""Evaluation of every example of a split exactly once."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax

from qvit_jax.evaluation import devices
from qvit_jax.evaluation.metrics import EvalSums, summarize


def make_eval_step(
  *,
  apply: Callable[..., jax.Array],
  gather: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
  prepare: Callable[[jax.Array], jax.Array],
  batch_sharding: Any,
) -> Callable[[Any, Any, Any, EvalSums], EvalSums]:
  """Returns step(variables, source, batch, sums) -> sums with the batch added.

  Args:
    apply: `model.apply`.
    gather: Makes uint8 images and labels of (source, batch).
    prepare: Makes normalised images of uint8 images.
    batch_sharding: Where the images of a batch lie.
  """

  def step(variables, source, batch, sums: EvalSums) -> EvalSums:
    images, labels = jax.lax.with_sharding_constraint(
      gather(source, batch), batch_sharding
    )
    logits = apply(variables, prepare(images))
    return sums.add(logits, labels, batch['mask'])

  return step


def evaluate(
  step: Callable[[Any, Any, Any, EvalSums], EvalSums],
  variables: Any,
  source: Any,
  batches: Iterable[Any],
  sums: EvalSums,
  *,
  poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Returns the metrics over all batches; see `metrics.summarize`.

  Args:
    step: A compiled `make_eval_step`.
    variables: What to evaluate.
    source: The data set's part that lives on the device.
    batches: Placed batches with a mask.
    sums: `EvalSums.zeros` on the devices.
    poll: Called before each batch; may raise to stop.
  """
  pending = collections.deque()
  for batch in batches:
    poll()
    sums = step(variables, source, batch, sums)
    pending.append(sums.loss)
    while len(pending) >= devices.max_in_flight():
      jax.block_until_ready(pending.popleft())
  return summarize(jax.device_get(sums))
