"""Who imports whom: strictly downwards, folder by folder."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Folders and the modules at the root, lowest first: each may import what lies
# in lower rows, and itself. A new file in a folder needs no row.
ORDER = (
  ('errors',),
  ('tree', 'arithmetic', 'rules'),
  ('ops',),
  ('evaluation', 'config', 'models', 'data'),
  ('quantization',),
  ('lora', 'store', 'export'),
  ('weights', 'training', 'report'),
  ('experiment',),
  ('modes',),
  ('api',),
)
ROWS = {name: row for row, names in enumerate(ORDER) for name in names}
# training does not know which model, recipe or data source it runs.
HIDDEN = {
  'training': {'models', 'quantization', 'data', 'lora'},
  'weights': {'models', 'quantization', 'data', 'evaluation', 'lora'},
}
# The only imports of ours inside a function: they cost a second each.
LATE = {
  ('data/__init__.py', 'qvit_jax.data.tfds_source'),
  ('__init__.py', 'qvit_jax.api'),
  ('api/cli.py', 'qvit_jax.'),
}
# Heavy or dying packages and the one file that knows them.
OWNERS = {
  'aqt': 'quantization/methods/aqt.py',
  'tensorflow_datasets': 'data/tfds_source.py',
  'tensorflow': 'training/writers.py',
  'clu': 'training/writers.py',
  'orbax': 'store/checkpoint.py',
  'huggingface_hub': 'weights/hub.py',
  'safetensors': 'store/tensors.py',
  'matplotlib': 'report/figures.py',
  'jinja2': 'report/html.py',
  'onnx': 'export/onnx_file.py',
  'onnxruntime': 'export/engines.py',
  'openvino': 'export/engines.py',
  'wandb': 'training/writers.py',
}


def imports(source):
  """Yields (module, is it inside a function) of every import."""
  tree = ast.parse(source)
  inside = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, (ast.FunctionDef, ast.Lambda))
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        yield name.name, id(node) in inside
    elif isinstance(node, ast.ImportFrom):
      for name in node.names:
        yield f'{node.module}.{name.name}', id(node) in inside


def part_of(module):
  """Returns the row name of 'qvit_jax.data.order' -> 'data'."""
  return module.split('.')[1]


def violations(path, source):
  """Returns a line for every import of a file that goes up or sideways."""
  own = path.split('/')[0].removesuffix('.py')
  lines = []
  for module, is_late in imports(source):
    if not module.startswith('qvit_jax.'):
      continue
    other = part_of(module)
    if is_late and not any(
      path == file and module.startswith(allowed) for file, allowed in LATE
    ):
      lines.append(f'{path} imports {module} inside a function')
    if other != own and (
      ROWS[other] >= ROWS[own] or other in HIDDEN.get(own, ())
    ):
      lines.append(f'{path} (row {ROWS[own]}) imports {module}')
  return lines


def package_files():
  package = ROOT / 'qvit_jax'
  return {
    path.relative_to(package).as_posix(): path.read_text()
    for path in package.rglob('*.py')
    if path != package / '__init__.py'
  }


def test_every_import_goes_down():
  found = [
    line
    for path, source in package_files().items()
    for line in violations(path, source)
  ]
  assert not found


def test_every_folder_has_a_row():
  parts = {path.split('/')[0].removesuffix('.py') for path in package_files()}
  assert parts <= set(ROWS)


def test_the_root_holds_the_ground_floor_alone():
  files = {path.stem for path in (ROOT / 'qvit_jax').glob('*.py')}
  assert files == {'__init__', 'errors', 'ops', 'rules', 'tree'}


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('models/vit.py', 'from qvit_jax.quantization import spec'),
    ('models/vit.py', 'import qvit_jax.training.loop'),
    ('training/loop.py', 'from qvit_jax.data import order'),
    ('tree.py', 'from qvit_jax import rules'),
    ('training/loop.py', 'def f():\n  from qvit_jax import tree'),
  ],
)
def test_a_planted_import_is_caught(path, source):
  assert len(violations(path, source)) == 1


@pytest.mark.parametrize(('package', 'owner'), OWNERS.items())
def test_one_file_alone_knows(package, owner):
  users = {
    path
    for path, source in package_files().items()
    for module, _ in imports(source)
    if module.split('.')[0] == package
  }
  assert users == {owner}


def test_tensorflow_is_imported_only_where_events_are_written():
  source = (ROOT / 'qvit_jax/training/writers.py').read_text()
  late = {module: is_late for module, is_late in imports(source)}
  assert late['tensorflow']
  assert late['clu.metric_writers.summary_writer']


def test_configs_import_only_their_common_base():
  for path in (ROOT / 'configs').glob('*.py'):
    found = {module for module, _ in imports(path.read_text())}
    allowed = (
      {'qvit_jax.config.resolve'}
      if path.stem == 'common'
      else {'configs.common'}
    )
    assert found == allowed, path


def test_the_home_folder_is_found_in_one_place():
  """Where a config is resolved; whoever reads a path later has a whole one."""
  users = {
    path for path, source in package_files().items() if 'expanduser' in source
  }
  assert users == {'config/resolve.py'}


def test_no_module_is_called_utils():
  names = {path.split('/')[-1] for path in package_files()}
  assert not names & {'utils.py', 'common.py', 'helpers.py', 'misc.py'}
