"""Statistics of norms beside training: estimated anew, or found for a model.

A norm that normalises by moving averages keeps those of the last ten or so
updates. Where weights swing between two levels that is too few (Nagel et al.
2022, arXiv:2203.11086, section 3.2); and a model whose norms were folded has
none at all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import norms
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.models import batch_norm
from qvit_jax.models.batch_norm import COLLECTION, SEEN
from qvit_jax.store.checkpoint import FLOATS
from qvit_jax.training import stages as stages_lib
from qvit_jax.training.state import TrainState

# Training images from which statistics of a model without any are derived.
_DERIVED = 512


def folded_params(
  config: Any, variables: dict[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the parameters by path of the same model without norms.

  Args:
    config: Of the model; `model.folded` makes that of the other one.
    variables: Nested collections; only floats count.
  """
  flat = {
    name: np.asarray(x)
    for name, x in tree.flatten(variables).items()
    if name.startswith(FLOATS)
  }
  if batch_norm.norms(flat):
    flat = batch_norm.fold(models.statistics(config), flat)
  return {name.removeprefix('params/'): x for name, x in flat.items()}


def collect(
  experiment: Experiment,
  variables: dict[str, Any],
  count: int,
  *,
  by_batch: bool,
) -> dict[str, Any]:
  """Returns mean and variance of what each norm sees, as `batch_stats`.

  Of images of the training order as evaluation sees them, without augmentation.
  The variance is that of all images together: the mean of those within batches
  plus that of the batches' means.

  Args:
    experiment: Built for training.
    variables: Of its model.
    count: Batches.
    by_batch: Whether norms go by the statistics of each batch, as in training;
      else by those of `variables`.
  """
  config, model = experiment.config, experiment.model
  data, size = config.data, config.model.image_size
  how: dict[str, Any] = {}
  if by_batch:
    how = {'train': True, 'rngs': {'dropout': jax.random.key(0)}}

  def add(sums, variables, source, batch):
    images, _ = jax.lax.with_sharding_constraint(
      preprocess.gather(source, batch), experiment.batch_sharding
    )
    images = preprocess.prepare_eval(images, data=data, size=size)
    _, found = model.module.apply(
      variables, images, mutable=[SEEN, COLLECTION], **how
    )
    flat = tree.flatten(found[SEEN])
    for path, x in tree.flatten(found[SEEN]).items():
      if path.endswith('/var'):
        mean = flat[f'{path.removesuffix("var")}mean']
        flat[path] = x + jnp.square(mean)
    return jax.tree.map(jnp.add, sums, tree.unflatten(flat, sums))

  whole = experiment.whole_sharding
  add = jax.jit(add, out_shardings=whole)
  source = experiment.replicate(experiment.data.train.source)
  sums = jax.tree.map(jnp.zeros_like, variables[COLLECTION])
  sums = jax.device_put(sums, whole)
  for batch in experiment.train_batches(1, count, augmented=False):
    # One after the other: see `devices.max_in_flight`.
    sums = jax.block_until_ready(add(sums, variables, source, batch))
  flat = {path: x / count for path, x in tree.flatten(sums).items()}
  for path in flat:
    if path.endswith('/var'):
      mean = flat[f'{path.removesuffix("var")}mean']
      flat[path] = jnp.maximum(flat[path] - jnp.square(mean), 0)
  return tree.unflatten(flat, sums)


def make_finish(
  experiment: Experiment,
) -> Callable[[TrainState], tuple[TrainState, str]] | None:
  """Returns what estimates statistics anew after the last update.

  Those of the weights that are evaluated; None where the config asks for none.

  Raises:
    ConfigError: The last stage holds what would be estimated.
  """
  count = experiment.config.train.reestimate_batches
  if not count:
    return None
  last = experiment.stages[-1]
  if stages_lib.KINDS[last.name].holds:
    raise ConfigError(
      f'train.reestimate_batches={count} would give the model other statistics '
      f'than those that its last stage {last.name!r} was trained with; set it '
      'to 0 or leave the stage out'
    )

  def finish(state: TrainState) -> tuple[TrainState, str]:
    found = collect(experiment, state.evaluated, count, by_batch=True)
    before = state.evaluated[COLLECTION]
    found = jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding), found, before
    )
    moved = _largest_move(before, found)
    if state.ema:
      state = state.replace(ema={**state.ema, COLLECTION: found})
    else:
      state = state.replace(variables={**state.variables, COLLECTION: found})
    images = count * experiment.config.train.batch_size
    return state, (
      f'statistics of norms estimated anew from {images:,} training images '
      f'(means moved by up to {moved:.2g} standard deviations)'
    )

  return finish


def _largest_move(before: Any, after: Any) -> float:
  """Returns the largest change of a mean, in standard deviations."""
  before, after = (tree.flatten(jax.device_get(x)) for x in (before, after))
  return max(
    float(
      np.max(
        np.abs(after[path] - before[path])
        / np.sqrt(after[f'{path.removesuffix("mean")}var'] + batch_norm.EPSILON)
      )
    )
    for path in before
    if path.endswith('mean')
  )


def measured(
  experiment: Experiment, variables: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Returns what a training starts from whose norms go by batches, and lines.

  Where statistics are of nothing that the norms saw, they are derived: else
  the first update would be one of another function.

  Args:
    experiment: Built for training.
    variables: Of its model, trained by somebody.
  """
  if not experiment.model.changing:
    return variables, []
  whole = jax.jit(lambda x: x, out_shardings=experiment.whole_sharding)
  held = {COLLECTION: whole(variables[COLLECTION])}
  if batch_norm.are_measured(tree.flatten(held)):
    return variables, []
  batch = experiment.config.train.batch_size
  count = -(-min(_DERIVED, experiment.data.train.size) // batch)
  held = models.statistics(experiment.config).held
  return derive(experiment, variables, count), [
    'statistics of norms are of nothing they saw (all means are 0, as where '
    f'norms were folded): derived from {count * batch:,} training images, the '
    f'function stays (to keep them, {norms.flags(held)})'
  ]


def derive(
  experiment: Experiment, variables: dict[str, Any], count: int
) -> dict[str, Any]:
  """Returns the same function with statistics of what its norms see.

  For a model whose norms stand for nothing yet, such as one read from a file
  where they were folded: training that goes by batches then begins with that
  function.

  Args:
    experiment: Built for training; its model has norms.
    variables: Of its model.
    count: Batches of training images.
  """
  seen = collect(experiment, variables, count, by_batch=False)
  whole = jax.jit(lambda x: x, out_shardings=experiment.whole_sharding)
  flat = {n: np.asarray(x) for n, x in tree.flatten(whole(variables)).items()}
  seen = tree.flatten({COLLECTION: seen})
  found = {n: np.asarray(x) for n, x in seen.items()}
  changed = batch_norm.with_statistics(flat, found)
  return jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding),
    tree.unflatten(changed, variables),
    variables,
  )
