"""What the releases of CLIP and of DINOv3 name their tensors."""

import numpy as np

from qvit_jax.weights.layout import ROPE_BASE, KeyMap, Row
from qvit_jax.weights.rows import (
  BLOCK,
  FACEBOOK,
  fused,
  linear,
  norm,
  without_mlp,
)

_CLIP_LAYER = '~transformer.resblocks.{i}.'
# OpenAI's names, which open_clip took over.
_CLIP = (
    Row('cls', '~class_embedding', 'token'),
    Row('pos_embed', '~positional_embedding', 'table'),
    Row('patch_embed/kernel', '~conv1.weight', 'conv'),
    *norm('pre_norm', '~ln_pre'),
    *norm(BLOCK + 'norm1', _CLIP_LAYER + 'ln_1'),
    *fused(_CLIP_LAYER + 'attn.in_proj_weight',
           _CLIP_LAYER + 'attn.in_proj_bias'),
    *linear(BLOCK + 'attn/out', _CLIP_LAYER + 'attn.out_proj', 'linear_in2'),
    Row(BLOCK + 'scale1', _CLIP_LAYER + 'ls_1.gamma', 'vector'),
    *norm(BLOCK + 'norm2', _CLIP_LAYER + 'ln_2'),
    *linear(BLOCK + 'mlp/fc1', _CLIP_LAYER + 'mlp.c_fc'),
    *linear(BLOCK + 'mlp/fc2', _CLIP_LAYER + 'mlp.c_proj'),
    Row(BLOCK + 'scale2', _CLIP_LAYER + 'ls_2.gamma', 'vector'),
    *norm('encoder/norm', '~ln_post'),
    *linear('head', 'head'),
)  # fmt: skip

# Keys have no bias: the release masks theirs.
_DINOV3 = (
    Row('cls', 'cls_token', 'same'),
    Row('registers', 'storage_tokens', 'same'),
    *FACEBOOK,
)  # fmt: skip
_MASK = 'blocks.{i}.attn.qkv.bias_mask'


def _periods(heads: int, dim: int) -> np.ndarray:
  """Returns by which distances patches are turned alike: [dim / 4]."""
  del heads
  exponents = np.arange(dim // 4, dtype=np.float64) * 4 / dim
  return (ROPE_BASE**exponents).astype(np.float32)


def _bias_mask(heads: int, dim: int) -> np.ndarray:
  """Returns ones for queries and values, zeros for keys: [3 * width]."""
  return np.repeat(np.asarray([1, 0, 1], np.float32), heads * dim)


RELEASE_LAYOUTS = {
    'openai_clip': KeyMap(
        'OpenAI CLIP',
        _CLIP,
        ignored=(
            r'^(visual\.)?proj$', r'^(text\.)?(transformer|token_embedding)\.',
            r'^(text\.)?(positional_embedding|text_projection|cls_emb)',
            r'^(text\.)?ln_final\.', r'^logit_(scale|bias)$',
            r'^(input_resolution|context_length|vocab_size)$',
        ),
        prefixes=('visual.', ''),
        norm_eps=1e-5,
        pre_norm_eps=1e-5,
        pools=('token', 'patch_mean'),
        biases=True,
    ),
    'dinov3': KeyMap(
        'DINOv3 release',
        variants=(
            ('DINOv3 release', _DINOV3),
            ('with SwiGLU', (
                *without_mlp(_DINOV3),
                *linear(BLOCK + 'mlp/gate', 'blocks.{i}.mlp.w1'),
                *linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.w2'),
                *linear(BLOCK + 'mlp/fc2', 'blocks.{i}.mlp.w3'),
            )),
        ),
        ignored=(r'^mask_token$', r'^local_cls_norm\.'),
        constants=(('rope_embed.periods', _periods), (_MASK, _bias_mask)),
        key_mask=_MASK,
        norm_eps=1e-5,
        pools=('token', 'patch_mean', 'token_mean'),
        registers=None,
        has_positions=False,
        is_dinov3=True,
        has_scales=True,
    ),
}  # fmt: skip
