"""Order, splits and sources of the data."""

import functools
import hashlib
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common
from qvit_jax.data import batches, digits, open_data, preprocess
from qvit_jax.data.batches import ResidentSplit, StreamedSplit
from qvit_jax.data.order import Order, numbers_of
from qvit_jax.errors import ConfigError, DataError
from tests.conftest import ROOT


def images_of(count, size=8):
  random = np.random.default_rng(count)
  return random.integers(0, 256, (count, size, size, 3), np.uint8)


def decode(record):
  return record


def splits_of(count, *, num_classes=5, **options):
  """Returns the same images as a resident and as a streamed split."""
  images = images_of(count)
  labels = (np.arange(count) % num_classes).astype(np.int32)
  records = [(image, int(n)) for image, n in zip(images, labels, strict=True)]
  streamed = StreamedSplit(
    records, decode, image_size=8, num_classes=num_classes,
    **{'workers': 0, **options},
  )  # fmt: skip
  return ResidentSplit(images, labels), streamed


def indices(split, *, first=1, last=10, batch=4, rows=None, seed=0):
  rows = rows or slice(0, batch)
  made = split.train_batches(
    seed=seed, batch=batch, rows=rows, first=first, last=last
  )
  return [one['index'].tolist() for one in made]


def assert_streams_what_is_resident(resident, streamed, found, batches_):
  """Compares streamed batches with the indices of resident ones."""
  count = 0
  for batch, expected in zip(found, batches_, strict=True):
    index = expected['index']
    np.testing.assert_array_equal(batch['image'], resident.images[index])
    np.testing.assert_array_equal(batch['label'], resident.labels[index])
    assert batch['label'].dtype == np.int32
    if 'mask' in expected:
      np.testing.assert_array_equal(batch['mask'], expected['mask'])
    count += 1
  assert count > 1


# Order.


def test_each_epoch_is_a_permutation_and_none_repeats():
  order = Order(3, 50)
  epochs = [order(np.arange(i * 50, (i + 1) * 50)).tolist() for i in range(4)]
  assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_give_different_orders():
  orders = {tuple(Order(seed, 50)(np.arange(50))) for seed in range(5)}
  assert len(orders) == 5


def test_order_is_a_function_of_seed_and_number_alone():
  numbers = np.array([5, 149, 0, 50, 51, 5, 260])
  order = Order(1, 50)
  order(np.arange(400, 450))  # what was asked before must not matter
  alone = [int(Order(1, 50)(np.array([n]))[0]) for n in numbers]
  assert order(numbers).tolist() == alone
  assert order(numbers).dtype == np.int32


def test_order_never_changes_between_versions():
  """Runs that resume after an update of NumPy rely on these numbers."""
  expected = [6, 1, 0, 5, 3, 8, 7, 9, 2, 4, 7, 3, 5, 0, 1, 4, 6, 8, 9, 2]
  assert Order(0, 10)(np.arange(20)).tolist() == expected


def test_batch_over_the_edge_takes_from_both_epochs():
  whole = Order(0, 10)(np.arange(20))
  edge = Order(0, 10)(numbers_of(3, 4, slice(0, 4)))
  assert edge.tolist() == [*whole[8:10], *whole[10:12]]


def test_batch_of_several_epochs_takes_each_whole():
  taken = Order(0, 3)(np.arange(12)).reshape(4, 3)
  assert (np.sort(taken, axis=1) == np.arange(3)).all()


# Resident splits.


def test_training_from_step_k_is_the_tail_of_training_from_one():
  split, _ = splits_of(11)
  whole = indices(split)
  assert len(whole) == 10
  for first in (2, 3, 7, 10):
    assert indices(split, first=first) == whole[first - 1 :]


def test_training_reads_every_image_once_an_epoch():
  split, _ = splits_of(12)
  epochs = np.reshape(indices(split, last=9), (3, 12))
  assert (np.sort(epochs, axis=1) == np.arange(12)).all()
  assert (epochs[0] != epochs[1]).any()
  assert indices(split, seed=1) != indices(split, seed=0)


@pytest.mark.parametrize('kind', [0, 1], ids=['resident', 'streamed'])
@pytest.mark.parametrize('size', [1, 8, 9, 11])
def test_evaluation_counts_every_image_once(size, kind):
  split = splits_of(size)[kind]
  resident, _ = splits_of(size)
  seen = []
  for batch in split.eval_batches(batch=4, rows=slice(0, 4)):
    assert batch['mask'].shape == (4,) and batch['mask'].dtype == np.float32
    images = batch.get('image')
    if images is None:
      images = resident.images[batch['index']]
    seen.extend(images[batch['mask'] == 1])
    padding = images[batch['mask'] == 0]
    assert (padding == resident.images[-1]).all()
  np.testing.assert_array_equal(seen, resident.images)


@pytest.mark.parametrize('kind', [0, 1], ids=['resident', 'streamed'])
def test_rows_of_two_processes_join_to_the_whole_batch(kind):
  split = splits_of(11)[kind]
  join = lambda parts: {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }
  makers = (
    functools.partial(split.train_batches, seed=0, batch=6, first=2, last=5),
    functools.partial(split.eval_batches, batch=6),
  )
  for make, steps in zip(makers, (4, 2), strict=True):
    whole = list(make(rows=slice(0, 6)))
    halves = [list(make(rows=rows)) for rows in (slice(0, 3), slice(3, 6))]
    assert len(whole) == len(halves[0]) == len(halves[1]) == steps
    for batch, *parts in zip(whole, *halves, strict=True):
      joined = join(parts)
      assert joined.keys() == batch.keys()
      for name, array in batch.items():
        np.testing.assert_array_equal(joined[name], array)


def test_resident_source_is_the_whole_split_and_streamed_source_nothing():
  resident, streamed = splits_of(7)
  assert resident.source['image'] is resident.images
  assert resident.source['label'] is resident.labels
  assert streamed.source == {}
  assert resident.size == streamed.size == 7


# Streamed splits.


def check_streaming(workers):
  resident, streamed = splits_of(11, workers=workers)
  train = dict(seed=3, batch=4, rows=slice(0, 4), first=2, last=9)
  assert_streams_what_is_resident(
    resident, streamed, streamed.train_batches(**train),
    resident.train_batches(**train),
  )  # fmt: skip
  held_out = dict(batch=4, rows=slice(0, 4))
  assert_streams_what_is_resident(
    resident, streamed, streamed.eval_batches(**held_out),
    resident.eval_batches(**held_out),
  )  # fmt: skip


def test_threads_stream_the_images_of_the_resident_split_in_its_order():
  check_streaming(workers=0)


@pytest.mark.slow
def test_worker_processes_stream_the_same():
  # In a process of its own: workers get the split by pickle, and functions
  # under the signature checker of these tests have none.
  script = (
    'from absl import flags; flags.FLAGS([""]);'
    'from tests.data import test_data; test_data.check_streaming(workers=1)'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


def test_streaming_many_short_epochs_in_threads_keeps_the_order():
  resident, streamed = splits_of(5)
  train = dict(seed=0, batch=16, rows=slice(0, 16), first=1, last=60)
  assert_streams_what_is_resident(
    resident, streamed, streamed.train_batches(**train),
    resident.train_batches(**train),
  )  # fmt: skip


def test_limit_streams_only_the_first_examples():
  resident, streamed = splits_of(11, limit=6)
  assert streamed.size == 6
  found = list(streamed.eval_batches(batch=4, rows=slice(0, 4)))
  assert [one['mask'].tolist() for one in found] == [[1] * 4, [1, 1, 0, 0]]
  np.testing.assert_array_equal(found[0]['image'], resident.images[:4])
  np.testing.assert_array_equal(found[1]['image'][:2], resident.images[4:6])


def test_streamed_label_outside_the_classes_is_an_error():
  _, streamed = splits_of(11, num_classes=5)
  narrow = StreamedSplit(
    streamed.records, decode, image_size=8, num_classes=4, workers=0
  )
  with pytest.raises(DataError, match='num_classes=4 allows 0 to 3'):
    list(narrow.eval_batches(batch=11, rows=slice(0, 11)))


def test_streamed_images_are_fitted_to_the_model():
  image = images_of(1, 12)[0, :, :8]
  split = StreamedSplit(
    [(image, 0)], decode, image_size=4, num_classes=2, workers=0
  )
  (batch,) = split.eval_batches(batch=1, rows=slice(0, 1))
  np.testing.assert_array_equal(batch['image'][0], batches.fit(image, 4))


# fit().


@pytest.mark.parametrize(('h', 'w'), [(8, 13), (13, 8), (8, 9), (8, 8)])
def test_fit_only_crops_what_has_the_right_shorter_side(h, w):
  image = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
  top, left = (h - 8) // 2, (w - 8) // 2
  expected = image[top : top + 8, left : left + 8]
  np.testing.assert_array_equal(batches.fit(image, 8), expected)


@pytest.mark.parametrize(('h', 'w'), [(20, 30), (31, 20), (5, 7), (1, 40)])
def test_fit_resizes_the_shorter_side(h, w):
  image = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
  fitted = batches.fit(image, 10)
  assert fitted.shape == (10, 10, 3) and fitted.dtype == np.uint8
  scale = 10 / min(h, w)
  new_h, new_w = round(h * scale), round(w * scale)
  resized = np.asarray(
    Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC)
  )
  top, left = (new_h - 10) // 2, (new_w - 10) // 2
  expected = resized[top : top + 10, left : left + 10]
  np.testing.assert_array_equal(fitted, expected)


def test_fit_keeps_a_constant_image_constant():
  image = np.full((17, 29, 3), 201, np.uint8)
  assert (batches.fit(image, 6) == 201).all()


# preprocess.


def prepare(images, key=0, size=None, labels=None, **fields):
  """Returns what training sees, with no normalisation unless asked for."""
  config = common.get_config()
  config.data.update(mean=(0.0,) * 3, std=(1.0,) * 3)
  config.data.update(fields)
  labels = np.arange(len(images)) if labels is None else labels
  x, targets = preprocess.prepare_train(
    jax.random.key(key), jnp.asarray(images), jnp.asarray(labels, jnp.int32),
    data=config.data, size=size or images.shape[1], num_classes=len(images),
  )  # fmt: skip
  return np.asarray(x), np.asarray(targets)


def is_box(mask):
  """True if the True pixels fill a rectangle."""
  rows, columns = mask.any(1), mask.any(0)
  whole = lambda line: np.ptp(np.flatnonzero(line)) + 1 == line.sum()
  filled = mask.sum() == rows.sum() * columns.sum()
  return bool(filled and whole(rows) and whole(columns))


def test_gather_takes_indices_of_the_source_or_the_streamed_pixels():
  resident, _ = splits_of(7)
  index = jnp.asarray([3, 0, 6])
  images, labels = preprocess.gather(resident.source, {'index': index})
  np.testing.assert_array_equal(images, resident.images[[3, 0, 6]])
  np.testing.assert_array_equal(labels, resident.labels[[3, 0, 6]])
  batch = {'image': jnp.asarray(images), 'label': jnp.asarray(labels)}
  streamed = preprocess.gather({}, batch)
  np.testing.assert_array_equal(streamed[0], images)
  np.testing.assert_array_equal(streamed[1], labels)


def test_plain_training_images_are_normalised_pixels():
  images, mean, std = images_of(4), (0.1, 0.2, 0.3), (0.5, 2.0, 4.0)
  x, targets = prepare(images, mean=mean, std=std, labels=[2, 0, 0, 3])
  np.testing.assert_allclose(
    x, (images / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(targets, np.eye(4)[[2, 0, 0, 3]])
  data = common.get_config().data
  data.update(mean=mean, std=std)
  evaluated = preprocess.prepare_eval(jnp.asarray(images), data=data, size=8)
  np.testing.assert_array_equal(evaluated, x)


def test_crop_is_a_window_of_the_padded_image():
  images = images_of(64)
  x, _ = prepare(images, pad=2)
  padded = np.pad(images / 255, ((0, 0), (2, 2), (2, 2), (0, 0)))
  corners = set()
  for out, whole in zip(x, padded, strict=True):
    found = [
      (top, left)
      for top, left in itertools.product(range(5), repeat=2)
      if np.allclose(out, whole[top : top + 8, left : left + 8], atol=1e-6)
    ]
    assert len(found) == 1
    corners.update(found)
  assert {top for top, _ in corners} == {left for _, left in corners}
  assert {top for top, _ in corners} == set(range(5)) and len(corners) > 15


def test_flip_mirrors_half_of_the_images():
  images = images_of(64)
  x, _ = prepare(images, flip=True)
  same = np.isclose(x, images / 255, atol=1e-6).all((1, 2, 3))
  mirrored = np.isclose(x, images[:, :, ::-1] / 255, atol=1e-6).all((1, 2, 3))
  assert (same ^ mirrored).all()
  assert 16 < same.sum() < 48


@pytest.mark.parametrize(
  ('chance', 'low', 'high'), [(1.0, 64, 64), (0.5, 16, 48)]
)
def test_erase_fills_one_box_with_noise(chance, low, high):
  images = images_of(64, 32)
  x, targets = prepare(images, erase=chance)
  changed = ~np.isclose(x, images / 255, atol=1e-6).all(-1)
  erased = changed.any((1, 2))
  assert low <= erased.sum() <= high
  shares = changed[erased].mean((1, 2))
  # Whole pixels: the drawn sides of 2 % to 33 % are rounded.
  assert 0.012 < shares.min() < 0.08 and 0.25 < shares.max() < 0.36
  assert all(is_box(mask) for mask in changed[erased])
  noise = x[changed]
  assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
  np.testing.assert_array_equal(targets, np.eye(64))


def own_share(targets):
  """Returns the share of its own label that every image keeps."""
  count = len(targets)
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
  share = targets[0, 0]
  expected = share * np.eye(count) + (1 - share) * np.eye(count)[::-1]
  np.testing.assert_allclose(targets, expected, atol=1e-6)
  return share


def test_mixup_blends_images_as_their_targets():
  images = images_of(6)
  shares = set()
  for key in range(5):
    x, targets = prepare(images, key, mixup=1.0)
    share = own_share(targets)
    expected = (share * images + (1 - share) * images[::-1]) / 255
    np.testing.assert_allclose(x, expected, atol=1e-5)
    shares.add(float(share))
  assert len(shares) == 5 and min(shares) > 0 and max(shares) < 1


def test_cutmix_cuts_a_box_of_the_share_that_targets_say():
  images = images_of(6, 16)
  shares = []
  for key in range(8):
    x, targets = prepare(images, key, cutmix=1.0)
    shares.append(own_share(targets))
    own = np.isclose(x, images / 255, atol=1e-6).all(-1)
    other = np.isclose(x, images[::-1] / 255, atol=1e-6).all(-1)
    assert (own ^ other).all() and (own == own[0]).all()
    assert own[0].mean() == pytest.approx(shares[-1], abs=1e-6)
    assert other[0].sum() == 0 or is_box(other[0])
  assert len(set(shares)) > 5 and min(shares) < 0.5 < max(shares)


def test_mixup_and_cutmix_together_take_turns():
  images, kinds = images_of(6, 16), []
  for key in range(12):
    x, targets = prepare(images, key, mixup=1.0, cutmix=1.0)
    share = own_share(targets)
    blend = (share * images + (1 - share) * images[::-1]) / 255
    kinds.append(np.allclose(x, blend, atol=1e-5))
  assert 2 <= sum(kinds) <= 10


@pytest.mark.parametrize('size', [5, 8, 20])
@pytest.mark.parametrize('method', ['bicubic', 'bilinear'])
def test_resize_equals_pillow(method, size):
  images = images_of(2, 12)
  x, _ = prepare(images, size=size, resize=method)
  how = getattr(Image.Resampling, method.upper())
  expected = np.stack([
    np.stack([
      np.asarray(Image.fromarray(plane).resize((size, size), how))
      for plane in np.moveaxis(image / np.float32(255), -1, 0)
    ], axis=-1)
    for image in images
  ])  # fmt: skip
  np.testing.assert_allclose(x, expected.clip(0, 1), atol=2e-5)


def test_resize_keeps_a_constant_image_constant():
  images = np.full((2, 9, 9, 3), 100, np.uint8)
  for size in (4, 9, 31):
    x, _ = prepare(images, size=size)
    assert x.shape == (2, size, size, 3)
    np.testing.assert_allclose(x, 100 / 255, atol=1e-6)


def test_augmentation_is_a_function_of_its_key():
  fields = dict(pad=2, flip=True, erase=0.5, mixup=0.8, cutmix=1.0, size=12)
  made = [prepare(images_of(6), key, **fields) for key in (0, 0, 1)]
  once, twice, other = made
  for a, b, c in zip(once, twice, other, strict=True):
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


# Digits.


def test_digits_splits_are_fixed():
  digest = lambda array: hashlib.sha256(array.tobytes()).hexdigest()[:16]
  found = {
    name: (digest(images), digest(labels))
    for name, (images, labels) in digits.load().items()
  }
  assert found == {
    'train': ('8ff096a590b0f461', '745d990dc8f80aea'),
    'test': ('8cde8721d1e8329f', 'c8a9cf10e14a8679'),
  }


def test_digits_have_1437_images_for_training_and_360_for_test():
  for name, count in (('train', 1437), ('test', 360)):
    images, labels = digits.load()[name]
    assert images.shape == (count, 8, 8, 3) and images.dtype == np.uint8
    assert labels.shape == (count,) and labels.dtype == np.int32
    assert images.max() == 255 and images.min() == 0
    assert (images == images[..., :1]).all()


def test_digits_are_stratified():
  splits = digits.load()
  counts = {name: np.bincount(labels) for name, (_, labels) in splits.items()}
  share = counts['test'] / (counts['train'] + counts['test'])
  assert len(share) == 10
  np.testing.assert_allclose(share, 360 / 1797, atol=0.006)


def test_no_digit_is_in_both_splits():
  train, test = (
    {image.tobytes() for image in images}
    for images, _ in digits.load().values()
  )
  assert len(train) == 1437 and len(test) == 360
  assert not train & test


# open_data.


def test_digits_open_as_resident_splits(digits_config):
  data = open_data(digits_config, training=True)
  assert (data.train.size, data.eval.size) == (1437, 360)
  assert data.class_names == tuple('0123456789')
  assert isinstance(data.train, ResidentSplit)
  assert '1,437 train' in data.description and '360 eval' in data.description


def test_evaluation_opens_no_training_split(digits_config):
  digits_config.eval.num_examples = 50
  data = open_data(digits_config, training=False)
  assert data.train is None and data.eval.size == 50
  expected = digits.load()['test'][1][:50]
  np.testing.assert_array_equal(data.eval.labels, expected)


def test_model_with_too_few_classes_is_refused(digits_config):
  digits_config.model.num_classes = 9
  with pytest.raises(DataError) as raised:
    open_data(digits_config, training=True)
  message = str(raised.value)
  assert '10 classes' in message and 'model.num_classes=9' in message
  assert '--config.model.num_classes=10' in message


@pytest.mark.parametrize('labels', [[0, 3], [-1, 0]])
def test_labels_outside_the_classes_are_refused(labels):
  with pytest.raises(DataError) as raised:
    batches.check_labels(np.asarray(labels), 3)
  message = str(raised.value)
  assert f'from {min(labels)} to {max(labels)}' in message
  assert 'model.num_classes=3 allows 0 to 2' in message
  batches.check_labels(np.asarray([0, 2]), 3)


@pytest.mark.parametrize('field', ['name', 'dir'])
def test_fields_of_another_source_are_refused(digits_config, field):
  digits_config.data[field] = 'cifar100'
  with pytest.raises(ConfigError, match=f"data.{field}='cifar100'.*tfds"):
    open_data(digits_config, training=True)


def test_unknown_split_of_the_digits_is_refused(digits_config):
  digits_config.data.eval_split = 'train[:90%]'
  with pytest.raises(DataError, match="'train.:90%.'.*'train' or 'test'"):
    open_data(digits_config, training=True)


# CIFAR-100.


@pytest.fixture
def cifar_config(cifar_dir):
  config = common.get_config()
  config.model.update(patch=4, image_size=32, num_classes=100)
  config.data.update(source='tfds', name='cifar100', dir=cifar_dir)
  return config


def test_numbers_say_which_records_of_cifar100_they_are_of(cifar_config):
  def evaluated(split, count):
    cifar_config.data.eval_split = split
    cifar_config.eval.num_examples = count
    return open_data(cifar_config, training=False).evaluated

  test = evaluated('test', 20)
  assert (test['split'], test['data']['name']) == ('test', 'cifar100')
  assert re.fullmatch('[0-9a-f]{16}', test['data']['digest'])
  assert evaluated('test', 20) == test
  others = [test, evaluated('test', 30), evaluated('train', 20),
            evaluated('test[50%:]', 20)]  # fmt: skip
  assert len({other['data']['digest'] for other in others}) == 4


def test_cifar100_evaluation_split_is_whole(cifar_config):
  split = open_data(cifar_config, training=False).eval
  assert isinstance(split, ResidentSplit)
  assert split.images.shape == (10_000, 32, 32, 3)
  assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
  assert (np.bincount(split.labels) == [100] * 100).all()
  assert len({image.tobytes() for image in split.images}) > 9_900


def test_cifar100_streams_when_it_does_not_fit(cifar_config):
  cifar_config.data.resident_mib = 100
  cifar_config.eval.num_examples = 50
  data = open_data(cifar_config, training=True)
  assert isinstance(data.train, StreamedSplit)
  assert (data.train.size, data.eval.size) == (50_000, 50)
  assert len(data.class_names) == 100
  rows = slice(0, 50)
  (streamed,) = data.eval.eval_batches(batch=50, rows=rows)
  cifar_config.data.resident_mib = 2048
  resident = open_data(cifar_config, training=False).eval
  assert resident.size == 50
  np.testing.assert_array_equal(streamed['image'], resident.images)
  np.testing.assert_array_equal(streamed['label'], resident.labels)
  made = data.train.train_batches(
    seed=0, batch=50, rows=rows, first=1001, last=1001
  )
  (batch,) = made  # the first of the second epoch
  assert batch['image'].shape == (50, 32, 32, 3)
  assert batch['label'].min() >= 0 and batch['label'].max() < 100


@pytest.mark.slow
def test_cifar100_training_split_is_whole(cifar_config):
  cifar_config.eval.num_examples = 50
  split = open_data(cifar_config, training=True).train
  assert split.images.shape == (50_000, 32, 32, 3)
  assert split.images.dtype == np.uint8
  assert (np.bincount(split.labels) == [500] * 100).all()


def test_cifar100_needs_a_hundred_classes(cifar_config):
  cifar_config.model.num_classes = 10
  with pytest.raises(DataError, match='has 100 classes'):
    open_data(cifar_config, training=False)


def test_unknown_split_of_cifar100_names_those_it_has(cifar_config):
  cifar_config.data.eval_split = 'validation'
  with pytest.raises(DataError, match="'validation'.*test.*train|train.*test"):
    open_data(cifar_config, training=False)


def test_an_evaluation_does_not_check_the_training_split():
  config = common.get_config()
  config.model.update(num_classes=10, image_size=8)
  config.data.train_split = 'nothing'
  assert open_data(config, training=False).eval.size == 360
  with pytest.raises(DataError, match="digits has no split 'nothing'"):
    open_data(config, training=True)
