"""`qvit_jax.load` and `quantize`: real images in, our own evaluation out."""

import concurrent.futures
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import qvit_jax
from qvit_jax import models, modes, weights
from qvit_jax.data import digits, preprocess
from qvit_jax.errors import ConfigError, DataError, QuantError, QvitError
from qvit_jax.experiment import sources, statistics
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.ptq_table import Table
from tests import small_cnns
from tests.conftest import ROOT, make_digits_config, run_python

FIXTURES = ROOT / 'tests' / 'fixtures'
IMAGES = digits.load()['test'][0][:70]
RECIPES = ('none', 'aqt', 'lsq', 'statsq', 'qvit')


def config_of(recipe='none', **sections):
  config = make_digits_config()
  config.quant.recipe = recipe
  if recipe in RECIPES[1:]:
    config.quant.default = 'w8a8'
  config.train.update(batch_size=16, steps=2)
  config.eval.update(every=2, num_examples=len(IMAGES))
  config.log.tensorboard = False
  for name, fields in sections.items():
    config[name].update(fields)
  return config


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Runs of every recipe, packed ones, adapters and a MobileNetV2."""
  place = tmp_path_factory.mktemp('made')
  for recipe in RECIPES:
    modes.run('train', config_of(recipe), str(place / recipe))
  config = config_of('aqt', export={'format': 'packed'})
  modes.run('export', config, str(place / 'aqt'))
  lora = {'rank': 2, 'targets': ('query', 'value')}
  config = config_of(lora=lora, checkpoint={'path': str(place / 'none')})
  modes.run('train', config, str(place / 'lora'))
  return place


def ours(config, place):
  """Logits of the evaluation split as `--mode=eval` computes them."""
  packed = sources.open_packed(config)
  experiment = Experiment(config, training=False, packed=packed)
  variables, _ = sources.evaluated(experiment, place)
  model, data = experiment.config.model, experiment.config.data
  images = preprocess.prepare_eval(
    jnp.asarray(IMAGES), data=data, size=model.image_size
  )
  return np.asarray(jax.jit(experiment.model.module.apply)(variables, images))


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_run_gives_the_logits_of_its_evaluation(recipe, made):
  model = qvit_jax.load(made / recipe)
  expected = ours(config_of(recipe), made / recipe)
  found = model(IMAGES)
  assert found.dtype == np.float32
  near = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=near)
  assert model.class_names == tuple('0123456789')
  step = qvit_jax.load(made / recipe / 'checkpoints' / '2')
  np.testing.assert_array_equal(step(IMAGES), found)


def test_a_packed_file_gives_its_logits(made, tmp_path):
  path = made / 'aqt' / 'export' / 'model.packed.safetensors'
  config = config_of('ptq', checkpoint={'path': str(path)})
  found = qvit_jax.load(path)(IMAGES)
  np.testing.assert_array_equal(found, ours(config, made))
  # What a run saves is what its export packs.
  again = tmp_path / 'again.safetensors'
  qvit_jax.load(made / 'aqt').save(again)
  np.testing.assert_array_equal(qvit_jax.load(again)(IMAGES), found)


def test_adapters_lie_on_their_base(made):
  config = config_of(lora={'rank': 2, 'targets': ('query', 'value')})
  expected = ours(config, made / 'lora')
  for path in ('', 'adapters/adapter.safetensors'):
    model = qvit_jax.load(made / 'lora' / path)
    np.testing.assert_allclose(model(IMAGES), expected, rtol=0, atol=1e-5)
  with pytest.raises(QvitError, match='merge_lora'):
    model.save(made / 'no.safetensors')


@pytest.mark.parametrize(
  'name', ['timm.safetensors', 'hf_vit', 'torchvision.safetensors']
)
def test_weights_of_others_say_what_they_are(name):
  path = FIXTURES / name
  fields = {'model.heads': 2, 'model.image_size': 32}
  with pytest.warns(UserWarning, match='nothing tells it'):
    model = qvit_jax.load(path, None if name == 'hf_vit' else fields)
  size = model.config.model.image_size
  images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3))
  images = images.astype(np.uint8)
  shapes = jax.eval_shape(
    models.build_model(model.config).init, jax.random.key(0),
    np.zeros((1, size, size, 3), np.float32),
  )['params']  # fmt: skip
  params, _ = weights.load_weights(str(path), shapes)
  expected = models.build_model(model.config).apply(
    {'params': params},
    preprocess.prepare_eval(
      jnp.asarray(images), data=model.config.data, size=size
    ),
  )
  near = 1e-5 * float(np.abs(expected).max())
  np.testing.assert_allclose(model(images), expected, rtol=0, atol=near)


def test_a_mobilenet_with_its_norms(tmp_path, monkeypatch):
  config = small_cnns.mobilenet_config(monkeypatch)
  config.train.update(batch_size=16, steps=2)
  config.eval.update(every=2, num_examples=len(IMAGES))
  config.log.tensorboard = False
  modes.run('train', config, str(tmp_path))
  model = qvit_jax.load(tmp_path)
  expected = ours(config, tmp_path)
  near = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(model(IMAGES), expected, rtol=0, atol=near)
  small = qvit_jax.quantize(model, IMAGES, 'int8_weight_only')
  assert small(IMAGES).shape == expected.shape


def test_threads_and_batch_sizes_share_few_programs(made):
  model = qvit_jax.load(made / 'none')
  expected = model(IMAGES)
  counts = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 32, 33, 60, 70]
  start = threading.Barrier(8)

  def work(thread):
    start.wait()
    return [(n, model(IMAGES[:n])) for n in counts[thread::8]]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = [pair for pairs in pool.map(work, range(8)) for pair in pairs]
  assert len(found) == len(counts)
  for n, logits in found:
    near = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected[:n], rtol=0, atol=near)
  assert len(model._programs) <= 5
  assert model(IMAGES[:0]).shape == (0, 10)
  many = np.concatenate([IMAGES] * 4)  # more than a program takes
  np.testing.assert_allclose(model(many)[210:], expected, rtol=0, atol=near)
  assert len(model._programs) <= 5


def test_files_and_pictures_are_read_like_those_of_predict(made, tmp_path):
  rng = np.random.default_rng(0)
  pictures = [
    Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    for shape in ((9, 30, 3), (8, 8, 3), (40, 20, 3), (16, 16))
  ]
  paths = [tmp_path / 'images' / f'{i}.png' for i in range(len(pictures))]
  paths[0].parent.mkdir()
  for picture, path in zip(pictures, paths, strict=True):
    picture.save(path)
  model = qvit_jax.load(made / 'none')
  found = model.predict(paths, top_k=3)
  assert found == model.predict(pictures, top_k=3)
  config = config_of(eval={'images': str(paths[0].parent), 'top_k': 3})
  config.checkpoint.path = str(made / 'none')
  modes.run('predict', config, str(tmp_path / 'run'))
  lines = (tmp_path / 'run' / 'predictions.jsonl').read_text().splitlines()
  for line, classes in zip(lines, found, strict=True):
    for there, here in zip(json.loads(line)['classes'], classes, strict=True):
      assert there['name'] == here['name']
      assert there['probability'] == pytest.approx(here['probability'], 1e-5)
  text = model.summary()
  assert 'step 2 of' in text
  assert '3,306 parameters' in text


def test_a_quantized_classifier_is_that_of_the_table(made, tmp_path):
  model = qvit_jax.load(made / 'none')
  images = digits.load()['train'][0][:64]
  small = qvit_jax.quantize(model, images, 'int8_static')
  error = np.abs(small(IMAGES) - model(IMAGES)).max()
  assert 0 < error < 0.1 * np.abs(model(IMAGES)).max()
  path = tmp_path / 'small.safetensors'
  assert small.save(path) == path.stat().st_size
  again = qvit_jax.load(path)
  np.testing.assert_array_equal(again(IMAGES), small(IMAGES))
  assert again.class_names == model.class_names
  # A float model that was saved is one that can be quantized.
  model.save(tmp_path / 'float.safetensors')
  saved = qvit_jax.load(tmp_path / 'float.safetensors')
  again = qvit_jax.quantize(saved, images, 'int8_static')
  np.testing.assert_array_equal(again(IMAGES), small(IMAGES))
  with pytest.warns(UserWarning, match='note:'):  # rows too short for a group
    qvit_jax.quantize(model, images, 'int4_weight_only_g32')
  # The order of the images changes no range: it is that of the table.
  config = config_of(ptq={
    'rows': ('int8_static',), 'calibration_examples': 64, 'rounds': 2,
    'engines': (),
  })  # fmt: skip
  config.checkpoint.path = str(made / 'none')
  experiment = Experiment(config, training=False, calibrating=True)
  variables, _ = sources.evaluated(experiment, tmp_path)
  table = Table(
    experiment, statistics.folded_params(config, variables), tmp_path,
    lambda line: None,
  )  # fmt: skip
  packed = table.pack('int8_static')
  order = experiment.data.train.train_batches(
    seed=0, batch=64, rows=slice(0, 64), first=1, last=1
  )
  seen = digits.load()['train'][0][next(order)['index']]
  same = qvit_jax.quantize(model, seen, 'int8_static')
  for a, b in zip(
    jax.tree.leaves(packed.variables), jax.tree.leaves(same._variables),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
  ('images', 'parts'),
  [
    (IMAGES.astype(np.float32), ['images are float32 [70, 8, 8, 3]', 'uint8']),
    (IMAGES[0], ['images are uint8 [8, 8, 3]', '[b, h, w, 3]']),
    ('picture.png', ['images are one str', 'a list']),
    ([3], ['images[0] is a int']),
    ([__file__], ['images[0]', 'test_classifier.py', 'cannot be read']),
    (['none.png'], ['images[0]', 'none.png', 'No such file']),
  ],
)
def test_what_is_no_image_is_one_line(images, parts, made):
  model = qvit_jax.load(made / 'none')
  with pytest.raises(DataError) as error:
    model(images)
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value)


def test_mistakes_of_quantize_and_load_are_one_line(made, tmp_path):
  model = qvit_jax.load(made / 'none')
  with pytest.raises(QuantError, match='no image to calibrate'):
    qvit_jax.quantize(model, IMAGES[:0])
  with pytest.raises(QvitError, match='w5x'):
    qvit_jax.quantize(model, IMAGES, 'w5x')
  with pytest.raises(QuantError, match='is quantized .* already'):
    qvit_jax.quantize(qvit_jax.load(made / 'aqt'), IMAGES)
  for path in (tmp_path, tmp_path / 'none', __file__):
    with pytest.raises(QvitError) as error:
      qvit_jax.load(path)
    assert '\n' not in str(error.value)
  with pytest.raises(ConfigError, match='model.hedas is unknown'):
    qvit_jax.load(FIXTURES / 'timm.safetensors', {'model.hedas': 3})
  with pytest.raises(ConfigError, match='ptq.rnage is unknown'):
    qvit_jax.quantize(model, IMAGES, 'int8_static', {'ptq.rnage': 'minmax'})
  with pytest.raises(ConfigError, match='ptq.range'):
    qvit_jax.quantize(model, IMAGES, 'int8_static', {'ptq.range': 'most'})
  with pytest.raises(ConfigError, match='optim.lr has no effect'):
    qvit_jax.load(made / 'none', {'optim.lr': 0.1})
  damaged = tmp_path / 'run'
  shutil.copytree(made / 'none', damaged)
  shutil.rmtree(damaged / 'checkpoints')
  with pytest.raises(QvitError):
    qvit_jax.load(damaged)


def test_the_package_is_imported_at_once_and_without_jax():
  code = (
    'import sys, qvit_jax; '
    'assert "jax" not in sys.modules; assert "numpy" not in sys.modules; '
    'print(sorted(set(qvit_jax.__all__)))'
  )
  assert run_python(code).strip() == "['Classifier', 'load', 'quantize']"


