"""The vision transformer as a list of operations; see `graph`."""

import dataclasses

from qvit_jax.models import rope
from qvit_jax.models.graph import IMAGES, Graph
from qvit_jax.models.vit_parts import Options


def draw(o: Options, image_size: int, g: Graph) -> None:
  """Adds all operations of a ViT.

  Args:
    o: What it looks like.
    image_size: Pixels.
    g: What they are added to.
  """
  x = g.add('patches', IMAGES, patch=o.patch)
  x = g.add('dense', x, path='patch_embed')
  paths = () if o.pool in ('mean', 'attention') else ('cls',)
  count = len(paths) + o.registers
  if o.registers:
    paths = (*paths, 'registers')
  is_learned, side = o.position == 'learned', image_size // o.patch
  if paths or is_learned:
    position = 'pos_embed' if is_learned else ''
    x = g.add(
      'tokens', x, paths=paths, position=position, patches=side * side
    )
  angles = None
  if not is_learned:
    angles = rope.angles(side, side, o.width // o.heads, count)
  if o.pre_norm:
    x = _norm(o, g, x, 'pre_norm')
  for i in range(o.depth):
    path = f'encoder/block_{i:02d}'
    seen = _norm(o, g, x, f'{path}/norm1')
    x = g.add(
      'add', x,
      _branch(o, g, _attention(o, g, seen, seen, f'{path}/attn', angles),
              f'{path}/scale1'),
    )  # fmt: skip
    y = _mlp(o, g, _norm(o, g, x, f'{path}/norm2'), f'{path}/mlp')
    x = g.add('add', x, _branch(o, g, y, f'{path}/scale2'))
  if o.last_norm and not o.norm_after_pool:
    x = _norm(o, g, x, 'encoder/norm')
  x = _pool(o, g, x, count)
  if o.norm_after_pool:
    x = _norm(o, g, x, 'pool_norm')
  g.add('dense', x, path='head')


def _norm(o: Options, g: Graph, x: str, path: str) -> str:
  return g.add('norm', x, path=path, epsilon=o.norm_eps)


def _branch(o: Options, g: Graph, x: str, path: str) -> str:
  return g.add('scale', x, path=path) if o.layer_scale else x


def _attention(
  o: Options, g: Graph, x: str, seen: str, path: str, angles=None
) -> str:
  """Returns what x asks of `seen`, [b, n, d]."""
  factor = (o.width // o.heads) ** -0.5
  is_between = o.qk_norm or angles is not None or g.rectify
  found = []
  for name, tokens in (('query', x), ('key', seen), ('value', seen)):
    y = g.add('dense', tokens, path=f'{path}/{name}')
    if name == 'query' and not is_between:
      y = g.add('scale', y, factor=factor)  # beside its layer: one product
    y = g.add('heads', y, count=o.heads)
    if name != 'value':
      if o.qk_norm:
        y = _norm(o, g, y, f'{path}/{name}_norm')
      if angles is not None:
        y = g.add('rotate', y, angles=angles)
      if g.rectify:
        y = g.add('rectify', y, path=path, name=name, form=g.rectify)
    found.append(y)
  query, key, value = found
  if is_between:
    query = g.add('scale', query, factor=factor)
  p = g.add('product', query, key, path=f'{path}/qk', of='qk')
  p = g.add('softmax', p)
  y = g.add('product', p, value, path=f'{path}/av', of='av')
  return g.add('dense', y, path=f'{path}/out')


def _mlp(o: Options, g: Graph, x: str, path: str) -> str:
  y = g.add('dense', x, path=f'{path}/fc1')
  if o.activation == 'swiglu':
    gate = g.add('silu', g.add('dense', x, path=f'{path}/gate'))
    y = g.add('multiply', gate, y)
  else:
    y = g.add(o.activation, y)
  return g.add('dense', y, path=f'{path}/fc2')


def _pool(o: Options, g: Graph, x: str, count: int) -> str:
  """Returns one vector an image; `count` tokens are before the patches."""
  patches = lambda: g.add('cut', x, start=count, stop=None) if count else x
  if o.pool in ('attention', 'token_attention'):
    seen = x if o.pool == 'token_attention' else patches()
    plain = dataclasses.replace(o, qk_norm=False)
    probe = g.add('probe', seen, path='pool/probe')
    y = _attention(plain, g, probe, seen, 'pool/attn')
    z = _norm(o, g, y, 'pool/norm')
    z = g.add('add', y, _mlp(o, g, z, 'pool/mlp'))
    return g.add('token', z)
  if o.pool == 'token':
    return g.add('token', x)
  mean = g.add('mean', patches())
  if o.pool == 'token_mean':
    return g.add('join', g.add('token', x), mean)
  return mean
