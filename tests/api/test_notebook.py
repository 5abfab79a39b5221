"""docs/notebook.ipynb runs from its first cell to its last."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path):
  cells = json.loads((ROOT / 'docs' / 'notebook.ipynb').read_text())['cells']
  code = [
    ''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code'
  ]
  for name in ('main.py', 'configs', 'qvit_jax'):
    (tmp_path / name).symlink_to(ROOT / name)
  script = tmp_path / 'notebook.py'
  script.write_text('\n\n'.join(code))
  done = subprocess.run(
    [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True,
    env=os.environ | {'MPLBACKEND': 'Agg', 'XLA_FLAGS': ''},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  lines = done.stdout.splitlines()
  shares = {
    line.split()[0]: float(line.split()[2])
    for line in lines if ' top-1 ' in line and 'test images' in line
  }  # fmt: skip
  assert set(shares) == {'float', 'w4a4'}
  assert shares['float'] > 0.85
  assert shares['w4a4'] > shares['float'] - 0.05
  assert (tmp_path / 'runs' / 'notebook' / 'w4a4.safetensors').is_file()
