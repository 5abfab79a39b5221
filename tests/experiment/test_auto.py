"""model.size='auto': the model that a file or a run says it is."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import vit_finetune
from qvit_jax import modes
from qvit_jax.config import resolve
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment import auto
from qvit_jax.models import architecture
from qvit_jax.store.tensors import save_tensors
from qvit_jax.weights import open_source
from tests.conftest import make_digits_config
from tests.weights.test_towers import TOWERS
from tests.weights.test_weights import FIXTURES, LAYOUTS, make_config

BARE = FIXTURES / 'timm.safetensors'


def fill(path, *, trains=False, **fields):
  """Returns the config that a file fills, and the lines."""
  config = vit_finetune.get_config()
  config.data.update(source='digits', name='')
  config.weights.path = str(path)
  given = {name.replace('__', '.'): value for name, value in fields.items()}
  config = resolve.with_fields(config, given)
  return auto.filled(
    config, '', trains=trains, reads_data=trains, overrides=[*given]
  )


@pytest.mark.parametrize('name', [*LAYOUTS, *TOWERS])
def test_a_file_tells_the_model_that_its_library_made(name):
  file, fields, *_ = {**LAYOUTS, **TOWERS}[name]
  path, given = FIXTURES / file, {'model__num_classes': 5}
  if not (path / 'config.json').exists():  # what no tensor shows
    given['model__heads'] = 3
    if fields.get('activation') != 'swiglu':
      given['model__activation'] = fields.get('activation', 'gelu')
  if fields.get('position') == 'rope' and not path.is_dir():
    given['model__image_size'] = 16
  config, lines = fill(path, **given)
  wanted = architecture(make_config(**fields))
  found = architecture(config)
  assert found == pytest.approx(wanted)
  assert len(lines) >= 8


def with_config(tmp_path, **texts):
  shutil.copy(BARE, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(texts))
  return tmp_path


def test_timms_config_needs_no_further_field(tmp_path):
  images = {
    'input_size': [3, 16, 16],
    'mean': [0.5, 0.5, 0.5],
    'std': [0.25, 0.5, 0.5],
    'interpolation': 'bilinear',
  }
  path = with_config(
    tmp_path, architecture='vit_tiny_patch4_16', pretrained_cfg=images,
    model_args={'num_heads': 3, 'act_layer': 'gelu_tanh'},
  )  # fmt: skip
  config, lines = fill(path, trains=True)
  assert config.model.heads == 3
  assert config.model.activation == 'gelu_tanh'
  assert config.data.std == (0.25, 0.5, 0.5)
  assert config.data.resize == 'bilinear'
  assert config.model.num_classes == 10  # of the digits
  assert 'data.mean=(0.5, 0.5, 0.5): config.json' in lines
  assert 'model.num_classes=10: classes of the data set' in lines


def wide_folder(path, **texts):
  """A folder with a file of width 192, for which names tell heads."""
  wide = {}
  for name, entry in open_source(BARE).entries.items():
    values = entry.read()
    for axis, size in enumerate(values.shape):
      if size in (24, 72):
        values = values.repeat(8, axis)
    wide[name] = values
  save_tensors(wide, path / 'model.safetensors', form='safetensors')
  (path / 'config.json').write_text(json.dumps(texts))
  return path


def test_the_name_of_a_model_of_timm_tells_its_heads(tmp_path):
  path = wide_folder(tmp_path, architecture='vit_tiny_patch4_16')
  config, lines = fill(path)
  assert config.model.width == 192
  assert config.model.heads == 3
  assert "architecture='vit_tiny_patch4_16' of config.json" in '\n'.join(lines)


def test_classes_are_counted_in_the_home_folder_too(tmp_path, monkeypatch):
  for name in ('train/a', 'train/b', 'train/c', 'test/a'):
    path = tmp_path / 'set' / name / '1.png'
    path.parent.mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(path)
  monkeypatch.setenv('HOME', str(tmp_path))
  shutil.copytree(FIXTURES / 'hf_vit', tmp_path / 'vit')
  fields = {'data__source': 'folder', 'data__dir': '~/set'}
  config, _ = fill('~/vit', trains=True, **fields)
  assert config.model.num_classes == 3


def test_heads_of_an_architecture_are_not_those_of_another_width(tmp_path):
  said = {
    'architecture': 'vit_small_patch16_224', 'model_args': {'embed_dim': 192},
  }  # fmt: skip
  with pytest.raises(ConfigError, match='does not tell its attention heads'):
    fill(wide_folder(tmp_path, **said))


def test_what_runs_leave_out_is_told_all_the_same():
  others = {
    'activation': 'swiglu', 'position': 'rope', 'last_norm': False,
    'norm_after_pool': True, 'pre_norm': True,
  }  # fmt: skip
  plain, found = {*architecture(make_config())}, set()
  for name, value in others.items():
    fields = {'heads': 6, name: value}
    found |= {*architecture(make_config(**fields))} - plain
  assert found == {*auto._LEFT_OUT} == {*others}


def test_a_resize_that_we_lack_is_said(tmp_path):
  said = {'num_attention_heads': 3, 'pretrained_cfg': {'interpolation': 'box'}}
  _, lines = fill(with_config(tmp_path, **said))
  assert (
    "data.resize=bicubic: in place of 'box' of config.json, which is not known "
    'here'
  ) in lines


def test_a_config_that_holds_no_object_is_refused(tmp_path):
  shutil.copy(BARE, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text('[1]')
  with pytest.raises(WeightsError, match='it holds list where an object'):
    fill(tmp_path)


@pytest.mark.parametrize(
  ('said', 'part'),
  [
    ({'num_attention_heads': 5}, '5 attention heads, which do not divide'),
    ({'hidden_size': 48}, 'a width of 48, but its tensors have 24'),
    ({'num_hidden_layers': 12}, 'a depth of 12, but its tensors have 2'),
  ],
)
def test_a_config_of_other_weights_is_refused(said, part, tmp_path):
  said = {'num_attention_heads': 3, **said}
  with pytest.raises(WeightsError, match=f'config.json says {part}.* or none'):
    fill(with_config(tmp_path, **said))


def test_a_file_without_blocks_is_no_model_of_depth_0(tmp_path):
  tensors = {
    name if name.startswith('blocks.') else f'net.{name}': entry.read()
    for name, entry in open_source(BARE).entries.items()
  }
  path = tmp_path / 'x.safetensors'
  save_tensors(tensors, path, form='safetensors')
  with pytest.raises(WeightsError, match='no block of the timm layout'):
    fill(path, model__heads=3)


@pytest.mark.parametrize('shape', [(0, 3, 4, 4), (24, 3, 0, 0), (1152,), ()])
def test_a_patch_embedding_of_nothing_is_refused(shape, tmp_path):
  tensors = {
    name: entry.read() for name, entry in open_source(BARE).entries.items()
  }
  tensors['patch_embed.proj.weight'] = np.ones(shape, np.float32)
  path = tmp_path / 'x.safetensors'
  save_tensors(tensors, path, form='safetensors')
  with pytest.raises(WeightsError, match='no square patch of 4 axes'):
    fill(path, model__heads=3)


def test_what_is_assumed_of_a_bare_file_is_said_and_the_pages_choice(tmp_path):
  _, lines = fill(BARE, model__heads=3)
  assert 'model.pool=token: assumed, there is cls_token' in lines
  untold = 'data.mean=(0.485, 0.456, 0.406): of the config, nothing tells it'
  assert untold in lines
  config, _ = fill(BARE, model__heads=3, model__pool='patch_mean')
  assert config.model.pool == 'patch_mean'
  tensors = {
    name.replace('norm.', 'fc_norm.') if name.startswith('norm.') else name:
    entry.read() for name, entry in open_source(BARE).entries.items()
  }  # fmt: skip
  path = tmp_path / 'x.safetensors'
  save_tensors(tensors, path, form='safetensors')
  _, lines = fill(path, model__heads=3)
  assert 'model.pool=patch_mean: assumed behind fc_norm.weight' in lines
  config, _ = fill(path, model__heads=3, model__pool='token')
  assert config.model.pool == 'token'
  with pytest.raises(ConfigError, match=r'last norm behind the pooling \(fc_'):
    fill(path, model__heads=3, model__pool='token_attention')


def test_a_siglip_may_lack_its_pooling(tmp_path):
  path = tmp_path / 'w'
  shutil.copytree(FIXTURES / 'hf_siglip_model', path)
  said = json.loads((path / 'config.json').read_text())
  said['vision_config']['vision_use_head'] = False
  (path / 'config.json').write_text(json.dumps(said))
  tensors = {
    name: entry.read() for name, entry in open_source(path).entries.items()
    if 'vision_model.head.' not in name
  }  # fmt: skip
  save_tensors(tensors, path / 'model.safetensors', form='safetensors')
  config, _ = fill(path)
  assert config.model.pool == 'mean'


def test_an_image_smaller_than_a_patch_is_that_of_the_positions(tmp_path):
  config, _ = fill(with_config(tmp_path, num_heads=3, image_size=3))
  assert config.model.image_size == 16


def test_what_nothing_tells_is_asked_for():
  with pytest.raises(ConfigError, match=r'attention heads.*model\.heads=') as e:
    fill(BARE)
  assert 'divides the width 24' in str(e.value)


def test_how_images_are_taken_where_nothing_tells_it_is_a_line():
  _, lines = fill(BARE, model__heads=3)
  assert lines[-3:] == [
    'data.mean=(0.485, 0.456, 0.406): of the config, nothing tells it',
    'data.std=(0.229, 0.224, 0.225): of the config, nothing tells it',
    'data.resize=bicubic: of the config, nothing tells it',
  ]


@pytest.mark.parametrize(
  ('field', 'value', 'there'),
  [
    ('model.heads', 6, 'says 3 (config.json)'),
    ('model.width', 32, 'says 24'),
    ('model.depth', 3, 'says 2'),
    ('model.patch', 8, 'says 4'),
    ('model.activation', 'quick_gelu', 'says gelu (config.json)'),
    ('model.norm_eps', 1e-3, 'says 1e-12 (config.json)'),
    ('model.mlp_dim', 48, 'says 40'),
  ],
)
def test_a_page_that_says_otherwise_names_both(field, value, there):
  with pytest.raises(ConfigError) as error:
    fill(FIXTURES / 'hf_vit', **{field.replace('.', '__'): value})
  assert str(error.value).startswith(f'{field}=')
  assert there in str(error.value)
  assert str(error.value).count('\n') == 0


def test_images_of_another_size_and_fresh_poolings_are_the_pages_choice():
  config, lines = fill(FIXTURES / 'hf_vit', model__image_size=32)
  assert config.model.image_size == 32
  assert 'model.image_size=32: of the config; 16 by config.json' in lines
  path = FIXTURES / 'hf_siglip_model'  # has no head
  config, _ = fill(path, model__pool='mean')
  assert config.model.pool == 'mean'
  config, _ = fill(FIXTURES / 'hf_vit', model__pool='token_attention')
  assert config.model.pool == 'token_attention'
  path = FIXTURES / 'hf_clip'  # has one, of the mean of its patches
  with pytest.raises(ConfigError, match=r'says patch_mean \(config\.json\)'):
    fill(path, model__pool='token')


def test_a_pooling_of_the_page_needs_what_it_asks():
  with pytest.raises(ConfigError, match=r'has none; set --.*pool=attention'):
    fill(FIXTURES / 'hf_siglip_model', model__pool='token_attention')


def test_an_adapter_is_looked_for_where_lora_path_says(tmp_path):
  given = {'lora__path': str(tmp_path), 'lora__name': 'x', 'lora__rank': 2}
  with pytest.raises(CheckpointError, match="holds no adapter 'x'"):
    fill('', **given)


def test_data_of_more_classes_than_a_trained_head_are_refused():
  config = vit_finetune.get_config()
  config.data.update(source='digits', name='')
  config.weights.path = str(FIXTURES / 'hf_vit')
  with pytest.raises(ConfigError, match='has 5 classes .* the data set has 10'):
    auto.filled(config, '', trains=False, reads_data=True)
  auto.filled(config, '', trains=False, reads_data=False)
  auto.filled(config, '', trains=True, reads_data=True)


@pytest.mark.parametrize(
  ('fields', 'error', 'part'),
  [
    ({'weights__path': ''}, ConfigError, 'none is named'),
    ({'weights__path': 'nowhere'}, WeightsError, 'does not exist'),
    ({'model__name': 'vgg'}, ConfigError, "model.name='vgg'"),
  ],
)
def test_auto_needs_a_vision_transformer_to_look_at(fields, error, part):
  with pytest.raises(error, match=part):
    fill(BARE, **fields)


def test_an_epsilon_that_is_only_usual_gives_way():
  config, lines = fill(BARE, model__heads=3, model__norm_eps=1e-5)
  assert config.model.norm_eps == 1e-5
  assert 'model.norm_eps=1e-05: of the config; 1e-06 by usual of timm' in lines


def test_fields_are_checked_before_they_are_compared(tmp_path):
  config = vit_finetune.get_config()
  config.weights.path = str(FIXTURES / 'hf_vit')
  with config.unlocked():
    config.model.hedas = 3
  with pytest.raises(ConfigError, match=r'unknown field model\.hedas'):
    modes.run('eval', config, str(tmp_path))


def test_what_is_looked_at_is_what_eval_would_restore(tmp_path):
  """A page's weights give way to a run that a flag names."""
  modes.run('train', make_digits_config(), str(tmp_path))
  both = {'checkpoint__path': str(tmp_path)}
  config, lines = fill(FIXTURES / 'hf_vit', **both)
  assert config.model.width == 16
  assert lines[0] == f'the model of step 6 of {tmp_path}'
  with pytest.raises(ConfigError, match='are both set'):
    fill(FIXTURES / 'hf_vit', trains=True, **both)
  # A run says too what it leaves out because it is at its default.
  with pytest.raises(ConfigError, match=r'says gelu \(its config\)'):
    fill(tmp_path, model__activation='quick_gelu')
  config = make_digits_config()
  config.model.activation, config.weights.path = 'quick_gelu', str(tmp_path)
  with pytest.raises(WeightsError, match="are of a model with activation 'gel"):
    modes.run('train', config, str(tmp_path / 'other'))


@pytest.mark.slow
def test_adapters_tell_the_model_and_their_own_classes(tmp_path):
  base = FIXTURES / 'hf_vit'  # of 5 classes
  adapted = {'lora__rank': 2, 'lora__targets': ('all',)}
  config, _ = fill(base, trains=True, **adapted)
  fields = {'train.epochs': 1.0, 'train.batch_size': 720, 'data.flip': False}
  config = resolve.with_fields(config, fields)
  modes.run('train', config, str(tmp_path))
  adapted['lora__path'] = str(tmp_path / 'adapters')
  for path in (base, ''):
    config, lines = fill(path, **adapted)
    assert lines[0].startswith('the model of adapter adapter of ')
    assert config.model.num_classes == 10
    assert config.model.width == 24
  with pytest.raises(ConfigError, match='none is named'):
    fill('', trains=True, **adapted)  # there it is where they are written


def test_a_training_goes_on_and_is_evaluated_by_its_workdir_alone(
  call_main, tmp_path
):
  flags = (
      '--config=configs/vit_finetune.py', f'--workdir={tmp_path / "run"}',
      '--config.data.source=digits', '--config.data.name=',
      '--config.eval.batch_size=120', '--config.log.tensorboard=False',
      '--config.model.dtype=float32',
  )  # fmt: skip
  training = (
      *flags, '--config.train.batch_size=8', '--config.eval.every=0',
      f'--config.weights.path={FIXTURES / "hf_vit"}',
  )  # fmt: skip
  first = call_main(*training, '--config.train.steps=1')
  assert first.returncode == 0, first.stderr
  assert 'auto      model.heads=3: config.json' in first.stdout
  more = call_main(*training, '--config.train.steps=2')
  assert more.returncode == 0, more.stderr
  assert 'resuming at step 1' in more.stdout
  looked = call_main(*flags, '--mode=eval')
  assert looked.returncode == 0, looked.stderr
  assert 'auto      model.heads=3: its config' in looked.stdout
  wrong = call_main(*flags, '--mode=eval', '--config.model.heads=4')
  assert wrong.returncode == 2
  assert 'model.heads=4 of the config, but step 2' in wrong.stderr
