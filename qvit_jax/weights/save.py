"""Writes our float parameters in the names and axes of others."""

import json
import math
import re
from typing import Any

import numpy as np

from qvit_jax import tree
from qvit_jax.errors import ExportError
from qvit_jax.weights.keymap import KINDS, collapse
from qvit_jax.weights.layouts import LAYOUTS, Row


def translate(params: Any, layout: str) -> dict[str, np.ndarray]:
  """Returns {their name: array} of a tree of parameters.

  Args:
    params: Our parameters, host or device arrays.
    layout: Key of LAYOUTS.

  Raises:
    ExportError: The layout has no place for a parameter.
  """
  ours = {name: np.asarray(x) for name, x in tree.flatten(params).items()}
  keymap = LAYOUTS[layout]
  _check_model(ours, layout)
  prefix = keymap.prefixes[0]
  if 'registers' in ours:
    prefix = keymap.register_prefix or prefix
  rows: dict[str, tuple[Row, str]] = {}
  for name in ours:
    found = re.search(r'block_(\d+)', name)
    number = found[1] if found else ''
    for row in keymap.rows:
      if row.ours.format(i=number) == name and name not in rows:
        theirs = row.theirs.replace('~', prefix)
        rows[name] = row, theirs.format(i=int(number or 0))
  homeless = [name for name in ours if name not in rows]
  if homeless:
    raise ExportError(
      f'the layout {layout} has no place for {", ".join(collapse(homeless))}; '
      f'choose another --config.export.layout ({", ".join(LAYOUTS)})'
    )
  if 'registers' in ours and keymap.slots[0] != 'all':
    _fold_positions(ours, keymap.slots[0])
  parts: dict[str, list[np.ndarray]] = {}
  for name, (row, theirs) in sorted(
    rows.items(), key=lambda item: item[1][0].part or 0
  ):
    values = KINDS[row.kind].backward(ours[name])
    parts.setdefault(theirs, []).append(values)
  return {
    name: np.ascontiguousarray(np.concatenate(values, axis=0))
    if len(values) > 1
    else np.ascontiguousarray(values[0])
    for name, values in parts.items()
  }


def _check_model(ours: dict[str, np.ndarray], layout: str) -> None:
  """Refuses a model that no class of the layout's library is."""
  keymap = LAYOUTS[layout]
  width = ours['encoder/norm/scale'].shape[0]
  pool = 'token' if 'cls' in ours else 'mean'
  if ours['head/kernel'].shape[0] == 2 * width:
    pool = 'token_mean'
  registers = ours['registers'].shape[1] if 'registers' in ours else 0
  problems = []
  if pool not in keymap.pools:
    problems.append(f'model.pool is {pool}, not {" or ".join(keymap.pools)}')
  if keymap.registers not in (None, registers):
    problems.append(f'model.registers is {registers}, not {keymap.registers}')
  if keymap.has_scales and 'encoder/block_00/scale1' not in ours:
    problems.append('the model has no LayerScale')
  if problems:
    raise ExportError(
      f'no model of the layout {layout} is like this: {"; ".join(problems)}; '
      f'choose another --config.export.layout ({", ".join(LAYOUTS)})'
    )


def _fold_positions(ours: dict[str, np.ndarray], slots: str) -> None:
  """Adds the positions that a layout has no slots for to their tokens."""
  count = ours['registers'].shape[1]
  pos = ours['pos_embed']
  cls, registers, grid = pos[:, :1], pos[:, 1 : 1 + count], pos[:, 1 + count :]
  ours['registers'] = ours['registers'] + registers
  if slots == 'grid':
    ours['cls'] = ours['cls'] + cls
    ours['pos_embed'] = grid
  else:
    ours['pos_embed'] = np.concatenate([cls, grid], axis=1)


def hf_config(shape: dict[str, Any], layout: str, classes: int) -> str:
  """Returns the config.json with which transformers opens an export.

  Args:
    shape: Our fields: width, depth, heads, mlp_dim, patch, image_size,
      norm_eps, registers.
    layout: 'hf', 'hf_deit' or 'hf_dinov2'.
    classes: Outputs of the head.
  """
  kind = {'hf': 'vit', 'hf_deit': 'deit', 'hf_dinov2': 'dinov2'}[layout]
  name = {'vit': 'ViT', 'deit': 'DeiT', 'dinov2': 'Dinov2'}[kind]
  if kind == 'dinov2' and shape['registers']:
    kind, name = 'dinov2_with_registers', 'Dinov2WithRegisters'
  config = {
      'architectures': [f'{name}ForImageClassification'], 'model_type': kind,
      'hidden_size': shape['width'], 'num_hidden_layers': shape['depth'],
      'num_attention_heads': shape['heads'], 'hidden_act': 'gelu',
      'image_size': shape['image_size'], 'patch_size': shape['patch'],
      'num_channels': 3, 'layer_norm_eps': shape['norm_eps'],
      'qkv_bias': True,
      'id2label': {str(i): str(i) for i in range(classes)},
      'label2id': {str(i): i for i in range(classes)},
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
