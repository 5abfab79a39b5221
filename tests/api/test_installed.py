"""What `pip install .` gives: the package, its configs, the command `qvit`."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The file that is built of a copy of the tree."""
  place = tmp_path_factory.mktemp('wheel')
  copy = place / 'tree'
  listed = subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
    cwd=ROOT, capture_output=True, text=True, check=True,
  ).stdout.splitlines()  # fmt: skip
  for name in listed:
    if (ROOT / name).is_file():
      (copy / name).parent.mkdir(parents=True, exist_ok=True)
      (copy / name).write_bytes((ROOT / name).read_bytes())
  run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-w', place, copy)
  (found,) = place.glob('*.whl')
  return found


def run(*command, cwd=None):
  done = subprocess.run(
    [str(part) for part in command], cwd=cwd, capture_output=True, text=True,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_pages_and_what_they_need(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    (path,) = (name for name in names if name.endswith('/METADATA'))
    metadata = archive.read(path).decode()
  for file in (ROOT / 'qvit_jax').rglob('*'):
    if file.is_file() and '__pycache__' not in file.parts:
      assert str(file.relative_to(ROOT)) in names
  for file in (ROOT / 'configs').glob('*.py'):
    assert f'qvit_jax/configs/{file.name}' in names
  assert not [name for name in names if name.startswith(('tests', 'configs'))]
  wanted = [line for line in metadata.splitlines() if 'Requires-Dist' in line]
  assert any(line.startswith('Requires-Dist: jax<0.12') for line in wanted)
  assert not any('pytest' in line for line in wanted)
  for extra in ('onnx', 'openvino', 'cuda13', 'wandb'):
    assert f'Provides-Extra: {extra}' in metadata


@pytest.mark.slow
def test_the_command_runs_from_an_empty_folder(wheel, tmp_path):
  run(sys.executable, '-m', 'venv', tmp_path / 'venv')
  binaries = tmp_path / 'venv' / 'bin'
  run(binaries / 'pip', 'install', '-q', wheel)
  empty = tmp_path / 'empty'
  empty.mkdir()
  said = run(binaries / 'qvit', '--help', cwd=empty)
  assert 'qvit --config=configs/NAME.py' in said
  said = run(
    binaries / 'qvit', '--config=configs/vit_ti_digits_w4a4.py',
    '--workdir=runs/digits', '--config.train.steps=2',
    '--config.train.batch_size=8', '--config.eval.num_examples=20', cwd=empty,
  )  # fmt: skip
  assert 'results in' in said
  run(
    binaries / 'python', '-c',
    'import numpy, qvit_jax; model = qvit_jax.load("runs/digits"); '
    'print(model(numpy.zeros((1, 8, 8, 3), "uint8")).shape)', cwd=empty,
  )  # fmt: skip
  assert sorted(path.name for path in empty.iterdir()) == ['runs']
  done = subprocess.run(
    [str(binaries / 'qvit'), '--config=nope.py'], cwd=empty, text=True,
    capture_output=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert 'configs/vit_ti_digits_w4a4.py' in done.stderr
  place = pathlib.Path(run(
    binaries / 'python', '-c', 'import qvit_jax; print(qvit_jax.__file__)',
    cwd=empty,
  ))  # fmt: skip
  assert (tmp_path / 'venv') in place.parents
