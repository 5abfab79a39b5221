"""What `--mode` may be: one function each. Row 15; knows nothing of flags."""

import copy
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from qvit_jax import (
  artifacts,
  benchmarks,
  curve,
  exports,
  files,
  merging,
  packing,
  ptq_table,
  restore,
  session,
  subject,
  tree,
)
from qvit_jax import config as config_lib
from qvit_jax import predict as predict_lib
from qvit_jax import sensitivity as sensitivity_lib
from qvit_jax import teacher as teacher_lib
from qvit_jax.data import open_images
from qvit_jax.errors import ConfigError, DivergedError
from qvit_jax.evaluation import report
from qvit_jax.experiment import Experiment
from qvit_jax.quantization import RECIPES
from qvit_jax.session import say
from qvit_jax.train_mode import train
from qvit_jax.whole_model import Model

# Rounds of a benchmark: enough for percentiles, a minute or two for small
# models on a CPU.
_ROUNDS = 15
_LOADER_ROUNDS = 5  # of some seconds each


def run(
  mode: str, config: Any, workdir: str, *, overrides: Iterable[str] = ()
) -> None:
  """Validates the config and does what the mode says.

  Args:
    mode: A key of MODES.
    config: A ConfigDict built on configs/common.py.
    workdir: Where to write; may be '' for `sites`.
    overrides: Fields that the command line sets.

  Raises:
    QvitError: The user's input is wrong.
    Preempted: A signal stopped the run after saving.
  """
  overrides = list(overrides)
  notes = config_lib.validate(config, mode=mode, overrides=overrides)
  if 'weights.path' in overrides and 'weights.required' not in overrides:
    config.weights.required = True  # who names weights wants these
  if mode != 'sites':
    _join_processes()  # before anything asks JAX for its devices
  for note in notes:
    say(f'note: {note}')
  MODES[mode](config, workdir)


def _join_processes() -> None:
  """Joins the other processes of a run that was started as several.

  SLURM, Open MPI and cloud TPUs are recognised by JAX itself; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
  """
  several = any(
    int(os.environ.get(name, 1)) > 1
    for name in ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
  )
  if not several or jax.distributed.is_initialized():
    return
  own = {}
  if 'JAX_NUM_PROCESSES' in os.environ:
    own = {
      'coordinator_address': os.environ['JAX_COORDINATOR_ADDRESS'],
      'num_processes': int(os.environ['JAX_NUM_PROCESSES']),
      'process_id': int(os.environ['JAX_PROCESS_ID']),
    }
  jax.distributed.initialize(**own)


def evaluate(config: Any, workdir: str) -> None:
  """Evaluates a checkpoint once over the whole split."""
  with session.opened(workdir) as place:
    packed = subject.open_packed(config)
    experiment = Experiment(config, training=False, packed=packed)
    session.header('eval', experiment, place)
    variables, origin = subject.start_of_eval(experiment, place)
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


def predict(config: Any, workdir: str) -> None:
  """Names the likeliest classes of every image of `eval.images`."""
  if jax.process_count() > 1:
    raise ConfigError('--mode=predict runs in one process; start it once')
  with session.opened(workdir) as place:
    packed = subject.open_packed(config)
    names, line = subject.class_names_of_eval(config, place)
    data = open_images(config, names)
    experiment = Experiment(config, training=False, data=data, packed=packed)
    session.header('predict', experiment, place)
    say(f'classes   {line}')
    variables, origin = subject.start_of_eval(experiment, place)
    for line in origin:
      say(f'start     {line}')
    found = predict_lib.predict(experiment, variables)
    text, count = predict_lib.to_text(found, data.eval.size)
    files.write_text(place / 'predictions.jsonl', text)
    session.say_bad_files(experiment)
    say(f'{count:,} images; results in {place / "predictions.jsonl"}')


def sites(config: Any, workdir: str) -> None:
  """Prints every quantizable product with its spec."""
  del workdir  # nothing is written
  model = Model(config)
  say(f'model  {model.title}')
  say(f'bits   {model.bits}')
  for line in model.adapter_lines():
    say(f'lora   {line}')
  say(model.plan.table())


def benchmark(config: Any, workdir: str) -> None:
  """Times training and inference beside the float twin, and the data path."""
  with session.opened(workdir) as place:
    experiment = Experiment(config, training=True)
    session.header('benchmark', experiment, place)
    session.add_teacher(experiment)
    twins = {'model': experiment}
    if config.quant.recipe != 'none' or config.lora.rank:
      twins['float'] = _twin(experiment, 'none')
    if 'quant' in RECIPES[config.quant.recipe].collections:
      twins['aqt'] = _twin(experiment, 'aqt')  # what learned steps cost
    result = {
      'environment': report.environment(),
      'config_digest': report.config_digest(config_lib.to_json(config)),
      'bits': experiment.model.bits,
      'rounds': _ROUNDS,
      'size_bytes': {
        name: twin.model.size_bytes() for name, twin in twins.items()
      },
      'train': benchmarks.time_training(twins, rounds=_ROUNDS),
      'inference': benchmarks.time_inference(twins, rounds=_ROUNDS),
      'loader': benchmarks.time_loader(experiment, rounds=_LOADER_ROUNDS),
    }
    if jax.process_index() == 0:
      files.write_json(place / 'benchmark.json', result)
    say(benchmarks.table(result))
    say(f'results in {place / "benchmark.json"}')


def _twin(experiment: Experiment, recipe: str) -> Experiment:
  """Returns the same experiment under another recipe, training all it has."""
  config = copy.deepcopy(experiment.config)
  config.quant.recipe = recipe
  config.lora.update(rank=0, targets=())
  config.train.update(trainable=('auto',), stages=())
  twin = Experiment(config, training=True, data=experiment.data)
  if config.train.teacher:  # a twin without it would be no twin
    twin.teacher = teacher_lib.load_teacher(twin)
  return twin


def _check_float(mode: str, config: Any) -> None:
  """Raises ConfigError where a mode cannot start from a float model."""
  if artifacts.is_artifact(config.checkpoint.path):
    raise ConfigError(
      f'checkpoint.path={config.checkpoint.path!r} is already quantized; give '
      'the workdir of a float run, or evaluate the file with --mode=eval '
      '--config.quant.recipe=ptq'
    )
  if config.quant.recipe != 'none':
    raise ConfigError(
      f'--mode={mode} starts from a float model, but quant.recipe is '
      f'{config.quant.recipe!r}; set --config.quant.recipe=none'
    )
  for field in ('checkpoint', 'weights'):
    restore.check_float_run(f'{field}.path', config[field].path)
  if jax.process_count() > 1:
    raise ConfigError(f'--mode={mode} runs in one process; start it once')


def _float_params(
  experiment: Experiment, place: pathlib.Path
) -> dict[str, np.ndarray]:
  """Returns the trained parameters by path and says whence they are."""
  variables, origin = subject.start_of_eval(experiment, place)
  for line in origin:
    say(f'start     {line}')
  params = tree.flatten(variables['params'])
  return {name: np.asarray(x) for name, x in params.items()}


def ptq(config: Any, workdir: str) -> None:
  """Quantizes a trained float model in every way of `ptq.rows`.

  And trains it further at the bits of `ptq.qat_specs`, for the curve.
  """
  _check_float('ptq', config)
  runs = curve.plan(config)
  config = copy.deepcopy(config)  # what it resolves is of the float model
  with session.opened(workdir) as place:
    experiment = Experiment(config, training=True)
    session.header('ptq', experiment, place)
    if runs:
      say(
        f'qat       {len(runs)} runs: {", ".join(config.ptq.qat_specs)}, '
        f'{config.ptq.qat_seeds} seed(s) each, recipe {config.ptq.qat_recipe}, '
        f'{experiment.schedule_line()}'
      )
    params = _float_params(experiment, place)
    table = ptq_table.Table(experiment, params, place, say)
    table.curve = curve.measure(
        runs, config, params=params, place=place, say=say,
        train=functools.partial(train, data=experiment.data),
    )  # fmt: skip
    own = {(place / 'qat' / run.name).resolve() for run in runs}
    table.curve += curve.given([  # no run is a seed twice
        path for path in config.ptq.qat_runs
        if pathlib.Path(path).resolve() not in own
    ])  # fmt: skip
    rows = table.run()
    say(f'{len(rows)} rows; results in {place / "results.json"}')


def sensitivity(config: Any, workdir: str) -> None:
  """Quantizes each product of a trained float model alone; ranks them."""
  _check_float('sensitivity', config)
  with session.opened(workdir) as place:
    experiment = Experiment(config, training=True)
    session.header('sensitivity', experiment, place)
    params = _float_params(experiment, place)
    table = sensitivity_lib.measure(experiment, params, place, say)
    sites = experiment.model.plan.sites
    for line in sensitivity_lib.describe(config, sites, table):
      say(line)
    say(f'{len(sites)} sites; results in {place / "sensitivity.json"}')


def merge_lora(config: Any, workdir: str) -> None:
  """Folds adapters into the kernels and checks that outputs agree."""
  if jax.process_count() > 1:
    raise ConfigError('--mode=merge_lora runs in one process; start it once')
  with session.opened(workdir) as place:
    # Only GPTQ looks at images of the training split.
    calibrates = config.lora.requantize == 'gptq'
    experiment = Experiment(config, training=calibrates)
    session.header('merge_lora', experiment, place)
    merging.run(experiment, place, say)


def export(config: Any, workdir: str) -> None:
  """Writes a packed model, or float parameters in the layout of others."""
  if jax.process_count() > 1:
    raise ConfigError('--mode=export runs in one process; start it once')
  with session.opened(workdir) as place:
    model = Model(config)
    say('mode      export')
    say(f'model     {model.title}')
    if config.export.format == 'packed':
      packing.export(model, place, say)
    else:
      exports.export(model, place, say)


MODES: dict[str, Callable[[Any, str], None]] = {
  'train': train,
  'eval': evaluate,
  'sites': sites,
  'benchmark': benchmark,
  'export': export,
  'merge_lora': merge_lora,
  'ptq': ptq,
  'sensitivity': sensitivity,
  'predict': predict,
}
