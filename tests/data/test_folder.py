"""Folders of images: listing, shares, bad files, the whole run."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image

from configs import vit_b_tiny_imagenet_lora
from qvit_jax import modes
from qvit_jax.data import find_data, listing, open_data
from qvit_jax.errors import CheckpointError, ConfigError, DataError
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.store.checkpoint import Checkpoints
from tests.conftest import ROOT, SHARED, make_digits_config
from tests.data.test_decode import broken_files, noise, odd_files, save

# Listing.


def make_folder(root, splits=('train', 'val'), classes=('cat', 'dog'), count=4):
  """Writes PNGs whose red channel is their label, green their number."""
  for split in splits:
    for label, name in enumerate(classes):
      for i in range(count):
        pixels = np.full((8, 8, 3), (label, i, 0), np.uint8)
        save(root / split / name / f'{i:03d}.png', pixels)
  return root


@pytest.fixture
def folder_config(tmp_path):
  config = make_digits_config()
  config.model.num_classes = 3
  config.data.update(
    source='folder', dir=str(tmp_path / 'set'), eval_split='val'
  )
  config.train.update(steps=4, batch_size=4)
  config.eval.update(batch_size=4, every=2)
  config.log.every = 1
  return config


def opened(config, training=True):
  return open_data(config, training=training)


def all_of(split, batch=4):
  """Returns {(label, number)} of the unmasked images of a split."""
  found = []
  for one in split.eval_batches(batch=batch, rows=slice(0, batch)):
    keep = one['mask'] > 0
    pixels, labels = one['image'][keep][:, 0, 0], one['label'][keep]
    assert (pixels[:, 0] == labels).all()
    found += [(int(r), int(g)) for r, g, _ in pixels]
  return found


def test_split_class_file_is_read_in_the_order_of_names(
  folder_config, tmp_path
):
  root = make_folder(tmp_path / 'set', classes=('dog', 'cat', 'Ant'))
  data = opened(folder_config)
  assert data.class_names == ('Ant', 'cat', 'dog')
  assert data.train.size == data.eval.size == 12
  assert data.description == (
    'set, 12 train, 12 eval images, streamed, 3 classes'
  )
  files = data.eval.records
  assert files.names[:2] == ('val/Ant/000.png', 'val/Ant/001.png')
  assert files[11] == (str(root / 'val/dog/003.png'), 2)
  assert data.notes == ()


def test_opening_lists_without_opening_a_file(
  folder_config, tmp_path, monkeypatch
):
  make_folder(tmp_path / 'set')
  monkeypatch.setattr(Image, 'open', None)
  assert opened(folder_config).train.size == 8


def test_sites_never_look_at_the_folder(folder_config, capsys):
  folder_config.data.dir = '/nothing/is/here'
  modes.run('sites', folder_config, '')
  assert 'patch_embed' in capsys.readouterr().out


def test_images_beside_the_class_folders_are_said(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  save(root / 'train' / 'stray.PNG', np.zeros((8, 8, 3), np.uint8))
  data = opened(folder_config)
  assert data.train.size == 8
  (note,) = data.notes
  assert note == (
    'train: 1 images lie in no class folder and are not read: stray.PNG'
  )


def test_hidden_and_other_files_are_counted(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  for name in ('.DS_Store', 'Thumbs.db', 'notes.txt', '._000.png'):
    (root / 'train/cat' / name).write_text('x')
  (root / 'train/cat/x.jpg').mkdir()
  (root / 'train/.git').mkdir()
  (root / 'train/README').write_text('x')
  data = opened(folder_config)
  assert data.train.size == 8
  (note,) = data.notes
  assert note.startswith('train: 4 entries are hidden, links to folders')
  assert 'and 1 more' in note


def test_files_are_resized_by_the_method_of_the_config(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  for name in ('000', '001', '002', '003'):
    save(root / f'val/cat/{name}.png', noise(16, 16))
  folder_config.data.resize = 'bilinear'
  split = opened(folder_config).eval
  batch = next(split.eval_batches(batch=4, rows=slice(0, 4)))
  way = Image.Resampling.BILINEAR
  expected = np.asarray(Image.fromarray(noise(16, 16)).resize((8, 8), way))
  np.testing.assert_array_equal(batch['image'][0], expected)


def test_suffixes_are_those_of_any_case(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  os.rename(root / 'train/cat/000.png', root / 'train/cat/000.JPEG')
  assert opened(folder_config).train.size == 8


def fails(config, *parts, error=DataError, training=True):
  with pytest.raises(error) as raised:
    find_data(config)
    opened(config, training)
  message = str(raised.value)
  assert '\n' not in message
  for part in parts:
    assert part in message, message


def test_a_missing_empty_or_flat_folder_is_one_line(folder_config, tmp_path):
  root = tmp_path / 'set'
  fails(
    folder_config, f'data.dir={str(root)!r} does not exist', '--config.data'
  )
  root.write_text('')
  fails(folder_config, 'is a file')
  root.unlink()
  root.mkdir()
  fails(folder_config, 'is empty')
  (root / 'train').mkdir()
  fails(folder_config, 'train holds no class folders', 'train/CLASS')
  save(root / 'train/images/a.png', noise())
  fails(folder_config, 'have no labels')
  folder_config.data.dir = ''
  fails(folder_config, 'needs it', '--config.data.dir', error=ConfigError)
  folder_config.data.update(dir=str(root), name='cifar100')
  fails(folder_config, "data.name='cifar100'", error=ConfigError)


def test_classes_in_no_split_are_one_line(folder_config, tmp_path):
  for name in ('cat', 'dog'):
    save(tmp_path / 'set' / name / 'a.png', noise())
  fails(folder_config, "no folder 'val'; it has cat, dog", 'SPLIT/CLASS/')


def test_class_folders_that_differ_are_one_line(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  os.rename(root / 'val/cat', root / 'val/bird')
  fails(
    folder_config, 'class folders of train and val', 'only in val: bird',
    'give train images of them',
  )  # fmt: skip


@pytest.mark.parametrize('kind', ['missing', 'empty', 'empty there only'])
def test_classes_without_images_to_evaluate_are_noted(
  folder_config, tmp_path, kind
):
  root = make_folder(tmp_path / 'set', classes=('cat', 'dog'))
  if kind == 'empty there only':
    (root / 'val/eel').mkdir()
    expected = []
  else:
    make_folder(root, splits=('train',), classes=('ant',))
    if kind == 'empty':
      (root / 'val/ant').mkdir()
    expected = ['val: no images of 1 of 3 classes (ant)']
  data = opened(folder_config)
  assert len(data.class_names) == 2 + len(expected)
  files = data.eval.records
  found = dict(zip(files.names, files.labels.tolist(), strict=True))
  assert found['val/dog/000.png'] == len(data.class_names) - 1
  assert len(data.notes) == len(expected)
  for note, start in zip(data.notes, expected, strict=True):
    assert note.startswith(start)


def test_two_forms_of_one_name_are_one_class(folder_config, tmp_path):
  forms = [unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD')]
  root = make_folder(tmp_path / 'set', ('train',), (forms[0], 'tea'))
  make_folder(root, ('val',), (forms[1], 'tea'))
  data = opened(folder_config)
  assert data.class_names == (forms[0], 'tea')
  assert counts(data.eval, 2) == [4, 4]
  make_folder(root, ('train',), forms[1:])
  fails(folder_config, "the class 'café' twice", 'Unicode')


def test_names_that_differ_in_case_say_so(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set', ('train',))
  make_folder(root, ('val',), ('Cat', 'dog'))
  fails(folder_config, 'only in val: Cat', "'Cat' and 'cat' differ in case")


def test_images_below_a_class_folder_are_read(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  for name in ('train/cat/2021/a.png', 'train/cat/2021/may/b.png',
               'train/cat/__MACOSX/c.png', 'train/cat/.git/d.png'):  # fmt: skip
    save(root / name, noise())
  data = opened(folder_config)
  assert counts(data.train, 2) == [6, 4]
  assert '2 entries' in data.notes[0] and '__MACOSX' in data.notes[0]


@pytest.mark.parametrize(
  'name',
  ['__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found', '.git', '__pycache__',
   '#snapshot', '@tmp'],
)
def test_folders_of_systems_are_no_classes(folder_config, tmp_path, name):
  root = make_folder(tmp_path / 'set')
  save(root / 'train' / name / 'a.png', noise())
  assert opened(folder_config).class_names == ('cat', 'dog')
  make_folder(tmp_path / 'one', ('train',), count=20)
  save(tmp_path / 'one' / name / 'train/a.png', noise())
  folder_config.data.dir = str(tmp_path / 'one')
  assert opened(folder_config).eval.size == 4  # still held out


def test_one_class_only_is_one_line(folder_config, tmp_path):
  make_folder(tmp_path / 'set', classes=('cat',))
  fails(folder_config, 'one class only (cat)')


def test_an_empty_class_is_one_line(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  (root / 'train/eel').mkdir()
  (root / 'train/eel/list.txt').write_text('')
  (root / 'val/eel').mkdir()
  fails(folder_config, "class 'eel' is empty: train/eel in", '.jpeg')


def test_more_classes_than_outputs_are_one_line(folder_config, tmp_path):
  make_folder(tmp_path / 'set', classes=('a', 'b', 'c', 'd'))
  fails(folder_config, '4 classes', '--config.model.num_classes=4')


@pytest.mark.parametrize('name', ['train/cat/x.png', 'train/cow', 'val'])
def test_a_link_that_leaves_the_folder_is_one_line(
  folder_config, tmp_path, name
):
  root = make_folder(tmp_path / 'set', splits=('train',))
  make_folder(tmp_path / 'other', splits=('val',))
  if name != 'val':
    make_folder(root, splits=('val',))
  if name == 'train/cow':
    make_folder(root, splits=('val',), classes=('cat', 'dog', 'cow'))
  target = tmp_path / 'other/val' / ('' if name == 'val' else 'cat')
  target = target / '000.png' if name.endswith('png') else target
  (root / name).symlink_to(target)
  fails(folder_config, f'{name} is a link that leaves {root}', str(target))


def test_links_inside_the_folder_are_followed(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  (root / 'train/cat/999.png').symlink_to('000.png')
  (root / 'train/cat/gone.png').symlink_to('nothing.png')
  data = opened(folder_config)
  assert data.train.size == 9
  assert 'train/cat/gone.png' in data.notes[0]


def test_links_in_a_circle_are_no_images_and_no_classes(
  folder_config, tmp_path
):
  root = make_folder(tmp_path / 'set')
  for name in ('train/cat/999.png', 'train/eel', 'cow'):
    (root / name).symlink_to(os.path.basename(name))
  data = opened(folder_config)
  assert data.train.size == 8 and data.class_names == ('cat', 'dog')
  assert 'train/cat/999.png' in data.notes[0]
  folder_config.data.eval_split = 'vall'
  fails(folder_config, "no folder 'vall'; it has train, val")
  assert len(listing.list_images('eval.images', str(root))[0]) == 16


def test_a_list_that_cannot_be_read_is_one_line(tmp_path):
  with pytest.raises(DataError, match='cannot be read .Is a directory'):
    listing.lines(str(tmp_path))


@pytest.mark.parametrize(
  'split',
  [
    '',
    'train[',
    'train[90%]',
    'train[50%:20%]',
    'train[:120%]',
    'train[:1.2.3%]',
  ],
)
def test_a_malformed_share_is_one_line(folder_config, tmp_path, split):
  make_folder(tmp_path / 'set')
  folder_config.data.train_split = split
  fails(folder_config, repr(split), "'train[:80%]'", error=ConfigError)


def test_processes_that_find_other_files_are_one_line(
  folder_config, tmp_path, monkeypatch
):
  make_folder(tmp_path / 'set')
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for other, message in ((0, ''), (1, 'the processes of this run find other')):
    monkeypatch.setattr(
      multihost_utils, 'process_allgather',
      lambda own, other=other: np.stack([own, own + np.uint8(other)]),
    )  # fmt: skip
    with pytest.raises(DataError, match=message) if other else nullcontext():
      Experiment(folder_config, training=False)


# Shares and the hold-out.


def counts(split, classes=3):
  return np.bincount(split.records.labels, minlength=classes).tolist()


def test_a_tenth_of_each_class_is_held_out(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set', splits=('train',), count=20)
  make_folder(root, splits=('train',), classes=('elk',), count=10)
  data = opened(folder_config)
  assert counts(data.train) == [18, 18, 9] and counts(data.eval) == [2, 2, 1]
  both = [*data.train.records.names, *data.eval.records.names]
  assert len(set(both)) == 50
  assert data.notes[0] == "'val' has no folder: 10% of 'train' is held out"
  assert 'train[90%:] is a stratified share' in data.notes[2]


def test_the_hold_out_is_the_same_for_every_seed(folder_config, tmp_path):
  make_folder(tmp_path / 'set', splits=('train',), count=20)
  found = set()
  for seed in (0, 1):
    folder_config.seed = seed
    found.add(opened(folder_config, training=False).eval.records.names)
  assert len(found) == 1
  # Chance, not the first or last names of each class.
  numbers = {name[-7:-4] for name in found.pop()}
  assert numbers != {'018', '019'} and numbers != {'000', '001'}


def test_the_share_held_out_is_a_field(folder_config, tmp_path):
  make_folder(tmp_path / 'set', splits=('train',), count=20)
  folder_config.data.holdout = 0.25
  data = opened(folder_config)
  assert counts(data.train, 2) == [15, 15] and counts(data.eval, 2) == [5, 5]
  folder_config.data.holdout = 0.0
  fails(folder_config, "no folder 'val'; it has train")


def test_nothing_is_held_out_where_a_split_is_misspelt(folder_config, tmp_path):
  make_folder(tmp_path / 'set')
  folder_config.data.eval_split = 'vall'
  fails(folder_config, "no folder 'vall'; it has train, val")


def test_a_hold_out_beside_an_evaluation_folder_is_an_error(
  folder_config, tmp_path
):
  make_folder(tmp_path / 'set')
  folder_config.data.holdout = 0.2
  fails(folder_config, 'would have no effect', 'train[90%:]', error=ConfigError)


def test_eighty_ten_ten_of_the_training_folder(folder_config, tmp_path):
  """The predecessor's 80k/10k/10k, in the small."""
  make_folder(tmp_path / 'set', count=30)
  found = []
  for train, held in (
    ('train[:80%]', 'train[80%:90%]'), ('train[:80%]', 'train[90%:]')
  ):  # fmt: skip
    folder_config.data.update(train_split=train, eval_split=held)
    data = opened(folder_config)
    assert counts(data.train, 2) == [24, 24]
    assert counts(data.eval, 2) == [3, 3]
    found += [set(data.train.records.names), set(data.eval.records.names)]
  assert found[0] == found[2]
  assert len(found[0] | found[1] | found[3]) == 60


@pytest.mark.parametrize(
  ('train', 'held', 'count'),
  [
    ('train', 'train[80%:]', 4),
    ('train[:90%]', 'train[80%:]', 2),
    ('./train', 'train', 20),
    ('train[:80%]', 'train[80%:]', 0),
    ('train', 'val', 0),
  ],
)
def test_images_of_both_splits_are_counted_in_the_header(
  folder_config, tmp_path, train, held, count
):
  make_folder(tmp_path / 'set', count=10)
  folder_config.data.update(train_split=train, eval_split=held)
  data = opened(folder_config)
  names = [os.path.normpath(x) for x in data.train.records.names]
  both = set(names) & set(data.eval.records.names)
  assert len(both) == count
  line = f'{count} of the eval images are trained on too'
  assert (line in data.notes) == bool(count)


def test_every_stretch_of_the_order_is_stratified():
  labels = np.repeat(np.arange(3), (60, 30, 10))
  order = listing.stratify(labels)
  assert sorted(order.tolist()) == list(range(100))
  for start in range(0, 100, 10):
    found = np.bincount(labels[order[start : start + 10]], minlength=3)
    np.testing.assert_array_equal(found, [6, 3, 1])


def test_the_order_never_changes_between_versions():
  """Runs that resume after an update of NumPy rely on these numbers."""
  labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
  expected = [4, 0, 8, 7, 2, 5, 1, 9, 6, 3]
  assert listing.stratify(labels).tolist() == expected


def test_a_few_images_are_spread_over_the_classes(folder_config, tmp_path):
  make_folder(tmp_path / 'set', count=10)
  folder_config.eval.num_examples = 6
  assert counts(opened(folder_config).eval, 2) == [3, 3]


# Tiny-ImageNet.


def make_tiny(root):
  """Tiny-ImageNet as distributed, in the small."""
  for label, one in enumerate(('n03', 'n01', 'n02')):
    for i in range(3):
      pixels = np.full((8, 8, 3), (label, i, 0), np.uint8)
      save(root / f'train/{one}/images/{one}_{i}.JPEG', pixels, format='PNG')
      save(root / f'val/images/val_{label}{i}.JPEG', pixels, format='PNG')
    (root / f'train/{one}/{one}_boxes.txt').write_text(f'{one}_0.JPEG\t0\t0')
  (root / 'wnids.txt').write_text('n03\nn01\nn02\n')
  (root / 'words.txt').write_text(
    'n01\tegret\nn02\tcrane\nn03\tcrane\nn99\tnothing\n'
  )
  (root / 'val/val_annotations.txt').write_text(
    ''.join(
      f'val_{label}{i}.JPEG\t{one}\t0\t0\t7\t7\n'
      for i in range(3)
      for label, one in enumerate(('n03', 'n01', 'n02'))
    )
  )
  return root


def test_tiny_imagenet_is_read_as_distributed(folder_config, tmp_path):
  make_tiny(tmp_path / 'set')
  data = opened(folder_config)
  assert data.class_names == ('crane (n03)', 'egret', 'crane (n02)')
  expected = [(label, i) for label in range(3) for i in range(3)]
  assert all_of(data.eval) == all_of(data.train) == expected
  assert data.notes == ()


@pytest.mark.parametrize(
  ('line', 'part'),
  [
    ('val_00.JPEG\tn77\t0', "the class 'n77'"),
    ('val_99.JPEG\tn01\t0', 'no file val_99.JPEG'),
    ('../../secret.JPEG\tn01\t0', 'no file ../../secret.JPEG'),
    ('nonsense', "the class ''"),
  ],
)
def test_a_wrong_annotation_is_one_line(folder_config, tmp_path, line, part):
  path = make_tiny(tmp_path / 'set') / 'val/val_annotations.txt'
  path.write_text(path.read_text() + line + '\n')
  fails(folder_config, 'val_annotations.txt', part)


def test_a_class_that_is_not_unpacked_is_one_line(folder_config, tmp_path):
  root = make_tiny(tmp_path / 'set')
  os.rename(root / 'train/n02', tmp_path / 'n02')
  fails(folder_config, 'wnids.txt and train', 'only in wnids.txt: n02')


def test_the_test_images_of_tiny_imagenet_have_no_labels(
  folder_config, tmp_path
):
  root = make_tiny(tmp_path / 'set')
  save(root / 'test/images/test_0.png', noise())
  folder_config.data.eval_split = 'test'
  fails(folder_config, 'so its images have no labels')


def test_the_real_tiny_imagenet_subset(tmp_path):
  archive = SHARED / 'data/tiny-imagenet-200-subset.zip'
  if not archive.exists():
    pytest.skip('the subset of Tiny-ImageNet is not at hand')
  names = ('wnids.txt', 'words.txt', 'val/', 'train/n02124075/')
  with zipfile.ZipFile(archive) as file:
    for name in file.namelist():
      if name.partition('/')[2].startswith(names):
        file.extract(name, tmp_path)
  root = tmp_path / 'tiny-imagenet-200'
  for one in (root / 'wnids.txt').read_text().split():
    (root / 'train' / one / 'images').mkdir(parents=True, exist_ok=True)
  # Its splits are those that the shipped config names.
  config = vit_b_tiny_imagenet_lora.get_config()
  config.model.image_size = 64
  config.data.dir = str(root)
  config.eval.num_examples = 400
  data = opened(config, training=False)
  assert data.class_names[0] == 'Egyptian cat' and len(data.class_names) == 200
  assert counts(data.eval, 200) == [2] * 200
  (batch,) = data.eval.eval_batches(batch=400, rows=slice(0, 400))
  assert batch['mask'].sum() == 400 and 80 < batch['image'].mean() < 150
  is_grey = np.ptp(batch['image'], axis=-1).max((1, 2)) == 0
  assert 0 < is_grey.sum() < 40  # some files are grey


# Bad files in a run.


def spoil(root, *names):
  for name in names:
    (root / name).write_bytes(b'spoilt')


def train_images(split, seed=0, first=1, last=6):
  found = split.train_batches(
    seed=seed, batch=4, rows=slice(0, 4), first=first, last=last
  )
  return [(one['image'][:, 0, 0, :2].tolist(), one['label'].tolist(), set(one))
          for one in found]  # fmt: skip


def test_training_reads_the_next_good_file_instead(
  folder_config, tmp_path, capsys
):
  root = make_folder(tmp_path / 'set', count=4)
  sound = train_images(opened(folder_config).train)
  spoil(root, 'train/cat/001.png', 'train/cat/002.png', 'train/dog/003.png')
  data = opened(folder_config)
  found = train_images(data.train)
  instead = {(0, 1): (0, 3), (0, 2): (0, 3), (1, 3): (0, 0)}
  for (before, _, _), (after, labels, keys) in zip(sound, found, strict=True):
    expected = [list(instead.get(tuple(x), x)) for x in before]
    assert after == expected and labels == [label for label, _ in after]
    assert keys == {'image', 'label'}
  out = capsys.readouterr().out
  assert out.count('\n') == 3 and out.count('cannot be decoded') == 3
  assert f'{root}/train/cat/001.png' in out and 'of at most 10' in out
  assert data.bad_files.lines() == ['3 files could not be decoded']


def test_training_goes_on_at_any_step_in_the_same_way(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  spoil(root, 'train/cat/001.png', 'train/cat/002.png')
  whole = train_images(opened(folder_config).train)
  for first in (2, 5):
    assert (
      train_images(opened(folder_config).train, first=first)
      == whole[first - 1 :]
    )


def test_evaluation_masks_bad_files(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set')
  spoil(root, 'val/cat/001.png', 'val/dog/003.png')
  data = opened(folder_config, training=False)
  expected = {(label, i) for label in range(2) for i in range(4)}
  assert set(all_of(data.eval, 3)) == expected - {(0, 1), (1, 3)}
  assert len(data.bad_files.reasons) == 2


@pytest.mark.parametrize('limit', [0, 1])
def test_one_bad_file_too_many_is_an_error(
  folder_config, tmp_path, limit, capsys
):
  root = make_folder(tmp_path / 'set')
  spoil(root, 'val/cat/001.png', 'val/dog/003.png')
  folder_config.data.bad_files = limit
  data = opened(folder_config, training=False)
  name = ('val/cat/001.png', 'val/dog/003.png')[limit]
  with pytest.raises(DataError) as error:
    all_of(data.eval)
  message = str(error.value)
  assert f'{root}/{name} cannot be decoded (it is none of' in message
  assert f'data.bad_files={limit} is the most' in message
  assert capsys.readouterr().out.count('\n') == limit


def test_forty_odd_files_among_good_ones(folder_config, tmp_path, capsys):
  root = make_folder(tmp_path / 'set')
  broken, odd = broken_files(root / 'val/cat'), odd_files(root / 'val/dog')
  assert len(broken) + len(odd) >= 40
  folder_config.data.bad_files = 100
  data = opened(folder_config, training=False)
  assert data.eval.size == 8 + len(broken) + len(odd)
  rows = slice(0, 4)
  masks = [x['mask'] for x in data.eval.eval_batches(batch=4, rows=rows)]
  assert np.concatenate(masks).sum() == 8 + len(odd)
  assert {os.path.basename(name) for name in data.bad_files.reasons} == set(
    broken
  )
  out = capsys.readouterr().out
  assert all(name in out for name in broken)
  assert not any(name in out for name in odd)


def test_too_many_bad_files_in_a_row_end_a_training(folder_config, tmp_path):
  root = make_folder(tmp_path / 'set', count=60)
  spoil(root, *(f'train/cat/{i:03d}.png' for i in range(60)))
  folder_config.data.bad_files = 1000
  data = opened(folder_config)
  with pytest.raises(DataError, match='31 files before it cannot be decoded'):
    train_images(data.train)


def test_a_folder_of_bad_files_evaluates_to_an_empty_mask(
  folder_config, tmp_path
):
  root = make_folder(tmp_path / 'set')
  spoil(root, *(f'val/{c}/00{i}.png' for c in ('cat', 'dog') for i in range(4)))
  assert all_of(opened(folder_config, training=False).eval) == []


def run_folder(config, workdir, **fields):
  config.update_from_flattened_dict(fields)
  modes.run('train', config, str(workdir))


def arrays_of(workdir):
  stored = Checkpoints(workdir / 'checkpoints', writer=False)
  arrays = stored.metadata(stored.latest())['arrays']
  return {p: e['digest'] for item in arrays.values() for p, e in item.items()}


def test_a_run_with_a_bad_file_resumes_bit_for_bit(
  folder_config, tmp_path, capsys
):
  root = make_folder(tmp_path / 'set')
  spoil(root, 'train/cat/001.png', 'val/dog/000.png')
  folder_config.optim.schedule = 'constant'
  run_folder(folder_config.copy_and_resolve_references(), tmp_path / 'whole')
  short = folder_config.copy_and_resolve_references()
  run_folder(short, tmp_path / 'parts', **{'train.steps': 2})
  capsys.readouterr()
  run_folder(folder_config, tmp_path / 'parts')
  out = capsys.readouterr().out
  assert 'resuming at step 2' in out
  assert 'changed since: the files' not in out
  assert '2 files could not be decoded' in out
  assert arrays_of(tmp_path / 'whole') == arrays_of(tmp_path / 'parts')
  results = json.loads((tmp_path / 'whole/results.json').read_text())
  assert results['baseline']['num_examples'] == 7


def test_another_class_map_is_refused_and_other_files_are_mentioned(
  folder_config, tmp_path, capsys
):
  root = make_folder(tmp_path / 'set')
  run_folder(folder_config, tmp_path / 'run', **{'train.steps': 2})
  os.unlink(root / 'train/cat/003.png')
  run_folder(folder_config, tmp_path / 'run', **{'train.steps': 3})
  assert 'changed since: the files of the data set' in capsys.readouterr().out
  for split in ('train', 'val'):
    os.rename(root / split / 'cat', root / split / 'eel')
  for mode in ('train', 'eval'):
    with pytest.raises(CheckpointError) as error:
      modes.run(mode, folder_config, str(tmp_path / 'run'))
    message = str(error.value)
    assert "label 0 is 'cat' there, 'dog' here" in message
    assert '\n' not in message


# Workers.


def check_workers(place):
  config = make_digits_config()
  config.model.num_classes = 3
  config.data.update(source='folder', dir=place, eval_split='val', workers=2)
  with_workers = train_images(opened(config).train)
  config.data.workers = 0
  assert with_workers == train_images(opened(config).train)


def workers_of(place):
  """Returns batches of two worker processes, which are up, and their ids."""
  config = make_digits_config()
  config.model.num_classes = 3
  config.data.update(source='folder', dir=place, eval_split='val', workers=2)
  batches = opened(config).train.train_batches(
    seed=0, batch=4, rows=slice(0, 4), first=1, last=1000
  )
  for _ in range(2):
    next(batches)
  return batches, [one.pid for one in multiprocessing.active_children()]


def check_signals(place):
  batches, workers = workers_of(place)
  assert len(workers) == 2
  for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
    for worker in workers:
      os.kill(worker, number)
  for _ in range(20):
    next(batches)
  os.kill(workers[0], signal.SIGKILL)
  with pytest.raises(DataError, match='data.workers=2 processes was killed'):
    for _ in range(20):
      next(batches)
  _, workers = workers_of(place)
  print('\nworkers', *workers, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_outlive_signals_and_not_the_training(tmp_path):
  """Ctrl-C and batch systems signal them too, before all is saved."""
  root = make_folder(tmp_path / 'set')
  script = (
    'from tests.data import test_folder; '
    f'test_folder.check_signals({str(root)!r})'
  )
  with open(tmp_path / 'out', 'w+') as out:  # a pipe would wait for orphans
    done = subprocess.run(
      [sys.executable, '-c', script],
      cwd=ROOT, stdout=out, stderr=out, timeout=300, check=False,
    )  # fmt: skip
    out.seek(0)
    text = out.read()
  assert done.returncode == -signal.SIGKILL, text
  # The resource trackers of the killed process may write after it.
  workers = re.search(r'^workers (\d+) (\d+)$', text, re.M).groups()
  until = time.monotonic() + 60
  while any(os.path.exists(f'/proc/{one}') for one in workers):
    assert time.monotonic() < until, 'orphans'
    time.sleep(0.1)


@pytest.mark.slow
def test_worker_processes_read_and_skip_the_same(tmp_path):
  # In a process of its own: workers get the split by pickle, and functions
  # under the signature checker of these tests have none.
  root = make_folder(tmp_path / 'set')
  spoil(root, 'train/cat/001.png', 'train/cat/002.png')
  script = (
    'from tests.data import test_folder; '
    f'test_folder.check_workers({str(root)!r})'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('cannot be decoded') == 4
  assert 'leaked' not in done.stderr
