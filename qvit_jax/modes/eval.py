"""Mode `eval`: evaluates a checkpoint once over the whole split."""

import math
import time
from typing import Any

from qvit_jax.errors import DivergedError
from qvit_jax.experiment import sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.modes import session
from qvit_jax.modes.session import say


def evaluate(config: Any, workdir: str) -> None:
  """Evaluates a checkpoint once over the whole split."""
  with session.opened(workdir) as place:
    packed = sources.open_packed(config)
    experiment = Experiment(config, training=False, packed=packed)
    session.header('eval', experiment, place)
    variables, origin = sources.evaluated(experiment, place)
    for line in origin:
      say(f'start     {line}')
    started = time.monotonic()
    metrics = experiment.make_evaluator()(variables)
    seconds = time.monotonic() - started
    if not math.isfinite(metrics['loss']):
      raise DivergedError(
        f'the evaluation loss of {origin[0]} is {metrics["loss"]}; evaluate '
        'another checkpoint or train with a lower optim.lr'
      )
    session.write_results(
      experiment, place, metrics, origin[0].partition(' of ')[0]
    )
    session.say_bad_files(experiment)
    say(
      '  '.join(
        f'{name} {metrics[name]:.6f}'
        for name in ('loss', 'top1', 'top5', 'f1_macro')
      )
      + f'  ({metrics["num_examples"]} images in {seconds:.1f} s, compiling '
      f'included); results in {place / "results.json"}'
    )
