"""Two processes under a real SLURM and a real Open MPI, on one machine.

Debian has both: slurm-wlm and openmpi-bin.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from qvit_jax.store import runs
from tests.conftest import ROOT, TINY
from tests.training.test_processes import latest

pytestmark = pytest.mark.slow

FLAGS = (*TINY, '--config.train.steps=1500', '--config.eval.every=1500',
         '--config.checkpoint.every=100')  # fmt: skip
CONF = """
ClusterName=test
SlurmctldHost={host}
AuthType=auth/munge
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ReturnToService=2
MpiDefault=none
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""  # noqa: E501


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
  """Returns (command that starts two tasks, its environment)."""
  names = ('srun', 'slurmctld', 'slurmd', 'munged')
  if os.geteuid() or not all(map(shutil.which, names)):
    pytest.skip('needs root, slurm-wlm and munge')
  place = tmp_path_factory.mktemp('slurm')
  for name in ('state', 'spool'):
    (place / name).mkdir()
  conf = place / 'slurm.conf'
  host = socket.gethostname().partition('.')[0]
  conf.write_text(CONF.format(host=host, place=place, cpus=os.cpu_count()))
  env = os.environ | {'SLURM_CONF': str(conf)}
  pathlib.Path('/run/munge').mkdir(exist_ok=True)
  subprocess.run(['chown', 'munge:', '/run/munge'], check=True)
  started = [subprocess.Popen(
    ['runuser', '-u', 'munge', '--', 'munged', '--foreground'],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )]  # fmt: skip
  time.sleep(2)
  for name in ('slurmctld', 'slurmd'):
    started.append(subprocess.Popen(
      [name, '-D'], env=env, stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ))  # fmt: skip
  until = time.monotonic() + 60
  while time.monotonic() < until:
    shown = subprocess.run(
      ['sinfo', '-h', '-o', '%t'], env=env, capture_output=True, text=True
    ).stdout.split()
    if 'idle' in shown:
      break
    time.sleep(1)
  else:
    pytest.fail((place / 'slurmctld.log').read_text()[-2000:])
  yield ('srun', '-n2', '--overcommit', '--kill-on-bad-exit=0'), env
  for one in reversed(started):
    one.terminate()
    one.wait(timeout=30)


@pytest.fixture(scope='module')
def mpi():
  """Returns the same of Open MPI."""
  if not shutil.which('mpirun'):
    pytest.skip('needs openmpi-bin')
  more = ['--allow-run-as-root'] if not os.geteuid() else []
  return ('mpirun', *more, '--oversubscribe', '-np', '2'), dict(os.environ)


def start(how, workdir):
  command, env = how
  return subprocess.Popen(
    [*command, sys.executable, '-u', 'main.py', *FLAGS, f'--workdir={workdir}'],
    cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True, start_new_session=True,
  )  # fmt: skip


def tasks_of(workdir):
  """Returns the process ids of the tasks themselves."""
  found = []
  for place in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      words = (place / 'cmdline').read_bytes().decode().split('\0')
    except OSError:
      continue
    if words[0] == sys.executable and f'--workdir={workdir}' in words:
      found.append(int(place.name))
  return sorted(found)


@pytest.mark.parametrize('name', ['slurm', 'mpi'])
def test_a_killed_task_ends_the_job_which_goes_on_bit_for_bit(
  name, request, tmp_path
):
  how = request.getfixturevalue(name)
  whole = start(how, tmp_path / 'whole')
  output = whole.communicate(timeout=400)[0]
  assert whole.returncode == 0, output[-3000:]
  assert '2 process(es)' in output
  workdir = tmp_path / 'killed'
  job = start(how, workdir)
  try:
    until = time.monotonic() + 200
    while latest(workdir) is None:
      assert time.monotonic() < until and job.poll() is None
      time.sleep(0.1)
    tasks = tasks_of(workdir)
    assert len(tasks) == 2
    os.kill(tasks[-1], signal.SIGKILL)
    killed = time.monotonic()
    output = job.communicate(timeout=60)[0]
  finally:
    for task in tasks_of(workdir):
      os.kill(task, signal.SIGKILL)
  assert time.monotonic() - killed < 60
  assert job.returncode != 0
  assert 'Traceback' not in output
  if name == 'slurm':  # Open MPI kills the other task before it can say it
    assert 'was killed or does not answer; run the same command' in output
  step = latest(workdir)
  again = start(how, workdir)
  output = again.communicate(timeout=400)[0]
  assert again.returncode == 0, output[-3000:]
  assert f'resuming at step {step}' in output
  first, second = (
    runs.open_run(tmp_path / one).digests for one in ('whole', 'killed')
  )
  assert first == second
