"""How others name a vision transformer's tensors: one key map each.

A row says which of their tensors a parameter of ours is and how its axes go.
In names, `{i}` is the block and `~` the prefix that a library puts before its
backbone.
"""

from qvit_jax.weights.cnn_layouts import CNN_LAYOUTS
from qvit_jax.weights.hf_layouts import HF_LAYOUTS
from qvit_jax.weights.layout import KeyMap, Row
from qvit_jax.weights.release_layouts import RELEASE_LAYOUTS
from qvit_jax.weights.rows import (
  BLOCK,
  FACEBOOK,
  fused,
  gated,
  linear,
  norm,
  without_first,
  without_mlp,
)


def _attention_pool() -> tuple[Row, ...]:
  """timm's: keys and values are the halves of one tensor."""
  theirs, rows = 'attn_pool.', [Row('pool/probe', 'attn_pool.latent', 'same')]
  for part, name in enumerate(('key', 'value')):
    ours = f'pool/attn/{name}'
    rows += [
      Row(f'{ours}/kernel', f'{theirs}kv.weight', 'linear', part, 2),
      Row(f'{ours}/bias', f'{theirs}kv.bias', 'vector', part, 2),
    ]
  return (
    *rows,
    *linear('pool/attn/query', f'{theirs}q'),
    *linear('pool/attn/out', f'{theirs}proj', 'linear_in2'),
    *norm('pool/norm', f'{theirs}norm'),
    *linear('pool/mlp/fc1', f'{theirs}mlp.fc1'),
    *linear('pool/mlp/fc2', f'{theirs}mlp.fc2'),
  )


# Facebook's names, which timm took over.
_DINOV2 = (
    Row('cls', 'cls_token', 'same'),
    Row('pos_embed', 'pos_embed', 'same'),
    *FACEBOOK,
)  # fmt: skip
_RELEASE = (*_DINOV2, Row('registers', 'register_tokens', 'same'))
_TIMM = (
    *_DINOV2,
    *norm(BLOCK + 'attn/query_norm', 'blocks.{i}.attn.q_norm'),
    *norm(BLOCK + 'attn/key_norm', 'blocks.{i}.attn.k_norm'),
)  # fmt: skip
_TIMM_VIT = (
    *_TIMM,
    Row('registers', 'reg_token', 'same'),
    *norm('pool_norm', 'fc_norm'),
    *norm('pre_norm', 'norm_pre'),
    *_attention_pool(),
)  # fmt: skip

# timm's Eva: rotary positions, keys without bias.
_EVA = (
    Row('cls', 'cls_token', 'same'),
    Row('registers', 'reg_token', 'same'),
    *linear('patch_embed', 'patch_embed.proj', 'conv'),
    *norm(BLOCK + 'norm1', 'blocks.{i}.norm1'),
    *(Row(f'{BLOCK}attn/{name}/kernel', 'blocks.{i}.attn.qkv.weight', 'linear',
          part) for part, name in enumerate(('query', 'key', 'value'))),
    Row(BLOCK + 'attn/query/bias', 'blocks.{i}.attn.q_bias', 'vector'),
    Row(BLOCK + 'attn/value/bias', 'blocks.{i}.attn.v_bias', 'vector'),
    *norm(BLOCK + 'attn/query_norm', 'blocks.{i}.attn.q_norm'),
    *norm(BLOCK + 'attn/key_norm', 'blocks.{i}.attn.k_norm'),
    *linear(BLOCK + 'attn/out', 'blocks.{i}.attn.proj', 'linear_in2'),
    Row(BLOCK + 'scale1', 'blocks.{i}.gamma_1', 'vector'),
    *norm(BLOCK + 'norm2', 'blocks.{i}.norm2'),
    *linear(BLOCK + 'mlp/fc2', 'blocks.{i}.mlp.fc2'),
    Row(BLOCK + 'scale2', 'blocks.{i}.gamma_2', 'vector'),
    *norm('encoder/norm', 'norm'),
    *norm('pool_norm', 'fc_norm'),
    *linear('head', 'head'),
)  # fmt: skip

_TV_LAYER = 'encoder.layers.encoder_layer_{i}.'
_TORCHVISION = (
    Row('cls', 'class_token', 'same'),
    Row('pos_embed', 'encoder.pos_embedding', 'same'),
    *linear('patch_embed', 'conv_proj', 'conv'),
    *norm(BLOCK + 'norm1', _TV_LAYER + 'ln_1'),
    *fused(_TV_LAYER + 'self_attention.in_proj_weight',
            _TV_LAYER + 'self_attention.in_proj_bias'),
    *linear(BLOCK + 'attn/out', _TV_LAYER + 'self_attention.out_proj',
             'linear_in2'),
    *norm(BLOCK + 'norm2', _TV_LAYER + 'ln_2'),
    *linear(BLOCK + 'mlp/fc1', _TV_LAYER + 'mlp.0'),
    *linear(BLOCK + 'mlp/fc2', _TV_LAYER + 'mlp.3'),
    *norm('encoder/norm', 'encoder.ln'),
    *linear('head', 'heads.head'),
)  # fmt: skip


def _flax(ours: str, theirs: str) -> tuple[Row, ...]:
  return (
    Row(f'{ours}/kernel', f'{theirs}/kernel', 'same'),
    Row(f'{ours}/bias', f'{theirs}/bias', 'same'),
  )


def _flax_norm(ours: str, theirs: str) -> tuple[Row, ...]:
  return (
    Row(f'{ours}/scale', f'{theirs}/scale', 'same'),
    Row(f'{ours}/bias', f'{theirs}/bias', 'same'),
  )


_G_LAYER = '~Transformer/encoderblock_{i}/'
_G_ATTENTION = _G_LAYER + 'MultiHeadDotProductAttention_1/'
_GOOGLE = (
    Row('cls', '~cls', 'same'),
    Row('pos_embed', '~Transformer/posembed_input/pos_embedding', 'same'),
    *_flax('patch_embed', '~embedding'),
    *_flax_norm(BLOCK + 'norm1', _G_LAYER + 'LayerNorm_0'),
    *_flax(BLOCK + 'attn/query', _G_ATTENTION + 'query'),
    *_flax(BLOCK + 'attn/key', _G_ATTENTION + 'key'),
    *_flax(BLOCK + 'attn/value', _G_ATTENTION + 'value'),
    *_flax(BLOCK + 'attn/out', _G_ATTENTION + 'out'),
    *_flax_norm(BLOCK + 'norm2', _G_LAYER + 'LayerNorm_2'),
    *_flax(BLOCK + 'mlp/fc1', _G_LAYER + 'MlpBlock_3/Dense_0'),
    *_flax(BLOCK + 'mlp/fc2', _G_LAYER + 'MlpBlock_3/Dense_1'),
    *_flax_norm('encoder/norm', '~Transformer/encoder_norm'),
    *_flax('head', '~head'),
)  # fmt: skip

LAYOUTS = {
    'timm': KeyMap(
        'timm',
        _TIMM_VIT,
        gated=(*without_first(_TIMM_VIT), *gated('blocks.{i}.mlp.fc1')),
        ignored=(r'head_dist\.',),
        pre_logits=r'pre_logits\.',
        slots=('grid', 'all'),
        pools=('token', 'mean', 'patch_mean', 'attention'),
        registers=None,
        pre_norm_eps=1e-5,
        last_norm=False,
    ),
    'timm_eva': KeyMap(
        "timm's Eva",
        variants=(
            ("timm's Eva", (
                *_EVA, *linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.fc1'),
            )),
            ('with SwiGLU', (
                *_EVA, *linear(BLOCK + 'mlp/gate', 'blocks.{i}.mlp.fc1_g'),
                *linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.fc1_x'),
            )),
        ),
        norm_eps=1e-5,
        pools=('token', 'mean', 'patch_mean'),
        registers=None,
        has_positions=False,
    ),
    'timm_distilled': KeyMap(
        'timm with a distillation token',
        (*_TIMM, Row('registers', 'dist_token', 'same')),
        ignored=(r'head_dist\.',),
        pre_logits=r'pre_logits\.',
        registers=1,
    ),
    'dinov2': KeyMap(
        'DINOv2 release',
        variants=(
            ('DINOv2 release', _RELEASE),
            ('with SwiGLU', (
                *without_mlp(_RELEASE), *gated('blocks.{i}.mlp.w12'),
                *linear(BLOCK + 'mlp/fc2', 'blocks.{i}.mlp.w3'),
            )),
        ),
        ignored=(r'mask_token$',),
        slots=('class',),
        resize='dinov2',
        resize_with_registers='timm',
        registers=None,
        biases=True,
        has_scales=True,
    ),
    **HF_LAYOUTS,
    'torchvision': KeyMap(
        'torchvision',
        _TORCHVISION,
        aliases=((r'\.mlp\.linear_1\.', '.mlp.0.'),
                 (r'\.mlp\.linear_2\.', '.mlp.3.')),
        pre_logits=r'heads\.pre_logits\.',
        resize='torchvision',
        biases=True,
    ),
    'google': KeyMap(
        'Google npz',
        _GOOGLE,
        pre_logits=r'pre_logits/',
        prefixes=('', 'opt/target/', 'params/'),
        resize='bilinear',
        pools=('token', 'mean'),
        biases=True,
    ),
    **RELEASE_LAYOUTS,
    **CNN_LAYOUTS,
}  # fmt: skip
