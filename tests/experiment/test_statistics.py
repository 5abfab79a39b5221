"""Trainings of models with BatchNorm, from the first line to the files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import modes, tree
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError, Preempted
from qvit_jax.experiment import first_state, statistics, teacher
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.models.batch_norm import COLLECTION
from qvit_jax.store import runs
from qvit_jax.store.checkpoint import Checkpoints
from tests.small_cnns import rich_variables, run_config
from tests.training.test_resume import baseline, end_state, rows, stop_after


def rich_config(**fields):
  config = run_config(**fields)
  config.train.update(ema_decay=0.9, accumulate=2)
  return config


def arrays(workdir):
  """Returns what a run evaluates, by path."""
  found = runs.open_run(workdir).read_evaluated(runs.own_device())
  return {path: np.asarray(x) for path, x in found.items()}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a finished float run with averages."""
  workdir = tmp_path_factory.mktemp('trained')
  modes.run('train', rich_config(), str(workdir))
  return workdir


def test_a_stopped_run_ends_in_the_same_bits(trained, tmp_path, monkeypatch):
  with monkeypatch.context() as context:
    stop_after(context, 1)
    with pytest.raises(Preempted):
      modes.run('train', rich_config(), str(tmp_path))
  modes.run('train', rich_config(), str(tmp_path))
  assert end_state(tmp_path) == end_state(trained)
  assert rows(tmp_path) == rows(trained)
  digests = end_state(trained)[1]
  assert {p.split('/')[0] for p in digests if COLLECTION in p} == {
    'variables', 'ema'
  }  # fmt: skip


def test_eval_uses_the_averaged_statistics(trained, tmp_path):
  config = rich_config()
  config.checkpoint.path = str(trained)
  modes.run('eval', config, str(tmp_path))
  step = int(baseline(tmp_path)['name'].removeprefix('step '))
  wanted = next(r for r in rows(trained, 'eval') if r['step'] == step)
  assert baseline(tmp_path)['loss'] == wanted['loss']
  # As the model applied to these very arrays.
  experiment = Experiment(config, training=False)
  found = experiment.make_evaluator()(tree.nest(arrays(trained)))
  assert found['loss'] == pytest.approx(wanted['loss'], rel=1e-6)


@pytest.mark.slow
def test_a_training_goes_on_from_the_statistics_of_another(trained, tmp_path):
  config = run_config(batch_norm='held')
  config.checkpoint.path = str(trained)
  config.train.steps = 1
  modes.run('train', config, str(tmp_path))
  before, after = arrays(trained), arrays(tmp_path)
  for path, x in before.items():
    same = np.array_equal(after[path], x)
    assert same or not path.startswith(f'{COLLECTION}/'), path


@pytest.mark.slow
def test_statistics_estimated_anew_are_those_of_training_images(
  tmp_path, capsys
):
  config = run_config()
  config.train.update(steps=1, reestimate_batches=2)
  modes.run('train', config, str(tmp_path))
  assert 'estimated anew from 32 training images' in capsys.readouterr().out
  found = arrays(tmp_path)
  experiment = Experiment(config, training=True)
  kernel = found['params/conv1_1/kernel']
  seen = []
  for batch in experiment.train_batches(1, 2):
    images, _ = preprocess.gather(experiment.data.train.source, batch)
    x = preprocess.prepare_eval(
      images, data=config.data, size=config.model.image_size
    )
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), ((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    seen.append(np.asarray(y, np.float64) + found['params/conv1_1/bias'])
  seen = np.concatenate(seen).reshape(-1, kernel.shape[-1])
  stats = f'{COLLECTION}/norm1_1'
  np.testing.assert_allclose(found[f'{stats}/mean'], seen.mean(0), rtol=1e-4)
  np.testing.assert_allclose(found[f'{stats}/var'], seen.var(0), rtol=1e-3)


@pytest.mark.slow
def test_statistics_are_held_where_norms_are_not_trained(capsys, tmp_path):
  config = run_config()
  config.train.update(trainable=('params/head',), steps=2)
  modes.run('train', config, str(tmp_path))
  out = capsys.readouterr().out
  assert (
    'norms     statistics of 8 norms are held: train.trainable leaves 8 of 8 '
    'norms as they are, such as norm1_1' in out
  )
  found = arrays(tmp_path)
  assert not found[f'{COLLECTION}/norm1_1/mean'].any()
  assert (found[f'{COLLECTION}/norm5_2/var'] == 1).all()


@pytest.mark.slow
def test_a_stage_holds_what_stages_before_it_moved():
  config = run_config()
  config.train.update(stages=('all:0.5', 'held:0.5'), steps=2, ema_decay=0.5)
  experiment = Experiment(config, training=True)
  state = experiment.fresh_state(jax.random.key(0))
  source = experiment.replicate(experiment.data.train.source)
  batch = next(experiment.train_batches(1, 1))
  states = []
  for stage in experiment.stages:
    step, _ = experiment.compile_train_step(
      state, source, batch, stage=stage.name
    )
    state, _ = step(state, source, batch, experiment.given)
    states.append(jax.device_get(state))
  first, last = (tree.flatten(state.variables) for state in states)
  for path, x in first.items():
    is_held = path.startswith(f'{COLLECTION}/')
    assert np.array_equal(last[path], x) == is_held, path
  # Averages still come nearer to what is held.
  mean = ('norm1_1', 'mean')
  gaps = [
    np.abs(
      state.ema[COLLECTION][mean[0]][mean[1]]
      - state.variables[COLLECTION][mean[0]][mean[1]]
    ).max()
    for state in states
  ]
  assert 0 < gaps[1] < gaps[0]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'train.batch_size': 4, 'train.accumulate': 4},
      'train.batch_size=4 puts 1 image on a device at a time (over mesh.data, '
      'mesh.fsdp and train.accumulate), of which BatchNorm gets no statistics '
      'worth the name; set --config.train.batch_size=8 or more, or hold them '
      'with --config.model.batch_norm=held',
    ),
    (
      {'train.trainable': ('params', 'batch_stats')},
      "train.trainable=('params', 'batch_stats') names batch_stats, statistics "
      'that follow the images and get no gradient; leave them out',
    ),
    (
      {'model.batch_norm': 'held', 'train.reestimate_batches': 3},
      'train.reestimate_batches=3 would have no effect: model.batch_norm='
      "'held'; set --config.train.reestimate_batches=0",
    ),
    (
      {'train.stages': ('all:0.5', 'held:0.5'), 'train.reestimate_batches': 3},
      'train.reestimate_batches=3 would give the model other statistics than '
      "those that its last stage 'held' was trained with; set it to 0 or leave "
      'the stage out',
    ),
    (
      {'model.batch_norm': 'none', 'train.stages': ('held:1',)},
      "train.stages[0]='held' would have no effect: no norm of this training "
      'has statistics that change; leave the stage out',
    ),
  ],
)
def test_what_cannot_be_is_one_line(fields, message):
  config = run_config()
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError) as error:
    experiment = Experiment(config, training=True)
    statistics.make_finish(experiment)
    _ = experiment.stages
  assert str(error.value) == message


def test_derived_statistics_let_training_begin_with_the_same_function():
  config = run_config()
  experiment = Experiment(config, training=True)
  variables = rich_variables(config)
  changed = statistics.derive(experiment, variables, 2)
  apply = jax.jit(
    lambda v, x, train: experiment.model.module.apply(
      v, x, train=train, mutable=[COLLECTION]
    )[0],
    static_argnums=2,
  )
  images = []
  for batch in experiment.train_batches(1, 2):
    x, _ = preprocess.gather(experiment.data.train.source, batch)
    images.append(
      preprocess.prepare_eval(x, data=config.data, size=32)
    )
  images = jnp.concatenate(images)
  there = np.asarray(apply(variables, images, False))
  np.testing.assert_allclose(
    apply(changed, images, False), there, rtol=0, atol=1e-4
  )
  # By the batch of all these images: that is what was measured.
  np.testing.assert_allclose(
    apply(changed, images, True), there, rtol=0, atol=1e-3
  )
  assert np.abs(apply(variables, images, True) - there).max() > 0.1


@pytest.mark.slow
def test_ptq_runs_on_the_model_without_norms(trained, tmp_path, capsys):
  config = rich_config()
  config.checkpoint.path = str(trained)
  config.ptq.update(rows=('fp32', 'int8_weight_only'), rounds=2)
  modes.run('ptq', config, str(tmp_path))
  out = capsys.readouterr().out
  assert 'fold      8 norms into kernels and biases' in out
  result = json.loads((tmp_path / 'results.json').read_text())
  wanted = baseline(trained)
  assert result['baseline']['loss'] == pytest.approx(wanted['loss'], rel=1e-5)
  # The page still says that the model has norms; its packed file has none.
  config = rich_config()
  config.quant.recipe = 'ptq'
  row = tmp_path / 'artifacts' / 'int8_weight_only.safetensors'
  config.checkpoint.path = str(row)
  modes.run('eval', config, str(tmp_path / 'eval'))
  here = baseline(tmp_path / 'eval')
  there = next(r for r in result['rows'] if r['name'] == 'int8_weight_only')
  assert here['loss'] == pytest.approx(there['loss'], rel=1e-5)


@pytest.mark.slow
def test_a_teacher_with_statistics_is_asked_as_in_evaluation(
  trained, tmp_path
):
  config = run_config()
  config.train.update(
    steps=1, teacher=str(trained), feature_weight=0.1, ema_decay=0.0
  )
  experiment = Experiment(config, training=True)
  guide = teacher.load_teacher(experiment)
  there = arrays(trained)
  for path, x in tree.flatten(guide.given['variables']).items():
    np.testing.assert_array_equal(x, there[path])
  modes.run('train', config, str(tmp_path))
  after = arrays(tmp_path)
  moved = f'{COLLECTION}/norm1_1/mean'
  assert after[moved].any() and not np.array_equal(after[moved], there[moved])
  assert rows(tmp_path, 'train')[0]['feature_loss'] > 0


@pytest.mark.slow
def test_adapters_lie_on_the_statistics_of_their_base(tmp_path, capsys):
  base = run_config(classifier='paper')
  base.train.steps = 2
  modes.run('train', base, str(tmp_path / 'base'))
  config = run_config(classifier='paper')
  config.checkpoint.path = str(tmp_path / 'base')
  config.train.steps = 2
  config.lora.update(rank=2, targets=('all',))
  modes.run('train', config, str(tmp_path / 'lora'))
  assert 'statistics of 8 norms are held' in capsys.readouterr().out
  held = runs.open_run(tmp_path / 'lora')
  assert not any(COLLECTION in path for path in held.digests['variables'])
  modes.run('eval', config, str(tmp_path / 'lora'))
  loss = baseline(tmp_path / 'lora')['loss']
  assert loss == rows(tmp_path / 'lora', 'eval')[-1]['loss']
  modes.run('merge_lora', config, str(tmp_path / 'lora'))
  merged = arrays(tmp_path / 'lora' / 'merged' / config.lora.name)
  there = arrays(tmp_path / 'base')
  for path, x in there.items():
    if path.startswith(f'{COLLECTION}/'):
      np.testing.assert_array_equal(merged[path], x)


def test_a_start_without_statistics_derives_them(tmp_path, capsys):
  """Such as from a file with norms folded: the function stays."""
  held = run_config(batch_norm='held')
  held.train.steps = 2
  modes.run('train', held, str(tmp_path / 'held'))
  there = tree.nest(arrays(tmp_path / 'held'))
  config = run_config()
  config.checkpoint.path = str(tmp_path / 'held')
  config.train.update(batch_size=128, steps=2)
  experiment = Experiment(config, training=True)
  own = Checkpoints(tmp_path / 'own' / 'checkpoints', writer=True)
  state, _, lines = first_state.initial_state(experiment, own)
  assert lines[1:] == [
    'statistics of norms are of nothing they saw (all means are 0, as where '
    'norms were folded): derived from 512 training images, the function stays '
    '(to keep them, --config.model.batch_norm=held)'
  ]
  here = jax.device_get(state.variables)
  assert here[COLLECTION]['norm1_1']['mean'].any()
  images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
  apply = jax.jit(experiment.model.module.apply)
  images = jnp.asarray(images, jnp.float32)
  np.testing.assert_allclose(
    apply(here, images), apply(there, images), rtol=0, atol=1e-5
  )


@pytest.mark.slow
def test_a_run_from_calibration_is_packed_with_its_norms(trained, tmp_path):
  """Statistics of a table, which saw no norms, start a run that has them."""
  config = rich_config()
  config.checkpoint.path = str(trained)
  config.ptq.update(rows=('int8_static',), rounds=2, calibration_examples=32)
  modes.run('ptq', config, str(tmp_path / 'ptq'))
  config = rich_config()
  config.checkpoint.path = str(trained)
  config.quant.update(
    recipe='lsq', default='w4a4',
    calibration_path=str(tmp_path / 'ptq' / 'calibration'),
  )  # fmt: skip
  modes.run('train', config, str(tmp_path / 'lsq'))
  config.checkpoint.path = config.quant.calibration_path = ''
  config.export.format = 'packed'
  modes.run('export', config, str(tmp_path / 'lsq'))
  parity = json.loads((tmp_path / 'lsq' / 'export' / 'parity.json').read_text())
  assert parity['largest_difference'] == 0 < parity['largest_logit']
  config.export.format = 'safetensors'
  config.quant.recipe = 'ptq'
  config.checkpoint.path = str(
    tmp_path / 'lsq' / 'export' / 'model.packed.safetensors'
  )
  modes.run('eval', config, str(tmp_path / 'eval'))
  here, there = baseline(tmp_path / 'eval'), baseline(tmp_path / 'lsq')
  assert here['loss'] == there['loss'] and here['execution'] == 'integer'


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_leaves_what_was_estimated(
  tmp_path, monkeypatch, capsys
):
  config = run_config()
  config.train.update(steps=1, reestimate_batches=1)
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  modes.run('train', config, str(whole))
  with monkeypatch.context() as context:
    stop_after(context, 1)
    with pytest.raises(Preempted):
      modes.run('train', config, str(cut))
  capsys.readouterr()
  modes.run('train', config, str(cut))
  assert 'estimated anew' not in capsys.readouterr().out
  assert end_state(cut) == end_state(whole)
