"""What `--mode=benchmark` times of an experiment and its float twin."""

import copy
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qvit_jax.config import resolve as config_lib
from qvit_jax.data.bare_loop import BareLoop
from qvit_jax.data.batches import StreamedSplit
from qvit_jax.data.listing import Files
from qvit_jax.errors import ConfigError
from qvit_jax.evaluation import fixed, timing
from qvit_jax.experiment import teacher as teacher_lib
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.models import Cut
from qvit_jax.modes import engine_benchmark, session
from qvit_jax.modes.session import say
from qvit_jax.quantization import METHODS
from qvit_jax.report import rows as report
from qvit_jax.store import files

# A training step costs a forward pass and two products of the same size
# backward; a multiply-accumulate is two operations.
_TRAIN_FLOPS_PER_MAC = 6
_INFERENCE_FLOPS_PER_MAC = 2
_LOADED = 4096  # images of one timed turn of the loader


# Rounds of a benchmark: enough for percentiles, a minute or two for small
# models on a CPU.
_ROUNDS = 15
_LOADER_ROUNDS = 5  # of some seconds each


class _Stepper:
  """A train step that carries its own state from call to call."""

  def __init__(self, experiment: Experiment, *, keeps: bool = True):
    """Compiles it; where it `keeps` features, those are computed once."""
    self._batches = experiment.train_batches(1, 10**9)
    self._fixed = next(self._batches)
    key = jax.random.key(experiment.config.seed)
    state = experiment.fresh_state(key)
    if keeps:
      source = session.train_source(experiment, state.variables)
    else:
      source = experiment.replicate(experiment.data.train.source)
    self.compiled, self.compile_seconds = experiment.compile_train_step(
      state, source, self._fixed
    )
    self._state, self._source = state, source
    self._given = experiment.given
    self.first_loss: float | None = None

  def fixed(self) -> jax.Array:
    """Steps on one batch that is on the device already."""
    return self._step(self._fixed)

  def loaded(self) -> jax.Array:
    """Steps on the next batch of the data set."""
    tick = self._step(next(self._batches))
    if self.first_loss is None:
      self.first_loss = float(tick[0])
    return tick

  def _step(self, batch) -> jax.Array:
    self._state, tick = self.compiled(
      self._state, self._source, batch, self._given
    )
    return tick


def time_training(
  twins: dict[str, Experiment], *, rounds: int
) -> dict[str, Any]:
  """Returns times, ratios, memory and FLOP/s of the train steps.

  Args:
    twins: 'model' and, if that is quantized, 'float'; 'aqt' beside learned
      steps. Where features of 'model' are computed once, 'recomputed' is
      timed beside it.
    rounds: Timed turns of each candidate.
  """
  steppers = {name: _Stepper(twin) for name, twin in twins.items()}
  flops = dict.fromkeys(
    steppers, twins['model'].model.plan.macs() * _TRAIN_FLOPS_PER_MAC
  )
  kept = twins['model'].features
  if kept:
    anew = copy.copy(twins['model'])
    anew.features = None
    steppers['recomputed'] = _Stepper(anew, keeps=False)
    flops['model'], frozen = _split_flops(anew, kept.cut)
    flops['recomputed'] = flops['model'] + frozen
  calls: dict[str, Callable[[], Any]] = {
    name: stepper.loaded for name, stepper in steppers.items()
  }
  calls['model_fixed_batch'] = steppers['model'].fixed
  seconds = timing.interleave(calls, rounds=rounds)
  batch = twins['model'].config.train.batch_size
  return {
      'candidates': {
          name: _candidate(
              seconds[name], stepper.compiled, stepper.compile_seconds, batch,
              flops[name],
          )
          for name, stepper in steppers.items()
      },
      'ratios': _ratios(seconds)
      | {
          'data_rate': timing.ratio(
              seconds['model_fixed_batch'], seconds['model']
          )
      },
      'first_losses': {
          name: stepper.first_loss for name, stepper in steppers.items()
      } if kept else {},
      'samples_seconds': seconds,
  }  # fmt: skip


def time_inference(
  twins: dict[str, Experiment], *, rounds: int
) -> dict[str, Any]:
  """Returns the same for a forward pass on one random batch."""
  experiment = twins['model']
  batch, size = (
    experiment.config.eval.batch_size,
    experiment.config.model.image_size,
  )
  key = jax.random.key(0)
  variables = {
    name: twin.fresh_variables(key, {}) for name, twin in twins.items()
  }
  images = jax.device_put(
    jax.random.normal(jax.random.key(1), (batch, size, size, 3), jnp.float32),
    experiment.batch_sharding,
  )
  compiled, compile_seconds, given = {}, {}, {}
  for name, twin in twins.items():
    whole, given[name] = fixed.split(variables[name])
    apply = twin.model.module.apply
    forward = lambda v, x, apply=apply, whole=whole: apply(whole(v), x)
    compiled[name], compile_seconds[name] = timing.compile_timed(
      jax.jit(forward), given[name], images
    )
  calls = {
    name: (lambda name=name: compiled[name](given[name], images))
    for name in twins
  }
  seconds = timing.interleave(calls, rounds=rounds)
  return {
      'candidates': {
          name: _candidate(
              seconds[name], compiled[name], compile_seconds[name], batch,
              experiment.model.plan.macs() * _INFERENCE_FLOPS_PER_MAC,
          )
          for name in twins
      },
      'ratios': _ratios(seconds),
      'samples_seconds': seconds,
  }  # fmt: skip


def time_loader(experiment: Experiment, *, rounds: int) -> dict[str, Any]:
  """Returns images/s of the loader and of a bare decoding loop in turns.

  {} where no files are read. No image goes to a device.

  Args:
    experiment: With a training split.
    rounds: Timed turns of each.
  """
  split = experiment.data.train
  if not isinstance(split, StreamedSplit) or not isinstance(
    split.records, Files
  ):
    return {}
  batch = experiment.config.train.batch_size
  steps = max(1, -(-_LOADED // batch))
  batches = split.train_batches(
      seed=experiment.config.seed, batch=batch, rows=slice(0, batch),
      first=1, last=10**6, augmented=True,
  )  # fmt: skip
  # What workers have ready when their turn comes does not count.
  ready = 2 * max(split.workers, 4)
  paths = [split.records[i % split.size][0] for i in range(steps * batch)]
  rates: dict[str, list[float]] = {'loader': [], 'bare': []}
  with BareLoop() as bare:
    for _ in range(rounds):
      for _ in range(ready):
        next(batches)
      started = time.perf_counter()
      for _ in range(steps):
        next(batches)
      rates['loader'].append(steps * batch / (time.perf_counter() - started))
      rates['bare'].append(len(paths) / bare.seconds(paths))
    cores = bare.cores
  return {
    'workers': split.workers,
    'cores': cores,
    'images_per_second': timing.spread(rates['loader']),
    'bare_images_per_second': timing.spread(rates['bare']),
    'ratio': timing.ratio(rates['loader'], rates['bare']),
  }


def _split_flops(experiment: Experiment, cut: Cut) -> tuple[int, int]:
  """Returns FLOPs of an image's step behind a cut, and forward before it."""
  starts = tuple(f'{path}/' for path in cut.behind)
  behind = sum(
    site.macs
    for site in experiment.model.plan.sites
    if f'{site.path}/'.startswith(starts)
  )
  before = experiment.model.plan.macs() - behind
  return behind * _TRAIN_FLOPS_PER_MAC, before * _INFERENCE_FLOPS_PER_MAC


def _ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
  found = {}
  if 'recomputed' in seconds:  # what features that are computed once save
    found['recomputed_to_model'] = timing.ratio(
      seconds['recomputed'], seconds['model']
    )
  if 'float' not in seconds:
    return found
  return found | {
    f'{name}_to_float': timing.ratio(seconds[name], seconds['float'])
    for name in ('model', 'aqt')
    if name in seconds
  }


def _candidate(
  seconds, compiled, compile_seconds, batch, flops_per_image
) -> dict[str, Any]:
  spread = timing.spread(seconds)
  rate = batch / spread['median']
  flops = flops_per_image * rate
  peak = timing.peak_flops()
  return {
    'milliseconds': {k: 1e3 * v for k, v in spread.items()},
    'images_per_second': rate,
    'compile_seconds': compile_seconds,
    'model_flops_per_second': flops,
    'share_of_bf16_peak': flops / peak if peak else None,
    'memory_bytes': timing.memory(compiled),
  }


def table(result: dict[str, Any]) -> str:
  """Returns the numbers of a benchmark as aligned text."""
  lines = [
    f'{"":22}{"median ms":>11}{"p10":>10}{"p90":>10}{"images/s":>11}'
    f'{"compile s":>11}{"GFLOP/s":>10}{"peak MiB":>10}'
  ]
  for part in ('train', 'inference'):
    for name, c in result[part]['candidates'].items():
      ms, peak = c['milliseconds'], c['memory_bytes']['peak']
      mib = f'{peak / 2**20:.0f}' if peak is not None else '-'
      lines.append(
        f'{part + " " + name:22}{ms["median"]:11.2f}{ms["p10"]:10.2f}'
        f'{ms["p90"]:10.2f}{c["images_per_second"]:11.1f}'
        f'{c["compile_seconds"]:11.1f}'
        f'{c["model_flops_per_second"] / 1e9:10.0f}{mib:>10}'
      )
    for name, r in result[part]['ratios'].items():
      lines.append(
        f'{part} {name}: {r["median"]:.3f} ({r["p10"]:.3f} to {r["p90"]:.3f})'
      )
  if losses := result['train']['first_losses']:
    listed = ', '.join(f'{name} {loss:.6f}' for name, loss in losses.items())
    lines.append(f'train loss of the first step: {listed}')
  if loader := result.get('loader'):
    r, bare = loader['ratio'], loader['bare_images_per_second']['median']
    lines.append(
      f'loader, {loader["workers"]} workers: '
      f'{loader["images_per_second"]["median"]:.0f} images/s; a bare loop on '
      f'{loader["cores"]} cores: {bare:.0f}; '
      f'ratio {r["median"]:.3f} ({r["p10"]:.3f} to {r["p90"]:.3f})'
    )
  return '\n'.join(lines)


def benchmark(config: Any, workdir: str) -> None:
  """Times training and inference beside the float twin, and the data path.

  Of a packed file, or with `eval.engine`: inference alone, in every engine.
  """
  packs = METHODS[config.quant.recipe].is_packed
  with session.opened(workdir) as place:
    if packs or config.eval.engine != 'jax':
      say('mode      benchmark')
      inference = engine_benchmark.run(config, _ROUNDS)
      _write(config, place, {'inference': inference})
      say(engine_benchmark.table(inference))
      say(f'results in {place / "benchmark.json"}')
      return
    if config.eval.rivals:
      raise ConfigError(
        f'eval.rivals={tuple(config.eval.rivals)} take turns with a packed '
        'file; set --config.quant.recipe=ptq, and --config.checkpoint.path= to '
        'the file'
      )
    if path := config.checkpoint.path:
      say(f'note: checkpoint.path={path!r} is not read: weights are random')
    experiment = Experiment(config, training=True)
    session.header('benchmark', experiment, place)
    session.add_teacher(experiment)
    twins = {'model': experiment}
    method = experiment.model.method
    if method.quantizes or config.lora.rank:
      twins['float'] = _twin(experiment, 'none')
    if method.learns_steps:
      twins['aqt'] = _twin(experiment, 'aqt')  # what learned steps cost
    result = {
      'bits': experiment.model.bits,
      'rounds': _ROUNDS,
      'size_bytes': {
        name: twin.model.size_bytes() for name, twin in twins.items()
      },
      'train': time_training(twins, rounds=_ROUNDS),
      'inference': time_inference(twins, rounds=_ROUNDS),
      'loader': time_loader(experiment, rounds=_LOADER_ROUNDS),
    }
    _write(config, place, result)
    say(table(result))
    say(f'results in {place / "benchmark.json"}')


def _write(config: Any, place: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes benchmark.json, on the first process."""
  if jax.process_index() == 0:
    digest = report.config_digest(config_lib.to_json(config))
    files.write_json(
      place / 'benchmark.json',
      {'environment': report.environment(), 'config_digest': digest, **result},
    )


def _twin(experiment: Experiment, recipe: str) -> Experiment:
  """Returns the same experiment under another recipe, training all it has."""
  config = config_lib.with_fields(
    experiment.config,
    {
      'quant.recipe': recipe,
      'lora.rank': 0,
      'lora.targets': (),
      'train.trainable': ('auto',),
      'train.stages': (),
    },
  )
  twin = Experiment(config, training=True, data=experiment.data)
  if config.train.teacher:  # a twin without it would be no twin
    twin.teacher = teacher_lib.load_teacher(twin)
  return twin
