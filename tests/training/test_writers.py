"""metrics.jsonl and the TensorBoard events beside it."""

import json

import pytest

from qvit_jax import modes
from qvit_jax.training import writers
from tests.conftest import TINY, fill, run_main


def read_rows(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_one_line_a_split_with_the_names_of_the_contract(tmp_path):
  writer = writers.JsonlWriter(tmp_path / 'metrics.jsonl', resume_step=0)
  writer.write_scalars(5, {'train/loss': 1.5, 'train/lr': 0.1, 'eval/top1': 1})
  writer.close()
  assert read_rows(tmp_path) == [
    {'step': 5, 'split': 'train', 'loss': 1.5, 'lr': 0.1},
    {'step': 5, 'split': 'eval', 'top1': 1},
  ]


def test_lines_beyond_the_restored_step_and_half_lines_go(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [{'step': step, 'split': 'train', 'loss': step} for step in (2, 4, 6)]
  text = '\n'.join(json.dumps(row) for row in rows)
  path.write_text(text + '\n{"step": 4, "spl')
  writer = writers.JsonlWriter(path, resume_step=4)
  writer.write_scalars(6, {'train/loss': 60})
  writer.close()
  assert [row['loss'] for row in read_rows(tmp_path)] == [2, 4, 60]


@pytest.fixture(scope='module')
def events(tmp_path_factory):
  """Returns (workdir, TensorBoard's reader) of a finished run."""
  from tensorboard.backend.event_processing import event_accumulator

  from tests.conftest import make_digits_config

  config = make_digits_config()
  config.log.tensorboard = True
  workdir = tmp_path_factory.mktemp('run')
  modes.run('train', config, str(workdir))
  reader = event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'), size_guidance={'tensors': 0}
  )
  reader.Reload()
  return workdir, reader


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(events):
  from tensorboard.util import tensor_util

  workdir, reader = events
  checked = 0
  for row in read_rows(workdir):
    for name, value in row.items():
      if name in ('step', 'split'):
        continue
      found = {
        event.step: float(tensor_util.make_ndarray(event.tensor_proto))
        for event in reader.Tensors(f'{row["split"]}/{name}')
      }
      assert found[row['step']] == pytest.approx(value, rel=1e-6)
      checked += 1
  # Three train lines of five numbers, two evaluations of five.
  assert checked == 25


def test_tensorboard_holds_confusion_and_weights(events):
  _, reader = events
  tags = reader.Tags()['tensors']
  assert 'eval/confusion' in tags
  assert 'params/encoder/block_00/attn/query/kernel' in tags
  assert 'params/head/kernel' in tags


@pytest.mark.parametrize('line', [b'\xff\xfe{"step"', b'{"step": "3"}', b'7'])
def test_garbage_in_metrics_jsonl_is_dropped(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 2, "split": "train", "loss": 1}\n' + line)
  writers.JsonlWriter(path, resume_step=4).close()
  assert [json.loads(x)['step'] for x in path.read_text().splitlines()] == [2]


@pytest.mark.slow
def test_a_full_disk_under_tensorboard_is_said(small_disk):
  fill(small_disk, leave=8 * 1024)
  done = run_main(
    *TINY, '--config.train.steps=3', '--config.log.tensorboard=true',
    f'--workdir={small_disk / "run"}',
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  # TensorFlow's C++ prints lines of its own before ours.
  assert 'free some space' in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr
