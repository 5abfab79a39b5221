"""With what other libraries take an export of ours."""

from typing import Any

import numpy as np

from qvit_jax.weights.hf_config import class_of, has_class, is_whole_ratio
from qvit_jax.weights.layouts import LAYOUTS

# Layouts whose call names the activation.
_SAYS = ('timm', 'openai_clip')


class _Code(str):
  """What stands in a call as it is."""

  def __repr__(self) -> str:
    return str(self)


def timm_arguments(
  shape: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """Returns with what `timm.models.VisionTransformer` takes an export.

  Args:
    shape: As `models.architecture` gives it.
    tensors: Of `translate` in the layout 'timm'.
  """
  grid = (shape['image_size'] // shape['patch']) ** 2
  has_cls = 'cls_token' in tensors
  has_others = has_cls or shape['registers']
  pools = {'token': 'token', 'attention': 'map'}
  is_gated = shape.get('activation') == 'swiglu'
  arguments = {
      'img_size': shape['image_size'], 'patch_size': shape['patch'],
      'embed_dim': shape['width'], 'depth': shape['depth'],
      'num_heads': shape['heads'], 'num_classes': shape['num_classes'],
      'mlp_ratio': (1 + is_gated) * shape['mlp_dim'] / shape['width'],
      'mlp_layer': _Code('timm.layers.SwiGLUPacked' if is_gated else ''),
      'global_pool': pools.get(shape['pool'], 'avg'),
      'fc_norm': shape.get('norm_after_pool', False),
      'pre_norm': shape.get('pre_norm', False),
      'final_norm': shape.get('last_norm', True),
      'act_layer': 'silu' if is_gated else shape.get('activation', 'gelu'),
      'class_token': has_cls, 'reg_tokens': shape['registers'],
      'no_embed_class': has_others and tensors['pos_embed'].shape[1] == grid,
      'qkv_bias': 'blocks.0.attn.qkv.bias' in tensors,
      'qk_norm': shape['qk_norm'],
      'init_values': 1.0 if shape['layer_scale'] else None,
  }  # fmt: skip
  usual = {
      'mlp_ratio': 4.0, 'mlp_layer': '', 'global_pool': 'token',
      'fc_norm': False,
      'pre_norm': False, 'act_layer': 'gelu', 'final_norm': True,
      'class_token': True, 'reg_tokens': 0, 'no_embed_class': False,
      'qkv_bias': True, 'qk_norm': False, 'init_values': None,
  }  # fmt: skip
  if arguments['global_pool'] == 'avg':
    del usual['fc_norm']  # by default True there
  return {
    name: value
    for name, value in arguments.items()
    if name not in usual or usual[name] != value
  }


def eva_arguments(
  shape: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """Returns with what `timm.models.Eva` takes an export.

  Args:
    shape: As `models.architecture` gives it.
    tensors: Of `translate` in the layout 'timm_eva'.
  """
  is_gated = shape.get('activation') == 'swiglu'
  more = {'swiglu_mlp': True, 'swiglu_align_to': 1} if is_gated else {}
  return more | {
      'img_size': shape['image_size'], 'patch_size': shape['patch'],
      'embed_dim': shape['width'], 'depth': shape['depth'],
      'num_heads': shape['heads'], 'num_classes': shape['num_classes'],
      'mlp_ratio': shape['mlp_dim'] / shape['width'],
      'global_pool': 'token' if shape['pool'] == 'token' else 'avg',
      'use_fc_norm': shape.get('norm_after_pool', False),
      'class_token': 'cls_token' in tensors,
      'num_reg_tokens': shape['registers'],
      'qkv_bias': 'blocks.0.attn.q_bias' in tensors,
      'qk_norm': shape['qk_norm'], 'use_abs_pos_emb': False,
      'init_values': 1.0 if shape['layer_scale'] else None,
      'use_rot_pos_emb': True, 'rope_type': 'dinov3',
      'rope_temperature': 100, 'rope_rotate_half': True,
  }  # fmt: skip


def clip_arguments(
  shape: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
  """Returns with what the VisionTransformer of open_clip takes an export.

  Its `proj` then has to be None: the head is a layer of its own.

  Args:
    shape: As `models.architecture` gives it.
    tensors: Of `translate` in the layout 'openai_clip'.
  """
  kinds = {
    'gelu_tanh': "lambda: torch.nn.GELU(approximate='tanh')",
    'quick_gelu': 'open_clip.transformer.QuickGELU',
  }
  arguments = {
      'image_size': shape['image_size'], 'patch_size': shape['patch'],
      'width': shape['width'], 'layers': shape['depth'],
      'heads': shape['heads'], 'mlp_ratio': shape['mlp_dim'] / shape['width'],
  }  # fmt: skip
  if shape['layer_scale']:
    arguments['ls_init_value'] = 1.0
  if 'visual.ln_pre.weight' not in tensors:
    arguments['no_ln_pre'] = True
  if shape['pool'] == 'patch_mean':
    arguments['pool_type'] = 'avg'
  if kind := kinds.get(shape.get('activation', 'gelu')):
    arguments['act_layer'] = _Code(kind)
  return arguments


# What a head reads where the library has no class with one.
_READS = {
  'token': 'the class token', 'patch_mean': 'the mean of the patches',
  'token_mean': 'the class token and the mean of the patches side by side',
  'attention': 'what the attention pooling gives',
}  # fmt: skip


def _head(shape: dict[str, Any], layout: str) -> str:
  """Returns how to use a head that no class of the layout's library has."""
  pool = shape['pool']
  reads, name = f'{_READS.get(pool)} of last_hidden_state', 'classifier'
  if pool in ('token', 'attention'):
    reads = 'its pooler_output'
  if layout == 'openai_clip':
    reads, name = 'what that gives', 'head'
  elif layout == 'dinov3':
    reads, name = f"{_READS.get(pool)} of forward_features's x_norm", 'head'
  return f'logits are {name}.weight times {reads}, plus {name}.bias'


def how_to_build(
  shape: dict[str, Any], tensors: dict[str, np.ndarray], layout: str
) -> list[str]:
  """Returns lines on how the layout's library takes an export.

  Args:
    shape: As `models.architecture` gives it.
    tensors: Of `translate`.
    layout: Key of LAYOUTS.
  """
  usual, lines = LAYOUTS[layout].norm_eps, []
  here = shape.get('norm_eps', usual)
  if layout == 'timm':
    arguments = timm_arguments(shape, tensors).items()
    text = ', '.join(f'{name}={value!r}' for name, value in arguments)
    lines.append(f'it fits timm.models.VisionTransformer({text})')
  if layout == 'timm_eva':
    arguments = eva_arguments(shape, tensors).items()
    text = ', '.join(f'{name}={value!r}' for name, value in arguments)
    lines.append(f'it fits timm.models.eva.Eva({text})')
  if layout == 'openai_clip':
    arguments = clip_arguments(shape, tensors).items()
    text = ', '.join(f'{name}={value!r}' for name, value in arguments)
    lines.append(
      "what begins with 'visual.' fits open_clip.transformer.VisionTransformer("
      f'{text}) with proj=None; {_head(shape, layout)}'
    )
  if layout == 'dinov3':
    lines.append(
      'it fits the release but for mask_token, which plays no part (strict='
      f'False); {_head(shape, layout)}'
    )
  is_hf = bool(LAYOUTS[layout].transformers)
  if is_hf and not has_class(shape, layout):
    lines.append(
      f'{class_of(shape, layout)} of transformers has no head: '
      f'{_head(shape, layout)}'
    )
  if layout == 'hf_clip' and has_class(shape, layout):
    lines.append(
      'post_layernorm is not written: CLIPForImageClassification has one, '
      'which plays no part in its logits'
    )
  if layout == 'hf_dinov2' and not is_whole_ratio(shape):
    lines.append(
      f'transformers 5 opens it only where mlp_ratio is whole; model.mlp_dim='
      f'{shape["mlp_dim"]} is no such multiple of model.width={shape["width"]}'
    )
  if is_hf:
    return lines  # config.json says the rest
  # The calls say it.
  kind, says = shape.get('activation', 'gelu'), layout in _SAYS
  if kind not in ('gelu', 'swiglu') and not says:
    lines.append(
      f'the model has model.activation={kind!r}; the library has the exact '
      'GELU, with which it computes something else'
    )
  if here != usual:
    lines.append(f'build it with LayerNorm epsilon {here:g}, not {usual:g}')
  if call := _cnn_call(shape, layout):
    lines.append(f'it fits {call}')
  if shape.get('padding', 'torch') != 'torch':
    lines.append(
      f"the model pads as model.padding={shape['padding']!r} says; the library "
      'puts as many zeros on both sides, with which it computes something else'
    )
  return lines


def _cnn_call(shape: dict[str, Any], layout: str) -> str:
  """Returns what makes such a convolutional model in the layout's library."""
  library, _, kind = layout.partition('_')
  classes = f'num_classes={shape["num_classes"]}'
  if kind == 'vgg' and shape['channels'] != 64:
    return ''  # nobody else has such a model
  if kind == 'vgg':
    name = f'vgg{shape["size"]}{"_bn" if shape["batch_norm"] else ""}'
    if shape['classifier'] == 'linear':
      classes += '), with the mean of the image and one linear layer behind it'
  elif kind == 'mobilenet_v2' and library == 'torchvision':
    name, classes = kind, f'width_mult={shape["width"]:g}, {classes}'
  elif kind == 'mobilenet_v2':
    name = f'mobilenetv2_{round(100 * shape["width"]):03d}'
  else:
    return ''
  call = f'timm.create_model({name!r}, {classes}'
  if library == 'torchvision':
    call = f'torchvision.models.{name}({classes}'
  return call if classes.endswith('it') else f'{call})'
