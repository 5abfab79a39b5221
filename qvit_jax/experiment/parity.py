"""An exported model in other runtimes, beside our own evaluation of it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models
from qvit_jax.data import preprocess
from qvit_jax.errors import ExportError
from qvit_jax.evaluation import fixed
from qvit_jax.evaluation.metrics import EvalSums, compare_logits, summarize
from qvit_jax.experiment import calibration
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.export import engines, onnx_model
from qvit_jax.export.engines import Engine
from qvit_jax.ops import SiteConv, SiteDense, SiteProduct
from qvit_jax.quantization.packed import Packed

# Training images by which results of integer convolutions get their ranges.
RANGE_IMAGES = 256
# Images whose products are compared one by one, and bytes of their operands.
_FEW, _MOST_BYTES = 8, 2**27
_EQUAL = 1e-5  # of a product's largest result: float32's rounding
_BYTE = 8  # bits
_KEPT = ('loss', 'top1', 'top5')


def eval_images(experiment: Experiment) -> Iterator[tuple[Any, Any, Any]]:
  """Yields (images as the model sees them, labels, which of them count)."""
  data, size = experiment.config.data, experiment.config.model.image_size
  source = jax.tree.map(jnp.asarray, experiment.data.eval.source)

  @jax.jit
  def prepare(source, batch):
    images, labels = preprocess.gather(source, batch)
    return preprocess.prepare_eval(images, data=data, size=size), labels

  for batch in experiment.eval_batches():
    images, labels = jax.device_get(prepare(source, batch))
    yield images, labels, np.asarray(batch['mask']) > 0


def logits_of(
  experiment: Experiment, runs: Mapping[str, Callable[[Any], Any]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns labels and each runner's logits of the whole evaluation split.

  Args:
    experiment: With its data.
    runs: By name: normalised images [b, h, w, 3] -> logits [b, classes].
  """
  labels: list[np.ndarray] = []
  found: dict[str, list[np.ndarray]] = {name: [] for name in runs}
  for images, truth, counts in eval_images(experiment):
    labels.append(truth[counts])
    for name, run in runs.items():
      found[name].append(np.asarray(run(images))[counts])
  return np.concatenate(labels), {
    name: np.concatenate(parts) for name, parts in found.items()
  }


def metrics_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Returns what `metrics.summarize` says of logits [n, classes]."""
  sums = EvalSums.zeros(logits.shape[1]).add(
    jnp.asarray(logits), jnp.asarray(labels), jnp.ones(len(labels))
  )
  return summarize(jax.device_get(sums))


def our_run(experiment: Experiment, packed: Packed) -> Callable[[Any], Any]:
  """Returns our own forward pass of a packed model, compiled."""
  apply, (whole, given) = experiment.model.module.apply, fixed.split(
    packed.variables
  )
  run = jax.jit(lambda given, images: apply(whole(given), images))
  return functools.partial(run, given)


def find_ranges(
  experiment: Experiment, packed: Packed
) -> dict[str, tuple[float, float]]:
  """Returns the ranges of results that an integer convolution has to know.

  Args:
    experiment: With a training split, where there are any.
    packed: The model.
  """
  found = calibration.prepared(experiment, RANGE_IMAGES)
  batches = (images for images, _ in found)
  return ranges_of(experiment.config, packed, batches)


def ranges_of(
  config: Any, packed: Packed, batches: Iterable[Any]
) -> dict[str, tuple[float, float]]:
  """Returns the same of batches of normalised images, none where none count."""
  paths = onnx_model.missing_ranges(config, packed)
  if not paths:
    return {}

  @jax.jit
  def ends(images):
    _, found = operands(config, packed, images)
    return {path: (found[path].min(), found[path].max()) for path in paths}

  ranges = {path: (np.inf, -np.inf) for path in paths}
  for images in batches:
    for path, (low, high) in ends(images).items():
      first, last = ranges[path]
      ranges[path] = min(first, float(low)), max(last, float(high))
  return ranges


def operands(
  config: Any, packed: Packed, images: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns operands 'PATH:side' and results 'PATH' of every product."""

  def tap(module, site, lhs, rhs, dims):
    module.sow('operands', 'lhs', lhs)
    if not site.is_layer:
      module.sow('operands', 'rhs', rhs)

  model = models.build_model(config, dataclasses.replace(packed.ops, tap=tap))
  kinds = SiteDense, SiteConv, SiteProduct
  _, seen = model.apply(
    packed.variables, images, mutable=['operands', 'intermediates'],
    capture_intermediates=lambda module, _: isinstance(module, kinds),
  )  # fmt: skip
  given, results = {}, {}
  for site in packed.plan.sites:
    node, result = seen['operands'], seen['intermediates']
    for key in site.path.split('/'):
      node, result = node[key], result[key]
    for side, x in node.items():
      given[f'{site.path}:{side}'] = x[0].astype(jnp.float32)
    results[site.path] = result['__call__'][0].astype(jnp.float32)
  return given, results


def compare_products(experiment: Experiment, packed: Packed) -> dict[str, Any]:
  """Returns how products of the file are beside ours, given our operands.

  Run by onnxruntime, on the first images of the evaluation split.

  Returns:
    images, products, equal: the share of results that are equal but for the
    rounding of float32 (and of an integer convolution's bias); least_equal:
    that of the product with the fewest, and its path.
  """
  config = experiment.config
  size = sum(
    4 * (math.prod(site.lhs_shape) + math.prod(site.rhs_shape))
    for site in packed.plan.sites
  )
  count = max(1, min(_FEW, _MOST_BYTES // size))
  images = next(eval_images(experiment))[0][:count]
  given, results = jax.device_get(
    jax.jit(lambda x: operands(config, packed, x))(images)
  )
  made, steps = onnx_model.make_products(config, packed)
  found = engines.open_engine('onnxruntime', made).run_all(given)
  shares = {}
  for path, ours in results.items():
    near = _EQUAL * np.abs(ours).max() + steps.get(path, 0) / 2
    theirs = found[path].reshape(ours.shape)
    shares[path] = float((np.abs(theirs - ours) <= near).mean())
  least = min(shares, key=shares.__getitem__)
  return {
    'images': len(images),
    'products': len(shares),
    'equal': float(np.mean(list(shares.values()))),
    'least_equal': {'path': least, 'equal': shares[least]},
  }


def check_kernels(
  engine: Engine, config: Any, packed: Packed
) -> dict[str, Any]:
  """Returns how an engine runs the products of a packed model.

  Where activations are float anyway, an engine may unpack kernels as it loads
  them: results are the same.

  Raises:
    ExportError: Some that the file has as integers run as float.
  """
  allowed = onnx_model.float_products(config, packed)
  found = engine.kernels()
  rounds = any(plan.acts for plan in packed.site_plans.values())
  if rounds and found.float > allowed:
    raise ExportError(
      f'{engine.name} {engine.version} runs {found.float} products in float, '
      f'where the model has {allowed}: its integers would not be used; '
      'give another row or another --config.export.profile'
    )
  return dataclasses.asdict(found) | {'names': dict(found.names)}


def cautions(names: Iterable[str], packed: Packed) -> list[str]:
  """Returns a line for each engine whose numbers are worse on this CPU."""
  plans = packed.site_plans.values()
  is_wide = any((plan.acts or 0) >= _BYTE for plan in plans)
  return [
    f'{name} adds pairs of 8-bit products in 16 bits on this CPU, which has no '
    'VNNI, and cuts off what does not fit; onnxruntime does not'
    for name in names
    if is_wide and engines.cuts_sums(name)
  ]


def measure(
  experiment: Experiment, packed: Packed, opened: Sequence[Engine]
) -> dict[str, Any]:
  """Returns an exported file's numbers in each engine, beside our own.

  Args:
    experiment: Of the packed model, with its evaluation split.
    packed: The model.
    opened: Engines that have loaded the file.
  """
  runs = {engine.name: engine.run for engine in opened}
  runs['jax'] = our_run(experiment, packed)
  labels, logits = logits_of(experiment, runs)
  rows = {}
  for name, found in logits.items():
    numbers = metrics_of(found, labels)
    rows[name] = {key: numbers[key] for key in _KEPT}
    if name != 'jax':
      compared = compare_logits(found, logits['jax'])
      rows[name] |= {key: compared[key] for key in ('agreement', 'sqnr_db')}
      most = float(np.abs(logits['jax']).max())
      difference = float(np.abs(found - logits['jax']).max())
      rows[name] |= {
        'largest_difference': difference, 'largest_logit': most
      }  # fmt: skip
  return experiment.data.evaluated | {'num_examples': len(labels)} | {
    'jax': rows.pop('jax'),
    'engines': rows,
  }
