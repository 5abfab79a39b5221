"""Windows, jitter and RandAugment: in the step, on the host, and in Pillow."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from configs import common
from qvit_jax.data import augment, augment_device, batches, preprocess
from qvit_jax.data.augment_host import METHODS, HostAugment, operate
from qvit_jax.data.batches import StreamedSplit
from qvit_jax.errors import ConfigError
from tests.conftest import ROOT, make_digits_config, notes_of

BICUBIC = Image.Resampling.BICUBIC


def images_of(count, h=24, w=20):
  """Returns noise over a slope, so that values differ and repeat."""
  random = np.random.default_rng(count)
  slope = np.linspace(20, 180, w)[None, None, :, None]
  noise = random.normal(0, 30, (count, h, w, 3))
  return np.clip(slope + noise, 0, 235).astype(np.uint8)


def of_pillow(image, name, magnitude, sign):
  """Returns what RandAugment's operation is in Pillow and by its papers."""
  made, share = Image.fromarray(image), sign * magnitude / 30
  factor = 1 + 0.9 * share
  enhancers = {
    'brightness': ImageEnhance.Brightness, 'color': ImageEnhance.Color,
    'contrast': ImageEnhance.Contrast, 'sharpness': ImageEnhance.Sharpness,
  }  # fmt: skip
  if name in enhancers:
    return enhancers[name](made).enhance(factor)
  h, w = image.shape[:2]
  matrices = {
    'shear_x': (1, 0.3 * share, 0, 0, 1, 0),
    'shear_y': (1, 0, 0, 0.3 * share, 1, 0),
    'translate_x': (1, 0, int(150 / 331 * w * share), 0, 1, 0),
    'translate_y': (1, 0, 0, 0, 1, int(150 / 331 * h * share)),
  }
  if name in matrices:
    return made.transform(made.size, Image.Transform.AFFINE, matrices[name])
  return {
    'identity': lambda: made,
    'rotate': lambda: made.rotate(30 * share),
    'posterize': lambda: ImageOps.posterize(made, 8 - round(magnitude / 7.5)),
    'solarize': lambda: ImageOps.solarize(made, 255 * (1 - magnitude / 30)),
    'autocontrast': lambda: ImageOps.autocontrast(made),
    'equalize': lambda: ImageOps.equalize(made),
  }[name]()


@functools.cache
def operate_jitted(magnitude):
  return jax.jit(
    lambda x, which, signs: augment_device.operate(x, which, signs, magnitude)
  )


@pytest.mark.parametrize('magnitude', [9, 30])
def test_operations_of_the_step_and_the_host_are_those_of_pillow(magnitude):
  cases = list(itertools.product(augment.OPERATIONS, (1, -1)))
  images = images_of(len(cases))
  which = jnp.asarray([augment.OPERATIONS.index(name) for name, _ in cases])
  signs = jnp.asarray([sign for _, sign in cases])
  made = np.asarray(operate_jitted(magnitude)(images, which, signs))
  for image, out, (name, sign) in zip(images, made, cases, strict=True):
    expected = np.asarray(of_pillow(image, name, magnitude, sign), np.int32)
    host = operate(Image.fromarray(image), name, magnitude, sign)
    np.testing.assert_array_equal(np.asarray(host), expected, err_msg=name)
    off = np.abs(out.astype(np.int32) - expected)
    # A pixel whose place lies on an edge may come from either side.
    moved = name in ('rotate', 'shear_x', 'shear_y')
    assert (off > 1).mean() <= (0.01 if moved else 0), name
    assert (off > 0).mean() <= 0.05, name
    changes = name != 'identity' and (name, magnitude) != ('posterize', 0)
    assert (out != image).any() == changes, name


def test_operations_leave_flat_images_alone():
  """No values to stretch or to equalize: nothing is divided by nothing."""
  images = np.full((2, 8, 8, 3), 77, np.uint8)
  which = jnp.asarray([augment.OPERATIONS.index('autocontrast'),
                       augment.OPERATIONS.index('equalize')])  # fmt: skip
  made = operate_jitted(9)(images, which, jnp.ones(2, jnp.int32))
  np.testing.assert_array_equal(made, images)


def test_randaugment_draws_every_operation_alike():
  draws = jax.jit(lambda key, x: augment_device.randaugment(key, x, 1, 30))
  images = np.broadcast_to(images_of(1), (420, 24, 20, 3))
  made = np.asarray(draws(jax.random.key(0), images))
  same = (made == images).all((1, 2, 3)).mean()
  assert 0.03 < same < 0.13  # identity alone, one of fourteen
  assert len({image.tobytes() for image in made}) == 23
  host = HostAugment(20, BICUBIC, randaugment=(1, 30))
  found = [
    host.colour(images[0], host.draws(0, n)[1]).tobytes() for n in range(420)
  ]
  assert len({*found}) == 23
  assert 0.03 < np.mean([x == images[0].tobytes() for x in found]) < 0.13


# Jitter.


def test_jitter_of_the_step_is_that_of_the_host():
  images, strength = images_of(12), 0.4
  host = HostAugment(20, BICUBIC, jitter=strength)
  draws = np.stack([host.draws(0, n)[1] for n in range(12)])
  step = jax.jit(lambda d, x: augment_device.jitter_by(d, x, strength))
  made = np.asarray(step(jnp.asarray(draws, jnp.float32), images))
  expected = np.stack([
    host.colour(image, one) for image, one in zip(images, draws, strict=True)
  ])  # fmt: skip
  off = np.abs(made.astype(np.int32) - expected)
  assert off.max() <= 2 and (off > 0).mean() < 0.02
  assert (made != images).any((1, 2, 3)).all()


def test_jitter_is_pillows_enhancers_one_after_the_other():
  image = images_of(1)[0]
  host = HostAugment(20, BICUBIC, jitter=0.5)
  draws = np.asarray([0.99, 0.1, 0.7, 0.4])  # the last order: 2, 1, 0
  made = Image.fromarray(image)
  made = ImageEnhance.Color(made).enhance(0.5 + 0.4)
  made = ImageEnhance.Contrast(made).enhance(0.5 + 0.7)
  made = ImageEnhance.Brightness(made).enhance(0.5 + 0.1)
  np.testing.assert_array_equal(host.colour(image, draws), np.asarray(made))


# Windows.


@pytest.mark.parametrize(('h', 'w'), [(24, 20), (30, 90), (5, 5)])
def test_boxes_are_inside_with_the_areas_and_aspects_asked_for(h, w):
  draws = np.random.default_rng(0).random((2000, augment.CROP_DRAWS))
  box = augment.boxes(draws, h, w, 0.25, np)
  top, left, height, width = box.T
  assert (top >= 0).all() and (top + height <= h).all()
  assert (left >= 0).all() and (left + width <= w).all()
  shares, aspects = height * width / (h * w), width / height
  # Sides are whole pixels.
  slack = 1 / min(h, w)
  assert shares.min() > 0.25 - 2 * slack and shares.max() <= 1
  assert 0.25 - slack < np.quantile(shares, 0.02) < 0.25 + 2 * slack
  assert aspects.min() > 0.75 - 3 * slack and aspects.max() < 4 / 3 + 3 * slack
  step = jax.jit(lambda d: augment.boxes(d, h, w, 0.25, jnp))(
    jnp.asarray(draws, jnp.float32)
  )
  assert (np.asarray(step) == box).all(1).mean() > 0.99


def test_where_no_try_fits_the_box_is_the_middle():
  draws = np.full((1, augment.CROP_DRAWS), 0.9)
  assert augment.boxes(draws, 10, 100, 0.9, np).tolist() == [[0, 43, 10, 13]]
  assert augment.boxes(draws, 100, 12, 0.9, np).tolist() == [[42, 0, 16, 12]]


@pytest.mark.parametrize('method', ['bicubic', 'bilinear'])
def test_windows_of_the_step_are_crops_of_pillow(method):
  images = images_of(4)
  box = np.asarray([[0, 0, 24, 20], [3, 5, 9, 11], [20, 1, 4, 3], [2, 2, 8, 8]])
  resize = jax.jit(
    lambda x, b: augment_device.resize_boxes(x, b, 8, method)
  )
  made = np.asarray(resize(images, box))
  for image, out, (top, left, h, w) in zip(images, made, box, strict=True):
    window = Image.fromarray(image[top : top + h, left : left + w])
    expected = np.asarray(window.resize((8, 8), METHODS[method]))
    assert np.abs(out.astype(np.int32) - expected).max() <= 1
    if (h, w) == (8, 8):
      np.testing.assert_array_equal(out, image[2:10, 2:10])


def test_the_host_crops_the_whole_image():
  image = images_of(1, 40, 60)[0]
  host = HostAugment(8, BICUBIC, crop=0.2)
  draws = host.draws(3, 5)[0]
  ((top, left, h, w),) = augment.boxes(draws[None], 40, 60, 0.2, np)
  window = Image.fromarray(image[top : top + h, left : left + w])
  expected = np.asarray(window.resize((8, 8), BICUBIC))
  np.testing.assert_array_equal(host.cut(image, draws), expected)


# Streams.

ALL = dict(crop=0.3, jitter=0.4, randaugment=(2, 9))


def decode(record):
  return record


def streamed(fields, workers=0):
  records = [(image, i % 3) for i, image in enumerate(images_of(11, 24, 32))]
  return StreamedSplit(
    records, decode, image_size=16, num_classes=3,
    workers=workers, augment=HostAugment(16, BICUBIC, **fields),
  )  # fmt: skip


def trained_on(split, first=1, last=6, rows=slice(0, 4), **options):
  made = split.train_batches(
    seed=0, batch=4, rows=rows, first=first, last=last,
    **{'augmented': True, **options},
  )  # fmt: skip
  return np.concatenate([one['image'] for one in made])


@pytest.mark.parametrize('fields', [
  dict(crop=0.3), dict(jitter=0.4), dict(randaugment=(2, 9)), ALL,
  dict(crop=0.3, jitter=0.4), dict(jitter=0.4, randaugment=(1, 5)),
])  # fmt: skip
def test_streams_are_augmented_by_seed_and_number_alone(fields):
  split = streamed(fields)
  whole = trained_on(split)
  np.testing.assert_array_equal(trained_on(split, first=3), whole[8:])
  halves = [trained_on(split, rows=slice(i, i + 2)) for i in (0, 2)]
  joined = np.concatenate(
    [half.reshape(6, 2, 16, 16, 3) for half in halves], axis=1
  )
  np.testing.assert_array_equal(joined.reshape(whole.shape), whole)
  plain = trained_on(split, augmented=False)
  assert (whole != plain).any((1, 2, 3)).mean() > 0.7
  # Every epoch of eleven images draws anew.
  first = trained_on(split, first=1, last=11)
  assert len({image.tobytes() for image in first}) > 30


def check_workers():
  found = [trained_on(streamed(ALL, workers)) for workers in (0, 2)]
  np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_workers_draw_what_threads_draw():
  # In a process of its own, as in test_data.
  code = (
    'from tests.data import test_augment; test_augment.check_workers()'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_evaluation_sees_images_as_they_are():
  split = streamed(ALL)
  (batch,) = split.eval_batches(batch=11, rows=slice(0, 11))
  expected = [batches.fit(image, 16) for image, _ in split.records]
  np.testing.assert_array_equal(batch['image'], np.stack(expected))


# The step.


def prepare(images, key=0, size=None, is_resident=True, **fields):
  """Returns what training sees, with no normalisation."""
  data = common.get_config().data
  data.update(mean=(0.0,) * 3, std=(1.0,) * 3, **fields)
  data = preprocess.for_step(data, is_resident=is_resident)
  labels = jnp.arange(len(images))
  x, targets = jax.jit(
    lambda key: preprocess.prepare_train(
      key, jnp.asarray(images), labels, data=data,
      size=size or images.shape[1], num_classes=len(images),
    )
  )(jax.random.key(key))  # fmt: skip
  return np.asarray(x), np.asarray(targets)


OPTIONS = {
  'crop': dict(crop=0.3), 'jitter': dict(jitter=0.4),
  'randaugment': dict(randaugment=(2, 9)), 'flip': dict(flip=True),
  'pad': dict(pad=2), 'erase': dict(erase=0.5),
  'mix': dict(mixup=0.8, cutmix=1.0),
}  # fmt: skip


@pytest.mark.parametrize(
  'pair',
  [
    pair for pair in itertools.combinations(OPTIONS, 2)
    if {*pair} & {'crop', 'jitter', 'randaugment'}
  ],
  ids='-'.join,
)  # fmt: skip
@pytest.mark.slow
def test_pairs_of_options_go_together(pair):
  images = images_of(6, 20, 20)
  fields = OPTIONS[pair[0]] | OPTIONS[pair[1]]
  once, twice, other = (
    prepare(images, key, size=16, **fields) for key in (0, 0, 1)
  )
  for a, b in zip(once, twice, strict=True):
    np.testing.assert_array_equal(a, b)
  assert (once[0] != other[0]).any()
  assert once[0].shape == (6, 16, 16, 3) and np.isfinite(once[0]).all()
  if 'erase' not in pair:
    assert once[0].min() >= 0 and once[0].max() <= 1
  np.testing.assert_allclose(once[1].sum(1), 1, atol=1e-6)
  alone = prepare(images, 0, size=16, **OPTIONS[pair[0]])
  assert (once[0] != alone[0]).any() or (once[1] != alone[1]).any()


def test_all_options_go_together_and_leave_streams_to_the_host():
  images = images_of(6, 16, 16)
  others = dict(flip=True, pad=2)
  fields = ALL | others
  x, _ = prepare(images, **fields)
  assert x.min() >= 0 and x.max() <= 1
  left, _ = prepare(images, is_resident=False, **fields)
  np.testing.assert_array_equal(left, prepare(images, **others)[0])


def test_older_draws_are_what_they_were():
  """Runs that resume must not see other crops than before."""
  images = images_of(4, 16, 16)
  keys = jax.random.split(jax.random.key(0), 4)
  x, _ = prepare(images, flip=True)
  flips = np.asarray(jax.random.bernoulli(keys[1], 0.5, (4, 1, 1, 1)))
  expected = np.where(flips, images[:, :, ::-1], images) / np.float32(255)
  np.testing.assert_allclose(x, expected, atol=1e-6)


# The config.


@pytest.mark.parametrize(
  ('field', 'value'),
  [('randaugment', (2,)), ('randaugment', (0, 9)), ('randaugment', (2, 31)),
   ('randaugment', (2.0, 9)), ('randaugment', ('a', 9)), ('crop', 1.5),
   ('jitter', -0.1)],
)  # fmt: skip
def test_values_that_are_none_are_one_line(field, value):
  config = make_digits_config()
  config.data[field] = value
  with pytest.raises(ConfigError, match=f'data.{field}=') as raised:
    notes_of(config)
  assert '\n' not in str(raised.value)
  allowed = '0 to 30' if field == 'randaugment' else 'a number from 0 to 1'
  assert allowed in str(raised.value)


def test_an_evaluation_says_that_augmentation_has_no_effect():
  config = make_digits_config()
  config.data.update(**ALL)
  overrides = [f'data.{name}' for name in ALL]
  assert notes_of(config, mode='eval', overrides=overrides) == [
    f'--config.data.{name} has no effect in --mode=eval' for name in ALL
  ]
