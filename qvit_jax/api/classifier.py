"""A trained model in Python: `load`, `quantize` and `Classifier`.

import qvit_jax

model = qvit_jax.load('runs/digits')
logits = model(images)  # uint8 [b, h, w, 3] -> float32 [b, classes]
small = qvit_jax.quantize(model, images, 'w4a4')
small.save('w4a4.safetensors')
"""

import pathlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from qvit_jax import models
from qvit_jax.config import resolve as config_lib
from qvit_jax.data import Data, batches, decode, preprocess
from qvit_jax.errors import ConfigError, DataError, ExportError, QuantError
from qvit_jax.evaluation import fixed
from qvit_jax.experiment import (
  auto,
  in_engines,
  own_config,
  ptq_table,
  sources,
  statistics,
)
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import folded
from qvit_jax.modes import MODES, runner
from qvit_jax.quantization import METHODS
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import artifacts, runs

# Images are padded to one of these counts, so that few programs are compiled.
SIZES = (1, 4, 16, 64, 256)
_IMAGES = (
  'give uint8 pixels [b, h, w, 3], or a list of image files or PIL images'
)


class Classifier:
  """Real images to logits; preprocessing is its own.

  Any number of threads may call it. A program is compiled once for each count
  of `SIZES` and size of images.

  Attributes:
    config: Resolved; what the model is and how images are prepared.
    class_names: By label; () where nobody saved them.
    origin: Lines: where the numbers came from, what was assumed.
  """

  def __init__(
    self,
    experiment: Experiment,
    variables: Mapping[str, Any],
    origin: Sequence[str] = (),
  ):
    """Takes a model and its arrays; see `load`.

    Args:
      experiment: Of the model.
      variables: What it evaluates, by collection.
      origin: Lines for `summary`.
    """
    self._model = experiment.model
    self.config = experiment.config
    self.class_names = tuple(experiment.data.class_names)
    self.origin = list(origin)
    self._variables = jax.device_put(dict(variables), jax.local_devices()[0])
    self._programs: dict[tuple[int, ...], Callable[[Any], Any]] = {}
    self._lock = threading.Lock()

  def __call__(self, images: Any) -> np.ndarray:
    """Returns float32 logits [b, classes].

    Args:
      images: uint8 [b, h, w, 3] of any size, or a list of files or PIL images.
        Square arrays are resized as they are; what is not square is resized on
        its shorter side and cut in the middle, as files are.

    Raises:
      DataError: They are no images.
    """
    pixels = self._pixels(images)
    parts = [
      self._run(pixels[start : start + SIZES[-1]])
      for start in range(0, len(pixels), SIZES[-1])
    ]
    count = self.config.model.num_classes
    return np.concatenate(parts) if parts else np.zeros((0, count), np.float32)

  def predict(self, images: Any, top_k: int = 5) -> list[list[dict[str, Any]]]:
    """Returns the likeliest classes of each image, likeliest first.

    Args:
      images: As for a call.
      top_k: How many; all where there are fewer.

    Returns:
      For each image a list of {'name', 'index', 'probability'}.

    Raises:
      DataError: They are no images.
    """
    logits = self(images)
    most = logits.max(axis=-1, keepdims=True)
    shares = np.exp(logits - most)
    shares /= shares.sum(axis=-1, keepdims=True)
    best = np.argsort(-shares, axis=-1, kind='stable')[:, :top_k]
    return [
      [
        {'name': self._name(int(i)), 'index': int(i),
         'probability': float(row[i])}
        for i in indices
      ]
      for row, indices in zip(shares, best, strict=True)
    ]  # fmt: skip

  def summary(self) -> str:
    """Returns what it is, on a few lines."""
    data, size = self.config.data, self.config.model.image_size
    model = self._model
    lines = [
      f'model     {model.title}',
      f'bits      {model.bits}',
      f'size      {model.size_bytes():,} bytes',
      f'images    {size} px, {data.resize}, mean {tuple(data.mean)}, std '
      f'{tuple(data.std)}',
      f'classes   {self.config.model.num_classes}'
      + (f': {_few(self.class_names)}' if self.class_names else ', unnamed'),
    ]
    return '\n'.join([*lines, *(f'from      {line}' for line in self.origin)])

  def save(self, path: str | pathlib.Path) -> int:
    """Writes a packed file, which `load` and every mode read.

    Args:
      path: Of the file, NAME.safetensors.

    Returns:
      Its bytes.

    Raises:
      ExportError: The disk does not take it, or adapters are not folded in.
    """
    if self._model.frozen:
      raise ExportError(
        'adapters lie on kernels that they do not hold; fold them in with '
        '--mode=merge_lora and load WORKDIR/merged/NAME'
      )
    config, packed = in_engines.as_packed(self._model, self._variables)
    return artifacts.save(
      packed, pathlib.Path(path), models.architecture(config),
      class_names=self.class_names, config=config_lib.to_json(config),
    )  # fmt: skip

  def _name(self, index: int) -> str:
    names = self.class_names
    return names[index] if index < len(names) else f'class {index}'

  def _pixels(self, images: Any) -> np.ndarray:
    """Returns uint8 [b, h, w, 3], square.

    Raises:
      DataError: They are no images.
    """
    if isinstance(images, (list, tuple)):
      found = [self._read(i, image) for i, image in enumerate(images)]
      size = self.config.model.image_size
      return np.stack(found) if found else np.zeros((0, size, size, 3), 'uint8')
    if isinstance(images, (str, pathlib.Path, Image.Image)):
      raise DataError(f'images are one {type(images).__name__}; {_IMAGES}')
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
      raise DataError(
        f'images are {pixels.dtype} {list(pixels.shape)}; {_IMAGES}'
      )
    if pixels.shape[1] != pixels.shape[2]:
      return np.stack([self._fit(image) for image in pixels])
    return pixels

  def _read(self, number: int, image: Any) -> np.ndarray:
    size, most = self.config.model.image_size, self.config.data.max_pixels
    try:
      if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        return self._fit(decode.to_rgb(upright))
      if isinstance(image, (str, pathlib.Path)):
        path = str(config_lib.expand(str(image)))
        return self._fit(decode.read_image(path, max_pixels=most, size=size))
    except decode.BadImageError as error:
      name = '' if isinstance(image, Image.Image) else f' {str(image)!r}'
      raise DataError(
        f'images[{number}]{name} cannot be read: {error}; leave it out'
      ) from error
    raise DataError(f'images[{number}] is a {type(image).__name__}; {_IMAGES}')

  def _fit(self, image: np.ndarray) -> np.ndarray:
    size, resize = self.config.model.image_size, self.config.data.resize
    return batches.fit(image, size, resize=resize)

  def _run(self, pixels: np.ndarray) -> np.ndarray:
    """Returns logits of at most the largest count of images."""
    count = len(pixels)
    room = next(size for size in SIZES if size >= count)
    # Real pixels, so that a scale of the whole batch sees nothing else.
    index = np.minimum(np.arange(room), count - 1)
    return np.asarray(self._program((room, *pixels.shape[1:]))(pixels[index]))[
      :count
    ]

  def _program(self, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """Returns the program for pixels of a shape, compiled if it is new."""
    with self._lock:
      if shape not in self._programs:
        self._programs[shape] = self._compiled(shape)
      return self._programs[shape]

  def _compiled(self, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    whole, given = fixed.split(self._variables)
    data, size = self.config.data, self.config.model.image_size
    apply = self._model.module.apply

    def logits(given, pixels):
      images = preprocess.prepare_eval(pixels, data=data, size=size)
      return apply(whole(given), images)

    pixels = jax.ShapeDtypeStruct(shape, jnp.uint8)
    program = jax.jit(logits).lower(given, pixels).compile()
    return lambda pixels: program(given, pixels)


def _few(names: Sequence[str]) -> str:
  shown = ', '.join(names[:5])
  return f'{shown}, ...' if len(names) > 5 else shown


def load(
  path: str | pathlib.Path, fields: Mapping[str, Any] | None = None
) -> Classifier:
  """Returns a trained model.

  Args:
    path: A workdir, a step in it, a packed file, an adapter (its base is where
      it was in its training), weights of timm, transformers, torchvision and
      others (a file, a folder), or 'hf://OWNER/NAME'.
    fields: {'section.field': value} of what weights of others do not tell, as
      'model.heads' or 'data.mean'; see configs/common.py.

  Raises:
    QvitError: There is no model, or it is damaged.
  """
  path, given = str(config_lib.expand(str(path))), _known(fields)
  kind = runs.kind_of(path)
  if not kind and not _is_weights(path):
    raise DataError(
      f'{path!r} is no model: give the workdir of a run, a packed file, an '
      'adapter, a file or folder of weights, or hf://OWNER/NAME'
    )
  if kind:
    config, place, lines = own_config.loaded(path)
    config = config_lib.with_fields(config, given)
    return _opened(config, place, lines, given)
  with tempfile.TemporaryDirectory() as place:  # for a report of the weights
    config, lines = _of_weights(path, given)
    return _opened(config, pathlib.Path(place), lines, given)


def _known(fields: Mapping[str, Any] | None) -> dict[str, Any]:
  """Returns fields that somebody gave; raises ConfigError for unknown ones."""
  given = dict(fields or {})
  for name in given:
    config_lib.check_name(name)
  return given


def _opened(
  config: Any, place: pathlib.Path, lines: list[str], given: dict[str, Any]
) -> Classifier:
  """Returns the classifier of a page.

  Args:
    config: The page.
    place: The workdir.
    lines: What is known of it beside what its arrays tell.
    given: Fields that somebody asked for; those without effect are refused.
  """
  context = runner.context_of(MODES['predict'], config)
  for name in given:
    if context.mode.ignores_field(name):
      raise ConfigError(
        f'{name} has no effect on what a model answers; leave it out'
      )
  config, _ = config_lib.resolve(config, context, overrides=given)
  packed = sources.open_packed(config)
  names, _ = sources.class_names(config, place)
  experiment = _experiment(config, names, packed=packed)
  variables, origin = sources.evaluated(experiment, place)
  return Classifier(experiment, variables, [*origin, *lines])


def _is_weights(path: str) -> bool:
  return '://' in path or pathlib.Path(path).exists()


def _of_weights(path: str, given: dict[str, Any]) -> tuple[Any, list[str]]:
  """Returns the config of weights of others, and lines of what is assumed."""
  fields = {
    'model.name': next(n for n, one in models.FAMILIES.items() if one.tells),
    'model.size': auto.SIZE, 'weights.path': path, 'model.dtype': 'float32',
  } | given  # fmt: skip
  page = config_lib.with_fields(config_lib.defaults(), fields)
  config, told = auto.filled(
    page, '', trains=False, reads_data=False, overrides=list(given),
    assumes=True,
  )  # fmt: skip
  assumed = [line for line in told if line.endswith(auto.UNTOLD)]
  for line in assumed:
    warnings.warn(f'{path}: {line}', stacklevel=3)
  return config, told[1:]


def _experiment(
  config: Any,
  names: Sequence[str],
  *,
  packed: Packed | None = None,
  train: Any = None,
) -> Experiment:
  none = batches.ResidentSplit(
    np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32)
  )
  data = Data(
    train, none, tuple(names), 'images in Python', only_images=not train
  )
  mesh = {
    name: field.default
    for name, field in config_lib.FIELDS.items()
    if field.section == 'mesh'
  }
  return Experiment(
    config_lib.with_fields(config, mesh), training=False, data=data,
    packed=packed,
  )  # fmt: skip


def quantize(
  classifier: Classifier,
  images: Any,
  row: str = 'w4a4',
  fields: Mapping[str, Any] | None = None,
) -> Classifier:
  """Returns a classifier after post-training quantization.

  Args:
    classifier: A float one.
    images: What it is calibrated on: as for a call; labels are not needed.
    row: Of `ptq.rows`, with solvers or without, as 'int8_static' or
      'w4a4+gptq'.
    fields: {'section.field': value}, as 'ptq.range' or 'quant.rules'. What
      the table would print as a note is a warning, and stands in `summary`.

  Raises:
    QuantError: It is quantized already, or there is no image.
    ConfigError: There is no such row, or a field that it does not read.
    DataError: They are no images.
  """
  model = classifier._model
  is_float = model.plan.is_float and not model.frozen
  if not is_float:
    what = 'holds adapters' if model.frozen else f'is quantized ({model.bits})'
    raise QuantError(
      f'the classifier {what} already; quantize a float one: the run or the '
      'weights that it was made of'
    )
  pixels = classifier._pixels(images)
  if not len(pixels):
    raise QuantError(
      'there is no image to calibrate on; give some hundred training images'
    )
  given = {
    'ptq.rows': (row,), 'ptq.calibration_examples': len(pixels),
    'ptq.engines': (),
  }  # fmt: skip
  config = config_lib.with_fields(
    folded(classifier.config), given | {'quant.recipe': 'none'} | _known(fields)
  )
  config_lib.check_fields(config, runner.context_of(MODES['ptq'], config))
  params = statistics.folded_params(classifier.config, classifier._variables)
  split = batches.ResidentSplit(pixels, np.zeros(len(pixels), np.int32))
  experiment = _experiment(config, classifier.class_names, train=split)
  said: list[str] = []
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    table = ptq_table.Table(experiment, params, folder, said.append)
    packed = table.pack(row)
  notes = [line for line in said if line.startswith(('note:', 'rule'))]
  for line in notes:
    if line.startswith('note:'):
      warnings.warn(line, stacklevel=2)
  config = config_lib.with_fields(config, {'quant.recipe': _packed_recipe()})
  made = _experiment(config, classifier.class_names, packed=packed)
  line = f'{row}, calibrated on {len(pixels)} images'
  return Classifier(made, packed.variables, [*classifier.origin, line, *notes])


def _packed_recipe() -> str:
  return next(name for name, one in METHODS.items() if one.is_packed)
