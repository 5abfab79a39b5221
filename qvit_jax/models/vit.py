"""The vision transformer, top to bottom; knows nothing of quantization.

Source: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words",
arXiv:2010.11929, section 3.1. Registers: Darcet et al. 2023, arXiv:2309.16588.
Norm before the blocks: CLIP, Radford et al. 2021, arXiv:2103.00020. The parts
are in `vit_parts`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.errors import ConfigError
from qvit_jax.models import rope, vit_graph
from qvit_jax.models.family import Cut, Family
from qvit_jax.models.vit_parts import (
  AttentionPool,
  Block,
  Options,
  PatchEmbed,
  norm,
)
from qvit_jax.ops import Ops, SiteDense, Stream

# name: (width, depth, heads, mlp_dim)
SIZES = {
  'Ti': (192, 12, 3, 768),
  'S': (384, 12, 6, 1536),
  'B': (768, 12, 12, 3072),
  'L': (1024, 24, 16, 4096),
}

# Values of `model.pool` by which a learned token asks the others.
ATTENDING = ('attention', 'token_attention')

# Which axis of a parameter `mesh.tensor` splits: heads, or hidden channels.
TENSOR_RULES = (
  (r'attn/(query|key|value)/kernel$', 1),
  (r'attn/(query|key|value)/bias$', 0),
  (r'attn/out/kernel$', 0),
  (r'mlp/(fc1|gate)/kernel$', 1),
  (r'mlp/(fc1|gate)/bias$', 0),
  (r'mlp/fc2/kernel$', 0),
)


class Encoder(nn.Module):
  """The stack of blocks and the last norm, if there is one before pooling."""

  o: Options
  ops: Ops

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b n d'],
    train: bool,
    angles: Float[Array, 'n half'] | None = None,
  ) -> Float[Array, 'b n d']:
    """Returns the tokens in float32; `angles` as of `Attention`."""
    o = self.o
    block = nn.remat(Block, static_argnums=(2,)) if o.remat else Block
    for i in range(o.depth):
      drop_path = o.stochastic_depth * i / max(o.depth - 1, 1)
      x = block(o, self.ops, drop_path, name=f'block_{i:02d}')(
        x, train, angles
      )
    if o.norm_after_pool or not o.last_norm:
      return x.astype(jnp.float32)
    return norm(o, 'norm')(x)


class ViT(nn.Module):
  """Patches, class token, registers and positions, encoder, head."""

  o: Options
  ops: Ops = Ops()

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], train: bool = False
  ) -> Float[Array, 'b classes']:
    """Returns float32 logits of normalised images."""
    o = self.o
    x = PatchEmbed(o, self.ops, name='patch_embed')(images)  # [b, n, d]
    init = nn.initializers.truncated_normal(0.02)
    first = []
    if o.pool not in ('mean', 'attention'):
      first.append(self.param('cls', init, (1, 1, o.width), jnp.float32))
    if o.registers:
      shape = (1, o.registers, o.width)
      first.append(self.param('registers', init, shape, jnp.float32))
    num_first = sum(tokens.shape[1] for tokens in first)
    first = [
      jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:]))
      for t in first
    ]
    x = jnp.concatenate([*first, x], axis=1)  # [b, num_first + n, d]
    angles = None
    if o.position == 'rope':
      height, width = (n // o.patch for n in images.shape[1:3])
      dim = o.width // o.heads
      angles = jnp.asarray(rope.angles(height, width, dim, num_first))
    else:
      pos = self.param('pos_embed', init, (1, *x.shape[1:]), jnp.float32)
      x = x + pos.astype(x.dtype)
    x = nn.Dropout(o.embedding_dropout, deterministic=not train)(x)
    if o.pre_norm:
      x = norm(o, 'pre_norm')(x).astype(x.dtype)
    x = Encoder(o, self.ops, name='encoder')(x, train, angles)
    if o.pool in ATTENDING:
      x = x if o.pool == 'token_attention' else x[:, num_first:]
      x = self.ops.cut(self, 'pool', x.astype(o.dtype))  # as it is read there
      x = AttentionPool(o, self.ops, name='pool')(x, train)
    else:
      token, mean = x[:, 0], x[:, num_first:].mean(axis=1)  # [b, d] each
      if o.pool == 'token_mean':
        x = jnp.concatenate([token, mean], axis=-1)  # [b, 2 d]
      else:
        x = token if o.pool == 'token' else mean
    if o.norm_after_pool:
      x = norm(o, 'pool_norm')(x)
    x = self.ops.cut(self, 'head', x)
    x = nn.Dropout(o.head_dropout, deterministic=not train)(x)
    head = SiteDense(
      (o.num_classes,), self.ops, dtype=o.dtype, out_dtype=jnp.float32,
      name='head',
    )  # fmt: skip
    return head(x)


def resolve_shape(model) -> dict[str, int]:
  """Returns patch, width, depth, heads and mlp_dim of `config.model`.

  Raises:
    ConfigError: An unknown size, a patch that does not divide the image, heads
      that do not divide the width, or a norm behind a pooling without one.
  """
  shape = dict(
      patch=model.patch, width=model.width, depth=model.depth,
      heads=model.heads, mlp_dim=model.mlp_dim,
  )  # fmt: skip
  if model.size:
    name, _, patch = model.size.partition('/')
    if name not in SIZES or not patch.isdecimal() or int(patch) < 1:
      raise ConfigError(
        f'model.size={model.size!r} is unknown; allowed: '
        f'{", ".join(SIZES)} with a patch, such as L/16, or an empty size '
        'with width, depth, heads, mlp_dim and patch set one by one'
      )
    shape = dict(
      zip(('width', 'depth', 'heads', 'mlp_dim'), SIZES[name], strict=True),
      patch=int(patch),
    )
  if model.image_size % shape['patch']:
    raise ConfigError(
      f'model.image_size={model.image_size} is not a multiple of the patch '
      f'{shape["patch"]}; choose a size such as '
      f'{max(1, model.image_size // shape["patch"]) * shape["patch"]} or '
      'another patch'
    )
  if shape['width'] % shape['heads']:
    raise ConfigError(
      f'model.heads={shape["heads"]} does not divide '
      f'model.width={shape["width"]}; choose heads that divide the width'
    )
  if model.position == 'rope' and shape['width'] // shape['heads'] % 4:
    raise ConfigError(
      "model.position='rope' turns pairs of channels by row and by column, but "
      f'a head has {shape["width"] // shape["heads"]} channels; choose '
      'model.width and model.heads that make it a multiple of 4'
    )
  if model.norm_after_pool and model.pool in ('token_mean', *ATTENDING):
    what = 'puts two side by side'
    if model.pool in ATTENDING:
      what = 'reads tokens that are normed before'
    raise ConfigError(
      'model.norm_after_pool=True norms one pooled token, but model.pool='
      f'{model.pool!r} {what}; set --config.model.pool=patch_mean or '
      '--config.model.norm_after_pool=False'
    )
  if model.norm_after_pool and not model.last_norm:
    raise ConfigError(
      'model.norm_after_pool=True puts the last norm behind the pooling, but '
      'model.last_norm=False says that there is none; leave one of them out'
    )
  return shape


def architecture(model) -> dict[str, Any]:
  """Returns what decides arrays and function; see `Family`."""
  return resolve_shape(model) | {
      name: model[name]
      for name in ('name', 'image_size', 'num_classes', 'pool', 'registers',
                   'qk_norm', 'norm_eps')
  } | {'layer_scale': bool(model.layer_scale)} | (
      # Newer than the first files, which lack them: named where they are on.
      {name: True for name in ('norm_after_pool', 'pre_norm') if model[name]}
  ) | (
      {} if model.activation == 'gelu' else {'activation': model.activation}
  ) | (
      {} if model.position == 'learned' else {'position': model.position}
  ) | (
      {} if model.last_norm else {'last_norm': False}
  )  # fmt: skip


def title(model) -> str:
  """Returns the size of `config.model`, such as 'B/16'."""
  shape = resolve_shape(model)
  return model.size or (
    f'width {shape["width"]}, depth {shape["depth"]}, {shape["heads"]} '
    f'heads, MLP {shape["mlp_dim"]}, patch {shape["patch"]}'
  )


def stream(model) -> Stream:
  """Returns who writes to and reads from the residual stream.

  It cannot be turned where a norm stands before the blocks, since what that
  scales enters it by no product, nor where no norm ends it.
  """
  blocks = [
    f'encoder/block_{i:02d}' for i in range(resolve_shape(model)['depth'])
  ]
  scaled = bool(model.layer_scale)
  writers = [('patch_embed', '')]
  readers = []
  first = ('fc1', 'gate') if model.activation == 'swiglu' else ('fc1',)
  for block in blocks:
    writers += [
      (f'{block}/attn/out', f'{block}/scale1' if scaled else ''),
      (f'{block}/mlp/fc2', f'{block}/scale2' if scaled else ''),
    ]
    attention = tuple(f'{block}/attn/{n}' for n in ('query', 'key', 'value'))
    readers += [
      (f'{block}/norm1', attention),
      (f'{block}/norm2', tuple(f'{block}/mlp/{name}' for name in first)),
    ]
  between = model.qk_norm or model.position == 'rope'
  turned, pooling, attending = () if between else blocks, ('head',), ()
  if model.pool in ATTENDING:
    pooling, attending = ('pool/attn/key', 'pool/attn/value'), ('pool',)
  # A norm commutes with turning wherever it stands, and so does the mean.
  last = 'pool_norm' if model.norm_after_pool else 'encoder/norm'
  turns = model.last_norm and not model.pre_norm
  return Stream(
    tokens=('cls', 'registers', 'pos_embed') if turns else (),
    writers=tuple(writers) if turns else (),
    readers=(*readers, (last, pooling)) if model.last_norm else tuple(readers),
    values=tuple(
      (f'{b}/attn/value', f'{b}/attn/out') for b in (*blocks, *attending)
    ),
    queries=tuple(
      (f'{b}/attn/query', f'{b}/attn/key') for b in (*turned, *attending)
    ),
    hidden=tuple(f'{b}/mlp/fc2' for b in (*blocks, *attending)),
  )


def cuts(model) -> tuple[Cut, ...]:
  """Returns where the model can be cut; see `Family`."""
  draws = (
    'dropout', 'attention_dropout', 'embedding_dropout', 'stochastic_depth'
  )  # fmt: skip
  head = Cut('head', ('head',), draws)
  if model.pool not in ATTENDING:
    return (head,)
  return Cut('pool', ('pool', 'head'), draws), head


def from_config(model, ops: Ops) -> ViT:
  """Returns the ViT that `config.model` describes, computing through `ops`."""
  shape = resolve_shape(model)
  same = {
    field.name: model[field.name]
    for field in dataclasses.fields(Options)
    if field.name not in (*shape, 'dtype')
  }
  return ViT(Options(**shape, **same, dtype=jnp.dtype(model.dtype)), ops)


FAMILY = Family(
  from_config=from_config,
  architecture=architecture,
  title=title,
  tensor_rules=TENSOR_RULES,
  stem='patch_embed',
  head='head',
  targets={
    'attn': r'attn/(query|key|value|out)$',
    'qv': r'attn/(query|value)$',
    'mlp': r'mlp/(fc[12]|gate)$',
    'all': r'',
  },
  reads=tuple(
    f'model.{name}'
    for name in (
        'patch', 'width', 'depth', 'heads', 'mlp_dim', 'activation',
        'position', 'pool', 'norm_after_pool', 'last_norm', 'pre_norm',
        'registers', 'layer_scale', 'qk_norm', 'norm_eps', 'dropout',
        'attention_dropout', 'embedding_dropout', 'head_dropout',
        'stochastic_depth', 'remat',
    )
  ),  # fmt: skip
  draw=lambda model, g: vit_graph.draw(
    from_config(model, Ops()).o, model.image_size, g
  ),
  stream=stream,
  tells=True,
  cuts=cuts,
)
