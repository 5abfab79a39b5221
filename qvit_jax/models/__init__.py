"""The models, by name."""

import difflib

import jax
import jax.numpy as jnp

from qvit_jax.errors import ConfigError, ExportError
from qvit_jax.models import mobilenet, vgg, vit
from qvit_jax.models.batch_norm import Statistics
from qvit_jax.models.family import Cut, Family
from qvit_jax.models.graph import IMAGES, Graph, Node
from qvit_jax.ops import Ops, Pair, Site, Stream

__all__ = [
    'FAMILIES', 'IMAGES', 'Cut', 'Family', 'Graph', 'Node', 'Statistics',
    'architecture', 'build_model', 'cuts', 'draw', 'family', 'list_sites',
    'pairs', 'statistics', 'stream', 'tensor_rules',
]  # fmt: skip

FAMILIES: dict[str, Family] = {
  'vit': vit.FAMILY,
  'vgg': vgg.FAMILY,
  'mobilenet_v2': mobilenet.FAMILY,
}


def family(config) -> Family:
  """Returns the record of the config's kind of model.

  Raises:
    ConfigError: There is no such kind.
  """
  name = config.model.name
  if name not in FAMILIES:
    near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.0)[0]
    raise ConfigError(
      f'model.name={name!r} is no kind of model; allowed: '
      f'{" | ".join(map(repr, FAMILIES))}. Set --config.model.name={near}'
    )
  return FAMILIES[name]


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


def stream(config) -> Stream | None:
  """Returns who writes to and reads from the residual stream; None: no one."""
  make = family(config).stream
  return make(config.model) if make else None


def statistics(config) -> Statistics | None:
  """Returns how the model's norms keep statistics; None: they keep none."""
  return family(config).statistics


def pairs(config) -> tuple[Pair, ...]:
  """Returns layers between which channels can be scaled; () where none can."""
  return family(config).pairs(config.model)


def cuts(config) -> tuple[Cut, ...]:
  """Returns where the model can be cut, in the order that images go."""
  return family(config).cuts(config.model)


def draw(config, *, rectify: str = '') -> Graph:
  """Returns the operations of the model without norms that can be folded.

  Args:
    config: A whole config.
    rectify: Form of Q-ViT's rectified queries and keys; '' without.

  Raises:
    ExportError: The family does not say what its models compute.
  """
  record, graph = family(config), Graph(rectify)
  if record.draw is None:
    raise ExportError(
      f'model.name={config.model.name!r} has no list of its operations; give '
      'its Family a `draw`, or set --config.export.format=stablehlo'
    )
  record.draw(config.model, graph)
  return graph


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
  return family(config).architecture(config.model)
