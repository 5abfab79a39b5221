"""What `--mode=benchmark` times in several runtimes: inference, in turns.

A packed file, or the model of `quant.recipe` with random weights, beside its
float32 twin: in JAX, and as ONNX in the engines.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qvit_jax import models, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError, ExportError
from qvit_jax.evaluation import fixed, timing
from qvit_jax.experiment import in_engines, sources
from qvit_jax.experiment.calibration import build_model
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model, folded
from qvit_jax.export import engines
from qvit_jax.modes.session import say
from qvit_jax.quantization import METHODS
from qvit_jax.quantization.packed import Packed

FLOAT = 'float32'
_PACKED, _OTHERS = '.safetensors', ('.onnx', '.xml')


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """What takes turns.

  Attributes:
    run: Gives logits of the images.
    facts: Who runs what, and how long it took to get ready.
  """

  run: Callable[[], Any]
  facts: dict[str, Any]


class _Field:
  """All candidates, on the same images."""

  def __init__(self, config: Any, names: Sequence[str]):
    """Takes the config of the model and the engines beside JAX."""
    self.config, self.names = config, names
    self.found: dict[str, _Candidate] = {}
    self.refused: dict[str, str] = {}
    size, batch = config.model.image_size, config.eval.batch_size
    self.images = np.random.default_rng(0).standard_normal(
      (batch, size, size, 3), np.float32
    )

  def add(self, label: str, config: Any, packed: Packed) -> None:
    """Adds a model in JAX and in every engine that can run it.

    Raises:
      ExportError: The engine of `eval.engine` cannot.
    """
    module = build_model(config, packed.ops, packed.dtype)
    whole, given = fixed.split(packed.variables)
    images = jax.device_put(self.images)
    compiled, seconds = timing.compile_timed(
      jax.jit(lambda given, x: module.apply(whole(given), x)), given, images
    )
    self._put('jax', label, lambda: compiled(given, images), seconds, {
      'version': jax.__version__, 'execution': packed.execution,
      'size_bytes': packed.num_bytes(),
      'memory_bytes': timing.memory(compiled),
    })  # fmt: skip
    started, written = time.perf_counter(), None
    for name in self.names:
      try:
        written = written or in_engines.write(
          config, packed, lambda: [self.images]
        )
        engine = in_engines.open_model(name, written, config, packed)
      except ExportError as error:
        if self.config.eval.engine == name:
          raise
        self.refused[f'{name} {label}'] = str(error).partition(';')[0]
        continue
      self._add_engine(engine, label, self.images, started)
      started = time.perf_counter()

  def add_file(self, path: pathlib.Path) -> None:
    """Adds a model of others in every engine that reads its form.

    Raises:
      ConfigError: None does, or it takes other images.
    """
    names = [n for n in self.names if path.suffix == '.onnx' or n == 'openvino']
    if not names:
      raise ConfigError(
        f'eval.rivals: {str(path)!r} is read by openvino alone, which is not '
        f'among the engines here ({", ".join(self.names) or "none"}); run pip '
        f'install -r {engines.REQUIREMENTS["openvino"]} and set '
        '--config.eval.engine=openvino'
      )
    for name in names:
      started = time.perf_counter()
      engine = engines.open_file(name, str(path))
      images = _fitted(self.images, engine.shape, path)
      self._add_engine(engine, path.stem, images, started)

  def _add_engine(self, engine, label, images, started) -> None:
    facts = in_engines.facts(engine)
    self._put(
      facts.pop('name'), label, lambda: engine.run(images),
      time.perf_counter() - started, facts,
    )  # fmt: skip

  def _put(self, engine, label, run, seconds, facts) -> None:
    if f'{engine} {label}' in self.found:
      raise ConfigError(
        f'eval.rivals: {label!r} is there twice; give files of different names'
      )
    self.found[f'{engine} {label}'] = _Candidate(
      run, {'engine': engine, 'model': label, 'ready_seconds': seconds} | facts
    )

  def measure(self, rounds: int) -> dict[str, Any]:
    """Returns times of all, and how much faster each is than each other."""
    seconds = timing.interleave(
      {name: one.run for name, one in self.found.items()}, rounds=rounds
    )
    rows = {}
    for name, one in self.found.items():
      spread = timing.spread(seconds[name])
      rows[name] = one.facts | {
        'milliseconds': {k: 1e3 * v for k, v in spread.items()},
        'images_per_second': len(self.images) / spread['median'],
      }
    return {
      'batch_size': len(self.images),
      'rounds': rounds,
      'candidates': rows,
      'speedups': {
        name: {
          other: timing.ratio(seconds[other], seconds[name])
          for other in seconds
          if other != name
        }
        for name in seconds
      },
      'refused': self.refused,
      'samples_seconds': seconds,
    }


def _fitted(
  images: np.ndarray, shape: tuple[Any, ...], path: pathlib.Path
) -> np.ndarray:
  """Returns images [b, h, w, 3] as a model's input of a shape wants them.

  Raises:
    ConfigError: It wants other ones.
  """
  if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
  fits = len(shape) == 4 and all(
    not isinstance(axis, int) or axis <= 0 or axis == count
    for axis, count in zip(shape, images.shape, strict=True)
  )
  if not fits:
    raise ConfigError(
      f'eval.rivals: {str(path)!r} takes {shape}, but the images here are '
      f'{images.shape}; set --config.eval.batch_size= or write the file with a '
      'free batch'
    )
  return images


def _float(config: Any) -> tuple[Any, Packed]:
  """Returns the model in float32 with random weights: time follows no value."""
  config = config_lib.with_fields(
    folded(config), {'model.dtype': FLOAT, 'quant.recipe': 'none'}
  )
  size = config.model.image_size
  init = jax.jit(models.build_model(config).init)
  params = init(jax.random.key(config.seed), np.zeros((1, size, size, 3)))
  flat = tree.flatten({'params': params['params']})
  named = {name.removeprefix('params/'): x for name, x in flat.items()}
  return config, in_engines.float_packed(config, named)


def _packed(config: Any, path: str) -> tuple[Any, Packed]:
  """Returns a packed file and its config."""
  given = config_lib.with_fields(config, {'checkpoint.path': path})
  packed = sources.open_packed(given)
  return Model(given, packed).config, packed


def run(config: Any, rounds: int) -> dict[str, Any]:
  """Returns what is written to benchmark.json of inference in every engine.

  Args:
    config: Of a packed file (`quant.recipe='ptq'`), or with `eval.engine`.
    rounds: Timed turns of each candidate.

  Raises:
    QvitError: A file or an engine is not there, or cannot be used.
  """
  asked = config.eval.engine
  names = engines.installed() if asked == 'jax' else (asked,)
  for name in names:
    engines.check_installed(name)
  if jax.process_count() > 1:
    raise ConfigError('a packed file is timed in one process; start it once')
  rivals = [pathlib.Path(path) for path in config.eval.rivals]
  for path in rivals:
    if path.suffix not in (_PACKED, *_OTHERS) or not path.is_file():
      raise ConfigError(
        f'eval.rivals: {str(path)!r} is no file of a packed model '
        f'({_PACKED}) or of a runtime ({", ".join(_OTHERS)}); give one'
      )
  field = _Field(config, names)
  subjects = _subjects(config, rivals)
  say(f'engines   {", ".join(("jax", *names))}')
  field.add(FLOAT, *_float(config))
  for label, subject in subjects.items():
    field.add(label, *subject)
  for path in rivals:
    if path.suffix in _OTHERS:
      field.add_file(path)
  return field.measure(rounds)


def _subjects(
  config: Any, rivals: Sequence[pathlib.Path]
) -> dict[str, tuple[Any, Packed]]:
  """Returns the models of ours that are timed beside float32, by label."""
  if METHODS[config.quant.recipe].is_packed:
    _, packed = first = _packed(config, config.checkpoint.path)
    say(f'model     {Model(config, packed).title}')
    found = {pathlib.Path(config.checkpoint.path).stem: first}
    for path in rivals:
      if path.suffix == _PACKED:
        found[path.stem] = _packed(config, str(path))
    return found
  model = Model(config)
  say(f'model     {model.title}')
  say(f'bits      {model.bits}')
  if not model.method.quantizes:
    return {}
  # Learned steps are fitted to training images.
  experiment = Experiment(config, training=True)
  variables = experiment.fresh_variables(jax.random.key(config.seed), {})
  return {'model': in_engines.as_packed(experiment.model, variables)}


def table(result: dict[str, Any]) -> str:
  """Returns the times as aligned text, and what is how much faster."""
  rows, speedups = result['candidates'], result['speedups']
  width = max(map(len, rows))
  lines = [
    f'{"":{width}}{"median ms":>11}{"p10":>10}{"p90":>10}{"images/s":>11}'
    f'{"its float32":>13}{"our float32":>13}  products'
  ]

  def over(name: str, other: str) -> str:
    if name == other:
      return '1.00x'
    return f'{speedups[name][other]["median"]:.2f}x'

  for name, row in rows.items():
    ms = row['milliseconds']
    kernels = row.get('kernels')
    how = row.get('execution', '') if kernels is None else ', '.join(
      f'{count} {kind}' for kind, count in kernels.items() if count
    )  # fmt: skip
    own = f'{row["engine"]} {FLOAT}'
    lines.append(
      f'{name:{width}}{ms["median"]:11.2f}{ms["p10"]:10.2f}{ms["p90"]:10.2f}'
      f'{row["images_per_second"]:11.1f}'
      f'{over(name, own):>13}{over(name, f"jax {FLOAT}"):>13}  {how}'
    )
  lines += _comparisons(rows, speedups)
  lines += [f'{name}: {why}' for name, why in result['refused'].items()]
  return '\n'.join(lines)


def _comparisons(rows: dict[str, Any], speedups: dict[str, Any]) -> list[str]:
  """Returns how fast the first model is beside the others in each engine."""
  lines = []
  first = next((r['model'] for r in rows.values() if r['model'] != FLOAT), '')
  for row in rows.values():
    engine, label = row['engine'], row['model']
    ratio = speedups.get(f'{engine} {first}', {}).get(f'{engine} {label}')
    if label != FLOAT and ratio:
      lines.append(
        f'{engine}: {first} is {ratio["median"]:.3f} ({ratio["p10"]:.3f} '
        f'to {ratio["p90"]:.3f}) times as fast as {label}'
      )
  return lines
