"""A mode is one file and one line, a field is one row."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODE = "  Mode('hello', 'say hello to a person', 'hello:hello'),\n"
FIELD = "  Field('log.person', 3, ZERO_UP, 'Who is greeted; >= 0.'),\n"
FILE = '''"""Mode `hello`."""


def hello(config, workdir):
  """Prints a greeting."""
  print('hello', config.log.person, 'in', workdir)
'''
CALLS = """
import main
for argv in (
  ['--help'],
  ['--help', 'log.person'],
  ['--config=configs/vit_folder.py', '--mode=hello', '--workdir=here',
   '--config.log.person=5'],
  ['--config=configs/vit_folder.py', '--mode=hello',
   '--config.log.person=-1'],
  ['--config=configs/vit_folder.py', '--mode=helo'],
):
  print('exit code', main.main(['main.py', *argv]))
"""


def add_line(path, before, line):
  """Inserts a line behind the one that opens a table."""
  text = path.read_text()
  assert text.count(before) == 1
  path.write_text(text.replace(before, before + line))


@pytest.fixture(scope='module')
def output(tmp_path_factory):
  """What a copy of the tree says that has one more mode and one more field."""
  copy = tmp_path_factory.mktemp('one_place')
  for name in ('qvit_jax', 'configs'):
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, copy / name, ignore=ignore)
  shutil.copy(ROOT / 'main.py', copy)
  (copy / 'qvit_jax/modes/hello.py').write_text(FILE)
  add_line(copy / 'qvit_jax/modes/__init__.py', '_TABLE = (\n', MODE)
  add_line(copy / 'qvit_jax/config/sections/running.py', 'FIELDS = (\n', FIELD)
  done = subprocess.run(
    [sys.executable, '-c', CALLS],
    cwd=copy,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return done


def test_a_mode_and_a_field_are_one_line_each(output):
  said = output.stdout
  assert '  hello        say hello to a person\n' in said
  assert '  log.person = 3\n    Who is greeted; >= 0.\n' in said
  assert 'hello 5 in here\n' in said
  codes = [line for line in said.splitlines() if 'exit code' in line]
  assert codes == [f'exit code {code}' for code in (0, 0, 0, 2, 2)]


def test_their_mistakes_are_one_line(output):
  wrong_value, wrong_mode = output.stderr.strip().splitlines()
  assert 'log.person=-1 is not allowed; allowed: a number >= 0' in wrong_value
  assert 'hello' in wrong_mode
