"""Whether transformers and open_clip compute what is exported for them.

They and PyTorch are no requirements of ours: without them this is skipped.

  pip install torch transformers open_clip_torch
  pytest tests/weights/test_transformers.py -m slow
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import tree
from qvit_jax.models import architecture, build_model
from qvit_jax.store.tensors import save_tensors
from qvit_jax.weights import (
  LAYOUTS,
  clip_arguments,
  hf_config,
  load_weights,
  translate,
)
from tests import reference
from tests.weights.test_timm import timm as _timm
from tests.weights.test_towers import CLIP, DINOV3, GATED
from tests.weights.test_weights import make_config, shapes_of

timm = _timm  # the fixture: it makes torchvision importable
DINOV2 = {'pool': 'token_mean', 'layer_scale': 1.0, 'mlp_dim': 48}
TANH = {'activation': 'gelu_tanh'}
CASES = {
    'vit': ('hf', {}), 'vit_tanh': ('hf', TANH),
    'deit': ('hf_deit', {'registers': 1}),
    'dinov2': ('hf_dinov2', DINOV2),
    'dinov2_registers': ('hf_dinov2', DINOV2 | {'registers': 3}),
    'dinov2_swiglu': (
        'hf_dinov2', DINOV2 | {'mlp_dim': 32, 'activation': 'swiglu'}),
    'clip': ('hf_clip', CLIP),
    'clip_gelu': ('hf_clip', CLIP | {'activation': 'gelu'}),
    'clip_mean': ('hf_clip', CLIP | {'pool': 'patch_mean', 'last_norm': False}),
    'siglip': ('hf_siglip', TANH | {'pool': 'attention'}),
    'siglip_mean': ('hf_siglip', TANH | {'pool': 'mean'}),
    'dinov3': ('hf_dinov3', DINOV3),
    'dinov3_mean': ('hf_dinov3', DINOV3 | {'pool': 'patch_mean'}),
    'dinov3_both': ('hf_dinov3', DINOV3 | {'pool': 'token_mean'}),
    'dinov3_swiglu': ('hf_dinov3', GATED),
    'dinov3_no_registers': ('hf_dinov3', DINOV3 | {'registers': 0}),
}  # fmt: skip


def exported(folder, layout, fields):
  """Returns a config, random parameters and their tensors in a folder."""
  config = make_config(**fields)
  params = tree.flatten(reference.random_params(shapes_of(config)))
  params = {name: np.array(x, np.float32) for name, x in params.items()}
  first = config.model.pool not in ('mean', 'attention')
  if 'pos_embed' in params and layout == 'hf_dinov2':
    params['pos_embed'][:, first : first + config.model.registers] = 0
  for name in params:
    if config.model.position == 'rope' and name.endswith('attn/key/bias'):
      params[name] = np.zeros_like(params[name])
    if config.model.pre_norm and name == 'patch_embed/bias':
      params[name] = np.zeros_like(params[name])
  tensors = translate(tree.nest(params), layout, config.model.pool)
  folder.mkdir(parents=True, exist_ok=True)
  save_tensors(tensors, folder / 'model.safetensors', form='safetensors')
  again, _ = load_weights(str(folder), shapes_of(config))
  jax.tree.map(np.testing.assert_array_equal, again, tree.nest(params))
  return config, params, tensors


def images():
  return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype('float32')


def check(config, params, theirs):
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  ours = build_model(config).apply(variables, jnp.asarray(images()))
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_transformers_computes_what_we_export(case, timm, tmp_path):
  import torch

  hf = pytest.importorskip('transformers', reason='it is not installed')
  layout, fields = CASES[case]
  config, params, tensors = exported(tmp_path / 'x', layout, fields)
  text = hf_config(architecture(config), tensors, layout)
  (tmp_path / 'x' / 'config.json').write_text(text)
  name = json.loads(text)['architectures'][0]
  kind = getattr(hf, name)
  model, said = kind.from_pretrained(tmp_path / 'x', output_loading_info=True)
  x = torch.tensor(images().transpose(0, 3, 1, 2))
  with torch.no_grad():
    outputs = model.eval()(pixel_values=x)
  missing = {n for n in said['missing_keys'] if 'mask_token' not in n}
  if case == 'clip_mean':  # which plays no part
    missing -= {f'vision_model.post_layernorm.{n}' for n in ('weight', 'bias')}
  if case == 'dinov3_no_registers':  # which holds nothing
    missing -= {'embeddings.register_tokens'}
  assert not missing and not said['mismatched_keys']
  if name.endswith('ForImageClassification'):
    assert not said['unexpected_keys']
    check(config, params, outputs.logits.numpy())
    return
  assert set(said['unexpected_keys']) == {'classifier.weight',
                                          'classifier.bias'}  # fmt: skip
  tokens = outputs.last_hidden_state.numpy()
  token, mean = tokens[:, 0], tokens[:, 1 + config.model.registers :].mean(1)
  read = {'patch_mean': mean, 'token_mean': np.concatenate([token, mean], 1)}
  read = read.get(config.model.pool, outputs.pooler_output.numpy())
  logits = read @ tensors['classifier.weight'].T + tensors['classifier.bias']
  check(config, params, logits)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields',
  [CLIP, CLIP | {'activation': 'gelu'}, CLIP | TANH,
   CLIP | {'pool': 'patch_mean'}, CLIP | {'layer_scale': 1.0}],
  ids=str,
)  # fmt: skip
def test_open_clip_computes_what_we_export(fields, timm, tmp_path):
  import torch

  open_clip = pytest.importorskip('open_clip', reason='it is not installed')
  config, params, tensors = exported(tmp_path / 'x', 'openai_clip', fields)
  arguments = clip_arguments(architecture(config), tensors)
  known = {'torch': torch, 'open_clip': open_clip}
  text = ', '.join(f'{name}={value!r}' for name, value in arguments.items())
  model = eval(f'open_clip.transformer.VisionTransformer({text})', known)
  model.proj = None
  model.load_state_dict({
      name.removeprefix('visual.'): torch.tensor(x)
      for name, x in tensors.items() if name.startswith('visual.')
  })  # fmt: skip
  x = torch.tensor(images().transpose(0, 3, 1, 2))
  with torch.no_grad():
    read = model.eval()(x).numpy()
  check(config, params, read @ tensors['head.weight'].T + tensors['head.bias'])


def test_every_layout_of_transformers_is_tried():
  tried = {layout for layout, _ in CASES.values()}
  assert tried == {k for k, keymap in LAYOUTS.items() if keymap.transformers}
