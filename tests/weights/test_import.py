"""Weights in a run: start, evaluation, export, the hub."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from qvit_jax import modes
from qvit_jax.errors import ExportError, WeightsError
from qvit_jax.store.checkpoint import Checkpoints
from tests.conftest import SHARED, TINY, make_digits_config, run_main

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


@pytest.fixture
def config(monkeypatch):
  """A digits run of the fixtures' model: its images are enlarged to 16 px."""
  config = make_digits_config()
  config.model.update(width=24, depth=2, heads=3, mlp_dim=40, image_size=16)
  config.weights.path = str(FIXTURES / 'timm.safetensors')
  config.train.steps = 2
  return config


def results(workdir):
  return json.loads((workdir / 'results.json').read_text())['baseline']


@pytest.fixture
def ten_classes(tmp_path):
  """The fixture in timm's layout with a classifier for the ten digits."""
  tensors = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  rng = np.random.default_rng(0)
  tensors['head.weight'] = rng.normal(size=(10, 24)).astype(np.float32)
  tensors['head.bias'] = np.zeros(10, np.float32)
  path = tmp_path / 'ten.safetensors'
  safetensors.numpy.save_file(tensors, path)
  return path


def test_a_run_starts_from_the_file_and_says_what_it_took(
  config, tmp_path, capsys
):
  config.optim.lr = 1e-12  # so that the imported values are still there
  modes.run('train', config, str(tmp_path))
  out = capsys.readouterr().out
  for line in (
    'timm.safetensors (safetensors), timm layout',
    'start     38 of 40 parameters taken, 38 of them as they are',
    're-initialised: head/kernel, head/bias: 5 classes there, 10 here',
    'unused: head.weight, head.bias',
    'note: the file does not tell its attention heads: 3 assumed',
  ):
    assert line in out
  report = json.loads((tmp_path / 'weights.json').read_text())
  assert report['layout'] == 'timm'
  assert len(report['matched']) == 38
  modes.run('export', config, str(tmp_path))
  exported = safetensors.numpy.load_file(tmp_path / 'export/model.safetensors')
  theirs = safetensors.numpy.load_file(FIXTURES / 'timm.safetensors')
  assert exported['head.weight'].shape == (10, 24)
  for name in theirs:
    if not name.startswith('head'):
      np.testing.assert_allclose(exported[name], theirs[name], atol=1e-9)


def test_a_quantized_run_starts_from_the_same_file(
  config, ten_classes, tmp_path
):
  config.weights.path = str(ten_classes)
  config.optim.lr = 1e-12
  modes.run('eval', config, str(tmp_path / 'float'))
  config.quant.update(recipe='aqt', default='w8a8')
  modes.run('train', config, str(tmp_path / 'aqt'))
  assert results(tmp_path / 'aqt')['weight_bits'] == 8
  loss = results(tmp_path / 'float')['loss']
  assert results(tmp_path / 'aqt')['loss'] == pytest.approx(loss, rel=0.02)


def test_a_file_is_evaluated_as_it_is(config, ten_classes, tmp_path, capsys):
  config.weights.path = str(ten_classes)
  modes.run('eval', config, str(tmp_path / 'file'))
  assert 'timm layout' in capsys.readouterr().out
  config.optim.lr = 1e-12
  modes.run('train', config, str(tmp_path / 'run'))
  one, other = results(tmp_path / 'file'), results(tmp_path / 'run')
  assert one['num_examples'] == 360
  assert one['loss'] == pytest.approx(other['loss'], rel=1e-5)
  # A workdir with checkpoints of its own evaluates those.
  capsys.readouterr()
  modes.run('eval', config, str(tmp_path / 'run'))
  assert 'digests verified' in capsys.readouterr().out


def test_a_random_classifier_is_not_evaluated(config, tmp_path):
  with pytest.raises(WeightsError, match='nothing to evaluate'):
    modes.run('eval', config, str(tmp_path))


def test_heads_that_differ_are_refused(config, tmp_path):
  config.weights.path = str(FIXTURES / 'hf_vit')
  config.model.heads = 4
  with pytest.raises(WeightsError, match='have 3 attention heads, the model 4'):
    modes.run('train', config, str(tmp_path))


def test_epsilon_and_channels_that_differ_are_mentioned(
  config, tmp_path, capsys
):
  folder = tmp_path / 'vit'
  shutil.copytree(FIXTURES / 'hf_vit', folder)
  (folder / 'preprocessor_config.json').write_text(
    '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
  )
  config.weights.path = str(folder)
  modes.run('train', config, str(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert 'set --config.model.norm_eps=1e-12' in out
  assert 'images had data.mean=[0.5, 0.5, 0.5] there' in out
  assert 'attention heads' not in out  # config.json tells them


@pytest.mark.parametrize('layout', ['timm', 'hf', 'torchvision', 'google'])
@pytest.mark.parametrize('form', ['safetensors', 'npz'])
def test_an_export_evaluates_like_its_run(config, tmp_path, layout, form):
  config.model.norm_eps = 1e-6
  modes.run('train', config, str(tmp_path / 'run'))
  config.export.update(layout=layout, format=form)
  modes.run('export', config, str(tmp_path / 'run'))
  folder = tmp_path / 'run' / 'export'
  parity = json.loads((folder / 'parity.json').read_text())
  assert parity['reads_back_equal'] is True
  assert parity['bytes'] == (folder / f'model.{form}').stat().st_size
  config.weights.path = str(folder / f'model.{form}')
  modes.run('eval', config, str(tmp_path / 'again'))
  assert results(tmp_path / 'again')['loss'] == pytest.approx(
    results(tmp_path / 'run')['loss'], rel=1e-5
  )
  if layout == 'hf':
    assert json.loads((folder / 'config.json').read_text())['hidden_size'] == 24


def test_an_export_without_a_place_for_a_parameter_is_refused(config, tmp_path):
  config.model.layer_scale = 1.0
  config.weights.path = ''
  modes.run('train', config, str(tmp_path))
  config.export.layout = 'torchvision'
  with pytest.raises(ExportError, match=r'no place for .*scale1') as error:
    modes.run('export', config, str(tmp_path))
  assert '--config.export.layout' in str(error.value)


def test_an_export_with_another_epsilon_is_refused(config, tmp_path):
  modes.run('train', config, str(tmp_path))
  config.model.norm_eps = 0.1
  with pytest.raises(ExportError, match='set --config.model.norm_eps=1e-06'):
    modes.run('export', config, str(tmp_path))


def test_an_export_leaves_nothing_of_the_one_before(config, tmp_path):
  modes.run('train', config, str(tmp_path))
  config.export.layout = 'hf'
  modes.run('export', config, str(tmp_path))
  config.export.update(layout='timm', format='npz')
  modes.run('export', config, str(tmp_path))
  folder = tmp_path / 'export'
  names = {path.name for path in folder.iterdir()}
  assert names == {'model.npz', 'parity.json', 'README.md'}
  # Nothing that is not ours goes, nor anything before the new file is there.
  (folder / 'notes.txt').write_text('')
  config.model.layer_scale = 1.0
  with pytest.raises(WeightsError, match='missing'):
    modes.run('export', config, str(tmp_path))
  names = {path.name for path in folder.iterdir()}
  assert names == {'README.md', 'model.npz', 'parity.json', 'notes.txt'}


def test_nothing_to_export_is_said(config, tmp_path):
  config.weights.path = ''
  with pytest.raises(ExportError, match='holds no checkpoint to export'):
    modes.run('export', config, str(tmp_path))


@pytest.mark.parametrize(
  'content', [b'<!DOCTYPE html>', b'\x80\x02}q\x00.', b'PK\x05\x06junk']
)
def test_a_false_file_is_one_line_and_exit_code_2(
  call_main, tmp_path, content
):
  path = tmp_path / 'weights.pth'
  path.write_bytes(content)
  done = call_main(
    *TINY, f'--config.weights.path={path}', f'--workdir={tmp_path / "run"}'
  )
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1, done.stderr
  assert str(path) in done.stderr


# The hub. Tests have no network: the cache is laid out as huggingface_hub does.

SHA = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
  """As HF_HUB_CACHE and HF_HUB_OFFLINE=1, which are read on import."""
  constants = pytest.importorskip('huggingface_hub.constants')
  cache = tmp_path / 'hub'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  return cache


@pytest.fixture
def hub_cache(empty_cache):
  """A cache that holds somebody/tiny-vit at the commit SHA."""
  model = empty_cache / 'models--somebody--tiny-vit'
  (model / 'refs').mkdir(parents=True)
  (model / 'refs' / 'main').write_text(SHA)
  shutil.copytree(FIXTURES / 'hf_vit', model / 'snapshots' / SHA)


SMALL = (
  *TINY, '--config.quant.recipe=none', '--config.model.width=24',
  '--config.model.depth=2', '--config.model.heads=3',
  '--config.model.mlp_dim=40', '--config.model.image_size=16',
  '--config.train.steps=2', '--config.model.norm_eps=1e-12',
)  # fmt: skip


@pytest.mark.slow
def test_the_cache_is_used_and_the_commit_pinned(
  hub_cache, call_main, tmp_path
):
  flags = (*SMALL, '--config.weights.path=hf://somebody/tiny-vit')
  workdir = tmp_path / 'run'
  done = call_main(*flags, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  assert 'HuggingFace ViT layout' in done.stdout
  pinned = f'hf://somebody/tiny-vit@{SHA}'
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['weights']['path'] == pinned
  metadata = Checkpoints(workdir / 'checkpoints', writer=False).metadata(2)
  assert metadata['config']['weights']['path'] == pinned
  # The same command goes on, although the config names no commit.
  more = call_main(
    *flags, '--config.train.steps=4', f'--workdir={workdir}'
  )
  assert more.returncode == 0, more.stderr
  assert 'resuming at step 2' in more.stdout
  assert 'weights.path' not in more.stdout
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['weights']['path'] == pinned


@pytest.mark.slow
def test_without_network_and_cache_it_says_what_to_fetch(
  empty_cache, call_main, tmp_path
):
  flags = (*SMALL, f'--workdir={tmp_path / "run"}')
  path = '--config.weights.path=hf://somebody/tiny-vit'
  done = call_main(*flags, path)
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1, done.stderr
  for part in (
    'hf://somebody/tiny-vit', 'model.safetensors and config.json',
    '--config.weights.path=FOLDER',
  ):  # fmt: skip
    assert part in done.stderr
  done = call_main(*flags, path, '--config.weights.required=false')
  assert done.returncode == 0, done.stderr
  assert 'NOT PRETRAINED: ' in done.stdout
  assert 'because weights.required is False' in done.stdout


@pytest.mark.parametrize('address', ['hf://', 'hf://name', 'hf://a/b/c@d@e'])
def test_a_malformed_address_is_refused(config, tmp_path, address):
  config.weights.path = address
  with pytest.raises(WeightsError, match='OWNER/NAME@REVISION'):
    modes.run('train', config, str(tmp_path))


@pytest.mark.slow
def test_a_real_vit_keeps_its_accuracy(tmp_path, cifar_dir):
  """73.45 % on the first 2,000 test images, by the weights' own README."""
  path = SHARED / 'weights' / 'vits14_c100_98px_timm.fp16.safetensors'
  if not path.is_file():
    pytest.skip('the real ViT-S/14 is not here')
  done = run_main(
    '--config=configs/vit_cifar100_finetune.py', '--mode=eval',
    f'--config.weights.path={path}', '--config.eval.num_examples=2000',
    '--config.model.dtype=float32', f'--config.data.dir={cifar_dir}',
    f'--workdir={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert results(tmp_path)['top1'] == pytest.approx(0.7345, abs=0.003)


@pytest.mark.slow
def test_vit_l_loads_quickly_in_little_memory(tmp_path):
  """A random ViT-L of 1.2 GB; the peak counts everything but the file."""
  import subprocess
  import sys

  code = f"""
import sys, time
import numpy as np, safetensors.numpy, jax, jax.numpy as jnp
sys.path.insert(0, {str(FIXTURES.parents[1])!r})
from configs import common
from qvit_jax import models, tree, weights
config = common.get_config()
config.model.update(size='L/16', num_classes=1000)
images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
init = models.build_model(config).init
shapes = jax.eval_shape(init, jax.random.key(0), images)['params']
path = {str(tmp_path)!r} + '/l.safetensors'
if sys.argv[1] == 'make':
  zeros = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), shapes)
  safetensors.numpy.save_file(weights.translate(zeros, 'timm'), path)
else:
  started = time.monotonic()
  params, report = weights.load_weights(path, shapes)
  assert tree.num_elements(params) == 304326632
  assert 'torch' not in sys.modules
  from tests.conftest import peak_bytes
  print(time.monotonic() - started, peak_bytes())
"""
  for what in ('make', 'load'):
    done = subprocess.run(
      [sys.executable, '-c', code, what], capture_output=True, text=True,
      check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
  seconds, peak = map(float, done.stdout.split())
  size = (tmp_path / 'l.safetensors').stat().st_size
  print(f'{seconds:.1f} s, peak {peak / size:.2f} times the file')
  assert size > 1.2e9
  assert peak < 2.5 * size
