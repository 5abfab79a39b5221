"""What `--mode=predict` says of each image."""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import rich.progress

from qvit_jax.data import Data, open_images, preprocess
from qvit_jax.errors import DivergedError
from qvit_jax.evaluation import fixed
from qvit_jax.experiment import in_engines, sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.modes import session
from qvit_jax.modes.session import say
from qvit_jax.report.predictions import Gallery
from qvit_jax.store import files


def answers(
  experiment: Experiment, variables: dict[str, Any], engine: Any = None
) -> Iterator[dict[str, Any]]:
  """Yields the likeliest classes of each image of the evaluation split.

  Images that cannot be decoded are left out; `data.bad_files` has them.

  Args:
    experiment: Its evaluation split is `data.open_images`.
    variables: What to apply, by collection.
    engine: The runtime that has the model; None: JAX applies it.

  Yields:
    file (relative to the folder) and classes, likeliest first, each with name,
    index and probability.

  Raises:
    DivergedError: A logit is not finite.
  """
  split, best = experiment.data.eval, _best(experiment, variables, engine)
  position = 0
  for batch in experiment.eval_batches():
    probabilities, indices = jax.device_get(best(batch['image']))
    if not np.isfinite(probabilities).all():
      raise DivergedError(
        'the model gives outputs that are not finite; predict with another '
        'checkpoint'
      )
    for row in np.flatnonzero(np.asarray(batch['mask'])):
      classes = zip(indices[row], probabilities[row], strict=True)
      yield {
        'file': split.records.names[position + row],
        'classes': [
          {
            'name': _name(experiment, int(index)),
            'index': int(index),
            'probability': float(probability),
          }
          for index, probability in classes
        ],
      }
    position += len(batch['mask'])


def _best(
  experiment: Experiment, variables: dict[str, Any], engine: Any
) -> Callable[[Any], Any]:
  """Returns pixels -> probabilities and indices of the likeliest classes."""
  config = experiment.config
  count = min(config.eval.top_k, config.model.num_classes)
  prepare = functools.partial(
    preprocess.prepare_eval, data=config.data, size=config.model.image_size
  )
  top = lambda logits: jax.lax.top_k(jax.nn.softmax(logits), count)
  if engine:
    prepare, top = jax.jit(prepare), jax.jit(top)
    return lambda pixels: top(engine.run(np.asarray(prepare(pixels))))
  apply = experiment.model.module.apply
  whole, given = fixed.split(variables)
  best = jax.jit(
    lambda given, pixels: top(apply(whole(given), prepare(pixels))),
    out_shardings=experiment.whole_sharding,
  )
  return functools.partial(best, given)


def _name(experiment: Experiment, index: int) -> str:
  names = experiment.data.class_names
  return names[index] if index < len(names) else f'class {index}'


def write(
  place: pathlib.Path,
  found: Iterator[dict[str, Any]],
  data: Data,
  title: str,
  *,
  max_pixels: int,
) -> int:
  """Writes predictions.jsonl as answers come, and a page; returns their number.

  Args:
    place: The workdir.
    found: Of `answers`.
    data: Of `open_images`.
    title: Which model answers.
    max_pixels: `data.max_pixels`.
  """
  gallery = Gallery(
    data.eval.records.root, data.class_names, max_pixels=max_pixels
  )
  shown = rich.progress.track(
      found, 'predict', total=data.eval.size, disable=not sys.stdout.isatty()
  )  # fmt: skip
  with files.replacing(place / 'predictions.jsonl') as lines:
    for one in shown:
      lines.write(json.dumps(one) + '\n')
      gallery.add(one)
  gallery.write(place / 'predictions.html', title)
  return gallery.count


def predict(config: Any, workdir: str) -> None:
  """Names the likeliest classes of every image of `eval.images`."""
  with session.opened(workdir) as place:
    packed = sources.open_packed(config)
    names, line = sources.class_names(config, place)
    data = open_images(config, names)
    experiment = Experiment(config, training=False, data=data, packed=packed)
    session.header('predict', experiment, place)
    say(f'classes   {line}')
    variables, origin = sources.evaluated(experiment, place)
    for line in origin:
      say(f'start     {line}')
    engine = None
    if config.eval.engine != 'jax':
      engine, _, lines = in_engines.opened(experiment, variables)
      for line in lines:
        say(f'engine    {line}')
    found = answers(experiment, variables, engine)
    title = f'{experiment.model.title}; {experiment.model.bits}; {origin[0]}'
    most = config.data.max_pixels
    count = write(place, found, data, title, max_pixels=most)
    session.say_bad_files(experiment)
    say(
      f'{count:,} images; results in {place / "predictions.jsonl"}, to look at '
      f'in {place / "predictions.html"}'
    )
