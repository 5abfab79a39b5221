"""A mode, method or solver is a file and a line; field, row, layout a line."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODE = "  Mode('hello', 'say hello to a person', 'hello:hello'),\n"
FIELD = "  Field('eval.person', 3, ZERO_UP, 'Who is greeted; >= 0.'),\n"
FILE = '''"""Mode `hello`."""


def hello(config, workdir):
  """Prints a greeting."""
  print('hello', config.eval.person, 'in', workdir)
'''
METHOD = '''"""Method `loud`, which rounds nothing but says so."""

from qvit_jax.ops import Ops
from qvit_jax.quantization.methods.method import Method

METHOD = Method(
  lambda quant, plan, hidden: Ops(), granularities=('per_token',),
  note=lambda quant, ops, plan: ', aloud',
)
'''
SOLVER = '''"""Solver `halve`."""

from qvit_jax.quantization.ptq.solver import Solver

SOLVER = Solver(lambda params, stream, observe, seed: {'x': params['x'] / 2})
'''
LAYOUT = """    'mine': KeyMap('My library', tuple(
        Row(row.ours, row.theirs.replace('weight', 'w'), row.kind, row.part)
        for row in _DINOV2)),
"""
LINES = {
  'modes/__init__.py': ('_TABLE = (\n', MODE),
  'config/sections/running.py': ('FIELDS = (\n', FIELD),
  'quantization/methods/__init__.py': (
    '_TABLE = {\n', "  'loud': 'loud:METHOD',\n"
  ),
  'quantization/ptq/solvers.py': (
    'SOLVERS: dict[str, Solver] = {\n', "  'halve': _of('halve'),\n"
  ),
  'quantization/ptq/rows.py': (
    '  rows |= {\n', "    'int7_dynamic': _uniform('int7_dynamic', 7, 7),\n"
  ),
  'weights/layouts.py': ('LAYOUTS = {\n', LAYOUT),
}  # fmt: skip
CALLS = """
from qvit_jax.api import cli
for argv in (
  ['--help'],
  ['--help', 'eval.person'],
  ['--config=configs/vit_folder.py', '--mode=hello', '--workdir=here',
   '--config.eval.person=5'],
  ['--config=configs/vit_folder.py', '--mode=hello',
   '--config.eval.person=-1'],
  ['--config=configs/vit_folder.py', '--mode=helo'],
  ['--config=configs/vit_ti_digits_w4a4.py', '--mode=sites',
   '--config.quant.recipe=loud'],
  ['--config=configs/vit_folder.py', '--mode=hello', '--workdir=here',
   '--config.export.layout=mine'],
):
  print('exit code', cli.main(['main.py', *argv]))

import numpy as np
from qvit_jax.quantization.ptq import apply, rows
row = rows.parse_row('int7_dynamic+halve')
print(row.method(), row.default, row.attention)
observe = lambda done, params: {}
print(apply.transform(row, {'x': np.float32(3)}, None, observe, seed=0))

import jax
from configs import common
from qvit_jax import models, weights
config = common.get_config()
config.model.update(image_size=8, patch=4, width=8, depth=2, heads=2, mlp_dim=8)
model = models.build_model(config)
shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))
params = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype)
                      .reshape(x.shape), shapes['params'])
tensors = weights.translate(params, 'mine')
np.savez('mine.npz', **tensors)
again, report = weights.load_weights('mine.npz', params)
print(sorted(tensors)[0], 'in the layout of', report.layout, 'and back:',
      jax.tree.all(jax.tree.map(np.array_equal, params, again)))
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
  (copy / 'qvit_jax/quantization/methods/loud.py').write_text(METHOD)
  (copy / 'qvit_jax/quantization/ptq/halve.py').write_text(SOLVER)
  for name, (before, line) in LINES.items():
    add_line(copy / 'qvit_jax' / name, before, line)
  for call in (
    ('-m', 'qvit_jax.config.listing', 'configs/common.py'),
    ('-c', CALLS),
  ):
    done = subprocess.run(
      [sys.executable, *call],
      cwd=copy,
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert done.returncode == 0, done.stderr
  done.page = (copy / 'configs/common.py').read_text()
  return done


def test_a_mode_and_a_field_are_one_line_each(output):
  said = output.stdout
  assert '  hello        say hello to a person\n' in said
  assert '  eval.person = 3\n    Who is greeted; >= 0.\n' in said
  assert 'hello 5 in here\n' in said
  codes = [line for line in said.splitlines() if 'exit code' in line]
  assert codes == [f'exit code {code}' for code in (0, 0, 0, 2, 2, 0, 0)]


def test_one_command_lists_the_field_for_its_readers(output):
  before = (ROOT / 'configs/common.py').read_text()
  added = '  eval.person = 3\n    Who is greeted; >= 0.\n'
  assert output.page.count(added) == 1
  assert output.page.replace(added, '') == before


def test_a_layout_is_one_row(output):
  said = 'blocks.0.attn.proj.bias in the layout of My library and back: True\n'
  assert said in output.stdout


def test_a_method_a_solver_and_a_row_are_one_line_each(output):
  said = output.stdout
  assert '(recipe loud, activations per_token, aloud)' in said
  assert 'dynamic per token, halve w7a7 a7\n' in said
  assert "{'x': np.float32(1.5)}" in said


def test_their_mistakes_are_one_line(output):
  wrong_value, wrong_mode = output.stderr.strip().splitlines()
  assert 'eval.person=-1 is not allowed; allowed: a number >= 0' in wrong_value
  assert 'hello' in wrong_mode
