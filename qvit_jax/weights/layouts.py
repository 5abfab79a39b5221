"""How others name a vision transformer's tensors: one key map each.

A row says which of their tensors a parameter of ours is and how its axes go.
In names, `{i}` is the block and `~` the prefix that a library puts before its
backbone.
"""

from qvit_jax.weights.cnn_layouts import CNN_LAYOUTS
from qvit_jax.weights.layout import KeyMap, Row

BLOCK = 'encoder/block_{i}/'


def _norm(ours: str, theirs: str) -> tuple[Row, ...]:
  return (
    Row(f'{ours}/scale', f'{theirs}.weight', 'vector'),
    Row(f'{ours}/bias', f'{theirs}.bias', 'vector'),
  )


def _linear(ours: str, theirs: str, kind: str = 'linear') -> tuple[Row, ...]:
  return (
    Row(f'{ours}/kernel', f'{theirs}.weight', kind),
    Row(f'{ours}/bias', f'{theirs}.bias', 'vector'),
  )


def _fused(weight: str, bias: str) -> tuple[Row, ...]:
  """Query, key and value as the thirds of one tensor."""
  rows = []
  for part, name in enumerate(('query', 'key', 'value')):
    rows += [
      Row(f'{BLOCK}attn/{name}/kernel', weight, 'linear', part),
      Row(f'{BLOCK}attn/{name}/bias', bias, 'vector', part),
    ]
  return tuple(rows)


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
    *_linear('pool/attn/query', f'{theirs}q'),
    *_linear('pool/attn/out', f'{theirs}proj', 'linear_in2'),
    *_norm('pool/norm', f'{theirs}norm'),
    *_linear('pool/mlp/fc1', f'{theirs}mlp.fc1'),
    *_linear('pool/mlp/fc2', f'{theirs}mlp.fc2'),
  )


# Facebook's names, which timm took over.
_DINOV2 = (
    Row('cls', 'cls_token', 'same'),
    Row('pos_embed', 'pos_embed', 'same'),
    *_linear('patch_embed', 'patch_embed.proj', 'conv'),
    *_norm(BLOCK + 'norm1', 'blocks.{i}.norm1'),
    *_fused('blocks.{i}.attn.qkv.weight', 'blocks.{i}.attn.qkv.bias'),
    *_linear(BLOCK + 'attn/out', 'blocks.{i}.attn.proj', 'linear_in2'),
    Row(BLOCK + 'scale1', 'blocks.{i}.ls1.gamma', 'vector'),
    *_norm(BLOCK + 'norm2', 'blocks.{i}.norm2'),
    *_linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.fc1'),
    *_linear(BLOCK + 'mlp/fc2', 'blocks.{i}.mlp.fc2'),
    Row(BLOCK + 'scale2', 'blocks.{i}.ls2.gamma', 'vector'),
    *_norm('encoder/norm', 'norm'),
    *_linear('head', 'head'),
)  # fmt: skip
_TIMM = (
    *_DINOV2,
    *_norm(BLOCK + 'attn/query_norm', 'blocks.{i}.attn.q_norm'),
    *_norm(BLOCK + 'attn/key_norm', 'blocks.{i}.attn.k_norm'),
)  # fmt: skip

# timm's Eva: rotary positions, keys without bias.
_EVA = (
    Row('cls', 'cls_token', 'same'),
    Row('registers', 'reg_token', 'same'),
    *_linear('patch_embed', 'patch_embed.proj', 'conv'),
    *_norm(BLOCK + 'norm1', 'blocks.{i}.norm1'),
    *(Row(f'{BLOCK}attn/{name}/kernel', 'blocks.{i}.attn.qkv.weight', 'linear',
          part) for part, name in enumerate(('query', 'key', 'value'))),
    Row(BLOCK + 'attn/query/bias', 'blocks.{i}.attn.q_bias', 'vector'),
    Row(BLOCK + 'attn/value/bias', 'blocks.{i}.attn.v_bias', 'vector'),
    *_norm(BLOCK + 'attn/query_norm', 'blocks.{i}.attn.q_norm'),
    *_norm(BLOCK + 'attn/key_norm', 'blocks.{i}.attn.k_norm'),
    *_linear(BLOCK + 'attn/out', 'blocks.{i}.attn.proj', 'linear_in2'),
    Row(BLOCK + 'scale1', 'blocks.{i}.gamma_1', 'vector'),
    *_norm(BLOCK + 'norm2', 'blocks.{i}.norm2'),
    *_linear(BLOCK + 'mlp/fc2', 'blocks.{i}.mlp.fc2'),
    Row(BLOCK + 'scale2', 'blocks.{i}.gamma_2', 'vector'),
    *_norm('encoder/norm', 'norm'),
    *_norm('pool_norm', 'fc_norm'),
    *_linear('head', 'head'),
)  # fmt: skip

_HF_STEM = (
    Row('cls', '~embeddings.cls_token', 'same'),
    Row('pos_embed', '~embeddings.position_embeddings', 'same'),
    *_linear('patch_embed', '~embeddings.patch_embeddings.projection', 'conv'),
)  # fmt: skip
_HF_LAYER = '~encoder.layer.{i}.'
_HF_ATTENTION = (
    *_linear(BLOCK + 'attn/query', _HF_LAYER + 'attention.attention.query'),
    *_linear(BLOCK + 'attn/key', _HF_LAYER + 'attention.attention.key'),
    *_linear(BLOCK + 'attn/value', _HF_LAYER + 'attention.attention.value'),
    *_linear(
        BLOCK + 'attn/out', _HF_LAYER + 'attention.output.dense', 'linear_in2'
    ),
)  # fmt: skip
_HF_END = (
    *_norm('encoder/norm', '~layernorm'),
    *_linear('head', 'classifier'),
)  # fmt: skip
_HF_VIT = (
    *_HF_STEM,
    *_HF_ATTENTION,
    *_norm(BLOCK + 'norm1', _HF_LAYER + 'layernorm_before'),
    *_norm(BLOCK + 'norm2', _HF_LAYER + 'layernorm_after'),
    *_linear(BLOCK + 'mlp/fc1', _HF_LAYER + 'intermediate.dense'),
    *_linear(BLOCK + 'mlp/fc2', _HF_LAYER + 'output.dense'),
    *_HF_END,
)  # fmt: skip
# What transformers 5 calls them in memory; it still writes the names above.
_HF_IN_MEMORY = (
    (r'(^|\.)(?:encoder\.)?layers?\.(\d+)\.', r'\1encoder.layer.\2.'),
    (r'attention\.q_proj', 'attention.attention.query'),
    (r'attention\.k_proj', 'attention.attention.key'),
    (r'attention\.v_proj', 'attention.attention.value'),
    (r'attention\.o_proj', 'attention.output.dense'),
)  # fmt: skip
_HF_VIT_IN_MEMORY = (
    *_HF_IN_MEMORY,
    (r'layer\.(\d+)\.mlp\.fc1', r'layer.\1.intermediate.dense'),
    (r'layer\.(\d+)\.mlp\.fc2', r'layer.\1.output.dense'),
)  # fmt: skip

_TV_LAYER = 'encoder.layers.encoder_layer_{i}.'
_TORCHVISION = (
    Row('cls', 'class_token', 'same'),
    Row('pos_embed', 'encoder.pos_embedding', 'same'),
    *_linear('patch_embed', 'conv_proj', 'conv'),
    *_norm(BLOCK + 'norm1', _TV_LAYER + 'ln_1'),
    *_fused(_TV_LAYER + 'self_attention.in_proj_weight',
            _TV_LAYER + 'self_attention.in_proj_bias'),
    *_linear(BLOCK + 'attn/out', _TV_LAYER + 'self_attention.out_proj',
             'linear_in2'),
    *_norm(BLOCK + 'norm2', _TV_LAYER + 'ln_2'),
    *_linear(BLOCK + 'mlp/fc1', _TV_LAYER + 'mlp.0'),
    *_linear(BLOCK + 'mlp/fc2', _TV_LAYER + 'mlp.3'),
    *_norm('encoder/norm', 'encoder.ln'),
    *_linear('head', 'heads.head'),
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
        (
            *_TIMM,
            Row('registers', 'reg_token', 'same'),
            *_norm('pool_norm', 'fc_norm'),
            *_norm('pre_norm', 'norm_pre'),
            *_attention_pool(),
        ),
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
                *_EVA, *_linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.fc1'),
            )),
            ('with SwiGLU', (
                *_EVA, *_linear(BLOCK + 'mlp/gate', 'blocks.{i}.mlp.fc1_g'),
                *_linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.fc1_x'),
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
        (*_DINOV2, Row('registers', 'register_tokens', 'same')),
        ignored=(r'mask_token$',),
        slots=('class',),
        resize='dinov2',
        resize_with_registers='timm',
        registers=None,
        biases=True,
        has_scales=True,
    ),
    'hf': KeyMap(
        'HuggingFace ViT',
        _HF_VIT,
        ignored=(r'mask_token$', r'decoder\.'),
        pre_logits=r'pooler\.dense\.',
        prefixes=('vit.', '', 'deit.'),
        aliases=_HF_VIT_IN_MEMORY,
        resize='torch',
        norm_eps=1e-12,
        transformers='ViT',
    ),
    'hf_deit': KeyMap(
        'HuggingFace DeiT',
        (
            *_HF_VIT,
            Row('registers', '~embeddings.distillation_token', 'same'),
            # ForImageClassificationWithTeacher has two heads.
            *_linear('head', 'cls_classifier'),
        ),
        ignored=(r'mask_token$', r'distillation_classifier\.', r'decoder\.'),
        pre_logits=r'pooler\.dense\.',
        prefixes=('deit.', ''),
        aliases=_HF_VIT_IN_MEMORY,
        resize='torch',
        norm_eps=1e-12,
        registers=1,
        transformers='DeiT',
    ),
    'hf_dinov2': KeyMap(
        'HuggingFace DINOv2',
        (
            *_HF_STEM,
            Row('registers', '~embeddings.register_tokens', 'same'),
            *_HF_ATTENTION,
            *_norm(BLOCK + 'norm1', _HF_LAYER + 'norm1'),
            *_norm(BLOCK + 'norm2', _HF_LAYER + 'norm2'),
            Row(BLOCK + 'scale1', _HF_LAYER + 'layer_scale1.lambda1', 'vector'),
            Row(BLOCK + 'scale2', _HF_LAYER + 'layer_scale2.lambda1', 'vector'),
            *_linear(BLOCK + 'mlp/fc1', _HF_LAYER + 'mlp.fc1'),
            *_linear(BLOCK + 'mlp/fc2', _HF_LAYER + 'mlp.fc2'),
            *_HF_END,
        ),
        ignored=(r'mask_token$',),
        prefixes=('dinov2.', '', 'dinov2_with_registers.'),
        aliases=_HF_IN_MEMORY,
        slots=('class',),
        resize='torch',
        resize_with_registers='timm',
        pools=('token_mean',),
        registers=None,
        has_scales=True,
        register_prefix='dinov2_with_registers.',
        transformers='Dinov2',
    ),
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
    **CNN_LAYOUTS,
}  # fmt: skip
