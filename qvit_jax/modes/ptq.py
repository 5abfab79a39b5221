"""Mode `ptq`: quantizes a trained float model in every way asked for."""

import functools
import pathlib
from typing import Any

from qvit_jax.config import resolve as config_lib
from qvit_jax.experiment import ptq_table, qat_runs
from qvit_jax.experiment.experiment import Experiment, schedule_line
from qvit_jax.modes import MODES, runner, session
from qvit_jax.modes.session import say
from qvit_jax.modes.train import train


def ptq(config: Any, workdir: str) -> None:
  """Quantizes a trained float model in every way of `ptq.rows`.

  And trains it further at the bits of `ptq.qat_specs`, for the curve.
  """
  context = runner.context_of(MODES['train'], config)
  runs = qat_runs.plan(
    config, lambda own: config_lib.resolve(own, context)
  )
  if runs:  # the recipe is theirs
    config = config_lib.with_fields(config, {'quant.recipe': 'none'})
  session.check_float('ptq', config)
  with session.opened(workdir) as place:
    experiment = Experiment(config, training=False, calibrating=True)
    session.header('ptq', experiment, place)
    if runs:
      first = runs[0].config
      say(
        f'qat       {len(runs)} runs: {", ".join(config.ptq.qat_specs)}, '
        f'{config.ptq.qat_seeds} seed(s) each, recipe {first.quant.recipe}, '
        f'{schedule_line(first, experiment.data.train.size)}'
      )
    experiment, params = session.float_model(experiment, place)
    table = ptq_table.Table(experiment, params, place, say)
    table.curve = qat_runs.measure(
        runs, experiment.config, params=params, place=place, say=say,
        evaluated=experiment.data.evaluated,
        train=functools.partial(train, data=experiment.data),
    )  # fmt: skip
    own = {(place / 'qat' / run.name).resolve() for run in runs}
    table.curve += qat_runs.given([  # no run is a seed twice
        path for path in config.ptq.qat_runs
        if pathlib.Path(path).resolve() not in own
    ], config=config, say=say)  # fmt: skip
    rows = table.run()
    say(f'{len(rows)} rows; results in {place / "results.json"}')
