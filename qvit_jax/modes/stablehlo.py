"""What `--mode=export` writes as a program of StableHLO."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qvit_jax import models
from qvit_jax.evaluation.metrics import compare_logits
from qvit_jax.experiment.model import Model
from qvit_jax.export import stablehlo
from qvit_jax.modes import deploy
from qvit_jax.quantization.packed import Packed

NAME = 'model.stablehlo'
_IMAGES = 32  # random ones, on which logits are compared


def write(
  config: Any, packed: Packed, place: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Writes WORKDIR/export/model.stablehlo, with parity.json beside it.

  Args:
    config: Of the model.
    packed: Of `deploy.subject`.
    place: The workdir.
    say: Prints a line.

  Raises:
    ExportError: The disk does not take it. What was there before stays.
  """
  target, size = place / 'export' / NAME, config.model.image_size
  apply = models.build_model(config, packed.ops).apply
  content = stablehlo.serialize(apply, packed.variables, size)
  deploy.put(target, content)
  found = _compare(apply, packed, stablehlo.load(target.read_bytes()), size)
  deploy.conclude(
    config, target, Model(config, packed),
    {'execution': packed.execution, 'why': packed.why,
     'platforms': list(stablehlo.PLATFORMS), **found},
  )  # fmt: skip
  say(
    f'{len(content):,} bytes in {target} ({packed.execution}; for '
    f'{", ".join(stablehlo.PLATFORMS)}); logits of {_IMAGES} random images '
    f'within {found["largest_difference"]:.2g} of our own evaluation, '
    f'{found["agreement"]:.1%} of the classes equal'
  )


def _compare(
  apply: Callable[..., Any],
  packed: Packed,
  program: Callable[[Any], Any],
  size: int,
) -> dict[str, Any]:
  """Returns how far what was read back is from our own evaluation."""
  images = jax.random.normal(jax.random.key(0), (_IMAGES, size, size, 3))
  there = np.asarray(program(images))
  here = np.asarray(jax.jit(apply)(packed.variables, images))
  compared = compare_logits(there, here)
  return {
    'images': _IMAGES,
    'largest_difference': float(np.abs(there - here).max()),
    'largest_logit': float(np.abs(here).max()),
    'agreement': compared['agreement'],
    'sqnr_db': compared['sqnr_db'],
  }
