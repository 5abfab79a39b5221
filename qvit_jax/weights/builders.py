"""With what other libraries take an export of ours."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvit_jax.weights.layouts import LAYOUTS

# model.activation as transformers calls it.
_HIDDEN_ACT = {
  'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'quick_gelu': 'quick_gelu'
}  # fmt: skip


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
  arguments = {
      'img_size': shape['image_size'], 'patch_size': shape['patch'],
      'embed_dim': shape['width'], 'depth': shape['depth'],
      'num_heads': shape['heads'], 'num_classes': shape['num_classes'],
      'mlp_ratio': shape['mlp_dim'] / shape['width'],
      'global_pool': pools.get(shape['pool'], 'avg'),
      'fc_norm': shape.get('norm_after_pool', False),
      'pre_norm': shape.get('pre_norm', False),
      'final_norm': shape.get('last_norm', True),
      'act_layer': shape.get('activation', 'gelu'),
      'class_token': has_cls, 'reg_tokens': shape['registers'],
      'no_embed_class': has_others and tensors['pos_embed'].shape[1] == grid,
      'qkv_bias': 'blocks.0.attn.qkv.bias' in tensors,
      'qk_norm': shape['qk_norm'],
      'init_values': 1.0 if shape['layer_scale'] else None,
  }  # fmt: skip
  usual = {
      'mlp_ratio': 4.0, 'global_pool': 'token', 'fc_norm': False,
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
  # timm's call and transformers' config.json say it.
  kind, says = shape.get('activation', 'gelu'), layout == 'timm'
  says = says or bool(LAYOUTS[layout].transformers)
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


def hf_config(
  shape: dict[str, Any],
  tensors: dict[str, np.ndarray],
  layout: str,
  *,
  class_names: Sequence[str] = (),
) -> str:
  """Returns the config.json with which transformers opens an export.

  Args:
    shape: As `models.architecture` gives it.
    tensors: Of `translate`.
    layout: Key of LAYOUTS, one of transformers.
    class_names: By label; numbers stand for outputs without one, and for all
      where there are more names than outputs.
  """
  classes = shape['num_classes']
  if len(class_names) > classes:
    class_names = ()
  class_names = [*class_names, *map(str, range(len(class_names), classes))]
  name = LAYOUTS[layout].transformers
  kind = name.lower()
  if kind == 'dinov2' and shape['registers']:
    kind, name = 'dinov2_with_registers', 'Dinov2WithRegisters'
  config = {
      'architectures': [f'{name}ForImageClassification'], 'model_type': kind,
      'hidden_size': shape['width'], 'num_hidden_layers': shape['depth'],
      'num_attention_heads': shape['heads'],
      'hidden_act': _HIDDEN_ACT[shape.get('activation', 'gelu')],
      'image_size': shape['image_size'], 'patch_size': shape['patch'],
      'num_channels': 3, 'layer_norm_eps': shape['norm_eps'],
      'qkv_bias': any('query.bias' in name for name in tensors),
      'id2label': {str(i): name for i, name in enumerate(class_names)},
      'label2id': {name: i for i, name in enumerate(class_names)},
  }  # fmt: skip
  if kind.startswith('dinov2'):
    ratio = shape['mlp_dim'] / shape['width']
    if int(shape['width'] * ratio) != shape['mlp_dim']:  # how it is used there
      ratio = math.nextafter(ratio, math.inf)
    config['mlp_ratio'] = int(ratio) if ratio.is_integer() else ratio
    if shape['registers']:
      config['num_register_tokens'] = shape['registers']
  else:
    config['intermediate_size'] = shape['mlp_dim']
  return json.dumps(config, indent=2)
