"""Parts of the vision transformer; knows nothing of quantization.

Source: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words",
arXiv:2010.11929, section 3.1. LayerScale: Touvron et al. 2021,
arXiv:2103.17239. Query/key norm: Dehghani et al. 2023, arXiv:2302.05442.
Stochastic depth: Huang et al. 2016, arXiv:1603.09382. Attention pooling: Zhai
et al. 2021, arXiv:2106.04560, section 3.2, as in SigLIP, arXiv:2303.15343.
Activations: Hendrycks and Gimpel 2016, arXiv:1606.08415; SwiGLU: Shazeer 2020,
arXiv:2002.05202.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.models import rope
from qvit_jax.ops import Ops, SiteDense, SiteProduct

# Between the layers of the MLP: x Phi(x), and its two approximations.
ACTIVATIONS = {
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What a ViT looks like; `configs/common.py` explains each field."""

  patch: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  num_classes: int
  activation: str = 'gelu'
  position: str = 'learned'
  pool: str = 'token'
  norm_after_pool: bool = False
  last_norm: bool = True
  pre_norm: bool = False
  registers: int = 0
  layer_scale: float = 0.0
  qk_norm: bool = False
  norm_eps: float = 1e-6
  dropout: float = 0.0
  attention_dropout: float = 0.0
  embedding_dropout: float = 0.0
  head_dropout: float = 0.0
  stochastic_depth: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False


def norm(o: Options, name: str) -> nn.LayerNorm:
  """Returns a LayerNorm of the model."""
  # Statistics in float32, by the two-pass formula, whatever the compute dtype.
  return nn.LayerNorm(
    epsilon=o.norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name
  )


class PatchEmbed(nn.Module):
  """Cuts the image into patches and embeds each with one convolution kernel."""

  o: Options
  ops: Ops

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n d']:
    """Returns one token a patch, row by row."""
    b, h, w, c = x.shape
    p = self.o.patch
    # A convolution whose stride is its window is a product over patches; the
    # kernel keeps the convolution's axes, [p, p, c, d].
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, (h // p) * (w // p), p, p, c)  # [b, n, p, p, c]
    dense = SiteDense(
      (self.o.width,), self.ops, in_dims=3, kind='conv', dtype=self.o.dtype
    )
    nn.share_scope(self, dense)  # 'patch_embed/kernel', not one level deeper
    return dense(x)  # [b, n, d]


class Attention(nn.Module):
  """Multi-head attention; softmax and its input are float32."""

  o: Options
  ops: Ops

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b n d'],
    train: bool,
    context: Float[Array, 'b m d'] | None = None,
    angles: Float[Array, 'n half'] | None = None,
  ) -> Float[Array, 'b n d']:
    """Returns the mixed tokens: of x itself, or of `context` as x asks.

    Args:
      x: Tokens.
      train: Whether dropout is on.
      context: What is mixed; None: x.
      angles: Of `rope.angles`; None: queries and keys are not turned.
    """
    o, dtype = self.o, self.o.dtype
    dim = o.width // o.heads
    seen = x if context is None else context
    q, k, v = (
      SiteDense((o.heads, dim), self.ops, dtype=dtype, name=name)(tokens)
      for name, tokens in (('query', x), ('key', seen), ('value', seen))
    )  # [b, n, k, dim], and twice [b, m, k, dim]
    if o.qk_norm:
      q = norm(o, 'query_norm')(q).astype(dtype)
      k = norm(o, 'key_norm')(k).astype(dtype)
    if angles is not None:
      q, k = rope.turn(q, angles), rope.turn(k, angles)
    if self.ops.rectify is not None:
      q = self.ops.rectify(self, 'query', q)
      k = self.ops.rectify(self, 'key', k)
    qk = SiteProduct(
      'qk', (((3,), (3,)), ((0, 2), (0, 2))), self.ops, name='qk'
    )
    p = nn.softmax(qk(q * jnp.asarray(dim**-0.5, dtype), k))  # [b, k, n, m]
    p = nn.Dropout(o.attention_dropout, deterministic=not train)(p)
    av = SiteProduct(
      'av', (((3,), (1,)), ((0, 1), (0, 2))), self.ops, name='av'
    )
    x = av(p.astype(dtype), v).astype(dtype)  # [b, k, n, dim]
    out = SiteDense((o.width,), self.ops, in_dims=2, dtype=dtype, name='out')
    return out(x.transpose(0, 2, 1, 3))  # [b, n, d]


class Mlp(nn.Module):
  """Two layers with an activation between them."""

  o: Options
  ops: Ops

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], train: bool
  ) -> Float[Array, 'b n d']:
    """Returns tokens of the input's width."""
    o = self.o
    layer = lambda name: SiteDense(
      (o.mlp_dim,), self.ops, dtype=o.dtype, name=name
    )
    if o.activation == 'swiglu':
      x = nn.silu(layer('gate')(x)) * layer('fc1')(x)  # [b, n, f]
    else:
      x = ACTIVATIONS[o.activation](layer('fc1')(x))
    x = nn.Dropout(o.dropout, deterministic=not train)(x)
    return SiteDense((o.width,), self.ops, dtype=o.dtype, name='fc2')(x)


class Block(nn.Module):
  """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

  o: Options
  ops: Ops
  drop_path: float  # chance that an image skips a branch

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b n d'],
    train: bool,
    angles: Float[Array, 'n half'] | None = None,
  ) -> Float[Array, 'b n d']:
    """Returns the tokens after both branches; `angles` as of `Attention`."""
    attention = Attention(self.o, self.ops, name='attn')
    mlp = Mlp(self.o, self.ops, name='mlp')
    y = attention(norm(self.o, 'norm1')(x), train, angles=angles)
    x = x + self._branch(y, 'scale1', train)
    y = mlp(norm(self.o, 'norm2')(x), train)
    return x + self._branch(y, 'scale2', train)

  def _branch(self, y, name, train):
    y = nn.Dropout(self.o.dropout, deterministic=not train)(y)
    if self.o.layer_scale:
      init = nn.initializers.constant(self.o.layer_scale)
      y = y * self.param(name, init, (y.shape[-1],), jnp.float32).astype(
        y.dtype
      )
    # One draw an image: the whole branch is kept or skipped.
    return nn.Dropout(
      self.drop_path, broadcast_dims=(1, 2), deterministic=not train
    )(y)


class AttentionPool(nn.Module):
  """One learned token asks the others; an MLP with a shortcut follows."""

  o: Options
  ops: Ops

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], train: bool
  ) -> Float[Array, 'b d']:
    """Returns what the token became."""
    o = dataclasses.replace(self.o, qk_norm=False)
    init = nn.initializers.truncated_normal(o.width**-0.5)
    probe = self.param('probe', init, (1, 1, o.width), jnp.float32)
    probe = jnp.broadcast_to(probe.astype(o.dtype), (len(x), 1, o.width))
    x = Attention(o, self.ops, name='attn')(probe, train, x)
    y = norm(o, 'norm')(x)
    return (x + Mlp(o, self.ops, name='mlp')(y, train))[:, 0]
