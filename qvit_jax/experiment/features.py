"""What a frozen backbone makes of training images, computed once.

Where everything that is trained lies behind a cut of the model, and nothing
before it draws at random or sees other images from step to step, what passes
the cut is a function of the image alone. It is then kept beside the labels, in
place of the images; the step hands it to the model at the cut, and what would
have computed it is dead code, which the compiler drops.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qvit_jax import models
from qvit_jax.data import preprocess
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.ops import Ops

# The variable by which they go into a model and out of it.
_COLLECTION, _NAME = 'features', 'passing'
_SECONDS = 10  # between two lines of progress
# Fields of `config.data` by which training sees other images at each step.
_AUGMENTS = (
  'pad', 'flip', 'crop', 'jitter', 'randaugment', 'erase', 'mixup', 'cutmix'
)  # fmt: skip


def _take(name: str, module: Any, at: str, x: jax.Array) -> jax.Array:
  """A `Ops.cut` that lets out what passes the cut `name`."""
  if at == name:
    module.sow(
      _COLLECTION, _NAME, x, reduce_fn=lambda old, new: new, init_fn=tuple
    )
  return x


def _give(name: str, module: Any, at: str, x: jax.Array) -> jax.Array:
  """A `Ops.cut` that puts what was computed in the place of x."""
  return module.get_variable(_COLLECTION, _NAME) if at == name else x


@dataclasses.dataclass(frozen=True)
class Features:
  """What passes a cut; the train step reads it in place of images.

  Attributes:
    cut: Where it passes.
    shape: Of one image's features.
    dtype: As they pass it.
    count: Images of the training split.
  """

  cut: models.Cut
  shape: tuple[int, ...]
  dtype: Any
  count: int

  @property
  def num_bytes(self) -> int:
    """Bytes of those of all training images."""
    return self.count * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

  @property
  def line(self) -> str:
    """One line: what is computed once, and what it takes."""
    return (
      f'of {self.count:,} training images are computed once, before '
      f'{self.cut.name}: {list(self.shape)} {jnp.dtype(self.dtype).name} each, '
      f'{self.num_bytes / 2**20:.1f} MiB'
    )

  def behind(self, config: Any, ops: Ops) -> Callable[..., Any]:
    """Returns a model's `apply` that is given features instead of images."""
    cut = functools.partial(_give, self.cut.name)
    module = models.build_model(config, dataclasses.replace(ops, cut=cut))
    size = config.model.image_size

    def apply(variables, features, *args, **kwargs):
      given = {_COLLECTION: {_NAME: features}}
      unseen = jnp.zeros((len(features), size, size, 3), jnp.float32)
      return module.apply({**variables, **given}, unseen, *args, **kwargs)

    return apply

  def prepare(
    self, key: jax.Array, features: jax.Array, labels: jax.Array, *, classes
  ) -> tuple[jax.Array, jax.Array]:
    """Returns features and target distributions, as `prepare_train` does."""
    del key
    return features, jax.nn.one_hot(labels, classes)

  def compute(
    self,
    experiment: Experiment,
    variables: dict[str, Any],
    say: Callable[[str], None],
  ) -> dict[str, jax.Array]:
    """Returns features and labels, a copy on every device.

    Args:
      experiment: Whose training split it is.
      variables: Of its model.
      say: Prints how far it is.
    """
    size, whole = experiment.config.model.image_size, experiment.whole_sharding
    apply = _tapped(experiment, self.cut)

    def add(features, variables, source, batch):
      images, _ = jax.lax.with_sharding_constraint(
        preprocess.gather(source, batch), experiment.batch_sharding
      )
      found = apply(
        variables,
        preprocess.prepare_eval(images, data=experiment.config.data, size=size),
      )
      # What pads the last batch lies behind the end.
      rows = jnp.where(batch['mask'] > 0, batch['index'], self.count)
      return features.at[rows].set(found, mode='drop')

    add = jax.jit(add, donate_argnums=0, out_shardings=whole)
    zeros = functools.partial(
      jnp.zeros, (self.count, *self.shape), self.dtype
    )
    features = jax.jit(zeros, out_shardings=whole)()
    split = experiment.data.train
    source, done = experiment.replicate(split.source), 0
    started = told = time.monotonic()
    for batch in experiment.eval_batches(split):
      # One after the other: see `devices.max_in_flight`.
      features = add(features, variables, source, batch)
      features = jax.block_until_ready(features)
      done += len(batch['index'])
      now = time.monotonic()
      if now - told > _SECONDS and done < self.count:
        told = now
        rate = done / (now - started)
        say(f'{done:,} of {self.count:,} images, {rate:.4g} images/s')
    say(f'computed in {time.monotonic() - started:.1f} s')
    return {'image': features, 'label': source['label']}


def _tapped(experiment: Experiment, cut: models.Cut) -> Callable[..., Any]:
  """Returns apply(variables, images) -> what passes the cut."""
  take = functools.partial(_take, cut.name)
  ops = dataclasses.replace(experiment.model.ops, cut=take)
  module = models.build_model(experiment.config, ops)

  def apply(variables, images):
    _, seen = module.apply(variables, images, mutable=[_COLLECTION])
    return seen[_COLLECTION][_NAME]

  return apply


def find(experiment: Experiment) -> tuple[Features | None, str]:
  """Returns what can be computed once, and a line: that, or why not.

  (None, '') where no backbone is frozen.

  Args:
    experiment: Built for training.
  """
  trained = experiment.config.train.trainable
  if experiment.model.frozen or not any(
    name.startswith('params/') for name in trained
  ):
    return None, ''
  cut, reasons = _choose(experiment, trained)
  reasons += _reasons(experiment)
  if cut and not reasons:
    size = experiment.config.model.image_size
    found = jax.eval_shape(
      _tapped(experiment, cut), experiment.model.shapes,
      jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
    )  # fmt: skip
    count = experiment.data.train.size
    features = Features(cut, found.shape[1:], found.dtype, count)
    mib, most = features.num_bytes / 2**20, experiment.config.data.resident_mib
    if mib <= most:
      return features, features.line
    reasons.append(
      f'those of {count:,} images take {mib:,.1f} MiB, more than '
      f'data.resident_mib={most:g}'
    )
  return None, f'are computed anew each step: {"; ".join(reasons)}'


def _choose(
  experiment: Experiment, trained: tuple[str, ...]
) -> tuple[models.Cut | None, list[str]]:
  """Returns the last cut that all that is trained lies behind, and why not."""
  model, fitting, before = experiment.config.model, None, trained
  for cut in reversed(models.cuts(experiment.config)):
    starts = tuple(f'params/{path}/' for path in cut.behind)
    before = [name for name in trained if not f'{name}/'.startswith(starts)]
    draws = [name for name in cut.draws if model[name]]
    if not before and not draws:
      return cut, []
    if not before and fitting is None:
      fitting = draws
  if fitting is None:
    verb = 'is' if len(before) == 1 else 'are'
    return None, [f'{", ".join(before)} {verb} trained, before every cut']
  fields = ' and '.join(f'model.{name}={model[name]:g}' for name in fitting)
  return None, [f'{fields} {_verb(fitting, "draw")} at random']


def _reasons(experiment: Experiment) -> list[str]:
  """Returns what of a training makes features change from step to step.

  Norms with statistics lie before every cut, and keep them where any norm is
  not trained; see `norms.why_held`.
  """
  config, found = experiment.config, []
  if not experiment.data.train.source:
    found.append('the training images are streamed')
  if on := [name for name in _AUGMENTS if config.data[name]]:
    fields = ' and '.join(f'data.{name}={config.data[name]}' for name in on)
    found.append(f'{fields} {_verb(on, "change")} images')
  if config.train.teacher:
    found.append('train.teacher sees the images')
  if experiment.model.method.quantizes:
    found.append(f'quant.recipe={config.quant.recipe} rounds what makes them')
  return found


def _verb(subjects: list[str], verb: str) -> str:
  return verb if len(subjects) > 1 else f'{verb}s'
