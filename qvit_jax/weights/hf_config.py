"""The config.json with which transformers opens an export."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvit_jax.weights.layouts import LAYOUTS

# model.activation as transformers calls it.
_HIDDEN_ACT = {
  'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'quick_gelu': 'quick_gelu',
  'swiglu': 'silu',
}  # fmt: skip
# Pillow's numbers of its filters.
_RESAMPLE = {'bilinear': 2, 'bicubic': 3}
# Layouts and poolings whose class has no head, and its name.
_HEADLESS = {
  ('hf_clip', 'token'): 'CLIPVisionModel',
  ('hf_siglip', 'attention'): 'SiglipVisionModel',
  **{('hf_dinov3', pool): 'DINOv3ViTModel'
     for pool in ('token', 'patch_mean', 'token_mean')},
}  # fmt: skip


def has_class(shape: dict[str, Any], layout: str) -> bool:
  """Returns whether transformers has the model with its head as one class."""
  return (layout, shape.get('pool')) not in _HEADLESS


def class_of(shape: dict[str, Any], layout: str) -> str:
  """Returns the class of transformers that opens an export.

  Args:
    shape: As `models.architecture` gives it.
    layout: Key of LAYOUTS, one of transformers.
  """
  if name := _HEADLESS.get((layout, shape.get('pool'))):
    return name
  name = LAYOUTS[layout].transformers
  if layout == 'hf_dinov2' and shape['registers']:
    name = 'Dinov2WithRegisters'
  return f'{name}ForImageClassification'


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
  name = class_of(shape, layout)
  names = {
      'id2label': {str(i): name for i, name in enumerate(class_names)},
      'label2id': {name: i for i, name in enumerate(class_names)},
  }  # fmt: skip
  config = {
      'hidden_size': shape['width'], 'num_hidden_layers': shape['depth'],
      'num_attention_heads': shape['heads'],
      'hidden_act': _HIDDEN_ACT[shape.get('activation', 'gelu')],
      'image_size': shape['image_size'], 'patch_size': shape['patch'],
      'num_channels': 3, 'layer_norm_eps': shape['norm_eps'],
  }  # fmt: skip
  more = {
    'hf_clip': _clip, 'hf_siglip': _clip, 'hf_dinov2': _dinov2,
    'hf_dinov3': _dinov3,
  }.get(layout, _vit)(shape, tensors, name)  # fmt: skip
  config = {'architectures': [name], **config, **more, **names}
  if 'vision_config' in more:  # which holds what is of the image tower
    own = {'architectures', 'model_type', 'id2label', 'label2id'}
    tower = {k: x for k, x in config.items() if k not in own}
    tower |= tower.pop('vision_config')
    config = {k: x for k, x in config.items() if k in own}
    config['vision_config'] = tower
  return json.dumps(config, indent=2)


def hf_processor(data: Any, size: int) -> str:
  """Returns the preprocessor_config.json with which images are prepared there.

  The shorter side is resized and the middle cut out, as ours are.

  Args:
    data: Section of a config: `resize`, `mean`, `std`.
    size: Of the model, px.
  """
  return json.dumps(
    {
      'image_processor_type': 'CLIPImageProcessor',
      'do_convert_rgb': True,
      'do_resize': True, 'size': {'shortest_edge': size},
      'resample': _RESAMPLE[data.resize],
      'do_center_crop': True, 'crop_size': {'height': size, 'width': size},
      'do_rescale': True, 'rescale_factor': 1 / 255,
      'do_normalize': True,
      'image_mean': list(data.mean), 'image_std': list(data.std),
    },
    indent=2,
  )  # fmt: skip


def how_to_open(shape: dict[str, Any], layout: str) -> list[str]:
  """Returns the lines of Python that open an exported folder and use it."""
  name = 'AutoModelForImageClassification'
  if not has_class(shape, layout):
    name = class_of(shape, layout)
  return [
    f'from transformers import AutoImageProcessor, {name}', '',
    "processor = AutoImageProcessor.from_pretrained('.')",
    f"model = {name}.from_pretrained('.')",
    "outputs = model(**processor(pictures, return_tensors='pt'))",
  ]


def _vit(shape, tensors, name) -> dict[str, Any]:
  """ViT's and DeiT's own fields."""
  return {
      'model_type': name.removesuffix('ForImageClassification').lower(),
      'qkv_bias': any('query.bias' in name for name in tensors),
      'intermediate_size': shape['mlp_dim'],
  }  # fmt: skip


def _clip(shape, tensors, name) -> dict[str, Any]:
  """CLIP's and SigLIP's own: within a whole model, or of the tower alone."""
  del tensors
  kind = 'siglip' if name.startswith('Siglip') else 'clip'
  more: dict[str, Any] = {'intermediate_size': shape['mlp_dim']}
  if kind == 'siglip':
    more['vision_use_head'] = shape['pool'] == 'attention'
  tower = {'model_type': f'{kind}_vision_model'}
  if name.endswith('VisionModel'):
    return more | tower
  return more | {'model_type': kind, 'vision_config': tower}


def _ratio(shape: dict[str, Any]) -> float:
  """Returns the mlp_ratio of a DINOv2."""
  width, dim = shape['width'], shape['mlp_dim']
  if shape.get('activation') == 'swiglu':
    return swiglu_ratio(width, dim)
  ratio = dim / width
  if int(width * ratio) != dim:  # how it is used there
    ratio = math.nextafter(ratio, math.inf)
  return ratio


def is_whole_ratio(shape: dict[str, Any]) -> bool:
  """Returns whether the mlp_ratio of a DINOv2 is a whole number."""
  return float(_ratio(shape)).is_integer()


def _dinov2(shape, tensors, name) -> dict[str, Any]:
  """DINOv2's own: the MLP is a multiple of the width."""
  ratio, is_gated = _ratio(shape), shape.get('activation') == 'swiglu'
  kind = 'dinov2_with_registers' if 'WithRegisters' in name else 'dinov2'
  more = {
      'model_type': kind,
      'qkv_bias': any('query.bias' in name for name in tensors),
      'mlp_ratio': int(ratio) if float(ratio).is_integer() else ratio,
  }  # fmt: skip
  if shape['registers']:
    more['num_register_tokens'] = shape['registers']
  return more | ({'hidden_act': 'gelu', 'use_swiglu_ffn': True} if is_gated
                 else {})  # fmt: skip


def swiglu_ratio(width: int, dim: int) -> float:
  """Returns the mlp_ratio with which DINOv2 builds a SwiGLU of `dim` channels.

  It takes two thirds, rounded up to a multiple of 8; 0 where none gives `dim`.
  """
  gives = lambda ratio: (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
  whole = range(1, 2 * dim // width + 2)
  wanted = 3 * dim / 2 / width
  tried = (*whole, wanted, math.nextafter(wanted, math.inf))
  return next((ratio for ratio in tried if gives(ratio) == dim), 0)


def _dinov3(shape, tensors, name) -> dict[str, Any]:
  """DINOv3's own."""
  del name
  has = lambda part: any(f'{part}_proj.bias' in name for name in tensors)
  return {
      'model_type': 'dinov3_vit', 'intermediate_size': shape['mlp_dim'],
      'num_register_tokens': shape['registers'], 'rope_theta': 100.0,
      'query_bias': has('q'), 'key_bias': has('k'), 'value_bias': has('v'),
      'use_gated_mlp': shape.get('activation') == 'swiglu',
  }  # fmt: skip
