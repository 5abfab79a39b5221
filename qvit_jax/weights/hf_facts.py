"""What config.json of transformers says of an image tower.

A field that it leaves out has the value of its class there.
"""

import pathlib
import re
from typing import Any

from qvit_jax.store.entries import refuse
from qvit_jax.weights.layout import ROPE_BASE

# Fields of the classes of image towers, by model_type.
_USUAL = {
    'clip_vision_model': {
        'num_attention_heads': 12, 'image_size': 224, 'patch_size': 32,
        'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5,
    },
    'siglip_vision_model': {
        'num_attention_heads': 12, 'image_size': 224, 'patch_size': 16,
        'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6,
    },
    'dinov3_vit': {
        'num_attention_heads': 6, 'image_size': 224, 'patch_size': 16,
        'hidden_act': 'gelu', 'layer_norm_eps': 1e-5, 'rope_theta': ROPE_BASE,
    },
}  # fmt: skip
_TOWERS = {'clip': 'clip_vision_model', 'siglip': 'siglip_vision_model'}
# What the class of a whole model does with its image tower: regex -> facts.
_CLASSES = {
    'CLIPForImageClassification': {'pool': 'patch_mean', 'last_norm': False},
    'CLIP(Vision)?Model(WithProjection)?': {'pool': 'token', 'last_norm': True},
    'SiglipForImageClassification': {'pool': 'mean', 'last_norm': True},
    'Siglip(Vision)?Model': {'pool': 'attention', 'last_norm': True},
}  # fmt: skip


def image_tower(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of the image tower, those of the whole file where flat.

  A SwiGLU is `hidden_act` 'swiglu'.

  Args:
    path: The weights, for messages.
    config: Value of a config.json.

  Raises:
    WeightsError: Rotary positions or a gate that no model here has.
  """
  kind, tower = config.get('model_type'), config.get('vision_config')
  if isinstance(tower, dict):
    kind = tower.get('model_type', _TOWERS.get(str(kind)))
  else:
    tower = config
  tower = {**_USUAL.get(str(kind), {}), **tower}
  if kind != 'dinov3_vit':
    return tower
  if tower['rope_theta'] != ROPE_BASE:
    refuse(
      path,
      f'its config.json says rope_theta={tower["rope_theta"]!r}; rotary '
      f'positions of base {ROPE_BASE:g} are supported',
      'choose other weights',
    )
  if not tower.get('use_gated_mlp'):
    return tower
  if tower['hidden_act'] not in ('silu', 'swish'):
    refuse(
      path,
      f'its config.json says use_gated_mlp with hidden_act='
      f'{tower["hidden_act"]!r}; a gate of silu is supported',
      'choose other weights',
    )
  return tower | {'hidden_act': 'swiglu'}


def of_class(config: dict[str, Any]) -> dict[str, Any]:
  """Returns `pool`, `last_norm` and `position` by the class that is named."""
  facts = {}
  if config.get('model_type') == 'dinov3_vit':
    facts['position'] = 'rope'
  names = config.get('architectures')
  name = str(names[0]) if isinstance(names, list) and names else ''
  found = [said for p, said in _CLASSES.items() if re.fullmatch(p, name)]
  if found:
    facts |= found[0]
  tower = config.get('vision_config', config)
  if isinstance(tower, dict) and tower.get('vision_use_head') is False:
    facts.pop('pool', None)  # of a SigLIP without its attention pooling
  return facts
