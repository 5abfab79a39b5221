"""How fast other runtimes are with the rows of `--mode=ptq`."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from qvit_jax.errors import ConfigError, ExportError
from qvit_jax.evaluation import timing
from qvit_jax.experiment import in_engines
from qvit_jax.export import engines, onnx_model
from qvit_jax.export.engines import Engine
from qvit_jax.quantization.packed import Packed

# Images for ranges that calibration does not keep: the time does not follow.
_IMAGES = 32
_AUTO = ('auto',)
NONE = (
  'no other runtime is installed, so rows are timed in JAX alone; pip install '
  '-r requirements-onnx.txt'
)


def names(config: Any) -> tuple[str, ...]:
  """Returns the engines that `ptq.engines` asks for.

  Raises:
    ConfigError: There is no such engine, or it is not installed.
  """
  asked = tuple(config.ptq.engines)
  if asked == _AUTO:
    return engines.installed()
  for name in asked:
    if name not in engines.ENGINES:
      raise ConfigError(
        f'ptq.engines names {name!r}; allowed: '
        f'{" ".join(map(repr, engines.ENGINES))}, or ("auto",) alone. Set '
        '--config.ptq.engines="(\'auto\',)"'
      )
    engines.check_installed(name)
  return asked


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A row and float32 in every engine.

  Attributes:
    batch: Images of a call.
    calls: What is timed, by name.
    models: Engines with the row; why not, where they cannot run it.
    profile: Of the row's ONNX model; '' where there is none.
  """

  batch: int
  calls: dict[str, Callable[[], Any]]
  models: dict[str, Engine | str]
  profile: str

  def facts(self, times: dict[str, list[float]]) -> dict[str, Any]:
    """Returns what a row says of each engine, given the seconds of its calls.

    `speedup` is over float32 in the same engine, timed in turns.
    """
    found = {}
    for name, engine in self.models.items():
      row = dict.fromkeys(
        ('version', 'profile', 'latency_ms', 'images_per_second', 'speedup',
         'kernels', 'note')
      )  # fmt: skip
      if isinstance(engine, str):
        found[name] = row | {'note': engine}
        continue
      spread = timing.spread(times[name])
      found[name] = row | {
        'version': engine.version,
        'profile': self.profile,
        'latency_ms': {k: 1e3 * v for k, v in spread.items()},
        'images_per_second': self.batch / spread['median'],
        'speedup': timing.ratio(times[f'{name} fp32'], times[name])['median'],
        'kernels': in_engines.facts(engine)['kernels'],
      }
    return found


class EngineTimes:
  """The engines of a table, with its float model."""

  def __init__(self, config: Any, images: Callable[[int], Iterable[Any]]):
    """Checks that they are there.

    Args:
      config: Of the model.
      images: Returns batches of so many normalised images.

    Raises:
      ConfigError: One is not.
    """
    self.names = names(config)
    self._config, self._images = config, images
    self._floats: dict[str, Engine | str] = {}
    size = config.model.image_size
    shape = (config.ptq.latency_batch, size, size, 3)
    rng = np.random.default_rng(0)
    self._timed = rng.standard_normal(shape, np.float32)

  def open(self, packed: Packed, base: Packed) -> _Opened:
    """Returns a row in every engine, ready to be timed beside float32.

    Args:
      packed: The row's model.
      base: That of float32.
    """
    if self.names and not self._floats:
      self._floats, _ = self._opened(base)
    if packed.dtype != base.dtype:
      why = f'its {packed.dtype} parts would be float32 in an ONNX file'
      found, profile = dict.fromkeys(self.names, why), ''
    elif packed.execution == 'float':
      found, profile = dict(self._floats), 'float'
    else:
      found, profile = self._opened(packed)
    calls = {}
    for name, engine in found.items():
      floats = self._floats[name]
      if isinstance(floats, str):  # nothing to compare with
        found[name] = floats
      elif not isinstance(engine, str):
        calls[name] = self._call(engine)
        calls[f'{name} fp32'] = self._call(floats)
    return _Opened(len(self._timed), calls, found, profile)

  def _opened(self, packed: Packed) -> tuple[dict[str, Engine | str], str]:
    """Returns a model in each engine, or why it cannot have it; its profile."""
    found: dict[str, Engine | str] = {}
    if not self.names:
      return found, ''
    try:
      images = lambda: self._images(_IMAGES)
      model = in_engines.write(self._config, packed, images)
    except ExportError as error:
      return dict.fromkeys(self.names, _short(error)), ''
    for name in self.names:
      try:
        found[name] = in_engines.open_model(name, model, self._config, packed)
      except ExportError as error:
        found[name] = _short(error)
    return found, onnx_model.fact(model, 'profile')

  def _call(self, engine: Engine) -> Callable[[], Any]:
    return lambda: engine.run(self._timed)


def _short(error: ExportError) -> str:
  """Returns what is wrong without what to do about it."""
  return str(error).partition(';')[0]


def texts(found: dict[str, Any]) -> list[str]:
  """Returns images/s of each engine of a row, for a person."""
  return [
    f'{name} -'
    if row['note']
    else f'{name} {row["images_per_second"]:.0f}/s ({row["speedup"]:.2f}x)'
    for name, row in found.items()
  ]
