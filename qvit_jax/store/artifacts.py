"""Packed models on disk: one safetensors file a row.

Codes, scales and what stays in float are its tensors; how each product runs
stands in its header. No float copy of a packed kernel is written.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

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
_KEY = 'qvit_jax'


def save(
  packed: Packed,
  path: pathlib.Path,
  architecture: dict[str, Any],
  *,
  class_names: Sequence[str] = (),
) -> int:
  """Writes a packed model; returns the bytes of the file.

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
  }
  flat = tree.flatten(packed.variables)
  arrays = {
    name: np.ascontiguousarray(np.asarray(x)) for name, x in flat.items()
  }
  tensors.save_tensors(
    arrays, path, form='safetensors', metadata={_KEY: json.dumps(header)}
  )
  return path.stat().st_size


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


def is_artifact(path: str) -> bool:
  """Returns whether a path names a packed model of ours, by its content."""
  place = pathlib.Path(path)
  return place.is_file() and _KEY in tensors.read_metadata(place)


def read_class_names(path: pathlib.Path) -> list[str]:
  """Returns the class names in a packed model's file; [] where it has none."""
  return json.loads(tensors.read_metadata(path)[_KEY]).get('class_names', [])


def load(
  path: pathlib.Path, sites: Sequence[Site], architecture: dict[str, Any]
) -> Packed:
  """Returns the packed model of a file.

  Raises:
    WeightsError: The file is damaged, no artifact of ours, or of another model.
  """
  entries = tensors.read(path)
  try:
    header = json.loads(tensors.read_metadata(path)[_KEY])
  except (KeyError, ValueError) as error:
    raise WeightsError(
      f'weights {path}: it is no packed model of ours; give a file that '
      '--mode=ptq wrote'
    ) from error
  if header['format'] > _FORMAT or header['architecture'] != architecture:
    raise WeightsError(
      f'weights {path}: it is of another model or a newer format; give model.* '
      'the values it was made with'
    )
  flat = {
    name: jnp.asarray(entry.read()) for name, entry in entries.items()
  }
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
