"""A model in another runtime than JAX: written as ONNX in memory and opened."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree
from qvit_jax.errors import ExportError
from qvit_jax.evaluation.metrics import EvalSums, summarize
from qvit_jax.experiment import calibration, parity, statistics
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model, folded
from qvit_jax.export import engines, onnx_model, profiles
from qvit_jax.export.engines import Engine
from qvit_jax.ops import Ops
from qvit_jax.quantization import build_plan
from qvit_jax.quantization.methods.packing import pack
from qvit_jax.quantization.packed import Packed


def as_packed(model: Model, variables: Mapping[str, Any]) -> tuple[Any, Packed]:
  """Returns what a model evaluates as a packed one, and its config.

  Norms are folded. Recipes become their codes; a float model has a `FloatCore`.

  Args:
    model: A whole one, without adapters.
    variables: Nested collections.
  """
  if model.packed:
    return model.config, model.packed
  config = folded(model.config)
  if model.method.quantizes:
    return config, pack(
      model.method, tree.flatten(dict(variables)), model.plan, model.ops,
      model.config.model.dtype, statistics=models.statistics(model.config),
    )  # fmt: skip
  params = statistics.folded_params(model.config, dict(variables))
  return config, float_packed(config, params)


def float_packed(config: Any, params: Mapping[str, Any]) -> Packed:
  """Returns a float model, by path and without norms, as a `Packed`."""
  plan = build_plan(config.quant, models.list_sites(config))
  variables = {'params': tree.nest({n: jnp.asarray(x) for n, x in
                                    params.items()})}  # fmt: skip
  return Packed(variables, Ops(), config.model.dtype, plan, 'float')


def write(
  config: Any, packed: Packed, images: Callable[[], Iterable[Any]]
) -> Any:
  """Returns the ONNX model of a packed one.

  Args:
    config: Of the model.
    packed: The model.
    images: Returns batches of normalised images, for the ranges that an integer
      convolution needs and calibration does not keep; called where it does.

  Raises:
    ExportError: No profile holds the model, or onnx is not installed.
  """
  ranges = {}
  if onnx_model.missing_ranges(config, packed):
    ranges = parity.ranges_of(config, packed, images())
  return onnx_model.make_model(config, packed, ranges=ranges)


def open_model(name: str, model: Any, config: Any, packed: Packed) -> Engine:
  """Returns an engine that has loaded an ONNX model of `write`.

  Raises:
    ConfigError: The runtime is not installed.
    ExportError: It has no such operators, or would not use the integers.
  """
  profile = onnx_model.fact(model, 'profile')
  if not engines.runs_in(name, profile):
    raise ExportError(
      f'{name} has no operators for a model that {profiles.WHAT[profile]}; '
      'use onnxruntime, or give a row with calibrated ranges, such as '
      'int8_static'
    )
  engine = engines.open_engine(name, model)
  parity.check_kernels(engine, config, packed)
  return engine


def facts(engine: Engine | None = None) -> dict[str, Any]:
  """Returns what results.json says of what ran a model; None: JAX did."""
  if engine is None:
    return {'name': 'jax', 'version': jax.__version__}
  found = engine.kernels()
  kernels = {key: getattr(found, key) for key in ('integer', 'packed', 'float')}
  return {'name': engine.name, 'version': engine.version, 'kernels': kernels}


def opened(
  experiment: Experiment, variables: Mapping[str, Any]
) -> tuple[Engine, Packed, list[str]]:
  """Returns the engine of `eval.engine` with a model, and lines about it.

  Args:
    experiment: Of the model.
    variables: What it evaluates.

  Raises:
    ConfigError, ExportError: The engine cannot run it.
  """
  name = experiment.config.eval.engine
  engines.check_installed(name)
  config, packed = as_packed(experiment.model, variables)
  lines = []
  if onnx_model.missing_ranges(config, packed):
    if experiment.data.only_images:
      raise ExportError(
        f'{name} needs ranges of training images for the sums of this model, '
        'which --mode=predict does not read; set --config.eval.engine=jax'
      )
    experiment.open_training_split()
    lines.append(
      f'ranges of sums and means are those of {parity.RANGE_IMAGES} training '
      'images'
    )
  images = lambda: (
    x for x, _ in calibration.prepared(experiment, parity.RANGE_IMAGES)
  )
  engine = open_model(name, write(config, packed, images), config, packed)
  found = facts(engine)
  counts = found['kernels']
  lines.insert(0, (
    f'{name} {engine.version}: {counts["integer"]} products of integers, '
    f'{counts["packed"]} of packed weights, {counts["float"]} float'
  ))  # fmt: skip
  lines += parity.cautions([name], packed)
  if packed.dtype != 'float32':
    lines.append(f'what is {packed.dtype} in JAX is float32 there')
  return engine, packed, lines


def evaluate(experiment: Experiment, engine: Engine) -> dict[str, Any]:
  """Returns the metrics of an engine's model over the whole split."""
  sums = EvalSums.zeros(experiment.config.model.num_classes)
  add = jax.jit(EvalSums.add)
  for images, labels, counts in parity.eval_images(experiment):
    sums = add(sums, engine.run(images), labels, counts.astype(np.float32))
  return experiment.data.evaluated | summarize(jax.device_get(sums))
