"""Learning from a teacher: losses, gradients, files, messages."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import data as data_lib
from qvit_jax import models, modes, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import (
  CheckpointError,
  ConfigError,
  Preempted,
  WeightsError,
)
from qvit_jax.experiment import teacher
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.modes import benchmark
from qvit_jax.quantization.methods import dgd
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training import loop, losses
from qvit_jax.training.pca import principal_directions
from tests import reference
from tests.conftest import (
  EIGHT_DEVICES,
  ROOT,
  make_digits_config,
  notes_of,
)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def finite_differences(function, x, step=1e-5):
  """Returns d function / d x of a float64 array, entry by entry."""
  gradient = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    for sign in (1, -1):
      moved = x.copy()
      moved[i] += sign * step
      gradient[i] += sign * function(moved) / (2 * step)
  return gradient


def f32(x):
  return jnp.asarray(x, jnp.float32)


# Losses, pure.


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_soft_distillation_is_on_paper(temperature):
  ours, theirs = 3 * normal(5, 4), 3 * normal(5, 4, seed=1)
  value, gradient = jax.value_and_grad(losses.soft_distillation)(
    f32(ours), f32(theirs), temperature
  )
  assert float(value) == pytest.approx(
    reference.soft_distillation(ours, theirs, temperature), rel=1e-5
  )
  p, q = (reference.softmax(x / temperature) for x in (theirs, ours))
  np.testing.assert_allclose(gradient, temperature * (q - p) / 5, atol=1e-6)


def test_hard_distillation_is_the_cross_entropy_to_the_first_choice():
  ours, theirs = 3 * normal(5, 4), normal(5, 4, seed=1)
  value, gradient = jax.value_and_grad(losses.hard_distillation)(
    f32(ours), f32(theirs)
  )
  choice = np.eye(4)[theirs.argmax(1)]
  expected = reference.cross_entropy(ours, choice, 0.0)
  assert float(value) == pytest.approx(expected, rel=1e-5)
  error = (reference.softmax(ours) - choice) / 5
  np.testing.assert_allclose(gradient, error, atol=1e-6)


def test_feature_distance_is_that_of_centred_projections():
  ours, theirs = normal(6, 5), normal(6, 5, seed=1)
  directions = np.linalg.qr(normal(5, 2, seed=2))[0]
  value, gradient = jax.value_and_grad(losses.feature_distance)(
    f32(ours), f32(theirs), f32(directions)
  )
  mean = theirs.mean(0)
  difference = (ours - mean) @ directions - (theirs - mean) @ directions
  assert float(value) == pytest.approx((difference**2).mean(), rel=1e-5)
  expected = 2 * difference @ directions.T / difference.size
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_directions_are_the_eigenvectors_of_the_covariance():
  features = normal(50, 6) * [5, 4, 1, 1, 0.5, 0.1] + 7
  values, vectors = np.linalg.eigh(np.cov(features.T))
  shares = np.cumsum(values[::-1]) / values.sum()
  for share, count in ((0.0, 1), (0.6, 1 + (shares < 0.6).sum()), (1.0, 6)):
    found = principal_directions(features, share)
    assert found.shape == (6, count)
    expected = vectors[:, ::-1][:, :count]
    # The sign of a direction is free.
    cosines = np.abs((found * expected).sum(0))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


@pytest.mark.parametrize('channels', [3, 5])
def test_map_distance_and_gradient_are_on_paper(channels):
  """Against maps [n, n], which the code itself never makes."""
  ours, theirs = normal(2, 7, 2, 3), normal(2, 7, 2, channels, seed=1)
  value, gradient = jax.value_and_grad(dgd.map_distance)(f32(ours), f32(theirs))
  expected = reference.map_distance(ours, theirs)
  assert float(value) == pytest.approx(expected, rel=1e-5)
  slopes = finite_differences(lambda x: reference.map_distance(x, theirs), ours)
  np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)


def test_map_distance_is_blind_to_scale_and_finite_where_nothing_is_apart():
  ours, theirs = f32(normal(2, 7, 2, 3)), f32(normal(2, 7, 2, 3, seed=1))
  apart = float(dgd.map_distance(ours, theirs))
  assert float(dgd.map_distance(1e-3 * ours, 30 * theirs)) == pytest.approx(
    apart, rel=1e-5
  )
  for x in (theirs, jnp.zeros_like(theirs)):
    value, gradient = jax.value_and_grad(dgd.map_distance)(x, theirs)
    assert np.isfinite(value) and np.isfinite(gradient).all()
  assert float(dgd.map_distance(theirs, theirs)) < 5e-3


def test_dgd_sums_queries_and_keys_of_all_layers():
  x = [f32(normal(2, 5, 2, 3, seed=i)) for i in range(8)]
  ours, theirs = [(x[0], x[1]), (x[2], x[3])], [(x[4], x[5]), (x[6], x[7])]
  expected = sum(dgd.map_distance(x[i], x[i + 4]) for i in range(4))
  assert float(dgd.dgd_loss(ours, theirs)) == pytest.approx(float(expected))


# Teachers of whole runs.


def teacher_config(**fields):
  config = make_digits_config()
  config.model.update(fields)
  return config


def trained(tmp_path_factory, name, recipe='none', **fields):
  """Returns the workdir of a short run of a model of its own."""
  workdir = tmp_path_factory.mktemp(name)
  config = teacher_config(**fields)
  config.quant.recipe = recipe
  config.train.update(steps=3, ema_decay=0.5)
  modes.run('train', config, str(workdir))
  return workdir


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A wider, deeper one than the student, with other patches and a mean."""
  return trained(
    tmp_path_factory, 'large', depth=2, width=24, heads=3, patch=2, pool='mean'
  )


@pytest.fixture(scope='module')
def twin(tmp_path_factory):
  """One of the student's size, quantized; its maps can be compared."""
  return trained(tmp_path_factory, 'twin', recipe='aqt')


def student_config(path, **train):
  config = make_digits_config()
  config.train.update(teacher=str(path), **train)
  return config


def everything(path):
  """All three losses of a teacher, in a run with random augmentation."""
  config = student_config(path, feature_weight=0.7, distill_weight=0.3)
  config.quant.update(recipe='aqt', dgd=0.2)
  config.data.update(pad=1, mixup=0.2)
  config.model.dropout = 0.1
  return config


def rows(workdir, split='train'):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  for row in found:
    row.pop('images_per_second')
  return [row for row in found if row['split'] == split]


def end_state(workdir):
  stored = Checkpoints(workdir / 'checkpoints', writer=False)
  body = stored.metadata(stored.latest())
  return body['arrays'], body['progress']


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_a_run_learns_from_a_teacher_of_another_size(
  large, tmp_path, capsys, kind
):
  config = student_config(large, distill=kind, distill_weight=1.0)
  modes.run('train', config, str(tmp_path))
  found = rows(tmp_path)
  assert [row['step'] for row in found] == [2, 4, 6]
  for row in found:  # no labels: the loss is the distillation's
    assert row['loss'] == pytest.approx(row['distill_loss'], rel=1e-6)
  printed = capsys.readouterr().out
  assert 'teacher   vit width 24, depth 2, 3 heads' in printed
  assert f'of {large}, digests verified' in printed
  heat = ' at T=1' if kind == 'soft' else ''
  assert f'teacher   loss: 0 labels + 1 {kind} distillation{heat}\n' in printed
  assert '  distill loss ' in printed


@pytest.mark.slow
def test_without_distillation_weight_the_teacher_changes_nothing(
  twin, tmp_path
):
  """Its other losses at a vanishing weight: the run is that of the labels."""
  config = student_config(twin, distill='none', feature_weight=1e-30)
  modes.run('train', config, str(tmp_path / 'with'))
  modes.run('train', make_digits_config(), str(tmp_path / 'without'))
  with_teacher = rows(tmp_path / 'with')
  for row in with_teacher:
    assert row.pop('feature_loss') > 0
  assert with_teacher == rows(tmp_path / 'without')


@pytest.mark.slow
def test_resume_with_a_teacher_ends_in_the_same_bits(
  twin, tmp_path, monkeypatch
):
  config = everything(twin)
  modes.run('train', config, str(tmp_path / 'whole'))
  calls, agreed = [], loop.StopFlag.agreed

  def stop(flag):
    calls.append(flag)
    if len(calls) == 3:  # inside a window of metrics
      os.kill(os.getpid(), signal.SIGTERM)
    return agreed(flag)

  with monkeypatch.context() as context:
    context.setattr(loop.StopFlag, 'agreed', stop)
    with pytest.raises(Preempted):
      modes.run('train', config, str(tmp_path / 'parts'))
  modes.run('train', config, str(tmp_path / 'parts'))
  assert end_state(tmp_path / 'parts') == end_state(tmp_path / 'whole')
  found = rows(tmp_path / 'parts')
  assert found == rows(tmp_path / 'whole')
  assert {'distill_loss', 'feature_loss', 'dgd_loss'} < set(found[0])


@pytest.mark.slow
def test_a_teacher_that_trained_on_is_not_taken_for_itself(tmp_path):
  place, run = tmp_path / 'teacher', tmp_path / 'run'
  config = make_digits_config()
  config.train.steps = config.eval.every = 2
  modes.run('train', config, str(place))
  modes.run('train', student_config(place, steps=2), str(run))
  modes.run('train', student_config(place, steps=3), str(run))
  config.train.steps, config.eval.every = 60, 30
  config.optim.lr = 1e-2
  modes.run('train', config, str(place))
  step = Checkpoints(place / 'checkpoints', writer=False).best()
  assert step > 2
  before, name = end_state(run), str(place)
  with pytest.raises(CheckpointError) as error:
    modes.run('train', student_config(place, steps=6), str(run))
  assert str(error.value).startswith(
    f'train.teacher={name!r} has other weights now (step {step} of {place}, '
    f'digests verified) than when this run began (step 2 of {place}, digests '
    'verified); bring them back, choose another workdir, or name the new ones '
  )
  assert '\n' not in str(error.value)
  assert end_state(run) == before
  there = place / 'checkpoints' / str(step)  # on purpose, and said
  modes.run('train', student_config(there, steps=6), str(run))
  assert end_state(run)[1]['teacher']['path'] == str(there)


@pytest.mark.slow
def test_a_run_may_go_on_with_a_teacher_it_did_not_have(twin, tmp_path, capsys):
  config = make_digits_config()
  config.train.steps = 3  # the window of step 3 is not written yet
  config.checkpoint.every = 3
  config.log.every = 4
  modes.run('train', config, str(tmp_path))
  config.train.update(steps=8, teacher=str(twin))
  modes.run('train', config, str(tmp_path))
  assert "changed since: train.teacher '' -> " in capsys.readouterr().out
  last = rows(tmp_path)[-1]
  assert last['step'] == 8 and last['distill_loss'] > 0


def test_progress_of_a_run_without_teacher_is_read_as_before():
  """Checkpoints of earlier versions name no numbers: they are the tick's."""
  old = {'window': [1.0, 2.0, 3.0], 'window_size': 2, 'best_step': None}
  assert loop.Progress(**old).window_names == ['loss', 'top1', 'grad_norm']


# Gradients.


def watched(experiment, guide):
  return guide.tapped(experiment.config, experiment.model.ops)


def test_gradients_are_those_of_constant_teacher_logits(large):
  config = student_config(large, distill_weight=0.3, temperature=2.0)
  experiment = Experiment(config, training=True)
  guide = teacher.load_teacher(experiment)
  images = f32(normal(4, 8, 8, 3))
  params = experiment.fresh_state(jax.random.key(1)).variables['params']

  def loss(params):
    logits, seen = watched(experiment, guide)(
      {'params': params}, images, train=True
    )
    targets = jnp.eye(10)[jnp.arange(4)]
    label = losses.cross_entropy(logits, targets)
    return guide(guide.given, images, logits, seen, label)[0]

  answer, _ = guide._apply(guide.given['variables'], images, train=False)
  constant = jnp.asarray(np.asarray(answer))

  def on_paper(params):
    logits = experiment.model.module.apply({'params': params}, images)
    labels = losses.cross_entropy(logits, jnp.eye(10)[jnp.arange(4)])
    distilled = losses.soft_distillation(logits, constant, 2.0)
    return 0.7 * labels + 0.3 * distilled

  expected = jax.jit(jax.grad(on_paper))(params)
  found = tree.flatten(jax.jit(jax.grad(loss))(params))
  for path, wanted in tree.flatten(expected).items():
    np.testing.assert_allclose(found[path], wanted, atol=1e-7, err_msg=path)

  def waiting(function):
    pull = jax.eval_shape(lambda params: jax.vjp(function, params)[1], params)
    return tree.num_bytes(pull)

  kept, needed = waiting(loss), waiting(on_paper)
  # What the backward pass waits for: logits at most, no layer of the teacher.
  assert needed > 10_000
  assert kept - needed < 4 * answer.nbytes


def test_no_gradient_reaches_the_teacher(twin):
  config = everything(twin)
  experiment = Experiment(config, training=True)
  guide = experiment.teacher = teacher.load_teacher(experiment)
  images = f32(normal(4, 8, 8, 3))
  variables = experiment.fresh_state(jax.random.key(1)).variables

  def loss(given):
    logits, seen = watched(experiment, guide)(variables, images, train=False)
    return guide(given, images, logits, seen, jnp.zeros(()))[0]

  for path, slope in tree.flatten(jax.jit(jax.grad(loss))(guide.given)).items():
    if path.startswith('variables'):
      assert not np.asarray(slope).any(), path


def test_teacher_arrays_are_arguments_of_the_step_not_constants(large):
  config = student_config(large)
  experiment = Experiment(config, training=True)
  experiment.teacher = teacher.load_teacher(experiment)
  source = experiment.replicate(experiment.data.train.source)
  state = experiment.fresh_state(jax.random.key(0))
  batch = next(experiment.train_batches(1, 1))
  step = experiment.train_step_function()
  jaxpr = jax.make_jaxpr(step)(state, source, batch, experiment.given)
  largest = max((np.size(x) for x in jaxpr.consts), default=0)
  assert largest < 100
  assert experiment.tick == ('loss', 'top1', 'grad_norm', 'distill_loss')


@pytest.mark.parametrize('remat', [False, True])
def test_losses_see_the_queries_keys_and_features_of_both(twin, remat):
  config = everything(twin)
  config.model.update(remat=remat, dropout=0.0)
  config.quant.recipe = 'none'
  experiment = Experiment(config, training=True)
  guide = teacher.load_teacher(experiment)
  images = f32(normal(4, 8, 8, 3))
  variables = experiment.fresh_state(jax.random.key(1)).variables
  logits, seen = watched(experiment, guide)(variables, images, train=True)
  np.testing.assert_array_equal(
    logits, models.build_model(config).apply(variables, images)
  )
  head = variables['params']['head']
  seen = seen['taps']
  np.testing.assert_allclose(
    seen['head']['lhs'] @ head['kernel'] + head['bias'], logits, atol=1e-6
  )
  qk = seen['encoder']['block_00']['attn']['qk']
  assert qk['lhs'].shape == qk['rhs'].shape == (4, 5, 2, 8)


@pytest.mark.slow
def test_accumulated_gradients_with_a_teacher_equal_whole_ones(twin, tmp_path):
  for parts in (1, 4):
    config = student_config(twin, accumulate=parts, feature_weight=1.0)
    modes.run('train', config, str(tmp_path / str(parts)))
  for a, b in zip(rows(tmp_path / '1'), rows(tmp_path / '4'), strict=True):
    assert a.pop('split') == b.pop('split')
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_weights_of_a_file_make_a_teacher_of_a_size(tmp_path, monkeypatch):
  """A named size, written for PyTorch, teaches a smaller model."""
  monkeypatch.setitem(models.vit.SIZES, 'Ti', (24, 2, 3, 48))
  big = make_digits_config()
  own = 'patch', 'width', 'depth', 'heads', 'mlp_dim'
  for name in own:  # which the size decides
    big.model[name] = config_lib.FIELDS[f'model.{name}'].default
  big.model.size = 'Ti/4'
  big.train.steps = 1
  big.eval.every = 1
  modes.run('train', big, str(tmp_path / 'big'))
  modes.run('export', big, str(tmp_path / 'big'))
  file = tmp_path / 'big/export/model.safetensors'
  config = student_config(file, teacher_size='Ti/4')
  experiment = Experiment(config, training=True)
  from_file = teacher.load_teacher(experiment)
  config = student_config(tmp_path / 'big')
  from_run = teacher.load_teacher(Experiment(config, training=True))
  images = f32(normal(2, 8, 8, 3))
  a, b = (
    one._apply(one.given['variables'], images, train=False)[0]
    for one in (from_file, from_run)
  )
  np.testing.assert_array_equal(a, b)
  assert from_file.lines[0].startswith('vit Ti/4, 8 px')


@pytest.mark.slow
def test_a_teacher_of_the_hub_stays_that_of_its_commit(
  twin, tmp_path, monkeypatch, capsys
):
  modes.run('export', make_digits_config_aqt(), str(twin))
  file, asked = str(twin / 'export/model.safetensors'), []

  def resolve(path):
    asked.append(path)
    return file, 'hf://a/b@commit'

  monkeypatch.setattr(teacher.weights, 'resolve', resolve)
  config = student_config('hf://a/b')
  modes.run('train', config, str(tmp_path))
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['train']['teacher'] == 'hf://a/b@commit'
  config = student_config('hf://a/b', steps=8)
  modes.run('train', config, str(tmp_path))
  assert asked == ['hf://a/b', 'hf://a/b@commit']
  assert 'changed since: train.teacher' not in capsys.readouterr().out


# What does not go together is said in one line.


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'quant.dgd': 1.0},
     'quant.dgd=1 compares the model with a teacher, but train.teacher is '
     'empty; set --config.train.teacher=WORKDIR or --config.quant.dgd=0'),
    ({'train.feature_weight': 0.5},
     'train.feature_weight=0.5 compares the model with a teacher, but '
     'train.teacher is empty'),
    ({'train.teacher': 'X', 'train.distill': 'none'},
     "train.teacher='X' would have no effect: train.distill is 'none'"),
    ({'train.temperature': 2.0},
     'train.temperature=2.0 would have no effect: train.teacher is empty; set '
     '--config.train.teacher='),
    ({'train.teacher': 'X', 'train.distill': 'hard', 'train.temperature': 2.0},
     'only soft distillation has it'),
    ({'train.teacher': 'X', 'train.feature_variance': 0.5},
     'train.feature_weight is 0; raise it'),
    ({'train.distill': 'firm'},
     "train.distill='firm' is not allowed; allowed: 'none' | 'soft' | 'hard'"),
  ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(fields, message):
  config = make_digits_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError) as raised:
    notes_of(config, mode='train', overrides=fields)
  assert message in str(raised.value)
  assert '\n' not in str(raised.value)


def test_a_model_with_dgd_is_evaluated_without_its_teacher():
  config = make_digits_config()
  config.quant.dgd = 1.0
  assert notes_of(config, mode='eval', overrides=()) == []


def refusal(config):
  with pytest.raises((ConfigError, CheckpointError, WeightsError)) as raised:
    teacher.load_teacher(Experiment(config, training=True))
  assert '\n' not in str(raised.value)
  return str(raised.value)


def test_a_teacher_of_other_classes_or_image_size_is_refused(
  large, tmp_path_factory
):
  config = student_config(large)
  config.model.num_classes = 12
  assert refusal(config) == (
    f"train.teacher='{large}': it has 10 classes, the student 12; give a "
    'teacher with the same model.num_classes'
  )
  config = student_config(large)
  config.model.image_size = 16
  assert 'it has 8 px, the student 16; give' in refusal(config)


def test_a_run_that_knows_the_classes_in_another_order_is_refused(twin):
  config = student_config(twin)
  data = data_lib.open_data(config, training=True)
  data = dataclasses.replace(data, class_names=data.class_names[::-1])
  with pytest.raises(ConfigError) as raised:
    teacher.load_teacher(Experiment(config, training=True, data=data))
  assert str(raised.value) == (
    f"train.teacher='{twin}': it knows the same classes in another order, so "
    'its outputs would teach the wrong ones; give a teacher trained on this '
    'data set'
  )


def test_two_unicode_forms_of_a_name_are_one_class():
  there, here = (
    [unicodedata.normalize(form, name) for name in ('brûlée', 'café')]
    for form in ('NFC', 'NFD')
  )
  assert there != here
  assert teacher._compare_classes(there, here) == []
  with pytest.raises(ConfigError, match='in another order'):
    teacher._compare_classes(there, here[::-1])
  (note,) = teacher._compare_classes(there, ['soup', 'tea'])
  assert note == 'note: its classes have other names than those here'


def test_losses_on_features_and_maps_need_equal_shapes(large):
  config = student_config(large, feature_weight=1.0)
  assert refusal(config) == (
    'train.feature_weight compares the features before both heads, but the '
    'teacher has 24 of them, the student 16; give a teacher of the same width '
    'or set --config.train.feature_weight=0'
  )
  config = student_config(large)
  config.quant.dgd = 1.0
  assert refusal(config) == (
    'quant.dgd compares the similarity maps of every layer and head, but the '
    'teacher has 2 layers, 3 heads, 16 tokens, the student 1 layers, 2 heads, '
    '5 tokens; give a teacher with the same or set --config.quant.dgd=0'
  )


def test_a_place_without_a_teacher_is_refused(tmp_path, twin):
  (tmp_path / 'checkpoints').mkdir()
  text = refusal(student_config(tmp_path))
  assert text.startswith(f"train.teacher='{tmp_path}': ")
  assert 'holds no checkpoint; train there first' in text
  (tmp_path / 'empty').mkdir()
  for name in ('empty', 'nowhere'):
    path = tmp_path / name
    assert refusal(student_config(path)).startswith(f"train.teacher='{path}': ")
  text = refusal(student_config(twin, teacher_size='Ti/4'))
  assert "train.teacher_size='Ti/4' would have no effect" in text


def test_weights_with_a_head_for_other_classes_are_refused(twin, tmp_path):
  modes.run('export', make_digits_config_aqt(), str(twin))
  config = student_config(twin / 'export/model.safetensors')
  config.model.num_classes = 12
  text = refusal(config)
  assert 'it brings no head/' in text and 'for 12 classes' in text


def make_digits_config_aqt():
  config = make_digits_config()
  config.quant.recipe = 'aqt'
  return config


# Benchmarks and several devices.


@pytest.mark.slow
def test_both_twins_of_a_benchmark_have_the_teacher(
  twin, tmp_path, monkeypatch
):
  monkeypatch.setattr(benchmark, '_ROUNDS', 2)
  modes.run('benchmark', everything(twin), str(tmp_path))
  result = json.loads((tmp_path / 'benchmark.json').read_text())
  assert set(result['train']['candidates']) == {'model', 'float'}


_SHARDED = """
import sys
from qvit_jax import modes
from tests.conftest import make_sharded_config
common = {'train.teacher': sys.argv[1], 'train.feature_weight': 1.0,
          'quant.dgd': 0.1}
axes = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2,
        'mesh.fsdp_min_mib': 1 / 64}
modes.run('train', make_sharded_config({**common, **axes}), sys.argv[2])
from qvit_jax.experiment import teacher
from qvit_jax.experiment.experiment import Experiment
experiment = Experiment(make_sharded_config({**common, **axes}), training=True)
given = teacher.load_teacher(experiment).given['variables']['params']
kernel = given['encoder']['block_00']['mlp']['fc1']['kernel']
print('fc1', kernel.shape, 'shard', kernel.addressable_shards[0].data.shape)
"""


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path):
  from tests.conftest import make_sharded_config

  modes.run('train', make_sharded_config({}), str(tmp_path / 'teacher'))
  fields = {'train.teacher': str(tmp_path / 'teacher'),
            'train.feature_weight': 1.0, 'quant.dgd': 0.1}  # fmt: skip
  modes.run('train', make_sharded_config(fields), str(tmp_path / 'one'))
  env = {**os.environ, **EIGHT_DEVICES, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', _SHARDED, str(tmp_path / 'teacher'),
     str(tmp_path / 'eight')],
    env=env, cwd=ROOT, capture_output=True, text=True, timeout=300,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'fc1 (64, 128) shard (32, 64)' in done.stdout
  one, eight = rows(tmp_path / 'one'), rows(tmp_path / 'eight')
  assert len(one) == 5
  for name in ('loss', 'distill_loss', 'feature_loss', 'dgd_loss'):
    np.testing.assert_allclose(
      [row[name] for row in eight], [row[name] for row in one], atol=1e-3
    )
