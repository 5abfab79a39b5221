"""What `--mode=export` writes as ONNX, and how it fares in other runtimes."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from qvit_jax import models
from qvit_jax.experiment import parity
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.export import engines, onnx_file, onnx_model
from qvit_jax.modes import deploy
from qvit_jax.quantization.packed import Packed

NAME = 'model.onnx'


def write(
  config: Any, packed: Packed, place: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Writes WORKDIR/export/model.onnx, with parity.json beside it.

  Args:
    config: Of the model.
    packed: Of `deploy.subject`.
    place: The workdir.
    say: Prints a line.

  Raises:
    ExportError: No profile holds the model, a runtime would not use its
      integers, or the disk does not take it. What was there before stays.
  """
  missing = onnx_model.missing_ranges(config, packed)
  experiment = Experiment(
    config, training=False, calibrating=bool(missing), packed=packed
  )
  say(f'data      {experiment.data.description}')
  ranges = parity.find_ranges(experiment, packed)
  if ranges:
    say(
      f'ranges    of {len(ranges)} convolutions before sums and means, from '
      f'{parity.RANGE_IMAGES} training images'
    )
  make = lambda **more: onnx_model.make_model(
    config, packed, config.export.profile, ranges=ranges,
    facts=_facts(experiment, packed), **more,
  )  # fmt: skip
  model = make()
  profile = onnx_model.fact(model, 'profile')
  opened = [
    engines.open_engine(name, model)
    for name in engines.installed()
    if engines.runs_in(name, profile)
  ]
  kernels = {
    engine.name: {'version': engine.version}
    | parity.check_kernels(engine, config, packed)
    for engine in opened
  }
  found = parity.measure(experiment, packed, opened)
  for name, row in found['engines'].items():
    row |= {'version': kernels[name].pop('version'), 'kernels': kernels[name]}
  products = {}
  if 'onnxruntime' in found['engines'] and profile != 'float':
    products = parity.compare_products(experiment, packed)
  if config.export.preprocess:
    model = make(preprocess=True)
  content = onnx_file.to_bytes(model)
  target = place / 'export' / NAME
  deploy.put(target, content)
  deploy.conclude(
    config, target, experiment.model,
    {'profile': profile, 'execution': packed.execution, **found,
     'products': products},
  )  # fmt: skip
  if packed.dtype != 'float32':
    say(f'note: what is {packed.dtype} here is float32 in the file')
  floats = onnx_model.float_products(config, packed)
  for line in _lines(found, products, profile, floats):
    say(line)
  for line in parity.cautions(found['engines'], packed):
    say(f'note: {line}')
  say(f'{len(content):,} bytes in {target} (profile {profile})')


def _facts(experiment: Experiment, packed: Packed) -> dict[str, str]:
  """Returns what the file says of itself."""
  config = experiment.config
  data = config.data
  return {
    'image_size': str(config.model.image_size),
    'resize': data.resize,
    'mean': json.dumps(list(data.mean)),
    'std': json.dumps(list(data.std)),
    'class_names': json.dumps(list(experiment.data.class_names)),
    'architecture': json.dumps(models.architecture(config)),
    'execution': packed.execution,
  }


def _lines(
  found: dict[str, Any], products: dict[str, Any], profile: str, floats: int
) -> list[str]:
  """Returns how the file compares, a line a runtime.

  Args:
    found: Of `parity.measure`, with kernels.
    products: Of `parity.compare_products`, or nothing.
    profile: Of the file.
    floats: Products of float numbers in it.
  """
  ours, count = found['jax'], found['num_examples']
  lines = [
    f'parity    {count} images of {found["split"]}: our own top1 '
    f'{ours["top1"]:.4f}, loss {ours["loss"]:.4f}'
  ]
  for name, row in found['engines'].items():
    sqnr = row['sqnr_db']
    kernels = row['kernels']
    lines.append(
      f'parity    {name} {row["version"]}: top1 {row["top1"]:.4f}, loss '
      f'{row["loss"]:.4f}, agreement {row["agreement"]:.2%}, SQNR '
      f'{"infinite" if sqnr is None else f"{sqnr:.1f} dB"}; products: '
      f'{kernels["integer"]} integer, {kernels["packed"]} of packed weights, '
      f'{kernels["float"]} float'
    )
    if profile == 'weight_only' and kernels['float'] > floats:
      lines.append(
        f'note: {name} unpacks {kernels["float"] - floats} kernels as it loads '
        'the file, which is small on disk alone'
      )
  if products:
    least = products['least_equal']
    lines.append(
      f'parity    {products["equal"]:.3%} of the results of '
      f'{products["products"]} products equal ours, given our inputs '
      f'(the least: {least["equal"]:.2%} of {least["path"]})'
    )
  for name in engines.ENGINES:
    if not engines.runs_in(name, profile):
      lines.append(f'note: {name} has no operators of profile {profile}')
    elif name not in found['engines']:
      lines.append(
        f'note: {name} is not installed, so the file was not tried there; '
        f'pip install -r {engines.REQUIREMENTS[name]}'
      )
  return lines
