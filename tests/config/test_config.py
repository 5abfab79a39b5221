"""Legal values, inert overrides and the config files."""

import pathlib
import re

import pytest

from configs import common
from qvit_jax import tree
from qvit_jax.config import listing
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ConfigError
from qvit_jax.experiment import auto
from qvit_jax.experiment.model import Model
from qvit_jax.modes import MODES, runner
from tests.conftest import notes_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(
  path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != 'common'
)


def load(name):
  module = __import__(f'configs.{name}', fromlist=['get_config'])
  return module.get_config()


def validate(config, overrides=(), mode='train'):
  return notes_of(config, mode=mode, overrides=overrides)


@pytest.fixture
def config():
  config = common.get_config()
  config.train.steps = 1
  return config


def test_every_field_has_legal_values_and_the_reverse(config):
  assert set(config_lib.flatten(config)) == set(config_lib.FIELDS)


def test_common_lists_every_field_as_help_does():
  values = config_lib.flatten(common.get_config())
  page = listing.page(values).rstrip()
  text = (ROOT / 'configs/common.py').read_text()
  assert page in text, 'run: ' + listing.__doc__.splitlines()[2].strip()
  for field in config_lib.FIELDS.values():
    assert len(field.text) > 10, field.name


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
    (
      'optim.warmup_from',
      {'optim.warmup_steps': 0, 'optim.warmup_epochs': 0.0},
      'there is no warm-up',
    ),
    ('data.workers', {'data.source': 'digits'}, 'data.source=folder or tfds'),
    ('data.resident_mib', {'data.source': 'digits'}, 'data.source=tfds'),
    ('log.histograms', {'log.tensorboard': False}, 'tensorboard=true'),
  ],
)
def test_a_field_without_effect_is_refused(config, field, set_up, hint):
  """On the command line, and on a page that sets it to something else."""
  config.update_from_flattened_dict(set_up)
  validate(config)  # where nobody set it, it is no mistake
  section, _, name = field.partition('.')
  page = config.copy_and_resolve_references()
  value = page[section][name]
  page[section][name] = (
    ('bias$',) if isinstance(value, tuple) else
    not value if isinstance(value, bool) else
    'w8a8' if isinstance(value, str) else value / 2 or 1 if
    isinstance(value, float) else value + 1
  )
  for wrong, flags in ((config, [field]), (page, [])):
    with pytest.raises(ConfigError, match='would have no effect') as error:
      validate(wrong, flags)
    assert hint in str(error.value)


def test_what_flags_switch_off_of_a_page_is_mentioned(config):
  page = config.copy_and_resolve_references()
  page.quant.update(recipe='aqt', default='w8a8')
  config.quant.default = 'w8a8'
  notes = notes_of(config, overrides=['quant.recipe'], page=page)
  assert notes == [
    "quant.default='w8a8' of the page has no effect with these flags"
  ]


def test_a_resolved_config_cannot_be_changed(config):
  context = runner.context_of(MODES['train'], config)
  resolved, _ = config_lib.resolve(config, context)
  with pytest.raises(AttributeError, match='immutable'):
    resolved.quant.default = 'w8a8'
  other = config_lib.with_fields(resolved, {'quant.default': 'w8a8', 'seed': 5})
  assert (other.quant.default, other.seed) == ('w8a8', 5)
  assert resolved.quant.default == 'w4a4'
  for path in (ROOT / 'qvit_jax').rglob('*.py'):
    if path.name == 'resolve.py':
      continue  # it makes them
    found = re.findall(
      r'^.*\bconfig(?:\.\w+|\[\w+\])+ = .*$|.*\bconfig\.\w+\.update\(.*',
      path.read_text(), re.M,
    )  # fmt: skip
    assert not [line for line in found if "'" not in line], path


@pytest.mark.parametrize(
  'name', [f.name for f in config_lib.FIELDS.values() if f.is_path]
)
def test_the_home_folder_is_meant_in_every_path(config, name, monkeypatch):
  monkeypatch.setenv('HOME', '/somewhere')
  is_tuple = isinstance(config_lib.FIELDS[name].default, tuple)
  value = ('~/a', '/b') if is_tuple else '~/a'
  more = {'quant.calibration_path': {'quant.recipe': 'lsq'},
          'lora.path': {'lora.rank': 2, 'lora.targets': ('all',)}}  # fmt: skip
  own = config_lib.with_fields(config, {name: value} | more.get(name, {}))
  resolved, _ = config_lib.resolve(own, runner.context_of(MODES['train'], own))
  found = config_lib.flatten(resolved)[name]
  assert found == (('/somewhere/a', '/b') if is_tuple else '/somewhere/a')


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
    ('eval', 'log.every', 5),
    ('eval', 'data.mixup', 0.5),
    ('predict', 'model.dropout', 0.5),
    ('export', 'checkpoint.every', 5),
    ('sensitivity', 'eval.batch_size', 5),
    ('benchmark', 'train.stages', ('all:0.5', 'norms:0.5')),
  ],
)
def test_fields_of_training_are_mentioned_elsewhere(mode, field, value):
  config = common.get_config()
  config.train.steps, config.quant.recipe = 1, 'lsq'
  config.update_from_flattened_dict({field: value})
  notes = notes_of(config, mode=mode, overrides=[field])
  assert notes == [f'--config.{field} has no effect in --mode={mode}']
  assert not notes_of(config, mode=mode, overrides=['quant.recipe'])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('ptq.choices', ('w8a8',)),
    ('ptq.sensitivity_examples', 8),
    ('ptq.budget_mb', 1.0),
    ('ptq.budget_gbops', 1.0),
  ],
)
def test_what_mixed_rows_read_is_refused_where_there_are_none(field, value):
  config = common.get_config()
  config.update_from_flattened_dict({field: value})
  for mode in ('ptq', 'sensitivity'):
    assert not notes_of(config, mode=mode, overrides=[field])
  config.ptq.rows = ('fp32', 'w8a8')
  assert not notes_of(config, mode='sensitivity', overrides=[field])
  for overrides in ([field], []):  # a page is checked as flags are
    with pytest.raises(ConfigError, match='is mixed_sensitivity; add it'):
      notes_of(config, mode='ptq', overrides=overrides)


@pytest.mark.parametrize(
  ('typo', 'field'),
  [('model.widht', 'model.width'), ('train.step', 'train.steps'),
   ('quant.attn', 'quant.attention')],
)  # fmt: skip
def test_the_nearest_field_is_found(config, typo, field):
  with pytest.raises(ConfigError, match=f'nearest field is --config.{field}'):
    config_lib.check_name(typo, config)


@pytest.mark.parametrize(('old', 'new'), config_lib.RENAMED.items())
def test_a_field_that_moved_names_its_new_place(config, old, new):
  with pytest.raises(ConfigError, match=f'{old} is now {new}; set --config.'):
    config_lib.check_name(old, config)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_legal_and_builds(name):
  config = load(name)
  assert validate(config) == []
  if config.model.size == auto.SIZE:
    config.weights.path = str(ROOT / 'tests/fixtures/hf_vit')
    config, _ = auto.filled(config, '', trains=False, reads_data=False)
  model = Model(config)  # shapes only
  names = tree.flatten(model.float_shapes['params'])
  kernels = [name for name in names if name.endswith('kernel')]
  layers = [site for site in model.plan.sites if site.is_layer]
  assert len(kernels) == len(layers) >= 5  # none is left out


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
  'field', [f.name for f in config_lib.FIELDS.values() if f.check[1]]
)
def test_every_legal_check_refuses_a_bad_value(field):
  legal = config_lib.FIELDS[field].check[1]
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
