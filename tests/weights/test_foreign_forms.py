"""What others leave out of, or put around, a vision transformer's tensors."""

import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import common
from qvit_jax import models, tree
from qvit_jax.errors import ExportError, WeightsError
from qvit_jax.store.tensors import save_tensors
from qvit_jax.weights import LAYOUTS, load_weights, translate
from qvit_jax.weights.adapt import RESIZES
from qvit_jax.weights.averaged import averaged
from qvit_jax.weights.containers import open_source
from qvit_jax.weights.facts import order_of
from tests import reference
from tests.weights.test_containers import DATA, tensor_pickle, torch_zip
from tests.weights.test_weights import FIXTURES, make_config, shapes_of

TIMM = FIXTURES / 'timm.safetensors'


def load_tensors(path, tensors, **fields):
  """Writes the tensors and reads them into the model of `make_config`."""
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path
  )
  return load_weights(str(path), shapes_of(make_config(**fields)))


def timm(drop='(?!)', **more):
  tensors = safetensors.numpy.load_file(TIMM)
  return {k: v for k, v in tensors.items() if drop not in k} | more


# What a model without something computes, one with zeros computes too.


@pytest.mark.parametrize(
  'kind', ['attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2', 'patch_embed.proj']
)
def test_layers_without_biases_get_zeros(kind, tmp_path):
  params, report = load_tensors(
    tmp_path / 'x.safetensors', timm(kind + '.bias')
  )
  whole, _ = load_tensors(tmp_path / 'y.safetensors', timm())
  zeros = {'attn.qkv': 6, 'patch_embed.proj': 1}.get(kind, 2)
  assert len(report.zeros) == zeros
  flat = tree.flatten(params)
  for name, values in tree.flatten(whole).items():
    expected = 0 if name in report.zeros else values
    np.testing.assert_array_equal(flat[name], np.broadcast_to(
      expected, values.shape))  # fmt: skip
  assert any(line.startswith('zeros: ') for line in report.lines())
  assert not set(report.zeros) & {*report.matched, *report.adapted}


def test_a_head_without_bias_keeps_its_kernel(tmp_path):
  params, report = load_tensors(tmp_path / 'x.safetensors', timm('head.bias'))
  assert list(report.zeros) == ['head/bias'] and not report.reinitialised
  head = params['head']['kernel']
  np.testing.assert_array_equal(head.T, timm()['head.weight'])
  _, report = load_tensors(
    tmp_path / 'x.safetensors', timm('head.bias'), num_classes=7
  )
  assert report.reinitialised['head/kernel'] == '5 classes there, 7 here'
  assert not report.zeros


@pytest.mark.parametrize(
  'gone', ['blocks.1.attn.qkv.bias', 'norm1.bias', 'attn.qkv.weight']
)
def test_a_hole_is_no_option(gone, tmp_path):
  """One block's bias is lost; a norm without bias may be an RMSNorm."""
  with pytest.raises(WeightsError, match='missing encoder/block'):
    load_tensors(tmp_path / 'x.safetensors', timm(gone))


def test_a_class_token_may_have_no_position(tmp_path):
  pos = timm()['pos_embed']
  params, report = load_tensors(
    tmp_path / 'x.safetensors', timm(pos_embed=pos[:, 1:])
  )
  assert not params['pos_embed'][0, 0].any()
  np.testing.assert_array_equal(params['pos_embed'][:, 1:], pos[:, 1:])
  assert 'without position gets zeros' in report.adapted['pos_embed']
  # And it is written back as the file that it was.
  np.testing.assert_array_equal(
    translate(params, 'timm')['pos_embed'], pos[:, 1:]
  )
  for layout in ('torchvision', 'hf', 'google'):
    written = translate(params, layout)
    assert (1, 17, 24) in {x.shape for x in written.values()}


def mae():
  """The fixture as MAE fine-tuned: its last norm stands behind the mean."""
  return {k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k: v
          for k, v in timm().items()}  # fmt: skip


def test_a_norm_behind_the_pooling_has_a_place_of_its_own(tmp_path):
  path = tmp_path / 'x.safetensors'
  params, report = load_tensors(
    path, mae(), pool='patch_mean', norm_after_pool=True
  )
  assert 'norm' not in params['encoder']
  assert report.facts['pool'] == 'patch_mean'
  again = translate(params, 'timm', 'patch_mean')
  assert again.keys() == mae().keys()
  with pytest.raises(WeightsError, match='model.norm_after_pool decides that'):
    load_tensors(path, mae())
  with pytest.raises(WeightsError, match='model.norm_after_pool decides that'):
    load_tensors(path, timm(), norm_after_pool=True)
  with pytest.raises(ExportError, match=r'export\.layout=timm$'):
    translate(params, 'hf', 'patch_mean')


# What frameworks put around the names.


@pytest.mark.parametrize(
  'start',
  ['model.', 'net.', 'module.model.backbone.', '_orig_mod.', 'encoder.',
   'base_model.model.', 'module.'],
)  # fmt: skip
@pytest.mark.parametrize('file', ['timm', 'hf_vit_in_memory'])
def test_any_prefix_of_the_whole_model_is_dropped(start, file, tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / f'{file}.safetensors')
  path = tmp_path / 'x.safetensors'
  wrapped = {start + k: v for k, v in tensors.items()}
  params, report = load_tensors(path, wrapped)
  plain, _ = load_tensors(path, tensors)
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  assert f'{start!r} dropped from every name' in report.notes


def test_tensors_beside_the_model_are_named(tmp_path):
  more = {'model.' + k: v for k, v in timm().items()}
  more['criterion.weight'] = np.ones(5, np.float32)
  params, report = load_tensors(tmp_path / 'x.safetensors', more)
  assert report.unused == ['criterion.weight']
  assert 'begin with' in report.notes[0] and '1 others' in report.notes[0]
  np.testing.assert_array_equal(params['cls'], timm()['cls_token'])


@pytest.mark.parametrize(
  ('one', 'other'),
  [('ema.', 'model.'), ('model_ema.module.', 'model.'), ('ema_model.', ''),
   ('teacher.backbone.', 'student.backbone.'), ('averaged_model.', 'model.')],
)  # fmt: skip
def test_of_two_models_the_averaged_one_counts(one, other, tmp_path):
  tensors = {one + k: v for k, v in timm().items()}
  tensors |= {other + k: 2 * v for k, v in timm().items()}
  params, report = load_tensors(tmp_path / 'x.safetensors', tensors)
  np.testing.assert_array_equal(params['cls'], timm()['cls_token'])
  assert len(report.unused) == len(timm())


def test_two_equal_models_are_refused(tmp_path):
  tensors = {'a.' + k: v for k, v in timm().items()}
  tensors |= {'b.' + k: v for k, v in timm().items()}
  with pytest.raises(WeightsError, match=r"2 models, under 'a\.', 'b\.'; save"):
    load_tensors(tmp_path / 'x.safetensors', tensors)


def test_a_teacher_is_the_average_of_a_student_alone():
  assert averaged(['teacher.', 'student.']) == 'teacher.'
  assert averaged(['teacher.', 'model.']) is None
  assert averaged(['schema.', 'model.']) is None
  assert averaged(['model.']) == 'model.'


# Objects beside the state dict: nothing is looked up, nothing called.


class Namespace:
  """Stands for what a training script saves of itself."""

  def __init__(self):
    self.lr, self.parts, self.names = 1e-3, [1, (2, 3)], {'a'}


def checkpoint(path, beside):
  """A .pth of {'model': {'a': tensor}, 'args': beside}."""
  inner = tensor_pickle()[2:-1]  # {'a': tensor}
  other = pickle.dumps(beside, 2)[2:-1]
  pickled = (
    b'\x80\x02}(X\x05\0\0\0model' + inner + b'X\x04\0\0\0args' + other + b'u.'
  )
  return torch_zip(path, pickled, {'0': DATA})


class Owned:
  """Unpickling this makes a file."""

  def __init__(self, path, how):
    self.path, self.how = path, how

  def __reduce__(self):
    if self.how == 'list':
      return list, (), None, iter([Owned(self.path, 'system')])
    if self.how == 'state':
      return Namespace, (), {'x': Owned(self.path, 'system')}
    if self.how == 'call':
      return subprocess.call, (['touch', str(self.path)],)
    return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize(
  'beside',
  [
    Namespace(), pathlib.PurePosixPath('/a'), np.float64(3), np.arange(3),
    {1, 2}, frozenset('a'), 1 << 100, complex(1, 2), b'bytes',
    {'deep': [Namespace(), (Namespace(), None)]}, np.random.default_rng(0),
    {(1, (2, 3)): 'a tuple'}, {1: {frozenset('a'): True}, 2: {b'x': 1.5}},
  ],
  ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_objects_beside_the_tensors_are_stepped_over(tmp_path, beside):
  path = checkpoint(tmp_path / 'x.pth', beside)
  source = open_source(path)
  assert list(source.entries) == ['a']
  np.testing.assert_array_equal(source.entries['a'].read(), [0, 1, 2, 3])
  assert "read from its entry 'model'" in source.notes
  assert 'not read: args' in source.notes


@pytest.mark.parametrize('how', ['system', 'call', 'list', 'state'])
def test_hostile_objects_beside_the_tensors_are_never_called(tmp_path, how):
  path = checkpoint(tmp_path / 'x.pth', Owned(tmp_path / 'owned', how))
  source = open_source(path)
  assert list(source.entries) == ['a']
  told = ' '.join(source.notes)
  name = '.call' if how == 'call' else '.system'
  assert 'stepped over, not executed' in told and name in told
  assert not (tmp_path / 'owned').exists()
  # They do execute where they are unpickled.
  pickle.loads(pickle.dumps(Owned(tmp_path / 'owned', how), 2))
  assert (tmp_path / 'owned').exists()


def test_a_tensor_of_an_unknown_kind_is_not_taken_for_missing(tmp_path):
  """Else its place would silently become zeros."""
  inner = tensor_pickle()[2:-1]
  other = pickle.dumps(Namespace(), 2)[2:-1]
  pickled = b'\x80\x02' + inner + b'X\x06\0\0\0b.bias' + other + b's.'
  path = torch_zip(tmp_path / 'x.pth', pickled, {'0': DATA})
  with pytest.raises(WeightsError, match=r"'b\.bias' is a .*Namespace, which"):
    open_source(path)


# Adapters of PEFT.


def peft_folder(folder, **config):
  folder.mkdir()
  safetensors.numpy.save_file(
    {'base_model.model.vit.layer.0.q_proj.lora_A.weight': np.ones((2, 4))},
    folder / 'adapter_model.safetensors',
  )
  if config:
    (folder / 'adapter_config.json').write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize('at', ['', 'adapter_model.safetensors'])
def test_a_peft_adapter_is_called_one(at, tmp_path):
  folder = peft_folder(
    tmp_path / 'a', peft_type='LORA', base_model_name_or_path='google/vit-base'
  )
  with pytest.raises(WeightsError) as error:
    load_weights(str(folder / at), shapes_of(make_config()))
  text = str(error.value)
  assert "PEFT adapter (LORA) of 'google/vit-base'" in text
  assert 'merge_and_unload' in text and '\n' not in text


def test_adapters_under_another_name_are_recognised(tmp_path):
  folder = peft_folder(tmp_path / 'a')
  path = tmp_path / 'x.safetensors'
  (folder / 'adapter_model.safetensors').rename(path)
  with pytest.raises(WeightsError, match=r'of PEFT .*merge_and_unload'):
    load_weights(str(path), shapes_of(make_config()))


# What a config.json says.


def hf_folder(folder, pos=None, **config):
  shutil.copytree(FIXTURES / 'hf_vit', folder)
  said = json.loads((folder / 'config.json').read_text()) | config
  (folder / 'config.json').write_text(json.dumps(said))
  if pos is not None:
    path = folder / 'model.safetensors'
    tensors = safetensors.numpy.load_file(path)
    tensors['vit.embeddings.position_embeddings'] = pos
    safetensors.numpy.save_file(tensors, path)
  return folder


def positions(count):
  rng = np.random.default_rng(0)
  return rng.normal(size=(1, count, 24)).astype(np.float32)


@pytest.mark.parametrize(
  ('config', 'grid'),
  [
    ({'image_size': [4, 36]}, (1, 9)),
    ({'image_size': [36, 4]}, (9, 1)),
    ({'image_size': [8, 8], 'pretrained_cfg': {'input_size': [3, 4, 36]},
      'patch_size': 4}, (3, 3)),
    ({'image_size': None, 'pretrained_cfg': {'input_size': [3, 4, 36]}},
     (1, 9)),
    ({'image_size': None, 'pretrained_cfg': {'input_size': [3, 224, 224]},
      'model_args': {'img_size': [4, 36]}}, (1, 9)),
    ({'image_size': {'height': 36, 'width': 4}}, (9, 1)),
    # As timm writes it: the kernel of 4 x 4 tells the patch.
    ({'image_size': None, 'patch_size': None,
      'pretrained_cfg': {'input_size': [3, 36, 4]}}, (9, 1)),
  ],
)  # fmt: skip
def test_a_grid_is_the_one_that_config_json_tells(config, grid, tmp_path):
  pos = positions(10)
  folder = hf_folder(tmp_path / 'w', pos, **config)
  params, report = load_weights(str(folder), shapes_of(make_config()))
  assert f'grid {grid[0]} x {grid[1]} -> 4 x 4' in report.adapted['pos_embed']
  # Resizing is linear, and each axis is resized on its own.
  rows, columns = (RESIZES['torch'][0](n, 4) for n in grid)
  expected = np.einsum(
    'ah,hwd,bw->abd', rows, pos[0, 1:].reshape(*grid, 24), columns
  )
  np.testing.assert_allclose(
    params['pos_embed'][0, 1:], expected.reshape(16, 24), atol=1e-5
  )


def test_a_grid_that_contradicts_the_file_is_refused(tmp_path):
  folder = hf_folder(tmp_path / 'w', positions(10), image_size=[8, 16])
  with pytest.raises(WeightsError, match='no grid of 2 x 4, which config.json'):
    load_weights(str(folder), shapes_of(make_config()))


@pytest.mark.parametrize('patch', [8, [4, 12], [36, 4]])
def test_a_patch_that_contradicts_the_kernel_is_refused(patch, tmp_path):
  folder = hf_folder(tmp_path / 'w', patch_size=patch)
  with pytest.raises(WeightsError) as error:
    load_weights(str(folder), shapes_of(make_config()))
  assert 'is of 4 x 4 pixels; give the config.json of' in str(error.value)
  assert f'says patch_size={patch}, but vit.embeddings' in str(error.value)


def test_what_nothing_reads_is_said(tmp_path):
  folder = hf_folder(
    tmp_path / 'w', hidden_dropout_prob=0.1, pretrained_cfg={
      'crop_pct': 0.9, 'crop_mode': 'center', 'interpolation': 'bilinear',
      'mean': [0.1, 0.2, 0.3], 'input_size': [3, 16, 16]})  # fmt: skip
  (folder / 'preprocessor_config.json').write_text(json.dumps({
      'do_normalize': True, 'image_std': [0.5, 0.5, 0.5], 'resample': 3,
      'rescale_factor': 1 / 127.5, 'size': {'height': 16, 'width': 16}}
  ))  # fmt: skip
  _, report = load_weights(str(folder), shapes_of(make_config()))
  assert report.facts['mean'] == [0.1, 0.2, 0.3]
  assert report.facts['std'] == [0.5, 0.5, 0.5]
  assert report.facts['resize'] == 'bicubic'
  notes = '\n'.join(report.notes)
  assert "not read of config.json: crop_pct=0.9, crop_mode='center'" in notes
  assert 'not read of preprocessor_config.json: rescale_factor=' in notes
  assert 'hidden_dropout_prob=0.1; model.dropout counts here' in notes


@pytest.mark.parametrize(
  ('config', 'part'),
  [
    ({'architecture': 'vit_base_patch16_rpn_224'}, 'norms behind'),
    ({'hidden_act': 'relu'}, "hidden_act='relu'; known are gelu"),
    ({'global_pool': 'avg', 'model_args': {'pool_include_prefix': True}},
     'pool_include_prefix=True'),
    ({'global_pool': 'avgmax'}, "global_pool='avgmax'"),
    ({'model_args': {'rope_temperature': 1e4}}, 'rope_temperature=10000.0'),
    ({'model_args': {'rope_rotate_half': False}}, 'rope_rotate_half=False'),
  ],
)  # fmt: skip
def test_what_no_shape_tells_is_refused_by_name(config, part, tmp_path):
  folder = hf_folder(tmp_path / 'w', **config)
  with pytest.raises(WeightsError, match=part):
    load_weights(str(folder), shapes_of(make_config()))


@pytest.mark.parametrize(
  ('config', 'said'),
  [
    ({'num_attention_heads': 2.5}, 'num_attention_heads=2.5'),
    ({'num_attention_heads': -3}, 'num_attention_heads=-3'),
    ({'num_attention_heads': 10**400}, 'num_attention_heads=1000'),
    ({'layer_norm_eps': '1e-6'}, "layer_norm_eps='1e-6'"),
    ({'layer_norm_eps': 0}, 'layer_norm_eps=0'),
    ({'image_size': [16]}, 'image_size=[16]'),
    ({'image_size': 10**8}, 'image_size=100000000'),
    ({'mean': 0.5, 'std': [0, 1, 1]}, 'mean=0.5, std=[0, 1, 1]'),
    ({'interpolation': True}, 'interpolation=True'),
  ],
)
def test_what_a_config_cannot_mean_is_not_read_but_said(config, said, tmp_path):
  config |= {'hidden_dropout_prob': 10**400}
  folder = hf_folder(tmp_path / 'w', **config)
  _, report = load_weights(str(folder), shapes_of(make_config()))
  assert f'not read of config.json: {said}' in '\n'.join(report.notes)


def test_a_whole_number_may_be_written_as_a_fraction(tmp_path):
  folder = hf_folder(tmp_path / 'w', num_attention_heads=3.0)
  _, report = load_weights(str(folder), shapes_of(make_config()))
  assert repr(report.facts['heads']) == '3'


def test_the_processor_of_images_and_texts_tells_how_images_were(tmp_path):
  folder = hf_folder(tmp_path / 'w')
  said = {'image_mean': [0.1] * 3, 'image_std': [0.2] * 3, 'resample': 5}
  (folder / 'processor_config.json').write_text(
    json.dumps({'image_processor': said, 'processor_class': 'CLIPProcessor'})
  )
  _, report = load_weights(str(folder), shapes_of(make_config()))
  assert report.facts['mean'] == [0.1] * 3
  assert report.facts['std'] == [0.2] * 3
  assert report.facts['resize'] == 'hamming'


def test_an_attention_pooling_beside_a_class_token_is_refused(tmp_path):
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm_siglip.safetensors')
  tensors['cls_token'] = np.ones((1, 1, 24), np.float32)
  with pytest.raises(WeightsError, match=r'\(attn_pool\.latent\) asks the'):
    load_tensors(tmp_path / 'x.safetensors', tensors, pool='attention')


@pytest.mark.parametrize(
  ('config', 'wanted'),
  [
    ({'hidden_act': 'gelu'}, 'gelu'),
    ({'hidden_act': 'quick_gelu'}, 'quick_gelu'),
    ({'hidden_act': 'gelu_pytorch_tanh'}, 'gelu_tanh'),
    ({'model_args': {'act_layer': 'gelu_tanh'}}, 'gelu_tanh'),
    ({'hidden_act': None, 'architecture': 'vit_small_patch16_224'}, 'gelu'),
    ({'hidden_act': None, 'architecture': 'vit_so400m_patch16_siglip_gap_256'},
     'gelu_tanh'),
    ({'hidden_act': None,
      'architecture': 'vit_base_patch16_clip_quickgelu_224'}, 'quick_gelu'),
  ],
)  # fmt: skip
def test_the_activation_is_told_and_compared(config, wanted, tmp_path):
  folder = hf_folder(tmp_path / 'w', **config)
  _, report = load_weights(str(folder), shapes_of(make_config()))
  assert report.facts['activation'] == wanted
  shape = models.architecture(make_config(activation=wanted))
  report.compare(shape)
  other = 'gelu' if wanted == 'quick_gelu' else 'quick_gelu'
  with pytest.raises(
    WeightsError,
    match=f"with activation '{wanted}', but model.activation='{other}'; set "
    f'--config.model.activation={wanted}$',
  ):
    report.compare(models.architecture(make_config(activation=other)))


@pytest.mark.parametrize(
  ('config', 'names'),
  [
    ({'id2label': {'0': 'dog', '1': 'cat'}}, ['dog', 'cat']),
    ({'id2label': {'1': 'cat', '0': 'dog'}}, ['dog', 'cat']),
    ({'label_names': ['b', 'a']}, ['b', 'a']),
    ({'pretrained_cfg': {'label_names': ['b', 'a']}}, ['b', 'a']),
    ({'label_names': None, 'pretrained_cfg': {'label_names': ['b', 'a']}},
     ['b', 'a']),
    ({'label2id': {'cat': 1, 'dog': 0}}, ['dog', 'cat']),
    ({'label2id': {'LABEL_0': 0, 'LABEL_1': 1}}, None),
    ({'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}}, None),
    ({'id2label': {'0': '0', '1': '1'}}, None),
    ({'id2label': {'0': '1', '1': '0'}}, ['1', '0']),
    ({'id2label': {'1': 'cat'}}, None),
    ({'id2label': {'0': 3}}, None),
  ],
)
def test_class_names_are_facts_and_placeholders_are_not(
  config, names, tmp_path
):
  none = {'id2label': {}, 'label2id': None}
  folder = hf_folder(tmp_path / 'w', **{**none, **config})
  _, report = load_weights(str(folder), shapes_of(make_config()))
  assert report.facts.get('class_names') == names


@pytest.mark.parametrize(
  ('there', 'here', 'order'),
  [
    (['dog', 'cat'], ['cat', 'dog'], [1, 0]),
    (['Golden Retriever', 'cat'], ['cat', 'golden_retriever'], [1, 0]),
    (['cafe\u0301', 'tea'], ['tea', 'caf\u00e9'], [1, 0]),
    (['crane', 'crane'], ['crane', 'crane'], [0, 1]),
    (['+', '-'], ['-', '+'], [1, 0]),
    (['a', 'b'], ['a', 'c'], None),
    (['a', 'a', 'b'], ['b', 'a', 'a'], None),
    (['a', 'b'], ['a', 'b', 'c'], None),
    (['x', 'dog', 'cat'], ['cat', 'dog'], [2, 1, 0]),
    (['a', 'b'], ['A', 'a'], None),
  ],
)
def test_classes_are_put_in_order_by_name(there, here, order):
  found, why = order_of(there, here)
  assert found == order
  assert bool(why) == (order is None)


# Pairs of options: import against export.

OPTIONS = {
    'pool': ('token', 'mean', 'patch_mean', 'token_mean', 'attention'),
    'norm_after_pool': (False, True),
    'registers': (0, 1, 3),
    'layer_scale': (0.0, 1.0),
    'qk_norm': (False, True),
    'class_position': (True, False),
    'qkv_bias': (True, False),
    'pre_norm': (False, True),
    'last_norm': (True, False),
    'position': ('learned', 'rope'),
    'activation': ('gelu', 'gelu_tanh', 'quick_gelu', 'swiglu'),
}  # fmt: skip


def is_possible(case):
  norms_nothing = case['pool'] in ('token_mean', 'attention') or (
    not case['last_norm']
  )
  return not (norms_nothing and case['norm_after_pool'])


def pairwise(options):
  """Returns few cases among which every possible pair of values stands."""
  cases = [dict(zip(options, values, strict=True))
           for values in itertools.product(*options.values())]  # fmt: skip
  cases = [case for case in cases if is_possible(case)]
  pairs = lambda case: set(itertools.combinations(case.items(), 2))
  left, chosen = set().union(*map(pairs, cases)), []
  while left:
    best = max(cases, key=lambda case: len(pairs(case) & left))
    chosen.append(best)
    left -= pairs(best)
  return chosen


def random_model(case, **fields):
  """Returns a config and parameters as a file of others would bring them."""
  case = dict(case)
  has_position, has_bias = case.pop('class_position'), case.pop('qkv_bias')
  config = common.get_config()
  config.model.update(
    patch=4, width=12, depth=1, heads=3, mlp_dim=24, image_size=8,
    num_classes=5, dtype='float32', **case, **fields,
  )  # fmt: skip
  params = tree.flatten(reference.random_params(shapes_of(config)))
  params = {name: np.array(x, np.float32) for name, x in params.items()}
  count = config.model.registers
  first = case['pool'] not in ('mean', 'attention')
  if case['position'] == 'learned':
    params['pos_embed'][:, first : first + count] = 0
    if first and (count or not has_position):
      params['pos_embed'][:, 0] = 0
  if config.model.pre_norm:  # such patches have no bias
    params['patch_embed/bias'] = np.zeros_like(params['patch_embed/bias'])
  for name in params:
    if not has_bias and re.search('/(query|key|value)/bias', name):
      params[name] = np.zeros_like(params[name])
  return config, params


@pytest.mark.parametrize('case', pairwise(OPTIONS), ids=str)
def test_pairs_of_options_are_written_and_read_back_or_refused(case, tmp_path):
  config, params = random_model(case)
  pool, path, fitting = config.model.pool, tmp_path / 'x.safetensors', []
  messages = {}
  for layout in LAYOUTS:
    try:
      written = translate(tree.nest(params), layout, pool)
    except ExportError as error:
      messages[layout] = str(error)
      continue
    fitting.append(layout)
    save_tensors(written, path, form='safetensors')
    again, report = load_weights(str(path), shapes_of(config))
    again = tree.flatten(again)
    assert again.keys() == params.keys() and not report.reinitialised
    for name, values in params.items():
      np.testing.assert_array_equal(again[name], values, err_msg=name)
    save_tensors(
      translate(tree.nest(again), layout, pool), path, form='safetensors'
    )
    for name, values in safetensors.numpy.load_file(path).items():
      np.testing.assert_array_equal(written[name], values)
  for message in messages.values():
    assert '\n' not in message
    if fitting:
      assert message.endswith(f'--config.export.layout={" or ".join(fitting)}')
    else:
      assert 'no layout can hold it' in message


@pytest.mark.parametrize('registers', [0, 2])
def test_a_trained_bias_of_patches_goes_into_positions(registers, tmp_path):
  """CLIP's patches have none in timm; the function stays."""
  config, params = random_model(
    dict.fromkeys(OPTIONS, False)
    | {'pool': 'token', 'registers': registers, 'layer_scale': 0.0}
    | {'activation': 'quick_gelu', 'pre_norm': True, 'qkv_bias': True}
    | {'last_norm': True, 'position': 'learned'}
  )
  params['patch_embed/bias'] = np.linspace(-1, 1, 12, dtype=np.float32)
  written = translate(tree.nest(params), 'timm')
  assert 'patch_embed.proj.bias' not in written
  path = tmp_path / 'x.safetensors'
  save_tensors(written, path, form='safetensors')
  again, report = load_weights(str(path), shapes_of(config))
  assert list(report.zeros) == ['patch_embed/bias']
  assert report.facts['norm_eps'] == 1e-5
  note = 'does not tell its activation: quick_gelu assumed'
  assert any(note in x for x in report.compare(models.architecture(config)))
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
  logits = [
    models.build_model(config).apply(
      {'params': tree.nest(jax.tree.map(jnp.asarray, dict(one)))},
      jnp.asarray(images, jnp.float32),
    )
    for one in (params, tree.flatten(again))
  ]
  np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_mean_pooling_with_registers_is_the_file_that_was_imported(tmp_path):
  config, params = random_model(
    dict.fromkeys(OPTIONS, False)
    | {'pool': 'mean', 'registers': 4, 'layer_scale': 0.0, 'qkv_bias': True}
    | {'activation': 'gelu', 'last_norm': True, 'position': 'learned'}
  )
  written = translate(tree.nest(params), 'timm')
  assert written['pos_embed'].shape == (1, 4, 12)
  assert written['reg_token'].shape == (1, 4, 12)
  assert 'cls_token' not in written
