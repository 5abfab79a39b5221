"""Packed models on disk: one safetensors file a row.

Codes, scales and what stays in float are its tensors; how each product runs
stands in its header. No float copy of a packed kernel is written.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from qvit_jax import tree
from qvit_jax.errors import WeightsError
from qvit_jax.ops import FloatCore, Ops, Site
from qvit_jax.quantization.integer_core import IntegerCore, SitePlan
from qvit_jax.quantization.methods.qvit import rectifier
from qvit_jax.quantization.packed import Packed
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan, QuantSpec
from qvit_jax.store import tensors

_FORMAT = 3
KEY = 'qvit_jax'


def save(
  packed: Packed,
  path: pathlib.Path,
  architecture: dict[str, Any],
  *,
  class_names: Sequence[str] = (),
  config: dict[str, Any] | None = None,
) -> int:
  """Writes a packed model; returns the bytes of the file.

  Args:
    packed: The model.
    path: Where to.
    architecture: Of `models.architecture`.
    class_names: By label.
    config: The resolved config of what was packed, as JSON.

  Raises:
    ExportError: The disk does not take it.
  """
  quant = packed.variables.get('quant', {})
  kernels = {
    path: [kernel.bits, kernel.rows, kernel.group, kernel.is_odd]
    for path, kernel in _kernels(quant).items()
    if isinstance(kernel, QTensor)
  }
  header = {
    'format': _FORMAT,
    'architecture': architecture,
    'dtype': packed.dtype,
    'execution': packed.execution,
    'why': packed.why,
    'granularity': packed.plan.act_granularity,
    'specs': {
      site.path: [spec.weights, spec.acts]
      for site, spec in zip(packed.plan.sites, packed.plan.specs, strict=True)
    },
    'sites': {
      path: dataclasses.asdict(plan) for path, plan in packed.site_plans.items()
    },
    'kernels': kernels,
    'rectify': getattr(packed.ops.rectify, 'form', ''),
    'class_names': list(class_names),
    'config': config,
  }
  arrays = tree.flatten(packed.variables)
  return tensors.save_described(arrays, path, KEY, header)


def _kernels(quant: dict[str, Any]) -> dict[str, Any]:
  """Returns {site path: kernel} of the collection `quant`."""
  found: dict[str, Any] = {}

  def walk(node, path):
    for name, child in node.items():
      if name == 'kernel':
        found['/'.join(path)] = child
      elif isinstance(child, dict):
        walk(child, (*path, name))

  walk(quant, ())
  return found


def read_header(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a packed model's file says of itself.

  Raises:
    WeightsError: The file is damaged, or no packed model of ours.
  """
  tensors.read(path)  # says more of a damaged file
  try:
    return tensors.read_header(path, KEY)
  except KeyError as error:
    raise WeightsError(
      f'weights {path}: it is no packed model of ours; give a file that '
      '--mode=ptq wrote'
    ) from error


def load(
  path: pathlib.Path, sites: Sequence[Site], architecture: dict[str, Any]
) -> Packed:
  """Returns the packed model of a file.

  Raises:
    WeightsError: The file is damaged, no artifact of ours, or of another model.
  """
  header = read_header(path)
  if header['format'] > _FORMAT:
    raise WeightsError(
      f'weights {path}: it has format {header["format"]}, and this version '
      f'reads up to {_FORMAT}; update qvit_jax'
    )
  there = header['architecture']
  if differing := sorted(
    name
    for name in {*there, *architecture}
    if there.get(name) != architecture.get(name)
  ):
    name, *more = differing
    rest = f' (and {", ".join(more)})' if more else ''
    raise WeightsError(
      f'weights {path}: it is of another model: {name} is {there.get(name)!r} '
      f'there, {architecture.get(name)!r} here{rest}; leave --config and '
      'model.* out, and the file says them'
    )
  arrays, _ = tensors.read_described(path, KEY)
  flat = {name: jnp.asarray(x) for name, x in arrays.items()}
  for site, facts in header['kernels'].items():
    name = f'quant/{site}/kernel'
    data, scale = flat.pop(f'{name}/data'), flat.pop(f'{name}/scale')
    flat[name] = QTensor(data, scale, *facts)
  plans = {n: SitePlan(**plan) for n, plan in header['sites'].items()}
  core = IntegerCore(tuple(plans.items())) if plans else FloatCore()
  specs = tuple(QuantSpec(*header['specs'][site.path]) for site in sites)
  return Packed(
    tree.nest(flat),
    Ops(core=core, rectify=rectifier(header.get('rectify', ''))),
    header['dtype'],
    QuantPlan(tuple(sites), specs, header['granularity']),
    header['execution'],
    header['why'],
  )
