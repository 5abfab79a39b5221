"""How transformers names a vision transformer's tensors: one key map each."""

from qvit_jax.weights.layout import KeyMap, Row
from qvit_jax.weights.rows import (
  BLOCK,
  PARTS,
  fused,
  gated,
  linear,
  norm,
  without_mlp,
)

_HF_STEM = (
    Row('cls', '~embeddings.cls_token', 'same'),
    Row('pos_embed', '~embeddings.position_embeddings', 'same'),
    *linear('patch_embed', '~embeddings.patch_embeddings.projection', 'conv'),
)  # fmt: skip
_HF_LAYER = '~encoder.layer.{i}.'
_HF_ATTENTION = (
    *linear(BLOCK + 'attn/query', _HF_LAYER + 'attention.attention.query'),
    *linear(BLOCK + 'attn/key', _HF_LAYER + 'attention.attention.key'),
    *linear(BLOCK + 'attn/value', _HF_LAYER + 'attention.attention.value'),
    *linear(
        BLOCK + 'attn/out', _HF_LAYER + 'attention.output.dense', 'linear_in2'
    ),
)  # fmt: skip
_HF_END = (
    *norm('encoder/norm', '~layernorm'),
    *linear('head', 'classifier'),
)  # fmt: skip
_HF_VIT = (
    *_HF_STEM,
    *_HF_ATTENTION,
    *norm(BLOCK + 'norm1', _HF_LAYER + 'layernorm_before'),
    *norm(BLOCK + 'norm2', _HF_LAYER + 'layernorm_after'),
    *linear(BLOCK + 'mlp/fc1', _HF_LAYER + 'intermediate.dense'),
    *linear(BLOCK + 'mlp/fc2', _HF_LAYER + 'output.dense'),
    *_HF_END,
)  # fmt: skip
_HF_DINOV2 = (
    *_HF_STEM,
    Row('registers', '~embeddings.register_tokens', 'same'),
    *_HF_ATTENTION,
    *norm(BLOCK + 'norm1', _HF_LAYER + 'norm1'),
    *norm(BLOCK + 'norm2', _HF_LAYER + 'norm2'),
    Row(BLOCK + 'scale1', _HF_LAYER + 'layer_scale1.lambda1', 'vector'),
    Row(BLOCK + 'scale2', _HF_LAYER + 'layer_scale2.lambda1', 'vector'),
    *linear(BLOCK + 'mlp/fc1', _HF_LAYER + 'mlp.fc1'),
    *linear(BLOCK + 'mlp/fc2', _HF_LAYER + 'mlp.fc2'),
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

# CLIP and SigLIP: the image tower, of whole models too.
_CLIP_LAYER = '~encoder.layers.{i}.'
_CLIP_ATTENTION = _CLIP_LAYER + 'self_attn.'
_CLIP_BOTH = (
    Row('pos_embed', '~embeddings.position_embedding.weight', 'table'),
    *linear(BLOCK + 'attn/query', _CLIP_ATTENTION + 'q_proj'),
    *linear(BLOCK + 'attn/key', _CLIP_ATTENTION + 'k_proj'),
    *linear(BLOCK + 'attn/value', _CLIP_ATTENTION + 'v_proj'),
    *linear(BLOCK + 'attn/out', _CLIP_ATTENTION + 'out_proj', 'linear_in2'),
    *norm(BLOCK + 'norm1', _CLIP_LAYER + 'layer_norm1'),
    *norm(BLOCK + 'norm2', _CLIP_LAYER + 'layer_norm2'),
    *linear(BLOCK + 'mlp/fc1', _CLIP_LAYER + 'mlp.fc1'),
    *linear(BLOCK + 'mlp/fc2', _CLIP_LAYER + 'mlp.fc2'),
    *norm('encoder/norm', '~post_layernorm'),
    *linear('head', 'classifier'),
)  # fmt: skip
_CLIP = (
    Row('cls', '~embeddings.class_embedding', 'token'),
    Row('patch_embed/kernel', '~embeddings.patch_embedding.weight', 'conv'),
    *norm('pre_norm', '~pre_layrnorm'),
    *_CLIP_BOTH,
)  # fmt: skip
_SIGLIP = (
    *linear('patch_embed', '~embeddings.patch_embedding', 'conv'),
    *_CLIP_BOTH,
    Row('pool/probe', '~head.probe', 'same'),
    *fused('~head.attention.in_proj_weight', '~head.attention.in_proj_bias',
           'pool/attn'),
    *linear('pool/attn/out', '~head.attention.out_proj', 'linear_in2'),
    *norm('pool/norm', '~head.layernorm'),
    *linear('pool/mlp/fc1', '~head.mlp.fc1'),
    *linear('pool/mlp/fc2', '~head.mlp.fc2'),
)  # fmt: skip
_TEXT = (
    r'(^|\.)text_model\.', r'(^|\.)(text|visual)_projection\.',
    r'(^|\.)logit_(scale|bias)$', r'position_ids$',
)  # fmt: skip

_DINOV3_LAYER = '~layer.{i}.'
_DINOV3 = (
    Row('cls', '~embeddings.cls_token', 'same'),
    Row('registers', '~embeddings.register_tokens', 'same'),
    *linear('patch_embed', '~embeddings.patch_embeddings', 'conv'),
    *(row for name in PARTS for row in linear(
        f'{BLOCK}attn/{name}', f'{_DINOV3_LAYER}attention.{name[0]}_proj')),
    *linear(BLOCK + 'attn/out', _DINOV3_LAYER + 'attention.o_proj',
            'linear_in2'),
    *norm(BLOCK + 'norm1', _DINOV3_LAYER + 'norm1'),
    *norm(BLOCK + 'norm2', _DINOV3_LAYER + 'norm2'),
    Row(BLOCK + 'scale1', _DINOV3_LAYER + 'layer_scale1.lambda1', 'vector'),
    Row(BLOCK + 'scale2', _DINOV3_LAYER + 'layer_scale2.lambda1', 'vector'),
    *linear(BLOCK + 'mlp/fc1', _DINOV3_LAYER + 'mlp.up_proj'),
    *linear(BLOCK + 'mlp/fc2', _DINOV3_LAYER + 'mlp.down_proj'),
    *norm('encoder/norm', '~norm'),
    *linear('head', 'classifier'),
)  # fmt: skip

HF_LAYOUTS = {
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
            *linear('head', 'cls_classifier'),
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
        variants=(
            ('HuggingFace DINOv2', _HF_DINOV2),
            ('with SwiGLU', (
                *without_mlp(_HF_DINOV2),
                *gated(_HF_LAYER + 'mlp.weights_in'),
                *linear(BLOCK + 'mlp/fc2', _HF_LAYER + 'mlp.weights_out'),
            )),
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
    'hf_clip': KeyMap(
        'HuggingFace CLIP',
        _CLIP,
        ignored=_TEXT,
        optional=(r'^encoder/norm/',),
        prefixes=('vision_model.', ''),
        resize='torch',
        norm_eps=1e-5,
        pre_norm_eps=1e-5,
        has_pre_norm=True,
        pools=('token', 'patch_mean'),
        normless=('patch_mean',),
        biases=True,
        transformers='CLIP',
    ),
    'hf_siglip': KeyMap(
        'HuggingFace SigLIP',
        _SIGLIP,
        ignored=_TEXT,
        optional=(r'^pool/',),
        prefixes=('vision_model.', ''),
        resize='torch',
        pools=('attention', 'mean'),
        biases=True,
        transformers='Siglip',
    ),
    'hf_dinov3': KeyMap(
        'HuggingFace DINOv3',
        variants=(
            ('HuggingFace DINOv3', _DINOV3),
            ('with SwiGLU', (
                *_DINOV3,
                *linear(BLOCK + 'mlp/gate', _DINOV3_LAYER + 'mlp.gate_proj'),
            )),
        ),
        ignored=(r'mask_token$',),
        # In memory the layers are an encoder's of their own.
        aliases=((r'(^|\.)model\.layer\.', r'\1layer.'),),
        norm_eps=1e-5,
        pools=('token', 'patch_mean', 'token_mean'),
        registers=None,
        separate_biases=True,
        has_positions=False,
        is_dinov3=True,
        has_scales=True,
        transformers='DINOv3ViT',
    ),
}  # fmt: skip
