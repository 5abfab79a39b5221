"""Programs of StableHLO, read where there is no line of this project."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from qvit_jax import models, modes
from qvit_jax.errors import ExportError
from qvit_jax.export import stablehlo
from qvit_jax.quantization import quantize
from qvit_jax.store import artifacts
from tests.conftest import fill
from tests.small_models import (
  collect,
  normal,
  pack,
  packed_logits,
  random_params,
  rich_config,
)

READER = """
import importlib.util, sys
import jax, numpy as np
from jax import export
assert importlib.util.find_spec('qvit_jax') is None
program = export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
images = np.load(sys.argv[2])
logits = [program.call(images), program.call(images[:1])]
np.savez(sys.argv[3], *logits)
print(program.platforms, *{x.dtype for x in logits}, program.in_avals)
"""


@pytest.fixture(scope='module')
def case():
  config = rich_config(depth=1)
  params = random_params(config)
  stats = collect(config, params, [normal((8, 8, 8, 3))])
  return config, lambda row: pack(config, row, params, stats)


def save(case, row, place):
  """Writes a row's file; returns its model and a config that exports it."""
  config, make = case
  packed, path = make(row), place / f'{row}.safetensors'
  artifacts.save(packed, path, models.architecture(config))
  config = rich_config(depth=1)
  config.quant.recipe = 'ptq'
  config.checkpoint.path = str(path)
  config.export.format = 'stablehlo'
  return packed, config


def test_it_runs_where_this_project_is_not(case, tmp_path):
  packed, config = save(case, 'int8_static', tmp_path)
  modes.run('export', config, str(tmp_path / 'run'))
  program = tmp_path / 'run' / 'export' / 'model.stablehlo'
  images = np.asarray(normal((5, 8, 8, 3), 1))
  np.save(tmp_path / 'images.npy', images)
  env = {n: x for n, x in os.environ.items() if n != 'PYTHONPATH'}
  done = subprocess.run(
    [sys.executable, '-c', READER, program, 'images.npy', 'logits.npz'],
    cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "('cpu', 'cuda', 'tpu') float32" in done.stdout
  assert 'float32[b,8,8,3]' in done.stdout
  found = np.load(tmp_path / 'logits.npz')
  wanted = packed_logits(case[0], packed, images)
  most = 1e-5 * np.abs(wanted).max()
  np.testing.assert_allclose(found['arr_0'], wanted, rtol=0, atol=most)
  np.testing.assert_allclose(found['arr_1'], wanted[:1], rtol=0, atol=most)
  parity = json.loads(program.with_name('parity.json').read_text())
  assert parity['file'] == 'model.stablehlo'
  assert parity['bytes'] == program.stat().st_size
  assert parity['execution'] == 'integer'
  assert parity['agreement'] == 1.0
  assert parity['largest_difference'] <= 1e-5 * parity['largest_logit']


def test_two_codes_of_4_bits_lie_in_a_byte():
  """Of the program too; and int8 is not widened in it."""
  codes = 192 * 400
  for bits, share in ((8, 1), (4, 0.5)):
    variables = {'kernel': quantize(normal((192, 400)), bits, search=False)}
    apply = lambda v, x: x.reshape(-1, 192) @ v['kernel'].codes * 1.0
    content = stablehlo.serialize(apply, variables, 8)
    assert codes * share < len(content) < codes * (share + 0.25)


def test_a_packed_file_is_no_run(case, tmp_path):
  _, config = save(case, 'int8_dynamic', tmp_path)
  config.export.format = 'packed'
  with pytest.raises(ExportError) as found:
    modes.run('export', config, str(tmp_path / 'run'))
  assert '--config.export.format=stablehlo' in str(found.value)
  assert '\n' not in str(found.value)


def test_a_failed_export_leaves_the_former_file(case, tmp_path, small_disk):
  _, config = save(case, 'int8_dynamic', tmp_path)
  target = pathlib.Path(small_disk, 'run', 'export', 'model.stablehlo')
  target.parent.mkdir(parents=True)
  target.write_text('former')
  fill(small_disk, 20_000)
  with pytest.raises(ExportError, match='disk is full'):
    modes.run('export', config, str(small_disk / 'run'))
  assert target.read_text() == 'former'
  assert list(target.parent.iterdir()) == [target]
