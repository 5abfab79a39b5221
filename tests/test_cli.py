"""The command line: help, exit codes, and one line for every mistake."""

import os
import subprocess
import sys

import pytest

from qvit_jax.store import files
from tests.conftest import EIGHT_DEVICES, ROOT, TINY, run_main, run_python

DIGITS = '--config=configs/vit_ti_digits_w4a4.py'
HEADLINE = '--config=configs/vit_l_cifar100_w4a4.py'


@pytest.fixture
def call(call_main, monkeypatch, tmp_path):
  """Returns call(*flags) -> (exit code, stderr); a workdir is added."""
  # TFDS looks where a test says, not where this machine has its data.
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)

  def run(*flags, workdir=tmp_path / 'run'):
    place = [f'--workdir={workdir}'] if workdir else []
    done = call_main(*flags, *place)
    return done.returncode, done.stderr

  return run


def check_mistake(result, *parts):
  """The exit code is 2 and one line on stderr holds all parts."""
  code, err = result
  assert code == 2, err
  assert err.count('\n') == 1, err
  for part in parts:
    assert part in err


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_freed_arrays_stay_with_the_process():
  code = (
    'import sys\n'
    'import numpy\n'
    'from qvit_jax.api import cli\n'
    "if sys.argv[1] == 'keep': cli._keep_memory()\n"
    'numpy.ones(2**24)\n'  # 128 MiB, gone at once
    "pages = int(open('/proc/self/statm').read().split()[1])\n"
    'print(pages * 4096 // 2**20)\n'
  )
  kept, given_back = (
    int(subprocess.run(
      [sys.executable, '-c', code, how], cwd=ROOT, capture_output=True,
      text=True, check=True,
    ).stdout)
    for how in ('keep', 'leave')
  )  # fmt: skip
  assert kept > given_back + 100


def test_help_lists_modes_and_loads_no_jax():
  code = (
    'import sys; from qvit_jax.api import cli; '
    "assert cli.main(['main.py', '--help']) == 0; "
    "print(sorted({'jax', 'numpy', 'tensorflow'} & set(sys.modules)))"
  )
  printed = run_python(code)
  assert printed.strip().endswith('[]')
  for mode in ('train', 'eval', 'sites', 'benchmark'):
    assert f'  {mode} ' in printed


@pytest.mark.parametrize(
  ('flags', 'parts'),
  [
    ((), ('no config was given', 'vit_l_cifar100_w4a4.py')),
    (('--config=nope.py',), ('nope.py is no file', 'vit_l_cifar100')),
    ((DIGITS, '--config.model.widht=3'), ('nearest', 'config.model.width')),
    ((DIGITS, '--config.train.steps=abc'), ('train.steps=abc',)),
    ((DIGITS, '--config.train.steps=1.5'), ('train.steps=1.5',)),
    ((DIGITS, '--config.model.qk_norm=maybe'), ('model.qk_norm=maybe',)),
    ((DIGITS, '--foo=1'), ('foo', '--help')),
    ((DIGITS, 'extra'), ("'extra' is no flag",)),
    ((DIGITS, '--mode=fly'), ('train|eval|ptq|sensitivity',)),
    ((DIGITS, '--config.quant.default=w1a4'), ('1 bits', '2 to 8')),
    ((DIGITS, '--config.quant.default=w4a9'), ('9 bits', '2 to 8')),
    ((DIGITS, '--config.quant.recipe=none', '--config.quant.default=w8a8'),
     ('would have no effect',)),
    ((DIGITS, "--config.quant.rules=(('blok/fc1', 'w8a8'),)"),
     ("'blok/fc1' matches nothing", 'mlp/fc1', '--mode=sites')),
    ((DIGITS, '--config.model.patch=3'), ('image_size=8', 'patch 3')),
    ((DIGITS, '--config.model.heads=5'), ('heads=5', 'width=192')),
    ((DIGITS, '--config.mesh.data=3'), ('mesh.data=3', '1 devices')),
    ((DIGITS, f'--config.seed={2**32}'), (f'seed={2**32}',)),
    ((DIGITS, '--config.weights.path=/nothing'),
     ("weights.path='/nothing'",)),
    ((DIGITS, '--config.train.steps=0'), ('train nothing',)),
    ((DIGITS, '--config.train.steps=-4'), ('train.steps=-4',)),
    ((DIGITS, '--config.optim.warmup_steps=1200'),
     ('warmup_steps=1200', '1200 of the training')),
    ((DIGITS, '--config.model.num_classes=5'),
     ('10 classes', '--config.model.num_classes=10')),
    ((DIGITS, '--config.data.train_split=trian'), ("split 'trian'",)),
    ((DIGITS, '--config.data.source=tfds'), ('--config.data.name=',)),
    ((HEADLINE, '--config.data.name=cifar1000'), ("'cifar1000' is no TFDS",)),
  ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line(call, flags, parts):
  check_mistake(call(*flags), *parts)


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('def get_config(:', 'SyntaxError'),
    ('x = 1', "no attribute 'get_config'"),
    ('import nothing_like_it', 'nothing_like_it'),
    ('def get_config():\n  return None', 'get_config'),
    ('def get_config():\n  return 3', 'get_config'),
    ('raise SystemExit(3)', 'SystemExit: 3'),
    (
      'from configs import common\ndef get_config():\n'
      '  c = common.get_config()\n  c.model.widht = 4\n  return c',
      'model.width',
    ),
  ],
)
def test_a_broken_config_file_is_named(call, tmp_path, text, part):
  path = tmp_path / 'mine.py'
  path.write_text(text)
  check_mistake(call(f'--config={path}'), part)


def test_a_missing_data_set_says_what_to_run_or_set(call, tmp_path):
  folder = tmp_path / 'nothing'
  check_mistake(
    call(HEADLINE, f'--config.data.dir={folder}'),
    f'cifar100 is not prepared in {folder}',
    'TFDS_DATA_DIR',
    '--config.data.dir',
    'download_and_prepare()',
  )


def test_a_workdir_is_needed_and_is_no_file(call, tmp_path):
  check_mistake(call(DIGITS, workdir=''), 'no workdir', '--workdir=DIR')
  path = tmp_path / 'file'
  path.write_text('')
  check_mistake(call(DIGITS, workdir=path), f'{path} is (or lies below) a file')
  check_mistake(call(DIGITS, workdir=path / 'below'), 'choose a directory')


def test_a_tilde_is_the_home_folder(call, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  done = call(DIGITS, '--mode=predict', workdir='~/run')
  check_mistake(done, f'{tmp_path / "run"} holds no checkpoint')


def test_a_workdir_in_use_names_its_owner(call, tmp_path):
  workdir = files.open_workdir(str(tmp_path / 'run'))
  with files.Lock(workdir):
    check_mistake(call(DIGITS), f'in use by process {os.getpid()} on ')


def test_evaluating_an_empty_workdir_says_to_train(call):
  check_mistake(
    call(DIGITS, '--mode=eval'), 'holds no checkpoint', 'train there first'
  )


def test_debug_shows_the_traceback(call):
  with pytest.raises(Exception, match='train nothing'):
    call(DIGITS, '--config.train.steps=0', '--debug')


def test_a_batch_that_eight_devices_cannot_share_is_refused(tmp_path):
  done = run_main(
    *TINY,
    '--config.train.batch_size=12',
    f'--workdir={tmp_path}',
    env=EIGHT_DEVICES,
  )
  check_mistake(
    (done.returncode, done.stderr),
    'train.batch_size=12 is not divisible by mesh.data x mesh.fsdp = 8',
    'choose a multiple of 8',
  )


def test_a_read_only_disk_is_one_line(call, tmp_path):
  place = tmp_path / 'disk'
  place.mkdir()
  if os.geteuid() or os.system(f'mount -t tmpfs -o size=1m,ro tmpfs {place}'):
    pytest.skip('mounting a disk needs root')
  try:
    check_mistake(call(DIGITS, workdir=place / 'run'), 'the disk is read-only')
  finally:
    os.system(f'umount -l {place}')


def test_sites_of_the_headline_make_no_array_and_write_nothing(tmp_path):
  code = (
    'import sys\n'
    'from qvit_jax.api import cli\n'
    'from tests.conftest import peak_bytes\n'
    'code = cli.main(sys.argv)\n'
    'print(code, peak_bytes())\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, '--mode=sites', HEADLINE,
     f'--workdir={tmp_path / "run"}'],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  *_, total, last = lines = done.stdout.splitlines()
  assert sum(line.startswith('encoder/block_') for line in lines) == 24 * 8
  assert total == (
    '194 sites, 146 quantized, 48 float; 61,553,790,976 MACs and '
    '2,907,660,943,360 BOPs an image'
  )
  status, peak = map(int, last.split())
  assert status == 0
  assert peak < 1e9  # parameters alone would be 1.2 GB
  assert list(tmp_path.iterdir()) == []


def test_a_trained_digits_model_reads_and_says_what_it_did(
  call_main, tmp_path
):
  done = run_main(*TINY, '--config.train.steps=6', f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr
  for part in (
    'mode      train', 'model     vit width 16', 'bits      8 layers w4a4',
    'data      digits, 1,437 train, 360 eval', f'workdir   {tmp_path}',
    'start     starting from scratch (weights.path is not set)',
    'compiling the train step', 'step 2/6  loss ', 'evaluation at step 3',
    f'results in {tmp_path}/results.json',
  ):  # fmt: skip
    assert part in done.stdout
  assert done.stderr == ''
  # A file that orbax keeps for itself: it would print what went wrong in each
  # of its threads, so it does not get to see it.
  path = tmp_path / 'checkpoints' / '6' / 'variables' / '_sharding'
  path.write_bytes(path.read_bytes()[:-9])
  done = call_main(*TINY, f'--workdir={tmp_path}', '--mode=eval')
  check_mistake(
    (done.returncode, done.stderr), 'is damaged: variables/_sharding has '
  )


@pytest.mark.parametrize('name', ['cifar100:9.9.9', 'cifar100/nothing'])
def test_an_unknown_version_of_a_set_is_one_line(call, name):
  check_mistake(call(HEADLINE, f'--config.data.name={name}'), name)
