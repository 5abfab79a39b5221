"""Mode `sensitivity`: quantizes each product alone; ranks them."""

from typing import Any

from qvit_jax.experiment import sensitivity as sensitivity_lib
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.modes import session
from qvit_jax.modes.session import say


def sensitivity(config: Any, workdir: str) -> None:
  """Quantizes each product of a trained float model alone; ranks them."""
  session.check_float('sensitivity', config)
  with session.opened(workdir) as place:
    experiment = Experiment(config, training=False, calibrating=True)
    session.header('sensitivity', experiment, place)
    experiment, params = session.float_model(experiment, place)
    table = sensitivity_lib.measure(experiment, params, place, say)
    sites = experiment.model.plan.sites
    for line in sensitivity_lib.describe(config, sites, table):
      say(line)
    say(f'{len(sites)} sites; results in {place / "sensitivity.json"}')
