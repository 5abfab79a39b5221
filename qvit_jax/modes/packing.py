"""What `--mode=export` writes of a run that learned its bits."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qvit_jax import models, tree
from qvit_jax.errors import ExportError
from qvit_jax.experiment.model import Model, folded
from qvit_jax.modes import deploy
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import artifacts

NAME = 'model.packed.safetensors'
_IMAGES = 32  # random ones, on which logits are compared


def write_packed(
  model: Model, place: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Packs a checkpoint into WORKDIR/export, with parity.json beside it.

  Raises:
    ExportError: The run has no bits.
    CheckpointError: There is no checkpoint, or one of other bits.
  """
  config = model.config
  if not model.method.quantizes:
    raise ExportError(
      "export.format='packed' packs what a quant.recipe trained, but "
      f'quant.recipe is {config.quant.recipe!r}; set it to that of the run, or '
      'pack a float run with --mode=ptq'
    )
  variables, run, packed = deploy.packed_run(model, place, say)
  target = place / 'export' / NAME
  facts = models.architecture(folded(config))
  size = artifacts.save(
    packed, target, facts, class_names=run.class_names, config=run.config
  )
  again = artifacts.load(target, model.plan.sites, facts)
  found = _compare(model, variables, again)
  full = tree.num_bytes(model.shapes['params'])
  deploy.conclude(
    config, target, model,
    {'compression': full / size, 'execution': again.execution,
     'why': again.why, **found},
  )  # fmt: skip
  say(
    f'{size:,} bytes in {target} ({full / size:.2f}x smaller, '
    f'{again.execution}); logits of {_IMAGES} random images within '
    f'{found["largest_difference"]:.2g} of the run, '
    f'{found["equal_classes"]:.1%} of the classes equal'
  )


def _compare(
  model: Model, variables: dict[str, Any], packed: Packed
) -> dict[str, Any]:
  """Returns how far the packed model is from the trained one."""
  size = model.config.model.image_size
  images = jax.random.normal(jax.random.key(0), (_IMAGES, size, size, 3))
  nested = tree.nest(variables)
  there = np.asarray(jax.jit(model.module.apply)(nested, images))
  module = models.build_model(folded(model.config), packed.ops)
  here = np.asarray(jax.jit(module.apply)(packed.variables, images))
  return {
    'images': _IMAGES,
    'largest_difference': float(np.abs(here - there).max()),
    'largest_logit': float(np.abs(there).max()),
    'equal_classes': float((here.argmax(1) == there.argmax(1)).mean()),
  }
