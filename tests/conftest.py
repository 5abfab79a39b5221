"""Test set-up: CPU only, and fixtures shared by several files."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'

# Before JAX is imported anywhere. Compiled programs are kept for the processes,
# tests and sessions that need the same ones again; --cache-clear forgets them.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(ROOT / '.pytest_cache' / 'd' / 'programs')
)  # fmt: skip
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
# Most of the time goes into compiling models that then run for milliseconds;
# without these passes it is a third. XLA_FLAGS='' before pytest tests what
# users get; do so before a release.
_FLAGS = ['--xla_backend_optimization_level=0',
          '--xla_cpu_parallel_codegen_split_count=1']  # fmt: skip
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # gone in 0.11
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(_FLAGS))

# OpenVINO's reports over the network, from a fork beside JAX's threads.
sys.modules.setdefault('openvino_telemetry', None)


def pytest_collection_finish():
  """Keeps the garbage collector from walking over all of JAX at every turn."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 100)


# For a process of its own, whose CPU then counts as eight devices.
EIGHT_DEVICES = {
  'XLA_FLAGS': os.environ['XLA_FLAGS']
  + ' --xla_force_host_platform_device_count=8'
}


def make_digits_config():
  """A digits model that trains in seconds: 1 block, width 16, 4 x 4 patches."""
  from configs import common

  config = common.get_config()
  config.model.update(
      patch=4, width=16, depth=1, heads=2, mlp_dim=32, image_size=8,
      num_classes=10, dtype='float32',
  )  # fmt: skip
  config.train.update(steps=6, batch_size=16)
  config.eval.update(batch_size=120, every=3)
  config.log.update(every=2, tensorboard=False)
  config.ptq.engines = ()  # a second a row
  return config


def notes_of(config, *, mode='train', overrides=(), page=None):
  """What a mode says of a config; raises as the command line would."""
  from qvit_jax.config import resolve
  from qvit_jax.modes import MODES, runner

  context = runner.context_of(MODES[mode], config)
  return resolve.resolve(config, context, overrides=overrides, page=page)[1]


@pytest.fixture
def digits_config():
  """See `make_digits_config`."""
  return make_digits_config()


@pytest.fixture
def cifar_dir():
  """The folder with CIFAR-100 prepared by TFDS; skips where there is none."""
  folder = os.environ.get('TFDS_DATA_DIR', str(SHARED / 'data' / 'tfds'))
  if not (pathlib.Path(folder) / 'cifar100').is_dir():
    pytest.skip('CIFAR-100 is not prepared; set TFDS_DATA_DIR')
  return folder


@pytest.fixture
def small_disk(tmp_path):
  """A 2 MB disk of its own; skips where mounting is not permitted."""
  place = tmp_path / 'disk'
  place.mkdir()
  if os.geteuid() or os.system(f'mount -t tmpfs -o size=2m tmpfs {place}'):
    pytest.skip('mounting a small disk needs root')
  yield place
  os.system(f'umount -l {place}')


def fill(disk, leave):
  """Fills a disk until only `leave` bytes are free."""
  free = shutil.disk_usage(disk).free
  (disk / 'filler').write_bytes(b'x' * (free - leave))


def peak_bytes():
  """Returns this process's peak memory, not that of the one it came from."""
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    pytest.skip('peak memory is read from /proc')
  return int(status.read_text().split('VmHWM:')[1].split()[0]) * 1024


@pytest.fixture
def call_main(capsys, monkeypatch):
  """Returns call(*flags): `run_main` without a process of its own."""
  from qvit_jax.api import cli

  monkeypatch.setattr(sys, 'argv', sys.argv)  # main sets it
  monkeypatch.chdir(ROOT)

  def call(*flags):
    capsys.readouterr()
    code = cli.main(['main.py', *map(str, flags)])
    return subprocess.CompletedProcess(flags, code, *capsys.readouterr())

  return call


def run_main(*flags, env=None, timeout=600):
  """Runs main.py in a process of its own; returns the finished process.

  That takes some ten seconds. It is for what only a process shows: signals,
  devices, what threads and libraries print; `call_main` is for the rest.
  """
  return subprocess.run(
    [sys.executable, 'main.py', *map(str, flags)],
    cwd=ROOT,
    env={**os.environ, **(env or {})},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


def run_python(code):
  """Returns what a fresh interpreter prints that runs code in the checkout."""
  return subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
    check=True,
  ).stdout  # fmt: skip


def start_two(*flags, own=((), ())):
  """Starts main.py as a run of two processes; `own` has flags of each."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  return [
    subprocess.Popen(
      [sys.executable, '-u', 'main.py', *map(str, (*flags, *own[i]))],
      cwd=ROOT,
      env=os.environ
      | {
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(i),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]


# Overrides that shrink configs/vit_ti_digits_w4a4.py to seconds.
TINY = (
    '--config=configs/vit_ti_digits_w4a4.py',
    '--config.model.patch=4', '--config.model.width=16',
    '--config.model.depth=1', '--config.model.heads=2',
    '--config.model.mlp_dim=32', '--config.train.batch_size=16',
    '--config.eval.every=3', '--config.log.every=2',
    '--config.log.tensorboard=false',
)  # fmt: skip


def make_sharded_config(fields):
  """A model with four heads for meshes, with {'section.field': value} set.

  Quantized at 8 bits: at 4 bits one activation that a different order of
  summation rounds to the other side moves the loss by more than 1e-3.
  """
  config = make_digits_config()
  config.model.update(width=64, heads=4, mlp_dim=128, depth=2)
  if fields.get('quant.recipe', 'none') != 'none':
    config.quant.default = 'w8a8'
  config.train.update(steps=5, batch_size=32)
  config.eval.update(batch_size=360)
  config.log.every = 1
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config
