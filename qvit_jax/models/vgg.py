"""VGG, top to bottom; knows nothing of quantization.

Source: Simonyan & Zisserman 2014, "Very Deep Convolutional Networks for
Large-Scale Image Recognition", arXiv:1409.1556, table 1, columns A, B, D, E.
BatchNorm, the init and the mean of 7 x 7 windows before the classifier, by
which images need not have 224 px, are torchvision's.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.errors import ConfigError
from qvit_jax.models.batch_norm import Statistics
from qvit_jax.models.convs import (
  LINEAR,
  Layer,
  adaptive_mean,
  apply_layer,
  check_image,
  max_pool,
)
from qvit_jax.models.family import Cut, Family
from qvit_jax.models.graph import IMAGES, Graph
from qvit_jax.ops import Ops, Pair, SiteDense

# Convolutions of each stage; a stage ends by halving the image.
SIZES = {
  '11': (1, 1, 2, 2, 2),
  '13': (2, 2, 2, 2, 2),
  '16': (2, 2, 3, 3, 3),
  '19': (2, 2, 4, 4, 4),
}
# Channels of each stage and of the classifier, in those of the first stage.
_WIDTHS = (1, 2, 4, 8, 8)
_HIDDEN = 64
WINDOWS = 7  # that the classifier of the paper sees, along each axis


@dataclasses.dataclass(frozen=True)
class Options:
  """What a VGG looks like; `configs/common.py` explains each field."""

  size: str
  num_classes: int
  channels: int = 64
  classifier: str = 'paper'
  batch_norm: str = 'train'
  head_dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False


class VGG(nn.Module):
  """Five stages of 3 x 3 convolutions and a classifier."""

  o: Options
  ops: Ops = Ops()

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], train: bool = False
  ) -> Float[Array, 'b classes']:
    """Returns float32 logits of normalised images."""
    o, x = self.o, images
    stage = VGG._stage
    if o.remat:
      stage = nn.remat(stage, static_argnums=(2, 3))
    for i in range(len(SIZES[o.size])):
      x = stage(self, x, i, train)
    return self._classify(x, train)

  def _stage(self, x, index: int, train: bool):
    o = self.o
    for k in range(SIZES[o.size][index]):
      name = f'{index + 1}_{k + 1}'
      features = o.channels * _WIDTHS[index]
      layer = Layer(f'conv{name}', f'norm{name}', features, has_bias=True)
      x = nn.relu(apply_layer(o, self.ops, layer, x, train))
    return max_pool(x)  # [b, h / 2, w / 2, features]

  def _classify(self, x, train: bool):
    o = self.o
    if o.classifier == 'paper':
      x = adaptive_mean(x, WINDOWS)
      x = x.reshape(x.shape[0], -1)  # [b, 7 * 7 * c], channels fastest
      x = self.ops.cut(self, 'fc1', x)
      for name in ('fc1', 'fc2'):
        dense = SiteDense(
          (o.channels * _HIDDEN,), self.ops, dtype=o.dtype, init=LINEAR,
          name=name,
        )  # fmt: skip
        x = nn.relu(dense(x))
        if name == 'fc2':
          x = self.ops.cut(self, 'head', x)
        x = nn.Dropout(o.head_dropout, deterministic=not train)(x)
    else:
      x = x.astype(jnp.float32).mean(axis=(1, 2))
      x = self.ops.cut(self, 'head', x)
      x = nn.Dropout(o.head_dropout, deterministic=not train)(x)
    head = SiteDense(
      (o.num_classes,), self.ops, dtype=o.dtype, out_dtype=jnp.float32,
      init=LINEAR, name='head',
    )  # fmt: skip
    return head(x)


def _check(model) -> None:
  """Raises ConfigError where `config.model` describes no VGG."""
  if model.size not in SIZES:
    raise ConfigError(
      f'model.size={model.size!r} is no size of vgg; allowed: '
      f'{" | ".join(map(repr, SIZES))}. Set --config.model.size=11'
    )
  check_image(model, 2 ** len(SIZES[model.size]))


def architecture(model) -> dict[str, Any]:
  """Returns what decides arrays and function; see `Family`."""
  _check(model)
  return {
      name: model[name]
      for name in ('name', 'image_size', 'num_classes', 'size', 'channels',
                   'classifier')
  } | {'batch_norm': model.batch_norm != 'none'}  # fmt: skip


def title(model) -> str:
  """Returns the size of `config.model`, such as '11 with BatchNorm'."""
  _check(model)
  text = model.size
  if model.channels != Options.channels:
    text += f' of {model.channels} channels'
  if model.batch_norm != 'none':
    text += ' with BatchNorm'
  return f'{text}, {model.classifier} classifier'


def pairs(model) -> tuple[Pair, ...]:
  """Returns layers between which channels can be scaled; see `Family`.

  ReLU, the maximum and the means commute with scales of channels.
  """
  _check(model)
  layers = [
    f'conv{i + 1}_{k + 1}'
    for i, count in enumerate(SIZES[model.size])
    for k in range(count)
  ]
  last = layers[-1]
  is_paper = model.classifier == 'paper'
  layers += ['fc1', 'fc2', 'head'] if is_paper else ['head']
  # Windows of the mean of one pixel each leave the image as it is.
  has_mean = not is_paper or model.image_size != WINDOWS * 2 ** len(_WIDTHS)
  return tuple(
    Pair(first, second, has_mean=first == last and has_mean)
    for first, second in zip(layers, layers[1:], strict=False)
  )


def cuts(model) -> tuple[Cut, ...]:
  """Returns where the model can be cut; see `Family`."""
  if model.classifier != 'paper':
    return (Cut('head', ('head',)),)
  hidden = Cut('fc1', ('fc1', 'fc2', 'head'))
  return hidden, Cut('head', ('head',), draws=('head_dropout',))


def draw(model, g: Graph) -> None:
  """Adds the operations of a VGG without norms; see `Family`."""
  x = IMAGES
  for i, count in enumerate(SIZES[model.size]):
    for k in range(count):
      x = g.add('relu', g.add('conv', x, path=f'conv{i + 1}_{k + 1}'))
    x = g.add('max_pool', x)
  if model.classifier == 'paper':
    x = g.add('flatten', g.add('windows_mean', x, size=WINDOWS))
    for name in ('fc1', 'fc2'):
      x = g.add('relu', g.add('dense', x, path=name))
  else:
    x = g.add('mean', x)
  g.add('dense', x, path='head')


def from_config(model, ops: Ops) -> VGG:
  """Returns the VGG that `config.model` describes, computing through `ops`."""
  _check(model)
  same = {
    field.name: model[field.name]
    for field in dataclasses.fields(Options)
    if field.name != 'dtype'
  }
  return VGG(Options(**same, dtype=jnp.dtype(model.dtype)), ops)


FAMILY = Family(
  from_config=from_config,
  architecture=architecture,
  title=title,
  tensor_rules=(
    (r'(conv\d_\d|fc[12])/kernel$', -1),
    (r'(conv\d_\d|fc[12])/bias$', -1),
  ),
  stem='conv1_1',
  head='head',
  targets={'classifier': r'^fc[12]$', 'all': r'^fc[12]$'},
  reads=tuple(
    f'model.{name}'
    for name in (
      'channels', 'classifier', 'batch_norm', 'head_dropout', 'remat'
    )
  ),  # fmt: skip
  draw=draw,
  pairs=pairs,
  cuts=cuts,
  statistics=Statistics(layer=lambda norm: norm.replace('norm', 'conv')),
)
