"""Weights of VGG and MobileNetV2 in the names of torchvision and timm."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import common
from qvit_jax import models, modes, tree
from qvit_jax.errors import ExportError, WeightsError
from qvit_jax.experiment import checks
from qvit_jax.models import batch_norm, vgg
from qvit_jax.models.mobilenet import STAGES
from qvit_jax.store.tensors import save_tensors
from qvit_jax.weights import (
  cnn_layouts,
  how_to_build,
  layout,
  layout_of,
  load_weights,
  read_weights,
  translate,
)
from qvit_jax.weights.keymap import KINDS, recognise
from qvit_jax.weights.layout import flatten_model
from qvit_jax.weights.layouts import LAYOUTS
from qvit_jax.weights.save import _places
from tests.conftest import ROOT, SHARED
from tests.small_cnns import (
  mobilenet_config,
  rich_variables,
  run_config,
  vgg_config,
)

# {'LIBRARY MODEL': {name: shape}} as torchvision 0.28 and timm 1.0.31 have it.
NAMES = json.loads((ROOT / 'tests/fixtures/cnn_names.json').read_text())
WEIGHTS = SHARED / 'weights'


def paper_config(name):
  """Returns a config of 'vgg11_bn' or 'mobilenet_v2 0.5', 1000 classes."""
  config = common.get_config()
  kind, _, width = name.partition(' ')
  if width:
    config.model.update(name=kind, size=width)
  else:
    norms = 'train' if '_bn' in kind else 'none'
    config.model.update(name='vgg', size=kind[3:5], batch_norm=norms)
  return config


@functools.cache
def shapes_of(name):
  return shapes(paper_config(name))


def shapes(config):
  size = config.model.image_size
  return jax.eval_shape(
    models.build_model(config).init, jax.random.key(0),
    jnp.zeros((1, size, size, 3)),
  )  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_every_tensor_of_the_libraries_has_its_place_and_shape(name):
  library, _, model = name.partition(' ')
  ours = flatten_model(shapes_of(model))
  key = layout_of(library, ours)
  places = _places(LAYOUTS[key], ours)
  assert places.keys() == ours.keys()
  found = {
    theirs: list(KINDS[row.kind].shape(ours[path].shape))
    for path, (row, theirs) in places.items()
  }
  expected = {
    theirs: shape for theirs, shape in NAMES[name].items()
    if not theirs.endswith('num_batches_tracked')
  }  # fmt: skip
  assert found == expected
  read = recognise(list(NAMES[name]))
  assert read.key == key and {*read.ours} == {*ours}
  assert not read.unknown


def test_facts_of_our_models_are_what_the_layouts_say():
  assert layout.COLLECTION == batch_norm.COLLECTION
  assert layout.EPSILON == batch_norm.EPSILON
  assert layout.WINDOWS == vgg.WINDOWS
  assert cnn_layouts.VGGS == vgg.SIZES
  stages = [(count, expansion > 1) for expansion, _, count, _ in STAGES]
  assert stages == [(n, i > 0) for i, n in enumerate(cnn_layouts.BLOCKS)]


MODELS = {
  'vgg': dict(),
  'vgg without norms': dict(batch_norm='none'),
  'vgg of the paper': dict(classifier='paper'),
  'mobilenet': None,
}


def small(monkeypatch, name, **fields):
  """Returns (config, variables) of a small model."""
  if MODELS[name] is None:
    config = mobilenet_config(monkeypatch, **fields)
  else:
    config = vgg_config(**MODELS[name], **fields)
  return config, rich_variables(config)


@pytest.fixture
def save(tmp_path):
  """Returns save(variables, layout): the path of a file."""

  def save(variables, layout='torchvision', **others):
    tensors = translate(variables, layout)
    tensors |= others
    path = tmp_path / 'x.safetensors'
    save_tensors(tensors, path, form='safetensors')
    return str(path)

  return save


def assert_equal(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for path, x in a.items():
    np.testing.assert_array_equal(x, b[path], err_msg=path)


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize('name', MODELS)
def test_models_are_written_and_read_back_bit_for_bit(
  monkeypatch, save, name, library
):
  config, variables = small(monkeypatch, name)
  path = save(variables, library)
  loaded, report = load_weights(path, shapes(config))
  assert_equal(loaded, variables)
  assert not report.reinitialised and not report.adapted
  assert report.layout.startswith(library)
  counters = {n for n in report.unused if n.endswith('num_batches_tracked')}
  assert counters == {*report.unused}
  has_norms = 'batch_stats' in variables
  line = f'unused: {len(counters)} times num_batches_tracked'
  assert (line in report.lines()) == has_norms
  assert bool(counters) == has_norms
  again = translate(loaded, library)
  for theirs, values in safetensors.numpy.load_file(path).items():
    np.testing.assert_array_equal(again[theirs], values)
    if theirs in counters:
      assert values.dtype == np.int64 and values == 0


def test_the_classifier_sees_channels_in_torchs_order():
  """A flattened [c, h, w] image times their kernel is ours of [h, w, c]."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(7, 7, 3)).astype(np.float32)
  kernel = rng.normal(size=(5, 3 * 49)).astype(np.float32)
  there = kernel @ image.transpose(2, 0, 1).ravel()
  for name, theirs in (
    ('linear_windows', kernel), ('conv_windows', kernel.reshape(5, 3, 7, 7))
  ):  # fmt: skip
    kind = KINDS[name]
    assert kind.shape((147, 5)) == theirs.shape
    ours = kind.forward(theirs, (147, 5))
    np.testing.assert_allclose(image.ravel() @ ours, there, rtol=1e-4)
    np.testing.assert_array_equal(kind.backward(ours), theirs)


@pytest.mark.parametrize('name', ['vgg of the paper', 'mobilenet'])
def test_a_head_of_other_classes_starts_fresh(monkeypatch, save, name):
  config, variables = small(monkeypatch, name)
  path = save(variables)
  config.model.num_classes = 7
  taken, report = read_weights(path, shapes(config))
  assert report.reinitialised == dict.fromkeys(
    ('head/kernel', 'head/bias'), '10 classes there, 7 here'
  )
  wanted = {*flatten_model(variables)} - {'head/kernel', 'head/bias'}
  assert {*taken} == wanted


def test_features_go_to_a_model_with_one_linear_layer(monkeypatch, save):
  _, variables = small(monkeypatch, 'vgg of the paper')
  taken, report = read_weights(save(variables), shapes(vgg_config()))
  assert report.reinitialised['head/kernel'] == (
    'it follows hidden layers, which the model does not have'
  )
  assert {'classifier.0.weight', 'classifier.3.bias'} <= {*report.unused}
  assert not any('fc' in name for name in taken)
  np.testing.assert_array_equal(
    taken['conv5_2/kernel'], variables['params']['conv5_2']['kernel']
  )


def refuses(path, config, *parts):
  with pytest.raises(WeightsError) as raised:
    load_weights(path, shapes(config))
  message = str(raised.value)
  assert '\n' not in message and len(message) < 1200
  for part in parts:
    assert part in message, message


def test_weights_of_another_structure_say_which_field_decides(
  monkeypatch, save
):
  config, variables = small(monkeypatch, 'vgg')
  path = save(variables)
  config.model.batch_norm = 'none'
  refuses(path, config, '(torchvision VGG-11 with BatchNorm and one linear',
          'no place for features.1.bias and 31 more (model.ba')  # fmt: skip
  config.model.update(batch_norm='train', size='13')
  refuses(path, config, 'VGG-11 with', 'missing conv1_2/bias and 11 more',
          '(model.size decides that)')  # fmt: skip
  config.model.update(size='11', classifier='paper')
  refuses(path, config, '(model.classifier decides that)')
  config.model.update(classifier='linear', channels=2)
  refuses(path, config, '[1, 3, 3, 3] there, [2, 3, 3, 3] wanted',
          'other shapes differ')  # fmt: skip


def test_a_model_of_another_library_is_refused(monkeypatch, save):
  config, variables = small(monkeypatch, 'vgg')
  mobile, _ = small(monkeypatch, 'mobilenet')
  refuses(save(variables), mobile, 'missing stem/kernel')
  with pytest.raises(ExportError, match=r'export.layout=torchvision_vgg or ti'):
    translate(variables, 'google')


# Padding: a fact of the file's origin.


def check(path, config):
  """Reads weights and compares what is known of them with a config."""
  _, report = read_weights(str(path), shapes(config))
  return checks.compare_facts(report, config)


@pytest.fixture
def mobile(monkeypatch, save):
  """Returns (config, path, tensors) of a MobileNetV2 of unknown origin."""
  config, variables = small(monkeypatch, 'mobilenet')
  return config, save(variables), translate(variables, 'torchvision')


def test_padding_that_is_not_known_is_asked_for(mobile):
  config, path, _ = mobile
  with pytest.raises(WeightsError) as raised:
    check(path, config)
  message = str(raised.value)
  assert '\n' not in message and 'do not say how their model pads' in message
  assert 'set --config.model.padding=torch' in message
  for padding in ('torch', 'same'):
    config.model.padding = padding
    check(path, config)


@pytest.mark.parametrize(
  ('text', 'known'),
  [('same', 'same'), ('TF SAME: stride-2 3x3 convs pad ...', 'same'),
   ('torch', 'torch'), ('symmetric', 'torch')],
)  # fmt: skip
def test_padding_in_the_header_counts(mobile, tmp_path, text, known):
  config, _, tensors = mobile
  path = tmp_path / 'y.safetensors'
  safetensors.numpy.save_file(tensors, path, {'padding': text})
  if known == 'torch':
    check(path, config)
  other = {'same': 'torch', 'torch': 'same'}[known]
  for wrong in {other, '' if known == 'same' else other}:
    config.model.padding = wrong
    with pytest.raises(WeightsError) as raised:
      check(path, config)
    message = str(raised.value)
    assert '\n' not in message
    assert f'of a model with padding {known!r}, but model.padding=' in message
    assert message.endswith(f'set --config.model.padding={known}')
  config.model.padding = known
  check(path, config)


@pytest.mark.parametrize(
  ('file', 'config_json', 'known'),
  [
    ('mobilenet_v2-7ebf99e0.safetensors', None, 'torch'),
    ('model.safetensors', {'architecture': 'mobilenetv2_100'}, 'torch'),
    ('model.safetensors', {'architecture': 'tf_mobilenetv2_100'}, 'same'),
    ('model.safetensors',
     {'pretrained_cfg': {'architecture': 'mobilenetv2_050'}}, 'torch'),
    ('mobilenet_v2.safetensors', {'architecture': 'resnet18'}, None),
  ],
)  # fmt: skip
def test_padding_is_told_by_names_of_files_and_architectures(
  mobile, tmp_path, file, config_json, known
):
  config, _, tensors = mobile
  folder = tmp_path / 'folder'
  save_tensors(tensors, folder / file, form='safetensors')
  if config_json:
    (folder / 'config.json').write_text(json.dumps(config_json))
  _, report = read_weights(str(folder / file), shapes(config))
  assert report.facts.get('padding') == known


def test_another_epsilon_goes_into_the_variances(mobile, tmp_path):
  config, _, tensors = mobile
  folder = tmp_path / 'folder'
  save_tensors(tensors, folder / 'model.safetensors', form='safetensors')
  (folder / 'config.json').write_text('{"architecture": "tf_mobilenetv2_100"}')
  taken, report = read_weights(str(folder), shapes(config))
  np.testing.assert_allclose(
    taken['batch_stats/stem_norm/var'],
    tensors['features.0.1.running_var'] + 1e-3 - 1e-5, rtol=1e-6,
  )  # fmt: skip
  assert 'epsilon of 0.001' in report.adapted['batch_stats/stem_norm/var']


def test_variances_below_zero_are_refused(mobile, tmp_path):
  config, _, tensors = mobile
  tensors['features.0.1.running_var'] = -tensors['features.0.1.running_var']
  path = tmp_path / 'y.safetensors'
  save_tensors(tensors, path, form='safetensors')
  refuses(str(path), config, 'negative variances in features.0.1.running_var')


def test_how_images_were_scaled_is_compared(mobile, tmp_path):
  config, _, tensors = mobile
  path = tmp_path / 'y.safetensors'
  config.model.padding = 'same'
  texts = {'padding': 'same', 'scale': 'x/127.5-1'}
  safetensors.numpy.save_file(tensors, path, texts)
  notes = check(path, config)
  assert [note[:42] for note in notes] == [
    'images had data.mean=[0.5, 0.5, 0.5] there', 'images had data.std=[0.5, '
    '0.5, 0.5] there,',
  ]  # fmt: skip
  config.data.update(mean=(0.5,) * 3, std=(0.5001,) * 3)
  assert not check(path, config)


def test_what_builds_an_export_is_said():
  def lines(name, layout, **fields):
    config = paper_config(name)
    config.model.update(fields)
    return how_to_build(models.architecture(config), {}, layout)

  assert lines('vgg11_bn', 'torchvision_vgg') == [
    'it fits torchvision.models.vgg11_bn(num_classes=1000)'
  ]
  assert lines('mobilenet_v2 0.5', 'timm_mobilenet_v2') == [
    "it fits timm.create_model('mobilenetv2_050', num_classes=1000)"
  ]
  built, padded = lines(
    'mobilenet_v2 0.5', 'torchvision_mobilenet_v2', padding='same'
  )
  assert built == (
    'it fits torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=1000)'
  )
  assert "model.padding='same'" in padded


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{}, {'batch_norm': 'none'}], ids=str)
def test_an_export_evaluates_like_its_run(tmp_path, fields):
  config = run_config(**fields)
  modes.run('train', config, str(tmp_path / 'run'))
  config.export.layout = 'torchvision'
  modes.run('export', config, str(tmp_path / 'run'))
  folder = tmp_path / 'run' / 'export'
  parity = json.loads((folder / 'parity.json').read_text())
  assert parity['reads_back_equal'] and parity['layout'] == 'torchvision_vgg'
  config.weights.path = str(folder / 'model.safetensors')
  modes.run('eval', config, str(tmp_path / 'again'))
  losses = [
    json.loads((tmp_path / name / 'results.json').read_text())['baseline'][
      'loss'
    ]
    for name in ('run', 'again')
  ]
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# The real MobileNetV2.


@pytest.fixture(scope='module')
def reference():
  path = WEIGHTS / 'mobilenet_v2_reference.npz'
  if not path.exists():
    pytest.skip('the real MobileNetV2 is not there')
  return dict(np.load(path))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('padding', 'logits'), [('same', 'logits_same'),
                          ('torch', 'logits_symmetric')],
)  # fmt: skip
def test_the_real_mobilenet_gives_the_logits_of_torch(
  reference, padding, logits
):
  config = paper_config('mobilenet_v2 1.0')
  config.model.update(image_size=160, padding=padding, dtype='float32')
  path = str(WEIGHTS / 'mobilenet_v2_224_imagenet_same.fp16.safetensors')
  variables, report = load_weights(path, shapes(config))
  assert report.facts['padding'] == 'same'
  assert report.facts['mean'] == [128 / 255] * 3
  x = reference['images'].astype(np.float32) / 128 - 1
  made = jax.jit(models.build_model(config).apply)(variables, x)
  assert np.abs(made - reference[logits]).max() < 1e-3
  tensors = safetensors.numpy.load_file(path)
  again = translate(variables, 'torchvision')
  assert again.keys() == tensors.keys()
  for name, values in tensors.items():
    np.testing.assert_array_equal(again[name], values)


# The library itself, where it is installed.


@pytest.fixture(scope='module')
def torchvision():
  """The library; it may lack its compiled operators."""
  torch = pytest.importorskip('torch', reason='torchvision needs PyTorch')
  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    library = torch.library.Library('torchvision', 'DEF')
    for operator in ('nms', 'qnms'):
      library.define(f'{operator}(Tensor a, Tensor b, float c) -> Tensor')
  return pytest.importorskip('torchvision', reason='not installed')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'size'),
  [('vgg11', 224), ('vgg11_bn', 224), ('vgg16', 64),
   ('mobilenet_v2 1.0', 224), ('mobilenet_v2 0.5', 224)],
)  # fmt: skip
def test_logits_are_torchvisions(torchvision, tmp_path, name, size):
  import torch

  torch.manual_seed(0)
  kind, _, width = name.partition(' ')
  options = {'width_mult': float(width)} if width else {}
  model = getattr(torchvision.models, kind)(**options).eval()
  with torch.no_grad():
    for path, x in model.state_dict().items():
      if path.endswith('running_mean'):
        x.normal_(0, 0.1)
      elif path.endswith('running_var'):
        x.uniform_(0.5, 1.5)
  tensors = {k: v.numpy() for k, v in model.state_dict().items()}
  path = str(tmp_path / 'x.safetensors')
  save_tensors(tensors, tmp_path / 'x.safetensors', form='safetensors')
  config = paper_config(name)
  config.model.update(image_size=size, dtype='float32')
  variables, _ = load_weights(path, shapes(config))
  images = np.random.default_rng(0).normal(size=(2, size, size, 3))
  images = images.astype(np.float32)
  made = jax.jit(models.build_model(config).apply)(variables, images)
  with torch.no_grad():
    theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
  assert np.abs(made - theirs).max() < 1e-5 * np.abs(theirs).max()
  again = translate(variables, 'torchvision')
  assert again.keys() == tensors.keys()
  for path, values in tensors.items():
    np.testing.assert_array_equal(again[path], values)
