"""--mode=predict: files in, classes with probabilities out."""

import collections
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from PIL import Image

from qvit_jax import models, modes
from qvit_jax.data import batches, open_images
from qvit_jax.errors import CheckpointError, ConfigError, DataError
from qvit_jax.experiment import sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.report import predictions
from qvit_jax.store import adapters, artifacts, runs
from tests import small_models
from tests.conftest import make_digits_config
from tests.data.test_folder import make_folder, noise, save


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A digits run of a few steps; returns its workdir."""
  workdir = tmp_path_factory.mktemp('predict') / 'run'
  config = make_digits_config()
  config.train.steps = 3
  modes.run('train', config, str(workdir))
  return workdir


def write_images(folder, count=7):
  """Writes images of several sizes and kinds; returns their names, sorted."""
  for i in range(count):
    channels = (3, 1, 4)[i % 3]
    save(folder / f'{i}.png', noise(8 + i, 8 + 2 * i, channels, seed=i))
  save(folder / 'below/deeper/last.gif', noise(8, 8, 1, seed=99))
  return [f'{i}.png' for i in range(count)] + ['below/deeper/last.gif']


def predict(workdir, images, config=None, **fields):
  """Runs the mode; returns {file: classes} in the order of the file."""
  config = config or make_digits_config()
  config.eval.update(images=str(images), batch_size=3)
  config.update_from_flattened_dict(fields)
  modes.run('predict', config, str(workdir))
  text = (workdir / 'predictions.jsonl').read_text()
  found = [json.loads(line) for line in text.splitlines()]
  assert all(set(one) == {'file', 'classes'} for one in found)
  return {one['file']: one['classes'] for one in found}


def probabilities(workdir, images, names):
  """The model's own: softmax of its logits of Pillow's pixels."""
  config = make_digits_config()
  config.eval.images = str(images)
  data = open_images(config, tuple('0123456789'))
  experiment = Experiment(config, training=False, data=data)
  variables, _ = sources.evaluated(experiment, workdir)
  pixels = []
  for name in names:
    image = Image.open(images / name).convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    flat = Image.alpha_composite(white, image).convert('RGB')
    pixels.append(batches.fit(np.asarray(flat), 8) / np.float32(255))
  x = (np.stack(pixels) - config.data.mean) / np.array(config.data.std)
  x = jnp.asarray(x, jnp.float32)
  logits = jax.jit(experiment.model.module.apply)(variables, x)
  return scipy.special.softmax(np.asarray(logits, np.float64), axis=1)


def test_probabilities_are_those_of_the_models_logits(trained, tmp_path):
  names = write_images(tmp_path)
  found = predict(trained, tmp_path)
  assert list(found) == sorted(names)
  expected = probabilities(trained, tmp_path, sorted(names))
  for classes, row in zip(found.values(), expected, strict=True):
    order = np.argsort(-row)[:5]
    assert [one['index'] for one in classes] == order.tolist()
    assert [one['name'] for one in classes] == [str(i) for i in order]
    np.testing.assert_allclose(
      [one['probability'] for one in classes], row[order], rtol=1e-4
    )


def test_so_many_classes_as_asked_for_and_no_more_than_there_are(
  trained, tmp_path
):
  write_images(tmp_path, 1)
  for asked, given in ((1, 1), (3, 3), (50, 10)):
    found = predict(trained, tmp_path, **{'eval.top_k': asked})
    assert {len(classes) for classes in found.values()} == {given}
  shares = [one['probability'] for one in found['0.png']]
  assert shares == sorted(shares, reverse=True)
  assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_the_page_shows_mistakes_of_folders_that_are_classes(
  trained, tmp_path, monkeypatch
):
  monkeypatch.setattr(predictions, 'MOST', 5)
  for i in range(9):
    name = '<b>&.png' if i == 4 else f'{i}.png'
    save(tmp_path / '37'[i % 2] / name, noise(20, 9, 3, seed=i))
  save(tmp_path / 'other' / 'x.png', noise(8, 8, 3, seed=99))
  found = predict(trained, tmp_path)
  page = (trained / 'predictions.html').read_text()
  named = {file: classes[0]['name'] for file, classes in found.items()}
  right = sum(name[0] == named[name] for name in named if 'other' not in name)
  assert f'9 lie in folders that are named as classes: {right} of' in page
  pairs = collections.Counter(
    (name[0], top) for name, top in named.items()
    if 'other' not in name and name[0] != top
  )  # fmt: skip
  for (label, top), times in pairs.items():
    assert f'<td>{label}</td><td>{top}</td><td>{times}</td>' in page
  assert f'5 of {9 - right}, the surest first' in page
  sure = max(
    classes[0]['probability'] for name, classes in found.items()
    if 'other' not in name and name[0] != classes[0]['name']
  )  # fmt: skip
  shown = page.partition('Mistakes</h2>')[2]
  assert f'{100 * sure:.1f}&nbsp;%' in shown[: shown.index('</figure>')]
  assert 'The first 5 of 10' in page
  assert page.count('data:image/jpeg;base64,') == 10
  assert '&lt;b&gt;&amp;.png' in page
  assert '<b>&.png' not in page
  assert '<script' not in page
  assert 'http' not in page.replace('http-equiv', '')


def test_one_file_can_be_given(trained, tmp_path):
  write_images(tmp_path)
  found = predict(trained, tmp_path / '3.png')
  assert list(found) == ['3.png']
  beside = predict(trained, tmp_path)['3.png']
  for alone, among in zip(found['3.png'], beside, strict=True):
    assert alone['index'] == among['index']
    assert alone['probability'] == pytest.approx(among['probability'], rel=1e-4)


def test_unreadable_files_are_named_counted_and_left_out(
  trained, tmp_path, capsys
):
  names = write_images(tmp_path)
  (tmp_path / '1.png').write_bytes(b'')
  (tmp_path / 'zz.jpg').write_text('text')
  (tmp_path / 'notes.txt').write_text('text')
  capsys.readouterr()
  found = predict(trained, tmp_path)
  assert list(found) == sorted(set(names) - {'1.png'})
  out = capsys.readouterr().out
  assert f'{tmp_path}/1.png cannot be decoded (the file is empty)' in out
  assert f'{tmp_path}/zz.jpg cannot be decoded (it is none of' in out
  assert '2 files could not be decoded' in out
  assert '1 entries are hidden, links to folders or no image' in out
  assert '7 images; results in' in out


def test_a_folder_of_unreadable_files_gives_an_empty_file(trained, tmp_path):
  for i in range(40):
    (tmp_path / f'{i}.jpg').write_text('text')
  assert predict(trained, tmp_path) == {}


def test_what_a_file_is_predicted_as_does_not_depend_on_its_neighbours(
  trained, tmp_path
):
  write_images(tmp_path)
  whole = predict(trained, tmp_path)
  for name in ('0.png', '2.png', '4.png'):
    (tmp_path / name).write_bytes(b'')
  some = predict(trained, tmp_path)
  assert len(some) == len(whole) - 3
  for name, classes in some.items():
    assert [one['index'] for one in classes] == [
      one['index'] for one in whole[name]
    ]


def test_class_names_are_those_saved_with_the_run(tmp_path, capsys):
  make_folder(tmp_path / 'set', classes=('a cat', 'dög', 'eel'))
  config = make_digits_config()
  config.model.num_classes = 4
  config.data.update(
    source='folder', dir=str(tmp_path / 'set'), eval_split='val'
  )
  config.train.update(steps=1, batch_size=4)
  modes.run('train', config, str(tmp_path / 'run'))
  os.rename(tmp_path / 'set', tmp_path / 'moved')  # is not needed any more
  capsys.readouterr()
  images = tmp_path / 'moved/val/eel'
  found = predict(tmp_path / 'run', images, config)
  assert len(found) == 4
  names = {one['index']: one['name'] for one in found['000.png']}
  assert names == {0: 'a cat', 1: 'dög', 2: 'eel', 3: 'class 3'}
  assert '3 class names saved with the model' in capsys.readouterr().out


def adapter_file(workdir, class_names):
  """Writes a file of adapters that are zero; returns its config."""
  config = make_digits_config()
  config.lora.update(rank=2, targets=('all',))
  experiment = Experiment(config, training=False)
  kept = experiment.model.kept(experiment.abstract_variables())
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), kept)
  facts = experiment.metadata() | {'step': 1, 'class_names': class_names}
  path = adapters.path_of(config, workdir)
  path.parent.mkdir()
  adapters.save(path, zeros, facts)
  return config, experiment


def test_adapters_have_the_class_names_of_their_own_training(trained, tmp_path):
  letters = list('abcdefghij')
  config, experiment = adapter_file(tmp_path, letters)
  config.checkpoint.path = str(trained)  # the base, trained on digits
  assert sources.class_names(config, tmp_path)[0] == letters
  with pytest.raises(CheckpointError, match="label 0 is 'a' there, '0' here"):
    sources.evaluated(experiment, tmp_path)


def test_weights_of_a_run_have_its_class_names(trained, tmp_path):
  config = make_digits_config()
  config.weights.path = str(trained)
  names, _ = sources.class_names(config, tmp_path)
  assert names == list('0123456789')


def test_a_packed_model_names_classes_too(trained, tmp_path):
  write_images(tmp_path / 'images')
  config = small_models.rich_config()
  params = small_models.random_params(config)
  packed = small_models.pack(config, 'int8_weight_only', params)
  path = tmp_path / 'row.safetensors'
  names = [f'digit {i}' for i in range(10)]
  facts = models.architecture(config)
  artifacts.save(packed, path, facts, class_names=names)
  assert runs.open_run(path).class_names == names
  config.quant.recipe = 'ptq'
  config.checkpoint.path = str(path)
  place = tmp_path / 'out'
  found = predict(place, tmp_path / 'images', config)
  assert {one['name'] for one in found['0.png']} <= set(names)
  artifacts.save(packed, path, facts)
  found = predict(place, tmp_path / 'images', config)
  assert {one['name'] for one in found['0.png']} <= {
    f'class {i}' for i in range(10)
  }


@pytest.mark.parametrize(
  ('images', 'error', 'part'),
  [
    ('', ConfigError, '--config.eval.images'),
    ('/nothing/here', DataError, "eval.images='/nothing/here' does not exist"),
    ('empty', DataError, 'is empty'),
    ('texts', DataError, 'holds no file that ends in .jpg'),
    ('links', DataError, 'x.png is a link that leaves'),
  ],
)
def test_a_wrong_folder_is_one_line(trained, tmp_path, images, error, part):
  for name in ('empty', 'texts', 'links'):
    (tmp_path / name).mkdir()
  (tmp_path / 'texts/a.txt').write_text('')
  save(tmp_path / 'x.png', noise())
  (tmp_path / 'links/x.png').symlink_to(tmp_path / 'x.png')
  config = make_digits_config()
  config.eval.images = str(tmp_path / images) if images else ''
  with pytest.raises(error) as raised:
    modes.run('predict', config, str(trained))
  assert part in str(raised.value) and '\n' not in str(raised.value)


def test_a_workdir_without_a_run_is_one_line(tmp_path):
  save(tmp_path / 'images/x.png', noise())
  config = make_digits_config()
  config.eval.images = str(tmp_path / 'images')
  with pytest.raises(CheckpointError, match='holds no checkpoint'):
    modes.run('predict', config, str(tmp_path / 'run'))


def test_an_interrupted_run_leaves_the_old_file(trained, tmp_path, monkeypatch):
  write_images(tmp_path)
  predict(trained, tmp_path)
  before = (trained / 'predictions.jsonl').read_bytes()

  def stop(*unused):
    raise KeyboardInterrupt

  monkeypatch.setattr(jax, 'device_get', stop)
  with pytest.raises(KeyboardInterrupt):
    predict(trained, tmp_path / '0.png')
  assert (trained / 'predictions.jsonl').read_bytes() == before


def test_the_command_line_predicts(call_main, trained, tmp_path):
  save(tmp_path / 'x.png', noise())
  done = call_main(
    '--config=configs/vit_ti_digits_w4a4.py', '--mode=predict',
    '--config.quant.recipe=none', '--config.model.patch=4',
    '--config.model.width=16', '--config.model.depth=1',
    '--config.model.heads=2', '--config.model.mlp_dim=32',
    f'--workdir={tmp_path / "out"}', f'--config.checkpoint.path={trained}',
    f'--config.eval.images={tmp_path}', '--config.eval.top_k=2',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (line,) = (tmp_path / 'out/predictions.jsonl').read_text().splitlines()
  assert len(json.loads(line)['classes']) == 2
