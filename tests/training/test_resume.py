"""Stopping and going on: the same bits as without the stop."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from qvit_jax import modes
from qvit_jax.errors import (
  CheckpointError,
  DivergedError,
  Preempted,
  WeightsError,
)
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training import loop
from tests.conftest import ROOT, TINY, make_digits_config, run_main


def rows(workdir, split=None):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  for row in found:
    row.pop('images_per_second')
  return [row for row in found if split in (None, row['split'])]


def end_state(workdir):
  """Returns (step, digests of all arrays, progress) of the newest step."""
  checkpoints = Checkpoints(workdir / 'checkpoints', writer=False)
  step = checkpoints.latest()
  body = checkpoints.metadata(step)
  digests = {
    f'{item}/{path}': entry['digest']
    for item, entries in body['arrays'].items()
    for path, entry in entries.items()
  }
  return step, digests, body['progress']


def baseline(workdir):
  return json.loads((workdir / 'results.json').read_text())['baseline']


def rich_config(recipe='aqt'):
  """Everything that a resume has to bring back: EMA, dropout, mixing."""
  config = make_digits_config()
  config.quant.recipe = recipe
  config.model.update(dropout=0.1, stochastic_depth=0.1)
  config.data.update(mixup=0.2, pad=1, erase=0.2)
  config.train.update(steps=8, ema_decay=0.9)
  config.eval.every = 4
  return config


def stop_after(monkeypatch, step, number=signal.SIGTERM):
  """Raises the flag of a signal once `step` updates are done."""
  agreed = loop.StopFlag.agreed
  calls = []

  def patched(flag):
    calls.append(flag)
    if len(calls) == step:
      os.kill(os.getpid(), number)
    return agreed(flag)

  monkeypatch.setattr(loop.StopFlag, 'agreed', patched)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a finished run."""
  workdir = tmp_path_factory.mktemp('trained')
  modes.run('train', rich_config(), str(workdir))
  return workdir


@pytest.fixture(scope='module')
def trained_float(tmp_path_factory):
  """The workdir of a finished run without quantization."""
  workdir = tmp_path_factory.mktemp('float')
  modes.run('train', rich_config('none'), str(workdir))
  return workdir


# A stop inside a window of metrics, and one on a step with an evaluation.
@pytest.mark.parametrize(
  ('recipe', 'step'),
  [
    pytest.param('none', 3, marks=pytest.mark.slow),
    ('aqt', 1),
    pytest.param('aqt', 4, marks=pytest.mark.slow),
  ],
)
def test_a_stopped_run_ends_in_the_same_bits(
  request, tmp_path, monkeypatch, recipe, step
):
  whole = request.getfixturevalue(
    'trained' if recipe == 'aqt' else 'trained_float'
  )
  config = rich_config(recipe)
  with monkeypatch.context() as context:
    stop_after(context, step)
    with pytest.raises(Preempted, match=f'SIGTERM after step {step}'):
      modes.run('train', config, str(tmp_path))
  assert end_state(tmp_path)[0] == step
  modes.run('train', config, str(tmp_path))
  assert end_state(tmp_path) == end_state(whole)
  assert rows(tmp_path) == rows(whole)
  steps = [(row['step'], row['split']) for row in rows(tmp_path)]
  assert len(steps) == len(set(steps)) == 6


def test_the_files_of_a_run_agree(trained):
  result = json.loads((trained / 'results.json').read_text())
  row = result['baseline']
  assert result['rows'] == []
  evaluations = {r['step']: r for r in rows(trained, 'eval')}
  best = max(r['top1'] for r in evaluations.values())
  step, _, progress = end_state(trained)
  assert step == 8
  assert row['top1'] == best == evaluations[progress['best_step']]['top1']
  assert row['loss'] == evaluations[progress['best_step']]['loss']
  assert row['name'] == f'step {progress["best_step"]}'
  assert (row['weight_bits'], row['act_bits']) == (4, 4)
  assert row['execution'] == 'simulated'
  assert row['num_examples'] == 360 == sum(map(sum, row['confusion']))
  assert row['latency_ms'] is None  # was not measured
  config = json.loads((trained / 'config.json').read_text())
  assert config['train']['steps'] == 8
  assert {p.name for p in trained.iterdir()} >= {
    'config.json', 'metrics.jsonl', 'results.json', 'checkpoints'
  }  # fmt: skip


def test_eval_gives_the_numbers_of_training_exactly(trained, tmp_path):
  config = rich_config()
  for path in (trained, trained / 'checkpoints' / '8'):
    config.checkpoint.path = str(path)
    modes.run('eval', config, str(tmp_path))
    row = baseline(tmp_path)
    step = int(row['name'].removeprefix('step '))
    wanted = next(r for r in rows(trained, 'eval') if r['step'] == step)
    for name in ('loss', 'top1', 'top5', 'f1_macro'):
      assert row[name] == wanted[name]
    assert step == 8 or path == trained


def test_a_finished_run_is_left_as_it_is(trained, capsys):
  before = end_state(trained), rows(trained), baseline(trained)
  config = rich_config()
  modes.run('train', config, str(trained))
  steps = config.train.steps
  assert (
    f'stopped at step {steps}: all {steps} steps (train.steps) are done; '
    'nothing is trained. To go on, set --config.train.steps to more than '
    f'{steps}\n' in capsys.readouterr().out
  )
  assert (end_state(trained), rows(trained), baseline(trained)) == before


@pytest.mark.parametrize(
  ('section', 'field', 'value', 'message'),
  [
    ('model', 'width', 32, 'width is 16 there, 32 here'),
    ('model', 'pool', 'mean', 'pool is token there, mean here'),
    ('quant', 'default', 'w8a8', '"patch_embed w4a4 per_token" there'),
    ('quant', 'recipe', 'none', '"patch_embed float -" here'),
    ('optim', 'name', 'sgd', "trained with optim.name='adamw', not 'sgd'"),
  ],
)
def test_another_model_in_the_workdir_is_refused(
  trained, section, field, value, message
):
  config = rich_config()
  config[section][field] = value
  with pytest.raises(CheckpointError) as error:
    modes.run('train', config, str(trained))
  assert message in str(error.value)


def test_a_changed_field_is_printed_on_resume(trained, capsys):
  config = rich_config()
  config.log.every = 5
  modes.run('train', config, str(trained))
  assert 'changed since: log.every 2 -> 5' in capsys.readouterr().out


def test_a_damaged_checkpoint_is_found_and_left_alone(tmp_path):
  config = make_digits_config()
  modes.run('train', config, str(tmp_path))
  data = tmp_path / 'checkpoints' / '6' / 'variables' / 'd'
  target = max(data.iterdir(), key=lambda p: p.stat().st_size)
  content = bytearray(target.read_bytes())
  content[len(content) // 3] ^= 1
  target.write_bytes(content)
  config.train.steps = 9
  with pytest.raises(CheckpointError, match='damaged'):
    modes.run('train', config, str(tmp_path))
  with pytest.raises(CheckpointError, match='damaged'):
    modes.run('eval', config, str(tmp_path))
  assert target.read_bytes() == bytes(content)
  assert Checkpoints(tmp_path / 'checkpoints', writer=False).latest() == 6


def test_early_stopping_survives_a_restart(tmp_path, capsys):
  config = make_digits_config()
  # With this rate nothing is learned: the first evaluation stays the best.
  config.optim.lr = 1e-12
  config.train.update(steps=30, patience=2, trainable=('params/head',))
  config.eval.every = 2
  modes.run('train', config, str(tmp_path))
  first = capsys.readouterr().out
  assert 'stopped early at step 6' in first and 'features  of 1,437' in first
  before = end_state(tmp_path)
  modes.run('train', config, str(tmp_path))
  again = capsys.readouterr().out
  assert 'stopped early at step 6: no better top1 in 2 evaluations' in again
  assert 'nothing is trained. To go on, set --config.train.patience=3' in again
  assert 'features' not in again
  assert end_state(tmp_path) == before
  assert rows(tmp_path, 'eval')[-1]['step'] == 6
  config.train.patience = 3  # as it says
  modes.run('train', config, str(tmp_path))
  assert rows(tmp_path, 'eval')[-1]['step'] == 8


def test_a_diverging_run_stops_and_keeps_the_last_good_state(tmp_path):
  config = make_digits_config()
  modes.run('train', config, str(tmp_path))
  before = end_state(tmp_path)
  config.optim.lr = 1e38
  config.train.steps = 12
  with pytest.raises(DivergedError) as error:
    modes.run('train', config, str(tmp_path))
  assert re.search(r'at step ([7-9]|1[0-2])\b', str(error.value))
  assert 'the checkpoint of step 6 is kept' in str(error.value)
  assert end_state(tmp_path) == before


def test_aqt_starts_from_a_float_run(tmp_path, capsys):
  config = make_digits_config()
  modes.run('train', config, str(tmp_path / 'float'))
  config.quant.update(recipe='aqt', default='w8a8')
  config.checkpoint.path = str(tmp_path / 'float')
  config.train.steps = 1
  config.optim.lr = 1e-12
  modes.run('train', config, str(tmp_path / 'aqt'))
  assert f'of {tmp_path / "float"}' in capsys.readouterr().out
  there, here = baseline(tmp_path / 'float'), baseline(tmp_path / 'aqt')
  assert here['loss'] == pytest.approx(there['loss'], abs=0.01)
  assert here['weight_bits'] == 8


def test_weights_of_another_class_count_get_a_fresh_head(tmp_path, capsys):
  config = make_digits_config()
  modes.run('train', config, str(tmp_path / 'ten'))
  config.model.num_classes = 12
  config.weights.path = str(tmp_path / 'ten')
  modes.run('train', config, str(tmp_path / 'twelve'))
  out = capsys.readouterr().out
  assert 're-initialised: head/kernel, head/bias: 10 classes there, 12' in out
  report = json.loads((tmp_path / 'twelve' / 'weights.json').read_text())
  assert set(report['reinitialised']) == {'head/bias', 'head/kernel'}
  assert len(report['matched']) == 22
  config.model.width = 32
  config.weights.path = str(tmp_path / 'ten')
  with pytest.raises(WeightsError, match='the width is 16 there, 32 here'):
    modes.run('train', config, str(tmp_path / 'other'))


FLAGS = (*TINY, '--config.train.steps=400', '--config.checkpoint.every=20',
         '--config.eval.every=100', '--config.log.every=10',
         '--config.model.dropout=0.1')  # fmt: skip


def start(workdir):
  return subprocess.Popen(
    [sys.executable, '-u', 'main.py', *FLAGS, f'--workdir={workdir}'],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for_training(process):
  for line in process.stdout:
    if line.startswith(('step', 'evaluation')):
      return
  pytest.fail('the run ended before it trained')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  done = run_main(*FLAGS, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_save_too(tmp_path, monkeypatch, call_main, number):
  stop_after(monkeypatch, 1, number)
  done = call_main(*FLAGS, f'--workdir={tmp_path}')
  assert done.returncode == 75, done.stderr
  name = signal.Signals(number).name
  assert f'stopped by {name} after step 1; everything' in done.stdout
  assert f'Go on with: python main.py {FLAGS[0]}' in done.stdout
  assert end_state(tmp_path)[0] == 1


def test_a_signal_saves_and_exits_with_75(undisturbed, tmp_path, call_main):
  process = start(tmp_path)
  wait_for_training(process)
  process.send_signal(signal.SIGTERM)
  out = process.communicate(timeout=120)[0]
  assert process.returncode == 75, out
  stop = re.search(r'stopped by SIGTERM after step (\d+); everything', out)
  assert stop, out
  assert end_state(tmp_path)[0] == int(stop[1])
  assert f'Go on with: python main.py {FLAGS[0]}' in out
  done = call_main(*FLAGS, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert f'resuming at step {stop[1]}' in done.stdout
  assert end_state(tmp_path) == end_state(undisturbed)
  assert rows(tmp_path) == rows(undisturbed)


@pytest.mark.slow
def test_kill_at_ten_random_moments(undisturbed, tmp_path):
  moments = random.Random(0)
  before = 0
  for _ in range(10):
    process = start(tmp_path)
    wait_for_training(process)
    time.sleep(moments.uniform(0, 0.6))
    process.kill()
    process.communicate()
    latest = Checkpoints(tmp_path / 'checkpoints', writer=False).latest() or 0
    logged = rows(tmp_path)[-1]['step']
    assert latest >= before
    assert logged - latest <= 20  # one interval
    before = latest
  done = run_main(*FLAGS, f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert end_state(tmp_path) == end_state(undisturbed)
  assert rows(tmp_path) == rows(undisturbed)


def test_fewer_steps_than_were_done_end_in_an_evaluation(tmp_path, monkeypatch):
  config = make_digits_config()
  config.eval.every = 100
  with monkeypatch.context() as context:
    stop_after(context, 2)
    with pytest.raises(Preempted):
      modes.run('train', config, str(tmp_path))
  config.train.steps = 1
  modes.run('train', config, str(tmp_path))
  row = json.loads((tmp_path / 'results.json').read_text())['baseline']
  assert row['num_examples'] == 360


def test_an_early_stop_saves_its_last_step(tmp_path):
  config = make_digits_config()
  config.train.steps = config.eval.every = 75
  modes.run('train', config, str(tmp_path))
  # The next evaluation is worse, and no step is one for a checkpoint.
  config.optim.lr = 10.0
  config.train.update(steps=150, patience=1)
  config.eval.every = 2
  config.checkpoint.every = 1000
  modes.run('train', config, str(tmp_path))
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['step'] == 76
  assert Checkpoints(tmp_path / 'checkpoints', writer=False).steps() == [75, 76]


def test_a_step_under_the_name_of_another_is_refused(trained, tmp_path):
  shutil.copytree(trained, tmp_path / 'run')
  folder = tmp_path / 'run' / 'checkpoints'
  (folder / '8').rename(folder / '50')
  config = rich_config()
  config.train.steps = 60
  with pytest.raises(CheckpointError, match='50 is damaged: it holds step 8'):
    modes.run('train', config, str(tmp_path / 'run'))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_leaves_nothing_to_go_on_from(
  tmp_path, number
):
  process = start(tmp_path)
  for line in process.stdout:
    if line.startswith('mode'):
      break
  process.send_signal(number)
  out = process.communicate(timeout=120)[0]
  assert process.returncode == 75, out
  assert out.count('Traceback') == out.count('Exception ignored')


def test_a_signal_that_was_swallowed_before_the_loop_stops_it():
  def handler(number, frame):
    del number, frame

  handler.received = 'SIGTERM'
  former = signal.signal(signal.SIGTERM, handler)
  try:
    with loop.StopFlag() as flag:
      assert flag.received == 'SIGTERM'
  finally:
    signal.signal(signal.SIGTERM, former)
