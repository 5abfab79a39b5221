"""--mode=merge_lora: kernels with the adapters in them."""

import json
import re

import numpy as np
import pytest

from qvit_jax import models, modes, tree
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment import sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.lora import adapter as lora
from qvit_jax.quantization import QTensor, dequantize
from qvit_jax.store import adapters, artifacts, runs
from qvit_jax.store.checkpoint import Checkpoints
from tests.conftest import make_digits_config


def lora_config(recipe='none', **fields):
  config = make_digits_config()
  config.model.width, config.model.mlp_dim = 32, 64
  config.lora.update(rank=4, targets=('all',))
  config.lora.update(fields)
  config.quant.recipe = recipe
  config.optim.lr = 1e-2
  config.train.update(steps=30, batch_size=32)
  config.eval.update(every=30)
  return config


def whole_config(path, recipe='none'):
  config = lora_config(recipe, rank=0, targets=())
  config.checkpoint.path = str(path)
  return config


def baseline(workdir):
  return json.loads((workdir / 'results.json').read_text())['baseline']


def told(capsys):
  """Returns (difference of logits, share of equal classes, top1s)."""
  text = capsys.readouterr().out
  apart, equal = re.search(
    r'random images within (\S+) of .* ([\d.]+)% of', text
  ).groups()
  assert 'take it with --config.lora.rank=0 --config.lora.targets="()"' in text
  top1 = re.findall(r'^(?:before|after) +top1 ([\d.]+)', text, re.M)
  return float(apart), float(equal), [float(x) for x in top1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a finished run beside float kernels."""
  workdir = tmp_path_factory.mktemp('float')
  modes.run('train', lora_config(init='pissa'), str(workdir))
  return workdir


def test_float_kernels_take_the_adapters_in(trained, tmp_path, capsys):
  expected = baseline(trained)
  assert expected['top1'] > 0.2  # adapters that do something
  modes.run('merge_lora', lora_config(init='pissa'), str(trained))
  apart, equal, top1 = told(capsys)
  assert apart < 1e-5
  assert equal == 100
  assert top1[0] == top1[1] == pytest.approx(expected['top1'], abs=1e-4)
  merged = trained / 'merged' / 'adapter'
  modes.run('eval', whole_config(merged), str(tmp_path))
  assert baseline(tmp_path)['loss'] == pytest.approx(expected['loss'], abs=1e-5)
  stored = Checkpoints(merged / 'checkpoints', writer=False)
  names = stored.metadata(stored.latest())['arrays']['variables']
  assert all(name.startswith('params/') for name in names)


@pytest.mark.slow
def test_learned_steps_make_a_plain_quantized_model(tmp_path, capsys):
  """L4Q: what is merged and rounded is what training rounded."""
  config = lora_config('lsq', init='pissa')
  config.quant.default = 'w4a4'
  config.train.steps = 10
  modes.run('train', config, str(tmp_path))
  modes.run('merge_lora', config, str(tmp_path))
  apart, equal, _ = told(capsys)
  assert apart < 1e-4
  assert equal == 100
  merged = tmp_path / 'merged' / 'adapter'
  plain = whole_config(merged, 'lsq')
  plain.export.format = 'packed'
  modes.run('export', plain, str(tmp_path / 'packed'))
  found = json.loads((tmp_path / 'packed/export/parity.json').read_text())
  # Every layer multiplies integers; attention products are float by default.
  assert found['equal_classes'] == 1
  assert found['largest_difference'] < 1e-4


@pytest.fixture(scope='module')
def packed_run(tmp_path_factory):
  """The workdir of a finished run beside packed kernels."""
  workdir = tmp_path_factory.mktemp('packed')
  config = lora_config(base='int8', group=16, targets=('mlp',))
  config.train.steps = 10
  modes.run('train', config, str(workdir))
  return workdir


@pytest.mark.parametrize(
  'requantize', ['nearest', pytest.param('gptq', marks=pytest.mark.slow)]
)
def test_packed_kernels_are_rounded_again(
  packed_run, tmp_path, capsys, requantize
):
  config = lora_config(
    base='int8', group=16, targets=('mlp',), requantize=requantize
  )
  config.ptq.calibration_examples = 64
  modes.run('merge_lora', config, str(packed_run))
  apart, equal, _ = told(capsys)
  assert 0 < apart < 0.05  # 8 bits of merged kernels
  assert equal > 90
  path = packed_run / 'merged' / 'adapter.safetensors'
  config = whole_config(path, 'ptq')
  packed = artifacts.load(
    path, models.list_sites(config), models.architecture(config)
  )
  assert runs.open_run(path).class_names == list('0123456789')
  kernels = {
    n: x
    for n, x in tree.flatten(packed.variables['quant']).items()
    if n.endswith('/data')
  }
  assert len(kernels) == 7  # all layers but the head
  modes.run('eval', config, str(tmp_path))
  assert baseline(tmp_path)['execution'] == 'simulated'
  assert baseline(tmp_path)['top1'] == pytest.approx(
    baseline(packed_run)['top1'], abs=0.03
  )


def test_layers_without_adapters_keep_their_codes(packed_run):
  config = lora_config(base='int8', group=16, targets=('mlp',))
  modes.run('merge_lora', config, str(packed_run))
  path = packed_run / 'merged' / 'adapter.safetensors'
  plain = whole_config(path, 'ptq')
  sites = models.list_sites(plain)
  packed = artifacts.load(path, sites, models.architecture(plain))
  experiment = Experiment(config, training=False)
  variables, _, _ = sources.adapted(experiment, packed_run)
  frozen = experiment.model.frozen
  spec = frozen.adapter.spec
  for site in sites:
    if not site.is_layer or site.path == 'head':
      continue
    before = frozen.kernel(variables, site.path)
    after = frozen.kernel(packed.variables, site.path)
    assert isinstance(after, QTensor)
    if site.path in frozen.adapter.by_path:
      wanted = lora.merged(
        dequantize(before), lora.by_layer(variables['lora'])[site.path], spec
      )
      error = np.abs(np.asarray(dequantize(after) - wanted))
      steps = np.repeat(np.asarray(after.scale), 16, axis=0)
      # Half a step, but where the searched scale clips the largest.
      assert np.mean(error <= steps[: len(error)] / 2 + 1e-6) > 0.95
    else:
      np.testing.assert_array_equal(after.codes, before.codes)


def test_adapters_of_one_base_are_chosen_by_name(trained, tmp_path, capsys):
  """Two files in one folder: the trained adapter, and one that does nothing."""
  source = trained / 'adapters' / 'adapter.safetensors'
  arrays, facts = adapters.load(source)
  idle = {
    name: x if 'head' in name else np.zeros_like(x)
    for name, x in arrays.items()
  }
  store = tmp_path / 'store'
  for name, values in (('cats', arrays), ('idle', idle)):
    adapters.save(store / f'{name}.safetensors', tree.nest(values), facts)
  losses = {}
  for name in ('cats', 'idle'):
    workdir = tmp_path / name
    config = lora_config(init='pissa', path=str(store), name=name)
    modes.run('eval', config, str(workdir))
    losses[name] = baseline(workdir)['loss']
  assert losses['cats'] == baseline(trained)['loss']
  assert losses['idle'] > losses['cats']
  config = lora_config(init='pissa', path=str(store), name='idle')
  modes.run('merge_lora', config, str(tmp_path))
  assert (tmp_path / 'merged' / 'idle' / 'checkpoints').is_dir()
  config = lora_config(init='pissa', path=str(store), name='dogs')
  with pytest.raises(CheckpointError, match='it holds cats, idle: set'):
    modes.run('eval', config, str(tmp_path))


def test_a_weights_path_needs_a_whole_model(trained, tmp_path):
  config = lora_config()
  config.weights.path = str(trained)
  with pytest.raises(WeightsError, match='holds adapters alone, no kernels'):
    modes.run('train', config, str(tmp_path))


@pytest.mark.slow
def test_a_run_can_start_from_what_was_merged(trained, tmp_path):
  """Adapters on a base that is a run; eval finds it by itself."""
  modes.run('merge_lora', lora_config(init='pissa'), str(trained))
  config = lora_config()
  config.weights.path = str(trained / 'merged' / 'adapter')
  config.train.steps = 2
  modes.run('train', config, str(tmp_path))
  expected = baseline(tmp_path)['loss']
  modes.run('eval', lora_config(), str(tmp_path))
  assert baseline(tmp_path)['loss'] == expected


def test_merging_needs_adapters(digits_config, tmp_path):
  with pytest.raises(ConfigError, match='lora.rank is 0; set lora'):
    modes.run('merge_lora', digits_config, str(tmp_path))
  with pytest.raises(CheckpointError, match='holds no adapter'):
    modes.run('merge_lora', lora_config(), str(tmp_path))
