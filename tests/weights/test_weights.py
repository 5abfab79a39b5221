"""Weights of other libraries: their logits, and their files back again.

The files and logits in fixtures/ come from the libraries themselves, see
fixtures/make_weights.py.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import common
from qvit_jax import tree
from qvit_jax.errors import ExportError, WeightsError
from qvit_jax.models import architecture, build_model
from qvit_jax.store import entries
from qvit_jax.store.tensors import save_tensors
from qvit_jax.weights import (
  adapt,
  hf_config,
  how_to_build,
  load_weights,
  translate,
)
from qvit_jax.weights.containers import open_source
from tests import reference

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
# name: (file, fields of config.model, layout to write, tensors that are unused)
LAYOUTS = {
    'hf_vit': ('hf_vit', {'norm_eps': 1e-12}, 'hf', 0),
    'hf_vit_in_memory': ('hf_vit_in_memory.safetensors', {'norm_eps': 1e-12},
                         'hf', 0),
    'hf_deit': ('hf_deit', {'norm_eps': 1e-12, 'registers': 1}, 'hf_deit', 0),
    'hf_dinov2': (
        'hf_dinov2',
        {'pool': 'token_mean', 'layer_scale': 1.0, 'mlp_dim': 48},
        'hf_dinov2', 1),
    'hf_dinov2_registers': (
        'hf_dinov2_registers',
        {'pool': 'token_mean', 'layer_scale': 1.0, 'registers': 3,
         'mlp_dim': 48},
        'hf_dinov2', 1),
    'hf_dinov2_swiglu': (
        'hf_dinov2_swiglu',
        {'pool': 'token_mean', 'layer_scale': 1.0, 'mlp_dim': 32,
         'activation': 'swiglu'},
        'hf_dinov2', 1),
    'hf_clip': (
        'hf_clip',
        {'pre_norm': True, 'activation': 'quick_gelu', 'norm_eps': 1e-5,
         'pool': 'patch_mean', 'last_norm': False},
        'hf_clip', 2),
    'hf_siglip': ('hf_siglip', {'pool': 'mean', 'activation': 'gelu_tanh'},
                  'hf_siglip', 11),
    'timm': ('timm.safetensors', {}, 'timm', 0),
    'timm_clip': (
        'timm_clip.safetensors',
        {'pre_norm': True, 'activation': 'quick_gelu', 'norm_eps': 1e-5},
        'timm', 0),
    'timm_eva': (
        'timm_eva.safetensors',
        {'position': 'rope', 'registers': 2, 'layer_scale': 1.0,
         'norm_eps': 1e-5}, 'timm_eva', 0),
    'timm_eva_swiglu': (
        'timm_eva_swiglu.safetensors',
        {'position': 'rope', 'registers': 2, 'layer_scale': 1.0,
         'norm_eps': 1e-5, 'activation': 'swiglu'}, 'timm_eva', 0),
    'timm_siglip': (
        'timm_siglip.safetensors',
        {'pool': 'attention', 'activation': 'gelu_tanh'}, 'timm', 0),
    'timm_tanh': ('timm_tanh.safetensors', {'activation': 'gelu_tanh'},
                  'timm', 0),
    'timm_qk_norm': ('timm_qk_norm.safetensors', {'qk_norm': True}, 'timm', 0),
    'timm_dinov2': ('timm_dinov2.safetensors', {'layer_scale': 1.0}, 'timm', 0),
    'timm_swiglu': (
        'timm_swiglu.safetensors',
        {'layer_scale': 1.0, 'activation': 'swiglu'}, 'timm', 0),
    'timm_registers': ('timm_registers.safetensors',
                       {'layer_scale': 1.0, 'registers': 3}, 'timm', 0),
    'timm_distilled': ('timm_distilled.safetensors', {'registers': 1},
                       'timm_distilled', 2),
    'torchvision': ('torchvision.safetensors', {}, 'torchvision', 0),
    'dinov2': ('dinov2.pth', {'layer_scale': 1.0}, 'dinov2', 1),
    'dinov2_swiglu': (
        'dinov2_swiglu.pth', {'layer_scale': 1.0, 'activation': 'swiglu'},
        'dinov2', 1),
    'google': ('google.npz', {}, 'google', 0),
}  # fmt: skip


def make_config(**fields):
  config = common.get_config()
  config.model.update(
      patch=4, width=24, depth=2, heads=3, mlp_dim=40, image_size=16,
      num_classes=5, dtype='float32',
  )  # fmt: skip
  config.model.update(fields)
  return config


def shapes_of(config, channels=3):
  size = config.model.image_size
  images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  init = build_model(config).init
  return jax.eval_shape(init, jax.random.key(0), images)['params']


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', str(FIXTURES))
  _, report = load_weights('~/timm.safetensors', shapes_of(make_config()))
  assert report.source.startswith(str(FIXTURES))


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('size', ['', '_other'])
def test_logits_are_those_of_the_library(name, size):
  file, fields, _, num_unused = LAYOUTS[name]
  reference = np.load(FIXTURES / f'{name}.reference.npz')
  images, logits = reference[f'images{size}'], reference[f'logits{size}']
  config = make_config(**fields)
  config.model.image_size = images.shape[1]
  params, report = load_weights(str(FIXTURES / file), shapes_of(config))
  variables = jax.tree.map(jnp.asarray, {'params': params})
  found = build_model(config).apply(variables, jnp.asarray(images))
  scale = np.abs(logits).max()
  np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * scale)
  assert len(report.unused) == num_unused
  assert report.reinitialised == {}
  adapted = set(report.adapted)
  if size and config.model.position == 'learned':
    assert adapted == {'pos_embed'}
    assert report.mis_shaped.keys() == adapted


@pytest.mark.parametrize('name', LAYOUTS)
def test_an_export_is_the_file_bit_for_bit(name, tmp_path):
  file, fields, layout, num_unused = LAYOUTS[name]
  params, report = load_weights(
    str(FIXTURES / file), shapes_of(make_config(**fields))
  )
  path = tmp_path / 'model.safetensors'
  pool = fields.get('pool', '')
  save_tensors(translate(params, layout, pool), path, form='safetensors')
  written = safetensors.numpy.load_file(path)
  theirs = {
    name: entry.read()
    for name, entry in open_source(FIXTURES / file).entries.items()
    if name not in report.unused
  }
  if name == 'hf_vit_in_memory':  # it is written as transformers writes it
    theirs = safetensors.numpy.load_file(
      FIXTURES / 'hf_vit' / 'model.safetensors'
    )
  assert written.keys() == theirs.keys()
  for tensor, values in theirs.items():
    np.testing.assert_array_equal(written[tensor], values)


# Adaptation: everything that is changed is said.


def load(name, target=None, **fields):
  file, own, _, _ = LAYOUTS[name]
  config = make_config(**{**own, **fields})
  return load_weights(str(FIXTURES / file), target or shapes_of(config))


def test_a_head_of_another_class_count_keeps_the_target():
  config = make_config(num_classes=7)
  variables = build_model(config).init(
    jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  )
  filled, report = load('timm', variables)
  head = variables['params']['head']['kernel']
  assert filled['params']['head']['kernel'] is head
  assert report.reinitialised == {
    'head/kernel': '5 classes there, 7 here',
    'head/bias': '5 classes there, 7 here',
  }
  assert report.mis_shaped['head/kernel'] == '[5, 24] -> [24, 7]'
  assert report.unused == ['head.weight', 'head.bias']
  assert not any(name.startswith('head') for name in report.matched)


def test_a_backbone_alone_gets_a_fresh_head():
  config = make_config(norm_eps=1e-12)
  _, report = load_weights(str(FIXTURES / 'hf_vit_model'), shapes_of(config))
  assert report.reinitialised['head/kernel'] == 'the file has none'
  assert report.unused == ['pooler.dense.bias', 'pooler.dense.weight']
  assert report.facts == {
    'norm_eps': 1e-12, 'heads': 3, 'image_size': 16, 'patch': 4,
    'activation': 'gelu', 'width': 24, 'depth': 2,
  }  # fmt: skip


def test_pre_logits_make_the_head_useless(tmp_path):
  tensors = dict(np.load(FIXTURES / 'google.npz'))
  tensors['pre_logits/kernel'] = np.ones((24, 24), np.float32)
  tensors['pre_logits/bias'] = np.ones(24, np.float32)
  np.savez(tmp_path / 'in21k.npz', **tensors)
  path = str(tmp_path / 'in21k.npz')
  _, report = load_weights(path, shapes_of(make_config()))
  assert 'pre-logits' in report.reinitialised['head/kernel']
  assert set(report.unused) == {
    'pre_logits/kernel', 'pre_logits/bias', 'head/kernel', 'head/bias'
  }  # fmt: skip


def test_without_a_class_token_its_position_goes():
  params, report = load('timm', pool='mean')
  assert 'cls' not in params
  assert report.unused == ['cls_token']
  whole, _ = load('timm')
  np.testing.assert_array_equal(params['pos_embed'], whole['pos_embed'][:, 1:])
  assert 'class token dropped' in report.adapted['pos_embed']


def test_grey_images_see_the_sum_of_the_channels():
  target = shapes_of(make_config(), channels=1)
  params, report = load('timm', target)
  whole, _ = load('timm')
  np.testing.assert_allclose(
    params['patch_embed']['kernel'],
    whole['patch_embed']['kernel'].sum(axis=2, keepdims=True),
    rtol=1e-6,
  )
  assert '3 channels summed to 1' in report.adapted['patch_embed/kernel']


@pytest.mark.parametrize(('size', 'patch'), [(24, 6), (32, 8), (10, 2)])
def test_a_larger_patch_sees_the_enlarged_image_the_same(size, patch):
  """FlexiViT's definition: <resize(x), kernel'> = <x, kernel>."""
  config = make_config(patch=patch, image_size=size)
  config.model.update(patch=patch, image_size=size)
  params, report = load('timm', shapes_of(config))
  assert 'pseudo-inverse' in report.adapted['patch_embed/kernel']
  old, _ = load('timm')
  old, new = old['patch_embed']['kernel'], params['patch_embed']['kernel']
  assert new.shape == (patch, patch, 3, 24)
  x = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
  larger = np.asarray(
    jax.image.resize(x, (patch, patch, 3), 'bilinear', antialias=False)
  )
  found = np.einsum('hwc,hwcd->d', larger, new)
  wanted = np.einsum('hwc,hwcd->d', x, old)
  if patch > 4:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  else:  # information is lost: nearest in the least squares' sense
    resize = lambda image: jax.image.resize(
      image, (patch, patch), 'bilinear', antialias=False
    )
    basis = np.eye(16, dtype=np.float32).reshape(16, 4, 4)
    matrix = np.asarray(jax.vmap(resize)(basis)).reshape(16, -1)
    best = np.linalg.lstsq(matrix, old.reshape(16, -1), rcond=None)[0]
    np.testing.assert_allclose(new.reshape(best.shape), best, atol=1e-5)


@pytest.mark.parametrize(('side', 'size'), [(4, 7), (7, 4), (5, 5), (14, 9)])
def test_positions_are_resized_as_jax_does_with_antialias(side, size):
  grid = np.random.default_rng(0).normal(size=(side, side, 3))
  grid = grid.astype(np.float32)
  wanted = jax.image.resize(grid, (size, size, 3), 'cubic', antialias=True)
  found = adapt.resize_positions(grid, size, 'timm')
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_float16_and_bfloat16_become_float32(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  for dtype in ('float16', 'bfloat16'):
    cast = {k: v.astype(entries.DTYPES[dtype]) for k, v in tensors.items()}
    path = tmp_path / f'{dtype}.safetensors'
    safetensors.numpy.save_file(cast, path)
    params, report = load_weights(str(path), shapes_of(make_config()))
    kernel = params['encoder']['block_01']['mlp']['fc1']['kernel']
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(
      kernel, cast['blocks.1.mlp.fc1.weight'].T.astype(np.float32)
    )
    assert len(report.matched) == 40


def test_every_tensor_of_a_sharded_folder_is_found(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  names = sorted(tensors)
  shards = {'a.safetensors': names[:11], 'b.safetensors': names[11:]}
  for shard, part in shards.items():
    safetensors.numpy.save_file({n: tensors[n] for n in part}, tmp_path / shard)
  index = {n: shard for shard, part in shards.items() for n in part}
  listing = tmp_path / 'model.safetensors.index.json'
  listing.write_text(json.dumps({'weight_map': index}))
  sharded, report = load_weights(str(tmp_path), shapes_of(make_config()))
  whole, _ = load('timm')
  jax.tree.map(np.testing.assert_array_equal, sharded, whole)
  assert 'sharded' in report.source
  (tmp_path / 'b.safetensors').unlink()
  with pytest.raises(WeightsError, match='b.safetensors is missing'):
    load_weights(str(tmp_path), shapes_of(make_config()))
  index[names[0]] = '../a.safetensors'
  listing.write_text(json.dumps({'weight_map': index}))
  with pytest.raises(WeightsError, match='points outside its folder'):
    load_weights(str(tmp_path), shapes_of(make_config()))


def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path):
  # As torch.save writes it, with the wrapper of a training script around.
  source = FIXTURES / 'dinov2_wrapped.pth'
  params, report = load_weights(
    str(source), shapes_of(make_config(layer_scale=1.0))
  )
  bare, _ = load('dinov2')
  jax.tree.map(np.testing.assert_array_equal, params, bare)
  assert report.notes == [
    "read from its entry 'model'", 'not read: epoch, arguments, optimizer'
  ]  # fmt: skip


# What does not fit is an error that lists everything.


@pytest.mark.parametrize(
  ('name', 'fields', 'parts'),
  [
    ('timm', {'depth': 3},
     ['the depth is 2 there, 3 here', 'missing encoder/block_02/norm1/scale']),
    ('timm', {'depth': 1},
     ['the depth is 2 there, 1 here', 'no place for blocks.1.attn.qkv.weight']),
    ('timm', {'width': 36, 'mlp_dim': 40},
     ['the width is 24 there, 36 here',
      'blocks.{0-1}.attn.qkv.weight: [72, 24] there, [108, 36] wanted',
      'norm.bias: [24] there, [36] wanted']),
    ('timm', {'mlp_dim': 48}, ['mlp.fc1.bias: [40] there, [48] wanted']),
    ('timm', {'registers': 2}, ['missing registers (model.registers decides']),
    ('timm', {'layer_scale': 1.0},
     ['missing encoder/block_{0-1}/scale1 (model.layer_scale decides that)']),
    ('timm_dinov2', {'layer_scale': 0.0},
     ['no place for blocks.{0-1}.ls1.gamma (model.layer_scale decides that)']),
    ('timm_qk_norm', {'qk_norm': False}, ['q_norm.weight', 'model.qk_norm']),
    ('hf_dinov2', {'pool': 'token'},
     ['classifier.weight: [5, 48] there, [5, 24] wanted']),
    ('timm_registers', {'registers': 5}, ['reg_token: [1, 3, 24] there']),
  ],
)  # fmt: skip
def test_another_model_is_refused_with_every_place(name, fields, parts):
  with pytest.raises(WeightsError) as error:
    load(name, **fields)
  message = str(error.value)
  for part in parts:
    assert part in message
  assert '\n' not in message


@pytest.mark.parametrize('count', [15, 18, 14])
def test_positions_that_form_no_grid_are_refused(tmp_path, count):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  tensors['pos_embed'] = np.zeros((1, count, 24), np.float32)
  path = tmp_path / 'odd.safetensors'
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(WeightsError) as error:
    load_weights(str(path), shapes_of(make_config()))
  assert f'pos_embed has the shape [1, {count}, 24]' in str(error.value)
  assert 'after 1 other tokens' in str(error.value)


def test_an_unknown_layout_names_the_nearest(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  path = tmp_path / 'odd.safetensors'
  safetensors.numpy.save_file({f'net_{k}': v for k, v in tensors.items()}, path)
  with pytest.raises(WeightsError) as error:
    load_weights(str(path), shapes_of(make_config()))
  assert 'net_cls_token' in str(error.value)
  assert 'the nearest is timm' in str(error.value)


def test_tensors_nobody_expects_are_refused(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  tensors['norm_behind.weight'] = np.ones(24, np.float32)
  path = tmp_path / 'more.safetensors'
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(WeightsError, match='unknown tensor norm_behind.weight'):
    load_weights(str(path), shapes_of(make_config()))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  for block in (0, 1):
    tensors[f'blocks.{block}.norm1.weight'][3] = value
  path = tmp_path / 'bad.safetensors'
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(WeightsError, match=r'blocks.\{0-1\}.norm1.weight'):
    load_weights(str(path), shapes_of(make_config()))


def test_float64_beyond_float32_is_named(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  tensors['norm.weight'] = tensors['norm.weight'].astype(np.float64) * 1e300
  path = tmp_path / 'bad.safetensors'
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(WeightsError, match='infinite or NaN values in norm.w'):
    load_weights(str(path), shapes_of(make_config()))


def with_tensors(path, **changed):
  """Writes the timm fixture with other tensors; None takes one away."""
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  for name, values in changed.items():
    tensors[name] = values
  safetensors.numpy.save_file(
    {k: v for k, v in tensors.items() if v is not None}, path
  )
  return str(path)


@pytest.mark.parametrize('shape', [(24,), (1, 1, 48), ()])
def test_a_class_token_of_another_shape_is_refused(tmp_path, shape):
  path = with_tensors(
    tmp_path / 'x.safetensors', cls_token=np.zeros(shape, np.float32)
  )
  with pytest.raises(WeightsError, match=r'cls_token: .* there, \[1, 1, 24\]'):
    load_weights(path, shapes_of(make_config()))


def test_a_wrapper_around_every_name_is_dropped(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  path = tmp_path / 'x.safetensors'
  wrapped = {f'module.{k}': v for k, v in tensors.items()}
  safetensors.numpy.save_file(wrapped, path)
  params, report = load_weights(str(path), shapes_of(make_config()))
  jax.tree.map(np.testing.assert_array_equal, params, load('timm')[0])
  assert report.notes == ["'module.' dropped from every name"]


def test_a_message_holds_no_control_characters(tmp_path):
  path = with_tensors(
    tmp_path / 'x.safetensors', **{'a\n\x1b[31m': np.zeros(1, np.float32)}
  )
  with pytest.raises(WeightsError) as error:
    load_weights(path, shapes_of(make_config()))
  assert 'unknown tensor a\\n\\x1b[31m' in str(error.value)
  assert str(error.value).isprintable()


def test_a_folder_called_checkpoints_may_hold_anybodys_weights(tmp_path):
  folder = tmp_path / 'checkpoints' / 'vit'
  folder.mkdir(parents=True)
  with_tensors(folder / 'model.safetensors')
  for path in (folder, folder / 'model.safetensors'):
    assert load_weights(str(path), shapes_of(make_config()))[1].layout == 'timm'


@pytest.mark.parametrize(
  ('layout', 'fields', 'part'),
  [
    ('hf_dinov2', {'layer_scale': 1.0}, 'model.pool is token, not token_mean'),
    ('hf_dinov2', {'pool': 'token_mean'}, 'the model has no LayerScale'),
    ('hf_deit', {}, 'model.registers is 0, not 1'),
    ('timm_distilled', {'registers': 2}, 'model.registers is 2, not 1'),
    ('hf', {'pool': 'mean'}, 'model.pool is mean, not token'),
    ('torchvision', {'pool': 'token_mean'}, 'model.pool is token_mean'),
    ('timm', {'pool': 'token_mean'}, 'not token or mean'),
    ('timm', {'pool': 'token_attention'}, 'model.pool is token_attention, not'),
  ],
)
def test_an_export_that_nothing_could_load_is_refused(layout, fields, part):
  config = make_config(**fields)
  init = build_model(config).init
  params = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  with pytest.raises(ExportError, match=part):
    translate(params, layout)


@pytest.mark.parametrize(
  ('width', 'mlp_dim'), [(88, 120), (104, 120), (24, 96)]
)
def test_transformers_finds_the_mlp_again(width, mlp_dim):
  shape = dict(width=width, mlp_dim=mlp_dim, depth=1, heads=2, patch=4,
               image_size=8, norm_eps=1e-6, registers=0,
               num_classes=5)  # fmt: skip
  config = json.loads(hf_config(shape, {}, 'hf_dinov2'))
  assert int(config['hidden_size'] * config['mlp_ratio']) == mlp_dim


@pytest.mark.parametrize(
  ('kind', 'theirs'),
  [('gelu', 'gelu'), ('gelu_tanh', 'gelu_pytorch_tanh'),
   ('quick_gelu', 'quick_gelu')],
)  # fmt: skip
def test_an_export_says_its_activation(kind, theirs):
  """By config.json or the call where the library can have it, else a line."""
  shape = architecture(make_config(activation=kind))
  params = tree.flatten(reference.random_params(shapes_of(make_config())))
  assert json.loads(hf_config(shape, {}, 'hf'))['hidden_act'] == theirs
  lines = {
    layout: '\n'.join(
      how_to_build(shape, translate(tree.nest(params), layout), layout)
    )
    for layout in ('timm', 'torchvision', 'google', 'hf')
  }
  is_other = kind != 'gelu'
  assert (f"act_layer='{kind}'" in lines['timm']) == is_other
  for layout in ('torchvision', 'google'):
    assert (f"model.activation='{kind}'; the" in lines[layout]) == is_other
  assert 'activation' not in lines['hf']


@pytest.mark.parametrize(
  ('names', 'written'),
  [
    ((), ['0', '1', '2']),
    (('cat', 'dog'), ['cat', 'dog', '2']),
    (('a', 'b', 'c'), ['a', 'b', 'c']),
    (('a', 'b', 'c', 'd'), ['0', '1', '2']),
  ],
)
def test_every_output_of_an_export_has_one_name(names, written):
  """Else transformers builds a head of another size."""
  shape = dict(width=8, mlp_dim=16, depth=1, heads=2, patch=4, image_size=8,
               norm_eps=1e-6, registers=0, num_classes=3)  # fmt: skip
  config = json.loads(hf_config(shape, {}, 'hf', class_names=names))
  assert config['id2label'] == dict(zip('012', written, strict=True))
  assert config['label2id'] == dict(zip(written, range(3), strict=True))
