"""Images and statistics that post-training quantization goes by.

Statistics are kept as files in the workdir's `calibration`, so that a row that
is added later, or another run of the same weights, need not collect them again.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError, QuantError, WeightsError
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import folded
from qvit_jax.ops import Ops
from qvit_jax.quantization.methods.learned_start import calibrated_steps
from qvit_jax.quantization.ptq import calibrate
from qvit_jax.quantization.ptq.ranges import AUTO
from qvit_jax.store import tensors

_BATCH = 32
_KEY = 'qvit_jax_calibration'
_FORMAT = 1  # raised when statistics come out otherwise


def digest(params: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of named arrays."""
  total = hashlib.sha256()
  for name, values in sorted(params.items()):
    total.update(f'{name} {values.dtype} {values.shape} '.encode())
    total.update(np.ascontiguousarray(values).tobytes())
  return total.hexdigest()


def build_model(config: Any, ops: Ops, dtype: str) -> Any:
  """Returns the config's model in another compute dtype."""
  config = config_lib.with_fields(config, {'model.dtype': dtype})
  return models.build_model(config, ops)


def nest(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns parameters by path as variables on the device."""
  return {'params': tree.nest({n: jnp.asarray(x) for n, x in params.items()})}


def prepared(
  experiment: Experiment, count: int
) -> Iterator[tuple[jax.Array, np.ndarray]]:
  """Yields images of the seeded training order, as evaluation sees them.

  All batches have one shape; the last may go on beyond the count.

  Args:
    experiment: With a training split.
    count: Images that are wanted.

  Yields:
    (images [b, h, w, 3], labels [b]).
  """
  data = experiment.config.data
  size, seed = experiment.config.model.image_size, experiment.config.seed
  batch, train = min(_BATCH, count), experiment.data.train
  hosts = train.train_batches(
    seed=seed,
    batch=batch,
    rows=slice(0, batch),
    first=1,
    last=-(-count // batch),
  )
  prepare = jax.jit(
    lambda images: preprocess.prepare_eval(images, data=data, size=size)
  )
  for host in hosts:
    images, labels = preprocess.gather(train.source, host)
    yield prepare(images), np.asarray(labels)


def check_count(experiment: Experiment, field: str, count: int) -> None:
  """Raises ConfigError where a field asks for more images than there are."""
  there = experiment.data.train.size
  if count > there:
    raise ConfigError(
      f'{field}={count}, but the training split has only {there} images; set '
      f'--config.{field}={there}'
    )


class Calibration:
  """The calibration images, and what is seen of them."""

  def __init__(
    self,
    experiment: Experiment,
    place: pathlib.Path,
    say: Callable[[str], None],
    *,
    hessians: bool = False,
    is_read: bool = True,
  ):
    """Checks that there are enough images.

    Args:
      experiment: With data and model.
      place: The workdir.
      say: Prints a line.
      hessians: Whether statistics have to hold Hessians.
      is_read: Whether anybody will look at an image.

    Raises:
      ConfigError: More images are asked for than there are.
    """
    self._experiment, self._say, self._hessians = experiment, say, hessians
    self._config = experiment.config
    self._own = place / 'calibration'
    if is_read:
      count = self._config.ptq.calibration_examples
      check_count(experiment, 'ptq.calibration_examples', count)
    given = self._config.ptq.calibration_path
    if given and not pathlib.Path(given).is_dir():
      raise ConfigError(
        f'ptq.calibration_path={given!r} is no folder; give the folder '
        '`calibration` of an earlier run, or leave it out'
      )

  def batches(self, count: int = 0) -> Iterator[jax.Array]:
    """Yields prepared images [b, h, w, 3].

    Args:
      count: How many; 0: `ptq.calibration_examples`.
    """
    left = count or self._config.ptq.calibration_examples
    for images, _ in prepared(self._experiment, left):
      yield images[:left]
      left -= len(images)

  def images(self) -> np.ndarray:
    """Returns all of them, [m, h, w, 3] float32."""
    return np.concatenate([np.asarray(batch) for batch in self.batches()])

  def observe(
    self, transforms: tuple[str, ...], params: dict[str, np.ndarray]
  ) -> dict[str, calibrate.SiteStats]:
    """Returns the statistics of a float model, from a file if there is one.

    Args:
      transforms: What has been done to the model; names the file.
      params: Its parameters.

    Raises:
      QuantError: `ptq.calibration_path` holds statistics of something else.
      WeightsError: Its file is damaged.
    """
    name = f'{"+".join(transforms) or "plain"}.safetensors'
    facts = self._facts(params)
    given = self._config.ptq.calibration_path
    path = pathlib.Path(given or self._own) / name
    found = self._read(path, facts) if path.is_file() else None
    if found is not None:
      self._say(f'calibration: statistics of {path}')
      return found
    if given:
      wrong = (
        'is of other weights, images or settings, or holds no Hessians'
        if path.is_file()
        else 'is not there'
      )
      raise QuantError(
        f'ptq.calibration_path={given!r}: {name} {wrong}; give the folder of a '
        'run with these rows and this model, or leave the path out'
      )
    stats = calibrate.collect(
      lambda ops: build_model(self._config, ops, 'float32'),
      nest(params),
      self.batches,
      self._experiment.model.plan.sites,
      scales=self._config.ptq.scales,
      hessians=self._hessians,
      progress=self._say,
    )
    tensors.save_described(
      calibrate.to_arrays(stats), self._own / name, _KEY, facts
    )
    return stats

  def _facts(self, params) -> dict[str, Any]:
    config = config_lib.to_json(self._config)
    return {
      'format': _FORMAT,
      'architecture': json.loads(json.dumps(models.architecture(self._config))),
      'weights': digest(params),
      'data': config['data'],
      'data_digest': self._experiment.data.digest,
      'seed': config['seed'],
      'examples': config['ptq']['calibration_examples'],
      'scales': config['ptq']['scales'],
      # 2: with what centers them.
      'hessians': 2 if self._hessians else False,
    }

  def _read(self, path: pathlib.Path, facts: dict[str, Any]):
    """Returns the statistics of a file, or None if they are of other facts.

    Raises:
      WeightsError: It is damaged, and the user named it; the workdir's own is
        written anew.
    """
    try:
      there = _read_facts(path)
      if there is not None:
        # Older files lack what is newer; fields had their defaults.
        there.setdefault('data_digest', facts['data_digest'])
        there['data'] = _defaults('data') | there['data']
        if not facts['hessians']:
          there['hessians'] = False  # more than is wanted does no harm
      return _read_stats(path) if there == facts else None
    except WeightsError as error:
      if self._config.ptq.calibration_path:
        raise
      self._say(f'calibration: anew, because of {error}')
      return None


def _defaults(section: str) -> dict[str, Any]:
  """Returns the default of each field of a section, as JSON values."""
  return {
    field.name.partition('.')[2]: json.loads(json.dumps(field.default))
    for field in config_lib.FIELDS.values()
    if field.section == section
  }


def _read_facts(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns what a file says its statistics are of; None if it says nothing.

  Raises:
    WeightsError: It is damaged.
  """
  tensors.read(path)  # says more of a damaged file
  try:
    return tensors.read_header(path, _KEY)
  except KeyError:
    return None


def _read_stats(path: pathlib.Path) -> dict[str, calibrate.SiteStats]:
  return calibrate.from_arrays(tensors.read_described(path, _KEY)[0])


def learned_start(
  experiment: Experiment, params: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], str]:
  """Returns the steps of `quant.calibration_path`, and a line about them.

  Args:
    experiment: Of a recipe with learned steps.
    params: The parameters that the run starts from, by path, norms folded.

  Returns:
    {'quant/SITE/lhs_step': array} in the shapes of the model's variables, with
    all steps and zero points of activations.

  Raises:
    QuantError: There is no such file, or it is of another model or of scales
      that quant.act_granularity cannot start from.
    WeightsError: It is damaged.
  """
  config, model = experiment.config, experiment.model
  folder, steps = config.quant.calibration_path, model.plan.act_granularity
  path = pathlib.Path(folder) / 'plain.safetensors'
  facts = _read_facts(path) if path.is_file() else None
  if facts is None:
    raise QuantError(
      f'quant.calibration_path={folder!r}: {path} is no calibration file; give '
      'the folder `calibration` of a --mode=ptq run of the same float model, '
      'or leave the path out'
    )
  here = json.loads(json.dumps(models.architecture(folded(config))))
  reasons = {
    'format': (_FORMAT, 'has another format'),
    'architecture': (here, 'is of another architecture'),
    'weights': (digest(params), 'is of other weights'),
    'scales': (steps, f'holds statistics {facts.get("scales")}, not {steps}'),
  }
  for name, (wanted, wrong) in reasons.items():
    if facts.get(name) != wanted:
      raise QuantError(
        f'quant.calibration_path={folder!r}: {path} {wrong}; run --mode=ptq on '
        f'the float model that this run starts from, with --config.ptq.scales='
        f'{steps}, or leave the path out'
      )
  # Steps are trained further, which a row's own choice was not measured for.
  ranges = 'mse' if config.ptq.range == AUTO else config.ptq.range
  found = calibrated_steps(model.ops.core, _read_stats(path), ranges)
  shapes = tree.flatten({'quant': model.shapes['quant']})
  started = {
    f'quant/{name}': np.asarray(x).reshape(shapes[f'quant/{name}'].shape)
    for name, x in found.items()
  }
  return started, (
    f'steps of activations from {path} ({facts["examples"]} images, range '
    f'{ranges})'
  )
