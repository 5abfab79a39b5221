"""However one of several processes ends, all end, and say why in one line."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from qvit_jax.errors import ConfigError
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training import processes
from tests.conftest import ROOT, TINY, fill, start_two

LONG = (*TINY, '--config.train.steps=50000', '--config.eval.every=50000')


def latest(workdir):
  return Checkpoints(workdir / 'checkpoints', writer=False).latest()


def wait_for_training(worker):
  for line in worker.stdout:
    if line.startswith('step'):
      return
  pytest.fail('the run ended before it trained')


def end_of(workers, within=60):
  """Returns exit codes and what was printed; fails after so many seconds."""
  outputs = [worker.communicate(timeout=within)[0] for worker in workers]
  return [worker.returncode for worker in workers], outputs


def last_line(output):
  return output.rstrip().splitlines()[-1]


@pytest.fixture
def two():
  """`start_two`, whose processes do not outlive the test."""
  started = []

  def start(*flags, **given):
    started.extend(start_two(*flags, **given))
    return started[-2:]

  yield start
  for worker in started:
    worker.kill()
    worker.communicate()


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_both(two, tmp_path, small_disk):
  fill(small_disk, 2**17)
  workers = two(
    *LONG,
    '--config.checkpoint.every=1',
    own=(
      [f'--workdir={tmp_path / "first"}'],
      [f'--workdir={small_disk / "second"}'],
    ),
  )
  for line in workers[0].stdout:
    if line.startswith('compiled'):
      break
  codes, outputs = end_of(workers)
  assert codes == [2, 2], outputs
  line = last_line(outputs[1])
  assert line.startswith(f'CheckpointError: {small_disk}/second/checkpoints')
  assert 'are free; free some space and run the same command again' in line
  assert last_line(outputs[0]) == f'{line} (process 1)'
  assert 'Traceback' not in outputs[0] + outputs[1]


def test_a_mistake_in_one_process_ends_both(two, tmp_path):
  flags = TINY[1:]
  workers = two(
    *flags,
    f'--workdir={tmp_path}',
    own=([TINY[0]], ['--config=configs/of_one_machine.py']),
  )
  codes, outputs = end_of(workers, within=120)
  assert codes == [2, 2], outputs
  line = last_line(outputs[1])
  assert 'ConfigError: --config=configs/of_one_machine.py is no file' in line
  assert last_line(outputs[0]) == f'{line} (process 1)'


@pytest.mark.parametrize(
  ('address', 'count', 'own'),
  [
    ('', '2', '0'),
    ('localhost', '2', '0'),
    ('localhost:port', '2', '0'),
    ('localhost:1234', 'two', '0'),
    ('localhost:1234', '2', '2'),
    ('localhost:1234', '2', ''),
  ],
)
def test_a_wrong_environment_is_refused(monkeypatch, address, count, own):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', address)
  monkeypatch.setenv('JAX_NUM_PROCESSES', count)
  monkeypatch.setenv('JAX_PROCESS_ID', own)
  with pytest.raises(ConfigError, match='set all three') as error:
    processes.join()
  said = (
    f'JAX_COORDINATOR_ADDRESS={address!r}, JAX_NUM_PROCESSES={count!r}, '
    f'JAX_PROCESS_ID={own!r}: '
  )
  assert str(error.value).startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize('own', [0, 1])
def test_a_process_that_waits_alone_gives_up(own):
  code = (
    'from qvit_jax.training import processes\n'
    'processes._TELL_SECONDS = 1\n'
    'processes.join(3)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=os.environ
    | {
      'JAX_COORDINATOR_ADDRESS': '127.0.0.1:29517',
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(own),
    },
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2
  waits = f'waiting for the other processes: this is {own} of 2, the first is '
  assert done.stdout.count(f'{waits}at 127.0.0.1:29517 (up to 3 s)\n') == 2
  assert done.stderr == (
    'ConfigError: the other processes did not start within 3 s; start the same '
    'command in each of them, with the same JAX_COORDINATOR_ADDRESS and its '
    'own JAX_PROCESS_ID, or set --config.mesh.timeout= to more\n'
  )


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_process_ends_the_other(two, tmp_path, killed):
  flags = (*LONG, '--config.checkpoint.every=20', f'--workdir={tmp_path}')
  workers = two(*flags)
  wait_for_training(workers[0])
  while latest(tmp_path) is None:
    time.sleep(0.1)
  workers[killed].kill()
  codes, outputs = end_of(workers)
  assert codes[killed] == -signal.SIGKILL
  assert codes[1 - killed] == 75, outputs
  other = outputs[1 - killed]
  assert last_line(other) == (
    f'stopped: process {killed} was killed or does not answer; run the same '
    'command again in every process, training goes on from the last checkpoint'
  )
  assert 'Traceback' not in other and 'coordination' not in other
  step = latest(tmp_path)
  again = two(*flags, f'--config.train.steps={step + 1}')
  codes, outputs = end_of(again, within=300)
  assert codes == [0, 0], outputs
  assert f'resuming at step {step}' in outputs[0]


@pytest.mark.slow
def test_a_first_process_that_hangs_ends_the_other(two, tmp_path):
  workers = two(*LONG, f'--workdir={tmp_path}')
  wait_for_training(workers[0])
  workers[0].send_signal(signal.SIGSTOP)
  output = workers[1].communicate(timeout=60)[0]
  assert workers[1].returncode == 75, output
  assert 'process 0 was killed or does not answer' in last_line(output)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_update(
  two, tmp_path
):
  workers = two(*LONG, f'--workdir={tmp_path}')
  wait_for_training(workers[0])
  workers[1].send_signal(signal.SIGUSR1)
  codes, outputs = end_of(workers)
  assert codes == [75, 75], outputs
  step = latest(tmp_path)
  assert f'stopped by another process after step {step};' in outputs[0]
  assert f'stopped by SIGUSR1 after step {step};' in outputs[1]
  logged = re.findall(r'^step (\d+)/', outputs[0], re.MULTILINE)
  assert not logged or step >= int(logged[-1])
  flags = (*LONG, f'--config.train.steps={step + 3}', f'--workdir={tmp_path}')
  codes, outputs = end_of(two(*flags), within=300)
  assert codes == [0, 0], outputs
  assert f'resuming at step {step}' in outputs[0]
  assert latest(tmp_path) == step + 3


@pytest.mark.slow
def test_a_signal_to_one_process_before_it_trains_ends_both(two, tmp_path):
  workers = two(*LONG, f'--workdir={tmp_path}')
  for line in workers[0].stdout:
    if line.startswith('mode'):
      break
  workers[1].send_signal(signal.SIGTERM)
  codes, outputs = end_of(workers)
  assert codes == [75, 75], outputs
  assert last_line(outputs[0]) == (
    'stopped by a signal; run the same command again (process 1)'
  )
