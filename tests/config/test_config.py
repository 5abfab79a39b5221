"""Legal values, inert overrides and the config files."""

import pathlib
import re

import pytest

from configs import common
from qvit_jax.config import fields
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment.model import Model

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
  path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != 'common'
)


def load(name):
  module = __import__(f'configs.{name}', fromlist=['get_config'])
  return module.get_config()


def validate(config, overrides=(), mode='train'):
  return config_lib.validate(config, mode=mode, overrides=overrides)


@pytest.fixture
def config():
  config = common.get_config()
  config.train.steps = 1
  return config


def test_every_field_has_legal_values_and_the_reverse(config):
  assert set(config_lib.flatten(config)) == set(fields.LEGAL)


def test_every_field_is_explained():
  lines = (ROOT / 'configs/common.py').read_text().splitlines()
  for i, line in enumerate(lines):
    if re.match(r'      \w+=|  c\.seed', line):
      above = lines[i - 1].strip()
      assert '#' in line or above.startswith('#'), line


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('seed', -1),
    ('model.depth', 0),
    ('model.num_classes', 1),
    ('model.pool', 'max'),
    ('model.norm_eps', 0.0),
    ('model.dropout', 1.0),
    ('model.stochastic_depth', -0.1),
    ('model.dtype', 'float64'),
    ('quant.recipe', 'gptq'),
    ('quant.act_granularity', 'per_channel'),
    ('data.source', 'imagenet'),
    ('data.mean', (0.5, 0.5)),
    ('data.std', (0.5, 0.0, 0.5)),
    ('data.erase', 1.5),
    ('data.resize', 'nearest'),
    ('optim.name', 'adam'),
    ('optim.lr', 0.0),
    ('optim.lr', float('nan')),
    ('optim.schedule', 'step'),
    ('optim.decay_rules', ()),
    ('train.steps', -1),
    ('train.batch_size', 0),
    ('train.label_smoothing', 1.0),
    ('train.trainable', ()),
    ('eval.num_examples', -1),
    ('mesh.fsdp', 0),
    ('log.every', 0),
  ],
)
def test_an_illegal_value_is_named_with_what_is_allowed(config, field, value):
  section, _, name = field.rpartition('.')
  node = config[section] if section else config
  node[name] = value
  with pytest.raises(ConfigError) as error:
    validate(config)
  message = str(error.value)
  assert f'{field}={value!r} is not allowed; allowed: ' in message
  assert '\n' not in message


def test_training_nothing_is_refused(config):
  config.train.steps = 0
  with pytest.raises(ConfigError, match='train nothing'):
    validate(config)


@pytest.mark.parametrize(
  ('field', 'set_up', 'hint'),
  [
    ('quant.default', {}, 'quant.recipe=aqt'),
    ('optim.momentum', {}, 'optim.name=sgd'),
    ('optim.b1', {'optim.name': 'sgd'}, 'optim.name=adamw'),
    ('model.width', {'model.size': 'S/16'}, 'model.size='),
    ('train.epochs', {}, 'train.steps=0'),
    ('optim.decay_rules', {}, 'optim.weight_decay is 0'),
    ('optim.end_lr', {'optim.schedule': 'constant'}, 'schedule=cosine'),
    ('optim.warmup_epochs', {'optim.warmup_steps': 1}, 'warmup_steps=0'),
  ],
)
def test_an_override_without_effect_is_refused(config, field, set_up, hint):
  config.update_from_flattened_dict(set_up)
  validate(config)  # as a default of the file it is no mistake
  with pytest.raises(ConfigError, match='would have no effect') as error:
    validate(config, [field])
  assert hint in str(error.value)


def test_an_override_that_another_mode_reads_is_mentioned(config):
  notes = validate(config, ['train.steps', 'model.patch'], mode='eval')
  assert notes == ['--config.train.steps has no effect in --mode=eval']


@pytest.mark.parametrize(
  ('mode', 'field', 'value'),
  [
    ('eval', 'quant.dampen', 0.1),
    ('sites', 'quant.calibration_path', 'calibration'),
    ('export', 'quant.dgd', 1.0),
    ('sensitivity', 'ptq.rounds', 5),
    ('benchmark', 'train.stages', ('all:0.5', 'norms:0.5')),
  ],
)
def test_fields_of_training_are_mentioned_elsewhere(mode, field, value):
  config = common.get_config()
  config.train.steps, config.quant.recipe = 1, 'lsq'
  config.update_from_flattened_dict({field: value})
  notes = config_lib.validate(config, mode=mode, overrides=[field])
  assert notes == [f'--config.{field} has no effect in --mode={mode}']
  assert not config_lib.validate(config, mode=mode, overrides=['quant.recipe'])


@pytest.mark.parametrize(
  ('typo', 'field'),
  [('model.widht', 'model.width'), ('train.step', 'train.steps'),
   ('quant.attn', 'quant.attention')],
)  # fmt: skip
def test_the_nearest_field_is_found(config, typo, field):
  assert config_lib.nearest(typo, config) == field


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_legal_and_builds(name):
  config = load(name)
  assert validate(config) == []
  model = Model(config)  # shapes only
  assert (
    len(model.plan.sites)
    == 8
    * len(
      [k for k in model.shapes['params']['encoder'] if k.startswith('block')]
    )
    + 2
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_opens_with_its_command(name):
  text = (ROOT / f'configs/{name}.py').read_text()
  docstring = text.split('"""')[1]
  assert f'python main.py --config=configs/{name}.py --workdir=' in docstring


def test_the_headline_is_vit_l_at_four_bits():
  config = load('vit_l_cifar100_w4a4')
  model = Model(config)
  assert model.size_bytes() < 0.14 * 4 * 303_404_132
  assert {str(s) for s in model.plan.specs} == {'w4a4', 'float'}
  assert (config.optim.lr, config.train.batch_size) == (3e-4, 128)
  assert config.train.epochs == 300


# For each kind of legal values one that is not.
BAD = {
  'True or False': 1,
  'a tuple of names': (),
  'three': (1.0, 2.0),
  'a number from 0 to 1': 1.5,
  'a number': -1.0,
  'letters': 'a/b',
}


@pytest.mark.parametrize(
  'field', [name for name, (_, text) in fields.LEGAL.items() if text]
)
def test_every_legal_check_refuses_a_bad_value(field):
  legal = fields.LEGAL[field][1]
  bad = next((v for k, v in BAD.items() if legal.startswith(k)), 'nonsense')
  config = common.get_config()
  section, _, name = field.rpartition('.')
  node = config[section] if section else config
  with node.ignore_type():
    node[name] = bad
  with pytest.raises(ConfigError) as error:
    validate(config)
  for part in (f'{field}={bad!r}', legal):
    assert part in str(error.value)
