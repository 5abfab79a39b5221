"""The models, by name."""

import jax
import jax.numpy as jnp

from qvit_jax.models import vit
from qvit_jax.models.family import Family
from qvit_jax.ops import Ops, Site, Stream

__all__ = [
    'FAMILIES', 'Family', 'architecture', 'build_model', 'family', 'list_sites',
    'stream', 'tensor_rules',
]  # fmt: skip

FAMILIES: dict[str, Family] = {'vit': vit.FAMILY}


def family(config) -> Family:
  """Returns the record of the config's kind of model."""
  return FAMILIES[config.model.name]


def build_model(config, ops: Ops = Ops()):  # noqa: B008 - Ops is frozen
  """Returns the Flax module that `config.model` describes.

  Args:
    config: A whole config; only its section `model` is read.
    ops: The arithmetic; plain float by default.

  Returns:
    A module that maps normalised images [b, h, w, 3] to float32 logits
    [b, classes].

  Raises:
    ConfigError: The section describes no possible model.
  """
  return family(config).from_config(config.model, ops)


def tensor_rules(config) -> tuple[tuple[str, int], ...]:
  """Returns (parameter regex, axis that `mesh.tensor` splits) rules."""
  return family(config).tensor_rules


def stream(config) -> Stream:
  """Returns who writes to and reads from the model's residual stream."""
  return family(config).stream(config.model)


def list_sites(config) -> list[Site]:
  """Returns every site of the model in execution order; makes no array."""
  sites: list[Site] = []
  ops = Ops(tap=lambda module, site, *operands: sites.append(site))
  size = config.model.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  jax.eval_shape(build_model(config, ops).init, jax.random.key(0), images)
  return sites


def architecture(config) -> dict:
  """Returns what decides a model's arrays and function, as JSON values.

  Two configs with equal architectures can exchange checkpoints; dropouts,
  compute dtype and remat may differ.
  """
  model = config.model
  return family(config).resolve_shape(model) | {
      name: model[name]
      for name in ('name', 'image_size', 'num_classes', 'pool', 'registers',
                   'qk_norm', 'norm_eps')
  } | {'layer_scale': bool(model.layer_scale)} | (
      # Newer than the first files, which lack it: named where it is on.
      {'norm_after_pool': True} if model.norm_after_pool else {}
  )  # fmt: skip
