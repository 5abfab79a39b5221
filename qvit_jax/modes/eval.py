"""Mode `eval`: evaluates a checkpoint once over the whole split."""

import math
import time
from typing import Any

from qvit_jax.errors import DivergedError
from qvit_jax.experiment import in_engines, sources
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
    metrics, ran, started = _measure(experiment, variables)
    seconds = time.monotonic() - started
    if not math.isfinite(metrics['loss']):
      raise DivergedError(
        f'the evaluation loss of {origin[0]} is {metrics["loss"]}; evaluate '
        'another checkpoint or train with a lower optim.lr'
      )
    name = origin[0].partition(' of ')[0]
    session.write_results(experiment, place, metrics, name, ran=ran)
    session.say_bad_files(experiment)
    say(
      '  '.join(
        f'{name} {metrics[name]:.6f}'
        for name in ('loss', 'top1', 'top5', 'f1_macro')
      )
      + f'  ({metrics["num_examples"]} images in {seconds:.1f} s, compiling '
      f'included); results in {place / "results.json"}'
    )


def _measure(
  experiment: Experiment, variables: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, float]:
  """Returns metrics, how they ran if not by JAX, and when that began."""
  started = time.monotonic()
  if experiment.config.eval.engine == 'jax':
    return experiment.make_evaluator()(variables), None, started
  engine, packed, lines = in_engines.opened(experiment, variables)
  for line in lines:
    say(f'engine    {line}')
  started = time.monotonic()
  metrics = in_engines.evaluate(experiment, engine)
  ran = {
    'engine': in_engines.facts(engine), 'execution': packed.execution,
    'why': packed.why,
  }  # fmt: skip
  return metrics, ran, started
