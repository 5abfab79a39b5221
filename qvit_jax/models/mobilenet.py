"""MobileNetV2, top to bottom; knows nothing of quantization.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", arXiv:1801.04381, table 2. Rounding of channels and the init are
those of torchvision, which are the authors' code's but for the init. Stochastic
depth: Huang et al. 2016, arXiv:1603.09382.
"""

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.errors import ConfigError
from qvit_jax.models.batch_norm import Statistics
from qvit_jax.models.convs import LINEAR, Layer, apply_layer, check_image
from qvit_jax.models.family import Cut, Family
from qvit_jax.models.graph import IMAGES, Graph
from qvit_jax.ops import Ops, Pair, SiteDense

# (expansion, channels, blocks, stride of the first) of each stage.
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
STEM, LAST = 32, 1280
# Factors of all channels that the authors published weights for.
LEAST, MOST = 0.35, 1.4
# The largest value that a ReLU6 gives.
CEILING = 6.0


@dataclasses.dataclass(frozen=True)
class Options:
  """What a MobileNetV2 looks like; `configs/common.py` explains each field."""

  width: float
  num_classes: int
  padding: str = 'torch'
  batch_norm: str = 'train'
  head_dropout: float = 0.0
  stochastic_depth: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """One inverted residual.

  Attributes:
    inside: Channels of its input.
    hidden: Channels between its convolutions.
    outside: Channels of its output.
    stride: Of the depthwise convolution.
  """

  inside: int
  hidden: int
  outside: int
  stride: int

  @property
  def is_residual(self) -> bool:
    """Whether the input is added to the output."""
    return self.stride == 1 and self.inside == self.outside

  @property
  def expands(self) -> bool:
    """Whether a convolution makes more channels first."""
    return self.hidden != self.inside


def rounded(channels: float, divisor: int = 8) -> int:
  """Returns the nearest multiple of 8, at least 90 % of the channels."""
  whole = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return whole + divisor if whole < 0.9 * channels else whole


def block_specs(width: float) -> list[BlockSpec]:
  """Returns the blocks of a model whose channels are multiplied by `width`."""
  found, inside = [], rounded(STEM * width)
  for expansion, channels, count, stride in STAGES:
    outside = rounded(channels * width)
    for i in range(count):
      hidden = inside * expansion
      found.append(BlockSpec(inside, hidden, outside, 1 if i else stride))
      inside = outside
  return found


def relu6(x: Array) -> Array:
  """Returns x cut to 0 .. 6."""
  return jnp.clip(x, 0, CEILING)


class Block(nn.Module):
  """Expand, filter each channel, project; the projection is linear."""

  o: Options
  ops: Ops
  spec: BlockSpec
  drop_path: float  # chance that an image skips the block

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w i'], train: bool
  ) -> Float[Array, 'b p q o']:
    """Returns the output, with the input added where shapes allow."""
    o, spec = self.o, self.spec

    def apply(name, y, features, **fields):
      layer = Layer(name, f'{name}_norm', features, **fields)
      return apply_layer(o, self.ops, layer, y, train)

    y = x
    if spec.expands:
      y = relu6(apply('expand', y, spec.hidden, size=1))
    y = apply(
      'depthwise', y, spec.hidden, stride=spec.stride, groups=spec.hidden,
      padding=o.padding,
    )  # fmt: skip
    y = apply('project', relu6(y), spec.outside, size=1)
    if not spec.is_residual:
      return y
    # One draw an image: the whole branch is kept or skipped.
    return x + nn.Dropout(
      self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train
    )(y)


class MobileNetV2(nn.Module):
  """Stem, inverted residuals, one wide layer, head."""

  o: Options
  ops: Ops = Ops()

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], train: bool = False
  ) -> Float[Array, 'b classes']:
    """Returns float32 logits of normalised images."""
    o = self.o
    block = nn.remat(Block, static_argnums=(2,)) if o.remat else Block
    layer = Layer(
      'stem', 'stem_norm', rounded(STEM * o.width), stride=2, padding=o.padding
    )
    x = relu6(apply_layer(o, self.ops, layer, images, train))
    specs = block_specs(o.width)
    for i, spec in enumerate(specs):
      drop_path = o.stochastic_depth * i / max(len(specs) - 1, 1)
      x = block(o, self.ops, spec, drop_path, name=f'block_{i:02d}')(x, train)
    layer = Layer('last', 'last_norm', rounded(LAST * max(1, o.width)), size=1)
    x = relu6(apply_layer(o, self.ops, layer, x, train))
    x = x.astype(jnp.float32).mean(axis=(1, 2))  # [b, c]
    x = self.ops.cut(self, 'head', x)
    x = nn.Dropout(o.head_dropout, deterministic=not train)(x)
    head = SiteDense(
      (o.num_classes,), self.ops, dtype=o.dtype, out_dtype=jnp.float32,
      init=LINEAR, name='head',
    )  # fmt: skip
    return head(x)


def width_of(model) -> float:
  """Returns the factor of all channels that `model.size` says.

  Raises:
    ConfigError: It is none, or gives no whole channels; or the image is smaller
      than the strides allow.
  """
  text = model.size
  if not re.fullmatch(r'\d+(\.\d*)?', text):
    raise ConfigError(
      f'model.size={text!r} is no size of mobilenet_v2; allowed: a factor of '
      f'all channels from {LEAST} to {MOST}. Set --config.model.size=1.0'
    )
  width = float(text)
  if not LEAST <= width <= MOST:
    raise ConfigError(
      f'model.size={text!r} gives no whole channels of mobilenet_v2 that '
      f'weights exist for; allowed: {LEAST} to {MOST}. Set '
      f'--config.model.size={min(max(width, LEAST), MOST)}'
    )
  check_image(model, 2 * math.prod(stride for *_, stride in STAGES))
  return width


def architecture(model) -> dict[str, Any]:
  """Returns what decides arrays and function; see `Family`."""
  return {
      name: model[name]
      for name in ('name', 'image_size', 'num_classes')
  } | {
      'padding': model.padding or 'torch', 'width': width_of(model),
      'batch_norm': model.batch_norm != 'none',
  }  # fmt: skip


def title(model) -> str:
  """Returns the size of `config.model`, such as '1 with BatchNorm'."""
  text = f'{width_of(model):g}'
  if model.batch_norm != 'none':
    text += ' with BatchNorm'
  return f'{text}, padding {model.padding or "torch"}'


def pairs(model) -> tuple[Pair, ...]:
  """Returns layers between which channels can be scaled; see `Family`.

  What a projection gives is scaled where no sum needs it as it is.
  """
  specs = block_specs(width_of(model))
  found, before = [], ('stem', False)  # (who gives the input, is it linear)
  for i, spec in enumerate(specs):
    path = f'block_{i:02d}'
    chain = ['expand', 'depthwise', 'project'][0 if spec.expands else 1 :]
    chain = [f'{path}/{name}' for name in chain]
    if before and not spec.is_residual:
      found.append(_pair(*before, chain[0]))
    found += [
      Pair(first, second, CEILING)
      for first, second in zip(chain, chain[1:], strict=False)
    ]
    before = None if spec.is_residual else (chain[-1], True)
  if before:
    found.append(_pair(*before, 'last'))
  return (*found, Pair('last', 'head', CEILING, has_mean=True))


def _pair(first: str, is_linear: bool, second: str) -> Pair:
  ceiling = None if is_linear else CEILING
  return Pair(first, second, ceiling, is_linear)


def draw(model, g: Graph) -> None:
  """Adds the operations of a MobileNetV2 without norms; see `Family`."""
  apply = lambda x, path: g.add('relu6', g.add('conv', x, path=path))
  x = apply(IMAGES, 'stem')
  for i, spec in enumerate(block_specs(width_of(model))):
    path, y = f'block_{i:02d}', x
    if spec.expands:
      y = apply(y, f'{path}/expand')
    y = apply(y, f'{path}/depthwise')
    y = g.add('conv', y, path=f'{path}/project')
    x = g.add('add', x, y) if spec.is_residual else y
  g.add('dense', g.add('mean', apply(x, 'last')), path='head')


def from_config(model, ops: Ops) -> MobileNetV2:
  """Returns the model that `config.model` describes, computing by `ops`."""
  same = {
    field.name: model[field.name]
    for field in dataclasses.fields(Options)
    if field.name not in ('width', 'padding', 'dtype')
  }
  options = Options(
    width_of(model), **same, padding=model.padding or 'torch',
    dtype=jnp.dtype(model.dtype),
  )  # fmt: skip
  return MobileNetV2(options, ops)


FAMILY = Family(
  from_config=from_config,
  architecture=architecture,
  title=title,
  tensor_rules=(
    (r'(expand|depthwise)/kernel$', 3),
    (r'project/kernel$', 2),
    (r'last/kernel$', 3),
  ),
  stem='stem',
  head='head',
  targets={'all': ''},
  reads=tuple(
    f'model.{name}'
    for name in (
      'padding', 'batch_norm', 'head_dropout', 'stochastic_depth', 'remat'
    )
  ),  # fmt: skip
  draw=draw,
  pairs=pairs,
  cuts=lambda model: (Cut('head', ('head',), draws=('stochastic_depth',)),),
  statistics=Statistics(layer=lambda norm: norm.removesuffix('_norm')),
)
