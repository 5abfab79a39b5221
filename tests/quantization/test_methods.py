"""Methods are asked through their record, not by their name or arithmetic."""

import ast
import pathlib

import pytest

from qvit_jax.quantization import METHODS

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / 'qvit_jax'
# Words that name other things too; then the other side has to be a recipe.
AMBIGUOUS = {'none', 'ptq'}
# A file of an earlier version says what its recipe read at that time.
HISTORY = {('config/resolve.py', "section['recipe']")}


def mentions(node):
  """Returns the texts of an operand: its own, or those it holds."""
  return {
    part.value
    for part in ast.walk(node)
    if isinstance(part, ast.Constant) and isinstance(part.value, str)
  }


def probes(path, source):
  """Returns a line for each probed core and each comparison with a name."""
  found = []
  for node in ast.walk(ast.parse(source)):
    text = ast.unparse(node) if isinstance(node, ast.expr) else ''
    if isinstance(node, ast.Call) and node.args:
      asked = ast.unparse(node.func) in ('isinstance', 'getattr', 'hasattr')
      if asked and any('core' in ast.unparse(x).lower() for x in node.args):
        found.append(f'{path}: {text}')
    if isinstance(node, ast.Compare):
      sides = [node.left, *node.comparators]
      names = set().union(*map(mentions, sides)) & set(METHODS)
      about = any(
        'recipe' in ast.unparse(side) or 'method' in ast.unparse(side)
        for side in sides
      )
      is_old = (path, ast.unparse(node.left)) in HISTORY
      if (names - AMBIGUOUS or names and about) and not is_old:
        found.append(f'{path}: {text}')
  return found


def test_no_core_is_probed_and_no_recipe_compared_outside_quantization():
  found = [
    line
    for file in sorted(PACKAGE.rglob('*.py'))
    if file.relative_to(PACKAGE).parts[0] != 'quantization'
    for line in probes(file.relative_to(PACKAGE).as_posix(), file.read_text())
  ]
  assert not found


@pytest.mark.parametrize(
  'source',
  [
    "kernels = getattr(self.ops.core, 'kernels', '')",
    'isinstance(model.ops.core, LearnedCore)',
    'isinstance(core, AqtCore)',
    "config.quant.recipe == 'none'",
    "recipe != 'ptq'",
    "recipe in ('lsq', 'statsq')",
    "found['method'] == 'none'",
    "kind == 'aqt'",
  ],
)
def test_probes_are_found(source):
  assert probes('any.py', source)


@pytest.mark.parametrize(
  'source',
  ["train.distill == 'none'", "mode == 'ptq'", "{'quant.recipe': 'none'}"],
)
def test_other_words_are_let_alone(source):
  assert not probes('any.py', source)


@pytest.mark.parametrize('name', METHODS)
def test_records_say_what_goes_together(name):
  method = METHODS[name]
  assert method.quantizes == bool(method.granularities)
  assert method.quantizes == (method.pack is not None)
  assert 'quant.rules' in method.reads or not method.quantizes
  assert ('quant.dampen' in method.reads) == method.dampens
  assert ('quant.freeze' in method.reads) == method.freezes
  assert ('quant.calibration_path' in method.reads) == method.learns_steps
  assert ('quant' in method.collections) == method.learns_steps
  assert method.same[0] == 'recipe'
