"""What the rest knows of a kind of model: its record, and nothing else."""

import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from qvit_jax import models, modes, tree
from qvit_jax.errors import ConfigError
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model
from qvit_jax.experiment.teacher import Teacher
from qvit_jax.ops import SiteDense
from qvit_jax.quantization.ptq import row_checks, rows
from qvit_jax.quantization.ptq.solvers import SOLVERS
from tests.conftest import ROOT, make_digits_config
from tests.small_models import logits, pack, random_params, rich_config

# Names of layers and of the kind itself, as code spells them.
OF_A_VIT = re.compile(
  r"\bvit\b|patch_embed|mlp/fc|\bfc[12]\b|attn/|'attn'|pos_embed|'cls'|'head'"
  r'|block_\d|block_\{|encoder/|\b(norm|scale)[12]\b|pool_norm'
  r'|(query|key|value)[_./](norm|kernel|bias|weight)'
)


class Flat(nn.Module):
  """Two layers without a residual stream or attention."""

  config: object
  ops: object

  @nn.compact
  def __call__(self, x, train=False):
    x = SiteDense((8,), self.ops, in_dims=3, kind='conv', name='first')(x)
    out = (self.config.num_classes,)
    return SiteDense(out, self.ops, name='last')(nn.relu(x))


FLAT = models.Family(
  from_config=Flat,
  architecture=lambda model: {'name': model.name, 'classes': model.num_classes},
  title=lambda model: 'two layers',
  tensor_rules=(),
  stem='first',
  head='last',
  targets={'all': ''},
  reads=('model.patch',),
)


@pytest.fixture
def flat(monkeypatch):
  monkeypatch.setitem(models.FAMILIES, 'flat', FLAT)
  config = make_digits_config()
  config.model.name = 'flat'
  return config


def test_only_models_and_weights_know_what_a_vit_is():
  sources = sorted((ROOT / 'qvit_jax').rglob('*.py'))
  known = [
    f'{path.relative_to(ROOT)}: {line.strip()}'
    for path in sources
    if path.relative_to(ROOT).parts[1] not in ('models', 'weights')
    for line in path.read_text().splitlines()
    if OF_A_VIT.search(line)
  ]
  assert not known
  assert any(OF_A_VIT.search(p.read_text()) for p in sources)


def test_what_is_searched_for_are_the_names_of_the_model():
  config = rich_config(layer_scale=1.0, qk_norm=True, registers=1)
  images = np.zeros((1, 8, 8, 3), np.float32)
  init = models.build_model(config).init
  params = jax.eval_shape(init, jax.random.key(0), images)['params']
  unsaid = {path for path in tree.flatten(params) if not OF_A_VIT.search(path)}
  assert unsaid == {'cls', 'registers', 'head/kernel', 'head/bias'}


def test_stem_and_head_are_the_first_and_the_last_layer():
  config = make_digits_config()
  family = models.family(config)
  layers = [s.path for s in models.list_sites(config) if s.is_layer]
  assert (family.stem, family.head) == (layers[0], layers[-1])


def test_maps_of_attention_are_compared_where_both_have_attention(flat):
  config = make_digits_config()
  for one in (config, flat):
    one.update_from_flattened_dict({'quant.dgd': 0.5, 'train.teacher': 'RUN'})
  first, second = (Experiment(c, training=True) for c in (config, flat))
  for who, student, own in (
    ('student', second, first),
    ('student', second, second),
    ('teacher', first, second),
  ):
    with pytest.raises(ConfigError, match=f'which the {who} has none') as error:
      Teacher(student, own, {}, origin='', digest='')
    assert '--config.quant.dgd=0' in str(error.value)


@pytest.mark.parametrize('mode', ['train', 'sites', 'ptq'])
def test_an_unknown_kind_of_model_is_refused_with_the_known_ones(
  tmp_path, mode
):
  config = make_digits_config()
  config.model.name = 'resnet'
  wanted = (
    r"^model.name='resnet' .* allowed: 'vit' \| 'vgg' \| 'mobilenet_v2'. Set "
    '--config.model.name='
  )
  with pytest.raises(ConfigError, match=wanted):
    modes.run(mode, config, str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_family_without_a_residual_stream_is_quantized(flat):
  assert models.stream(flat) is None
  assert Model(flat).title.startswith('flat two layers, 8 px')
  params = random_params(flat)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  packed = pack(flat, 'w8a8+plain', params)
  model = models.build_model(flat, packed.ops)
  found = np.asarray(
    jax.jit(model.apply)(packed.variables, images), np.float32
  )
  wanted = np.asarray(logits(flat, params, images), np.float32)
  assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize(
  'solver', [name for name, s in SOLVERS.items() if s.needs_stream]
)
def test_solvers_of_a_residual_stream_are_refused_without_one(flat, solver):
  row = rows.parse_row(f'w4a4+{solver}+gptq')
  with pytest.raises(ConfigError, match=rf'{solver}.* none. Write .w4a4\+gptq'):
    row_checks.check_model([row], models.list_sites(flat), models.stream(flat))
  vit = make_digits_config()
  row_checks.check_model([row], models.list_sites(vit), models.stream(vit))


@pytest.mark.parametrize(
  'name', ['w4a4', 'w8a8+rotate', 'w4a8+hadamard', 'mixed_sensitivity']
)
def test_the_row_that_is_named_instead_is_taken(flat, name):
  sites = models.list_sites(flat)
  with pytest.raises(ConfigError) as caught:
    row_checks.check_model([rows.parse_row(name)], sites, None)
  assert '\n' not in str(caught.value)
  advice = re.search(r"Write '(.*)'$", str(caught.value))[1]
  row_checks.check_model([rows.parse_row(advice)], sites, None)


@pytest.mark.parametrize('recipe', ['lsq', 'statsq'])
def test_turned_inputs_in_training_are_refused_without_a_stream(flat, recipe):
  flat.quant.update(recipe=recipe, default='w4a4', hadamard=True)
  with pytest.raises(ConfigError, match='flat has none. Set --config.quant.h'):
    Model(flat)
  flat.quant.hadamard = False
  assert Model(flat).plan.by_path['first'].acts == 4


def test_adapters_leave_out_the_head_whatever_its_name(flat):
  flat.lora.update(rank=2, targets=('all',))
  model = Model(flat)
  assert [path for path, _ in model.frozen.adapter.layers] == ['first']
  assert 'params/last' in model.frozen.collections


RECORD = '''
"""A kind of model that is here to be added."""

from qvit_jax.models.family import Family
from qvit_jax.models.vit import FAMILY as VIT

FAMILY = Family(
  from_config=VIT.from_config, architecture=VIT.architecture,
  title=lambda model: 'of tomorrow', tensor_rules=(), stem=VIT.stem,
  head=VIT.head, targets=VIT.targets, reads=VIT.reads,
)
'''
RUN = """
from qvit_jax import models, modes
from tests.conftest import make_digits_config

config = make_digits_config()
config.model.name = 'new'
modes.run('sites', config, '')
"""


def test_a_new_family_is_a_file_and_its_entry(tmp_path):
  for name in ('qvit_jax', 'configs', 'tests'):
    skipped = shutil.ignore_patterns('fixtures', '__pycache__')
    shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
  place = tmp_path / 'qvit_jax' / 'models'
  (place / 'new.py').write_text(RECORD)
  table = place / '__init__.py'
  text = table.read_text()
  for there, more in (
    ('import mobilenet, vgg, vit', 'import mobilenet, new, vgg, vit'),
    ("  'vit': vit.FAMILY,", "  'new': new.FAMILY,\n  'vit': vit.FAMILY,"),
  ):
    assert text.count(there) == 1
    text = text.replace(there, more)
  table.write_text(text)
  found = subprocess.run(
    [sys.executable, '-c', RUN], cwd=tmp_path, capture_output=True, text=True
  )
  assert 'model  new of tomorrow' in found.stdout, found.stderr[-2000:]
