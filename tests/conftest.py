"""Test set-up: CPU only, and fixtures shared by several files."""

import os

# Before JAX is imported anywhere.
os.environ['JAX_PLATFORMS'] = 'cpu'

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'


@pytest.fixture
def digits_config():
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
  return config


@pytest.fixture
def cifar_dir():
  """The folder with CIFAR-100 prepared by TFDS; skips where there is none."""
  folder = os.environ.get('TFDS_DATA_DIR', str(SHARED / 'data' / 'tfds'))
  if not (pathlib.Path(folder) / 'cifar100').is_dir():
    pytest.skip('CIFAR-100 is not prepared; set TFDS_DATA_DIR')
  return folder


def run_main(*flags, env=None, timeout=600):
  """Runs main.py in a process of its own; returns the finished process."""
  return subprocess.run(
      [sys.executable, 'main.py', *map(str, flags)],
      cwd=ROOT,
      env={**os.environ, **(env or {})},
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
  )


# Overrides that shrink configs/vit_ti_digits_w4a4.py to seconds.
TINY = (
    '--config=configs/vit_ti_digits_w4a4.py',
    '--config.model.patch=4', '--config.model.width=16',
    '--config.model.depth=1', '--config.model.heads=2',
    '--config.model.mlp_dim=32', '--config.train.batch_size=16',
    '--config.eval.every=3', '--config.log.every=2',
    '--config.log.tensorboard=false',
)  # fmt: skip
