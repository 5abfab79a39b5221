"""A packed model as ONNX: float32 images [b, h, w, 3] to logits."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qvit_jax.export import graph, onnx_file, profiles
from qvit_jax.export.onnx_operations import (
  Ranges,
  Translation,
  activation,
  next_codes,
)
from qvit_jax.quantization.packed import Packed

_BYTE = 8


def make_model(
  config: Any,
  packed: Packed,
  profile: str = '',
  *,
  ranges: Ranges | None = None,
  facts: Mapping[str, str] | None = None,
  preprocess: bool = False,
) -> Any:
  """Returns an onnx.ModelProto of a model.

  Its input is 'images', normalised float32 [batch, h, w, 3], its output
  'logits', float32 [batch, classes].

  Args:
    config: Of a model without norms that can be folded.
    packed: Its numbers; of a float model those of `FloatCore`.
    profile: One of `profiles.PROFILES`; '' for the one of its bits.
    ranges: Of the convolutions that `missing_ranges` names.
    facts: More of what the file says of itself.
    preprocess: Whether the input is 'pixels' instead, uint8 of any size, which
      the file resizes and normalises.

  Raises:
    ExportError: The package onnx is missing, or no profile holds the model.
  """
  program = graph.program(config, packed)
  chosen = profiles.choose(program, profile)
  made = Translation(program, chosen, ranges or {})
  return made.model(dict(facts or {}), config.data if preprocess else None)


def make_products(
  config: Any, packed: Packed
) -> tuple[Any, dict[str, float]]:
  """Returns an onnx.ModelProto of all products, each with its own operands.

  Inputs 'PATH:lhs' and 'PATH:rhs' are what `ops.Core` is handed for a product,
  outputs 'PATH' what its layer gives.

  Returns:
    The model; the largest step of each integer convolution by path, of which
    its bias is a whole number.
  """
  program = graph.program(config, packed, merges=False)
  steps = {
    path: float(np.ravel(p.lhs[0])[0] * p.kernel.scale.max())
    for path, p in program.products.items()
    if p.site.window is not None and p.plan.acts
  }
  return Translation(program, profiles.choose(program), {}).products(), steps


def float_products(config: Any, packed: Packed) -> int:
  """Returns how many products of a model's file are of float numbers, at most.

  With those of Hadamard matrices, of means over windows (one an axis), and of
  attention whose codes take nine bits.
  """
  program = graph.program(config, packed)
  total = 2 * sum(node.kind == 'windows_mean' for node in program.nodes)
  for p in program.products.values():
    is_float = not p.plan.acts and (p.kernel is None or p.kernel.scale is None)
    is_wide = p.plan.acts == _BYTE and not (
      p.site.is_layer or p.plan.is_static or p.plan.aqt
    )
    total += bool(p.plan.block) + (is_float or is_wide)
  return total


def fact(model: Any, name: str) -> str:
  """Returns what a model says of itself by a name; '' where it does not."""
  return onnx_file.facts(model).get(name, '')


def missing_ranges(config: Any, packed: Packed) -> tuple[str, ...]:
  """Returns the convolutions whose results have no calibrated range.

  An integer convolution gives bytes in other runtimes; where the next layer's
  range is not that of its result (before a sum or a mean), it has to be found.
  """
  program = graph.program(config, packed)
  if profiles.choose(program) != 'qdq':
    return ()
  found = []
  for node in program.nodes:
    if node.kind == 'conv' and program.products[node.path].plan.acts:
      end = activation(program, node) or node
      if next_codes(program, end.output) is None:
        found.append(node.path)
  return tuple(found)
