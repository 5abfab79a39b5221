"""Food-101: as distributed, and as TFDS prepares it."""

import json
import re
import zipfile

import numpy as np
import pytest

from qvit_jax.data import find_data, open_data
from qvit_jax.errors import ConfigError, DataError
from tests.conftest import SHARED, make_digits_config
from tests.data.test_decode import save

CLASSES = {'waffles': 'Waffles', 'apple_pie': 'Apple pie'}
COUNTS = {'train': 3, 'test': 2}


def make_food(root):
  """Writes two classes whose red channel is their label, green their number."""
  lists = {'train': [], 'test': []}
  for label, name in enumerate(CLASSES):
    number = 0
    for split, count in COUNTS.items():
      for _ in range(count):
        pixels = np.full((8, 8, 3), (label * 100, number * 40, 0), np.uint8)
        save(root / 'images' / name / f'{10 - number}.jpg', pixels)
        lists[split].append(f'{name}/{10 - number}')
        number += 1
  meta = root / 'meta'
  meta.mkdir()
  (meta / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')
  (meta / 'labels.txt').write_text('\n'.join(CLASSES.values()) + '\n')
  for split, entries in lists.items():
    write_list(root, split, entries)
  return root


def write_list(root, split, entries):
  (root / 'meta' / f'{split}.txt').write_text('\n'.join(entries))
  value = {name: [] for name in CLASSES}
  for entry in entries:
    value.setdefault(entry.partition('/')[0], []).append(entry)
  (root / 'meta' / f'{split}.json').write_text(json.dumps(value))


@pytest.fixture
def config(tmp_path):
  config = make_digits_config()
  config.model.num_classes = 2
  config.data.update(source='folder', dir=str(tmp_path / 'food-101'))
  return config


@pytest.fixture
def root(tmp_path):
  return make_food(tmp_path / 'food-101')


def test_splits_are_those_of_meta_with_names_of_people(config, root):
  data = open_data(config, training=True)
  assert data.class_names == ('Waffles', 'Apple pie')
  assert data.description == (
    'food-101, 6 train, 4 eval images, streamed, 2 classes'
  )
  assert data.notes == () and data.eval_split == 'test'
  files = data.eval.records
  assert files.names == (
    'images/waffles/6.jpg', 'images/waffles/7.jpg', 'images/apple_pie/6.jpg',
    'images/apple_pie/7.jpg',
  )  # fmt: skip
  assert files.labels.tolist() == [0, 0, 1, 1]
  rows = slice(0, 4)
  (batch,) = data.eval.eval_batches(batch=4, rows=rows)
  np.testing.assert_allclose(batch['image'][:, 0, 0, 0], [0, 0, 100, 100],
                             atol=3)  # fmt: skip
  assert batch['label'].tolist() == [0, 0, 1, 1]


def test_a_share_of_a_split_is_stratified(config, root):
  config.data.update(train_split='train[:67%]', eval_split='train[67%:]')
  data = open_data(config, training=True)
  assert np.bincount(data.train.records.labels).tolist() == [2, 2]
  assert np.bincount(data.eval.records.labels).tolist() == [1, 1]
  assert not {*data.train.records.names} & {*data.eval.records.names}


def test_digest_tells_other_lists_and_files(config, root):
  digest = lambda: open_data(config, training=False).evaluated['data']
  first = digest()
  assert re.fullmatch('[0-9a-f]{16}', first['digest'])
  assert digest() == first and first['name'] == 'food-101'
  save(root / 'images/waffles/6.jpg', np.zeros((9, 9, 3), np.uint8))
  assert digest() != first


def test_other_files_are_noted_and_not_read(config, root):
  save(root / 'images/waffles/777.jpg', np.zeros((8, 8, 3), np.uint8))
  for name in ('.DS_Store', '._6.jpg', 'Thumbs.db'):
    (root / 'images/waffles' / name).write_text('x')
  (root / 'images/__MACOSX').mkdir()
  data = open_data(config, training=True)
  assert (data.train.size, data.eval.size) == (6, 4)
  (note,) = data.notes
  assert note.startswith('images: 5 entries are in no list of meta/')


def fails(config, *parts, error=DataError, training=True):
  with pytest.raises(error) as raised:
    find_data(config)
    open_data(config, training=training)
  message = str(raised.value)
  assert '\n' not in message
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize(
  'name',
  ['classes.txt', 'labels.txt', 'train.txt', 'test.txt', 'train.json',
   'test.json'],
)
def test_a_missing_file_of_meta_is_one_line(config, root, name):
  (root / 'meta' / name).unlink()
  fails(config, f'has no meta/{name}; unpack', training=False)


def test_missing_folders_are_one_line(config, root):
  (root / 'images').rename(root / 'pictures')
  fails(config, 'it has no folder images; unpack')
  (root / 'pictures').rename(root / 'images')
  (root / 'meta').rename(root / 'data')
  fails(config, 'has no meta/classes.txt and no meta/labels.txt')


def test_missing_images_are_one_line(config, root):
  (root / 'images/waffles/6.jpg').unlink()
  fails(config, '1 images of meta/test.txt are not there: images/waffles/6.jpg')


@pytest.mark.parametrize(
  ('file', 'text', 'message'),
  [
    ('labels.txt', 'Waffles', 'classes.txt has 2 lines, meta/labels.txt 1'),
    ('labels.txt', 'Pie\nPie', 'meta/labels.txt names Pie twice'),
    ('classes.txt', 'waffles\ncurry', 'names apple_pie/10, apple_pie/8, '),
    ('classes.txt', '', 'meta/classes.txt is empty'),
    ('test.txt', 'waffles/6', 'disagree on apple_pie/6, apple_pie/7, waff'),
    ('test.txt', 'waffles/../x', 'names waffles/../x, of no class'),
    ('test.json', '{"waffles": 3}', 'no JSON object of lists of images (Type'),
    ('test.json', '[', 'is no JSON object of lists of images (JSONDecodeErr'),
    ('test.json', '{}', 'meta/test.txt and meta/test.json disagree on'),
  ],
)
def test_files_of_meta_that_disagree_are_one_line(
  config, root, file, text, message
):
  (root / 'meta' / file).write_text(text)
  fails(config, message, '; unpack food-101.tar.gz again')


def test_an_image_in_both_splits_is_one_line(config, root):
  write_list(root, 'test', ['waffles/10', 'apple_pie/6'])
  fails(config, 'meta/train.txt and meta/test.txt both name waffles/10')


def test_classes_without_images(config, root):
  write_list(root, 'test', ['waffles/6'])
  data = open_data(config, training=True)
  assert data.notes[1].startswith('test: no images of 1 of 2 classes (apple_p')
  write_list(root, 'train', ['waffles/10'])
  fails(config, 'meta/train.txt names no image of apple_pie')


def test_splits_that_are_not_there_are_one_line(config, root):
  config.data.eval_split = 'val'
  fails(config, "has no split 'val'; set --config.data.train_split")
  config.data.update(eval_split='test', train_split='trian[:50%]')
  fails(config, "has no split 'trian'")
  config.data.update(train_split='train', holdout=0.2)
  fails(config, 'data.holdout=0.2 would have no effect', error=ConfigError)


def test_a_link_out_of_the_folder_is_one_line(config, root, tmp_path):
  (tmp_path / 'x.jpg').write_bytes(b'x')
  (root / 'images/waffles/7.jpg').unlink()
  (root / 'images/waffles/7.jpg').symlink_to(tmp_path / 'x.jpg')
  fails(config, 'is a link that leaves')


def test_folders_that_are_named_as_splits_count_first(config, tmp_path):
  root = tmp_path / 'food-101'
  for name in ('train/images/a.png', 'train/meta/a.png', 'test/images/a.png',
               'test/meta/a.png', 'images/x.png', 'meta/x.png'):  # fmt: skip
    save(root / name, np.zeros((8, 8, 3), np.uint8))
  assert open_data(config, training=True).class_names == ('images', 'meta')


def test_the_real_subset_has_its_official_split(config, tmp_path):
  path = SHARED / 'data' / 'food-101-13class-160px.zip'
  if not path.exists():
    pytest.skip('the subset of Food-101 is not there')
  with zipfile.ZipFile(path) as file:
    file.extractall(tmp_path)
  config.model.num_classes = 13
  data = open_data(config, training=True)
  assert (data.train.size, data.eval.size) == (1875, 625)
  assert data.class_names[:3] == ('Apple pie', 'Baby back ribs', 'Baklava')
  assert len(data.class_names) == 13 and not data.notes
  assert np.bincount(data.eval.records.labels)[-3:].tolist() == [25, 19, 31]


@pytest.fixture
def prepared(root, tmp_path, monkeypatch):
  """Food-101 in two classes as TFDS's own builder prepares it: its folder."""
  tfds = pytest.importorskip('tensorflow_datasets')
  manager = tfds.download.DownloadManager
  monkeypatch.setattr(
    manager, 'download_and_extract', lambda self, url: str(tmp_path)
  )
  place = tmp_path / 'tfds'
  builder = tfds.builder('food101', data_dir=place, file_format='array_record')
  builder.download_and_prepare()
  return place


def test_tfds_has_the_same_images_and_streams_them(config, root, prepared):
  config.model.num_classes = 101
  own = open_data(config, training=True)
  config.data.update(
    source='tfds', name='food101', dir=str(prepared), eval_split='validation'
  )
  data = open_data(config, training=True)
  assert (data.train.size, data.eval.size) == (6, 4)
  assert data.description == 'food101, 6 train, 4 eval images, streamed'
  assert data.class_names[:2] == ('apple_pie', 'baby_back_ribs')
  assert re.fullmatch('[0-9a-f]{16}', data.evaluated['data']['digest'])

  def pixels(split, names):
    (batch,) = split.eval_batches(batch=4, rows=slice(0, 4))
    labels = [names[i].lower().replace(' ', '_') for i in batch['label']]
    return sorted(zip(labels, batch['image'].tolist(), strict=True))

  assert pixels(data.eval, data.class_names) == pixels(
    own.eval, own.class_names
  )
  config.data.eval_split = 'test'
  fails(config, "split 'test' of food101 cannot be read", 'train, validation')
