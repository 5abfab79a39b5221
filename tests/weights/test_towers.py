"""Image towers and backbones of others: what a head would read, and back.

The files and what their libraries make of images come from these, see
fixtures/make_weights.py.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qvit_jax import tree
from qvit_jax.errors import ExportError, WeightsError
from qvit_jax.models import architecture, build_model, rope
from qvit_jax.store.tensors import save_tensors
from qvit_jax.weights import (
  LAYOUTS,
  hf_config,
  how_to_build,
  load_weights,
  translate,
)
from qvit_jax.weights.containers import open_source
from qvit_jax.weights.layout import ROPE_BASE
from tests import reference
from tests.weights.test_weights import FIXTURES, make_config, shapes_of

CLIP = {'pre_norm': True, 'activation': 'quick_gelu', 'norm_eps': 1e-5}
DINOV3 = {'position': 'rope', 'registers': 2, 'layer_scale': 1.0,
          'norm_eps': 1e-5}  # fmt: skip
GATED = DINOV3 | {'activation': 'swiglu'}
# name: (file, fields of config.model, layout to write, tensors that are unused)
TOWERS = {
    'hf_clip_model': ('hf_clip_model', CLIP, 'hf_clip', 23),
    'hf_siglip_model': (
        'hf_siglip_model', {'pool': 'attention', 'activation': 'gelu_tanh'},
        'hf_siglip', 24),
    'hf_dinov3': ('hf_dinov3', DINOV3, 'hf_dinov3', 1),
    'hf_dinov3_swiglu': ('hf_dinov3_swiglu', GATED, 'hf_dinov3', 1),
    'hf_mae': ('hf_mae', {'norm_eps': 1e-12}, 'hf', 24),
    'open_clip': ('open_clip.safetensors', CLIP, 'openai_clip', 19),
    'dinov3': ('dinov3.pth', DINOV3, 'dinov3', 1),
    'dinov3_swiglu': ('dinov3_swiglu.pth', GATED, 'dinov3', 1),
}  # fmt: skip
HEAD = ['head/kernel', 'head/bias']


def load(name, path=None, **fields):
  file, own, _, _ = TOWERS[name]
  config = make_config(num_classes=24, **{**own, **fields})
  params, report = load_weights(str(path or FIXTURES / file), shapes_of(config))
  ones = lambda x: np.ones(x.shape, np.float32)
  params['head'] = jax.tree.map(ones, params['head'])  # no file has one
  return config, params, report


def with_tensors(name, path, change):
  """Writes a fixture after `change` of its tensors; returns the path."""
  entries = open_source(FIXTURES / TOWERS[name][0]).entries
  tensors = {k: np.array(entry.read()) for k, entry in entries.items()}
  tensors = change(tensors) or tensors
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path
  )
  return path


@pytest.mark.parametrize('name', TOWERS)
@pytest.mark.parametrize('size', ['', '_other'])
def test_a_head_reads_what_the_library_gives_it(name, size):
  """With the identity as head the logits are what the head reads."""
  known = np.load(FIXTURES / f'{name}.reference.npz')
  images, wanted = known[f'images{size}'], known[f'logits{size}']
  config, params, report = load(name, image_size=images.shape[1])
  assert list(report.reinitialised) == HEAD
  assert len(report.unused) == TOWERS[name][3] == len({*report.unused})
  params['head'] = {'kernel': jnp.eye(24), 'bias': jnp.zeros(24)}
  variables = {'params': jax.tree.map(jnp.asarray, params)}
  found = build_model(config).apply(variables, jnp.asarray(images))
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * scale)
  is_resized = size and config.model.position == 'learned'
  assert list(report.adapted) == (['pos_embed'] if is_resized else [])
  report.compare(architecture(config))  # nothing there contradicts the model


@pytest.mark.parametrize('name', TOWERS)
def test_a_tower_is_written_back_bit_for_bit(name, tmp_path):
  file, _, layout, _ = TOWERS[name]
  config, params, report = load(name)
  written = translate(params, layout, config.model.pool)
  path = tmp_path / 'model.safetensors'
  save_tensors(written, path, form='safetensors')
  again, read = load_weights(str(path), shapes_of(config))
  assert not read.reinitialised and not read.unused
  jax.tree.map(np.testing.assert_array_equal, again, params)
  written = safetensors.numpy.load_file(path)
  for part in ('weight', 'bias'):  # which the file had not
    assert written.pop(next(n for n in written if n.endswith(f'r.{part}')
                            or n == f'head.{part}')).any()  # fmt: skip
  theirs = {
    name: entry.read()
    for name, entry in open_source(FIXTURES / file).entries.items()
    if name not in report.unused
  }
  assert written.keys() == theirs.keys()
  for tensor, values in theirs.items():
    np.testing.assert_array_equal(written[tensor], values)


# What is beside the tower is one line.


@pytest.mark.parametrize(
  ('name', 'line'),
  [
    ('hf_clip_model',
     'unused: 22 tensors of the text tower (logit_scale, text_model, '
     'text_projection)'),
    ('hf_siglip_model',
     'unused: 24 tensors of the text tower (logit_bias, logit_scale, '
     'text_model)'),
    ('open_clip',
     'unused: 18 tensors of the text tower (ln_final, logit_scale, '
     'positional_embedding, text_projection, token_embedding, transformer)'),
  ],
)  # fmt: skip
def test_the_text_tower_is_one_line(name, line):
  _, _, report = load(name)
  lines = report.lines()
  assert line in lines
  projection = {'hf_clip_model': 'visual_projection.weight',
                'open_clip': 'visual.proj'}.get(name)  # fmt: skip
  others = [x for x in lines if x.startswith('unused: ') and x != line]
  assert others == ([f'unused: {projection}'] if projection else [])


@pytest.mark.parametrize('name', ['hf_clip_model', 'open_clip'])
def test_a_text_tower_alone_is_refused(name, tmp_path):
  path = with_tensors(name, tmp_path / 'x.safetensors', lambda tensors: {
      k: v for k, v in tensors.items() if not k.startswith('vis')})  # fmt: skip
  with pytest.raises(WeightsError, match=r'a text tower alone \(.*; give the'):
    load(name, path)


def test_a_resnet_is_refused(tmp_path):
  resnet = {'visual.layer1.0.conv1.weight': np.ones((4, 4, 1, 1), np.float32)}
  path = with_tensors('open_clip', tmp_path / 'x.safetensors',
                      lambda tensors: tensors | resnet)  # fmt: skip
  with pytest.raises(WeightsError, match='image tower is a ResNet'):
    load('open_clip', path)


def test_patches_of_any_number_are_refused(tmp_path):
  def flatten(tensors):
    name = 'vision_model.embeddings.patch_embedding.weight'
    tensors[name] = tensors[name].reshape(24, -1)

  path = with_tensors('hf_siglip_model', tmp_path / 'x.safetensors', flatten)
  with pytest.raises(WeightsError, match='SigLIP 2 for images of any shape'):
    load('hf_siglip_model', path)


# Other spellings of the same.


@pytest.mark.parametrize(
  ('name', 'more'),
  [
    # transformers 4 wrote these.
    ('hf_clip_model', {'vision_model.embeddings.position_ids': (1, 17),
                       'text_model.embeddings.position_ids': (1, 4)}),
    # Of OpenAI's files.
    ('open_clip', dict.fromkeys(
        ('input_resolution', 'context_length', 'vocab_size'), ())),
    # A norm for local crops, of DINOv3's 7B.
    ('dinov3', {'local_cls_norm.weight': (24,), 'local_cls_norm.bias': (24,)}),
  ],
)  # fmt: skip
def test_what_plays_no_part_is_named(name, more, tmp_path):
  zeros = {k: np.zeros(shape, np.int64) for k, shape in more.items()}
  path = with_tensors(
    name, tmp_path / 'x.safetensors', lambda tensors: tensors | zeros
  )
  _, params, report = load(name, path)
  _, wanted, _ = load(name)
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  assert more.keys() <= {*report.unused}


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    ('hf_clip_model', 'vision_model.', ''),  # CLIPVisionModel of transformers 5
    ('hf_clip_model', 'vision_model.', 'vision_tower.vision_model.'),
    ('hf_siglip_model', 'vision_model.', ''),
    ('hf_dinov3', 'layer.', 'model.layer.'),
    ('hf_dinov3', '', 'backbone.'),
    ('open_clip', 'visual.', ''),
    ('open_clip', '', 'module.'),
    ('dinov3', '', 'teacher.backbone.'),
  ],
)
def test_other_spellings_are_read(name, old, new, tmp_path):
  tower = old if old.startswith('vis') else ''

  def rename(tensors):
    return {
      new + k.removeprefix(old): v if k.startswith(old) else v
      for k, v in tensors.items()
      if k.startswith(tower)
    } if old != 'layer.' else {
      new + k.removeprefix(old) if k.startswith(old) else k: v
      for k, v in tensors.items()
    }  # fmt: skip

  path = with_tensors(name, tmp_path / 'x.safetensors', rename)
  _, params, _ = load(name, path)
  _, wanted, _ = load(name)
  jax.tree.map(np.testing.assert_array_equal, params, wanted)


# What follows from the shape.


@pytest.mark.parametrize('dim', [4, 8, 64, 128])
def test_periods_are_those_of_our_model(dim):
  assert rope.BASE == ROPE_BASE
  angles = rope.angles(1, 2, dim, 0)[0, dim // 4 :]  # centers at -1/2 and 1/2
  keymap = LAYOUTS['dinov3']
  periods = dict(keymap.constants)['rope_embed.periods'](1, dim)
  np.testing.assert_allclose(-np.pi / angles, periods, rtol=1e-6)
  assert periods.dtype == np.float32


def test_a_masked_bias_of_keys_counts_as_zero(tmp_path):
  name = 'blocks.1.attn.qkv.bias'

  def change(tensors):
    tensors[name][24:48] = 7

  path = with_tensors('dinov3', tmp_path / 'x.safetensors', change)
  _, params, report = load('dinov3', path)
  _, wanted, _ = load('dinov3')
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  assert report.zeros['encoder/block_01/attn/key/bias'] == (
    'the file masks the biases of keys'
  )


def test_without_a_mask_the_bias_of_keys_counts(tmp_path):
  def change(tensors):
    tensors['blocks.1.attn.qkv.bias'][24:48] = 7
    return {k: v for k, v in tensors.items() if 'mask' not in k}

  path = with_tensors('dinov3', tmp_path / 'x.safetensors', change)
  _, params, _ = load('dinov3', path)
  assert (params['encoder']['block_01']['attn']['key']['bias'] == 7).all()
  with pytest.raises(ExportError, match='no place for .*attn/key/bias'):
    translate(params, 'dinov3')


@pytest.mark.parametrize(
  ('change', 'part'),
  [
    ({'rope_embed.periods': np.asarray([1, 30], np.float32)},
     'rope_embed.periods is not what 3 heads of 8 channels have (1.0, 30.0'),
    ({'rope_embed.periods': np.ones(3, np.float32)},
     'of shape [3], not 1.0, 10'),
    ({'blocks.1.attn.qkv.bias_mask': np.ones(72, np.float32)},
     'blocks.1.attn.qkv.bias_mask is not what 3 heads'),
    ({'blocks.0.attn.qkv.bias_mask': np.full(72, np.nan, np.float32)},
     '(nan, nan'),
  ],
)  # fmt: skip
def test_other_constants_are_refused(change, part, tmp_path):
  path = with_tensors(
    'dinov3', tmp_path / 'x.safetensors', lambda tensors: tensors | change
  )
  with pytest.raises(WeightsError) as error:
    load('dinov3', path)
  assert part in str(error.value) and '\n' not in str(error.value)


def test_rounded_periods_are_said(tmp_path):
  change = {'rope_embed.periods': np.asarray([1, 10.03], np.float32)}
  path = with_tensors(
    'dinov3', tmp_path / 'x.safetensors', lambda tensors: tensors | change
  )
  _, _, report = load('dinov3', path)
  assert 'rope_embed.periods rounded there, exact here' in report.notes


@pytest.mark.parametrize('name', ['hf_dinov3', 'dinov3'])
def test_rotary_positions_are_of_patches_of_one_size(name):
  with pytest.raises(WeightsError, match='model.patch is 4 there, 8 here, and'):
    load(name, patch=8)


def test_a_model_without_registers_is_read(tmp_path):
  """transformers then writes a tensor that holds nothing."""
  name = 'embeddings.register_tokens'
  path = with_tensors('hf_dinov3', tmp_path / 'x.safetensors', lambda tensors:
                      tensors | {name: np.zeros((1, 0, 24), np.float32)}
                      )  # fmt: skip
  _, params, report = load('hf_dinov3', path, registers=0)
  assert 'registers' not in params and name in report.unused


# What config.json says.


def folder_of(name, path, **said):
  folder = path / 'w'
  shutil.copytree(FIXTURES / name, folder)
  config = json.loads((folder / 'config.json').read_text())
  tower = config.get('vision_config', config)
  for key, value in said.items():
    place = config if key in ('model_type', 'architectures') else tower
    place[key] = value
    if value is None:
      del place[key]
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


FACTS = {'heads': 3, 'image_size': 16, 'patch': 4, 'width': 24, 'depth': 2}


@pytest.mark.parametrize(
  ('name', 'facts'),
  [
    ('hf_clip',
     {'activation': 'quick_gelu', 'norm_eps': 1e-5, 'pool': 'patch_mean',
      'last_norm': False}),
    ('hf_clip_model',
     {'activation': 'quick_gelu', 'norm_eps': 1e-5, 'pool': 'token',
      'last_norm': True}),
    ('hf_siglip',
     {'activation': 'gelu_tanh', 'norm_eps': 1e-6, 'pool': 'mean',
      'last_norm': True}),
    ('hf_siglip_model',
     {'activation': 'gelu_tanh', 'norm_eps': 1e-6, 'pool': 'attention',
      'last_norm': True}),
    ('hf_dinov3',
     {'activation': 'gelu', 'norm_eps': 1e-5, 'position': 'rope'}),
    ('hf_dinov3_swiglu',
     {'activation': 'swiglu', 'norm_eps': 1e-5, 'position': 'rope'}),
    ('hf_mae', {'activation': 'gelu', 'norm_eps': 1e-12}),
  ],
)  # fmt: skip
def test_a_config_tells_of_the_image_tower(name, facts):
  assert open_source(FIXTURES / name).facts == FACTS | facts


@pytest.mark.parametrize(
  ('name', 'facts'),
  [
    ('hf_clip_model', {'heads': 12, 'patch': 32, 'activation': 'quick_gelu',
                       'norm_eps': 1e-5, 'image_size': 224}),
    ('hf_siglip_model', {'heads': 12, 'patch': 16, 'activation': 'gelu_tanh',
                         'norm_eps': 1e-6, 'image_size': 224}),
    ('hf_dinov3', {'heads': 6, 'patch': 16, 'activation': 'gelu',
                   'norm_eps': 1e-5, 'image_size': 224}),
  ],
)  # fmt: skip
def test_what_a_config_leaves_out_is_what_the_class_has(name, facts, tmp_path):
  left = ('num_attention_heads', 'patch_size', 'hidden_act', 'layer_norm_eps',
          'image_size')  # fmt: skip
  folder = folder_of(name, tmp_path, **dict.fromkeys(left))
  found = open_source(folder).facts
  assert {key: found[key] for key in facts} == facts


@pytest.mark.parametrize(
  ('said', 'part'),
  [
    ({'rope_theta': 1000.0}, 'rope_theta=1000.0; rotary positions of base 100'),
    ({'use_gated_mlp': True}, "use_gated_mlp with hidden_act='gelu'; a gate"),
    ({'hidden_act': 'silu'}, "hidden_act='silu'; known are gelu"),
  ],
)
def test_what_no_model_here_computes_is_refused(said, part, tmp_path):
  folder = folder_of('hf_dinov3', tmp_path, **said)
  with pytest.raises(WeightsError) as error:
    load('hf_dinov3', folder)
  assert part in str(error.value) and '\n' not in str(error.value)


def test_another_pooling_than_that_of_the_class_is_said():
  config = make_config(**CLIP)
  params, report = load_weights(str(FIXTURES / 'hf_clip'), shapes_of(config))
  notes = report.compare(architecture(config))
  assert 'model.pool was patch_mean there, token here' in notes
  assert 'model.last_norm was False there, True here' in notes
  assert report.unused == [] and 'norm' in params['encoder']


# Halves of a SwiGLU.


@pytest.mark.parametrize(
  ('file', 'tensor', 'rows', 'part'),
  [
    ('timm_swiglu.safetensors', 'blocks.0.mlp.fc1.weight', 79,
     'has 79 outputs, blocks.0.mlp.fc2.weight 40 inputs: neither as many'),
    ('dinov2_swiglu.pth', 'blocks.0.mlp.w12.weight', 79,
     'blocks.0.mlp.w12.weight: [79, 24] there, [80, 24] wanted'),
  ],
)  # fmt: skip
def test_halves_that_are_none_are_refused(file, tensor, rows, part, tmp_path):
  entries = open_source(FIXTURES / file).entries
  tensors = {k: np.array(entry.read()) for k, entry in entries.items()}
  tensors[tensor] = np.ascontiguousarray(tensors[tensor][:rows])
  path = tmp_path / 'x.safetensors'
  safetensors.numpy.save_file(tensors, path)
  config = make_config(layer_scale=1.0, activation='swiglu')
  with pytest.raises(WeightsError) as error:
    load_weights(str(path), shapes_of(config))
  assert part in str(error.value) and '\n' not in str(error.value)


def test_a_packed_swiglu_is_told():
  path = str(FIXTURES / 'timm_swiglu.safetensors')
  fields = {'layer_scale': 1.0, 'activation': 'swiglu'}
  _, report = load_weights(path, shapes_of(make_config(**fields)))
  assert report.layout == 'timm with SwiGLU'
  assert report.facts['activation'] == 'swiglu'
  with pytest.raises(WeightsError, match='model.activation decides that'):
    load_weights(path, shapes_of(make_config(layer_scale=1.0)))


# Exports.


def random_params(**fields):
  config = make_config(**fields)
  params = tree.flatten(reference.random_params(shapes_of(config)))
  params = {name: np.array(x, np.float32) for name, x in params.items()}
  for name in params:
    if name.endswith('attn/key/bias'):
      params[name] *= 0
  return config, tree.nest(params)


@pytest.mark.parametrize(
  ('layout', 'fields', 'part'),
  [
    ('hf_clip', {}, 'the model has no norm before the blocks'),
    ('hf_clip', {'pre_norm': True, 'pool': 'patch_mean'},
     'model.pool=patch_mean reads tokens before the last norm'),
    ('hf_clip', {'pre_norm': True, 'last_norm': False},
     'the model has no last norm'),
    ('hf_clip', {'pre_norm': True, 'registers': 1}, 'registers is 1, not 0'),
    ('hf_siglip', {}, 'model.pool is token, not attention or mean'),
    ('hf_siglip', {'pool': 'mean', 'pre_norm': True}, 'no place for pre_norm'),
    ('hf_dinov3', {'layer_scale': 1.0}, 'model.position is learned'),
    ('hf_dinov3', {'position': 'rope'}, 'the model has no LayerScale'),
    ('dinov3', {'position': 'rope', 'layer_scale': 1.0, 'qk_norm': True},
     'no place for'),
    ('openai_clip', {'pool': 'attention'}, 'model.pool is attention, not tok'),
    ('hf_dinov2', {'pool': 'token_mean', 'layer_scale': 1.0, 'mlp_dim': 40,
                   'activation': 'swiglu'}, ''),
    ('hf_dinov2', {'pool': 'token_mean', 'layer_scale': 1.0, 'mlp_dim': 36,
                   'activation': 'swiglu'}, 'model.mlp_dim is 36, not a'),
  ],
)  # fmt: skip
def test_what_no_class_is_is_refused(layout, fields, part):
  config, params = random_params(**fields)
  if not part:
    assert translate(params, layout, config.model.pool)
    return
  with pytest.raises(ExportError) as error:
    translate(params, layout, config.model.pool)
  assert part in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('layout', 'fields', 'line'),
  [
    ('hf_clip', CLIP,
     'CLIPVisionModel of transformers has no head: logits are classifier.weight'
     ' times its pooler_output, plus classifier.bias'),
    ('hf_siglip', {'pool': 'attention'},
     'SiglipVisionModel of transformers has no head: logits are '
     'classifier.weight times its pooler_output, plus classifier.bias'),
    ('hf_dinov3', DINOV3 | {'pool': 'patch_mean'},
     'DINOv3ViTModel of transformers has no head: logits are '
     'classifier.weight times the mean of the patches of last_hidden_state, '
     'plus classifier.bias'),
    ('openai_clip', CLIP,
     "what begins with 'visual.' fits open_clip.transformer.VisionTransformer("
     'image_size=16, patch_size=4, width=24, layers=2, heads=3, mlp_ratio='
     '1.6666666666666667, act_layer=open_clip.transformer.QuickGELU) with '
     'proj=None; logits are head.weight times what that gives, plus head.bias'),
    ('hf_clip', CLIP | {'pool': 'patch_mean', 'last_norm': False},
     'post_layernorm is not written: CLIPForImageClassification has one, which '
     'plays no part in its logits'),
    ('dinov3', DINOV3,
     'it fits the release but for mask_token, which plays no part (strict='
     "False); logits are head.weight times the class token of "
     "forward_features's x_norm, plus head.bias"),
    ('hf_dinov2', {'pool': 'token_mean', 'layer_scale': 1.0},
     'transformers 5 opens it only where mlp_ratio is whole; model.mlp_dim=40 '
     'is no such multiple of model.width=24'),
    ('hf_siglip', {'pool': 'mean'}, None),
  ],
)  # fmt: skip
def test_an_export_says_how_to_use_its_head(layout, fields, line):
  config, params = random_params(**fields)
  tensors = translate(params, layout, config.model.pool)
  lines = how_to_build(architecture(config), tensors, layout)
  assert lines == ([line] if line else [])


@pytest.mark.parametrize('pool', ['patch_mean', 'token'])
def test_a_config_holds_the_tower_as_its_class_wants_it(pool):
  """Within a whole model where that has the head, else by itself."""
  fields = CLIP | {'pool': pool, 'last_norm': pool == 'token'}
  config, params = random_params(**fields)
  tensors = translate(params, 'hf_clip', pool)
  shape = architecture(config)
  text = hf_config(shape, tensors, 'hf_clip', class_names=['a', 'b'])
  said = json.loads(text)
  tower = said.pop('vision_config', said)
  assert {'architectures', 'model_type', 'id2label', 'label2id'} <= said.keys()
  assert len(said) == 4 or tower is said
  assert 'vision_config' not in tower
  assert tower['model_type'] == 'clip_vision_model'
  assert (tower['hidden_size'], tower['layer_norm_eps']) == (24, 1e-5)
  assert said['id2label'] == dict(zip('01234', 'ab234', strict=True))
