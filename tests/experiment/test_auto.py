"""model.size='auto': the model that a file or a run says it is."""

import json
import shutil

import pytest
from PIL import Image

from configs import vit_finetune
from qvit_jax import modes
from qvit_jax.config import resolve
from qvit_jax.errors import ConfigError, WeightsError
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


def test_the_name_of_a_model_of_timm_tells_its_heads(tmp_path):
  entries = open_source(BARE).entries
  wide = {}
  for name, entry in entries.items():
    values = entry.read()
    for axis, size in enumerate(values.shape):
      if size in (24, 72):
        values = values.repeat(8, axis)  # width 192
    wide[name] = values
  save_tensors(wide, tmp_path / 'model.safetensors', form='safetensors')
  said = {'architecture': 'vit_tiny_patch4_16'}
  (tmp_path / 'config.json').write_text(json.dumps(said))
  config, lines = fill(tmp_path)
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
  for pool in ('token_attention', 'mean'):
    config, lines = fill(path, model__pool=pool)
    assert config.model.pool == pool
    assert lines[-1].startswith('model.num_classes=1000: of the config')
  path = FIXTURES / 'hf_clip'  # has one, of the mean of its patches
  with pytest.raises(ConfigError, match=r'says patch_mean \(config\.json\)'):
    fill(path, model__pool='token')


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
