"""Codes of packed models, compiled into the program that runs them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, tree
from qvit_jax.evaluation import fixed, timing
from tests.conftest import EIGHT_DEVICES, ROOT
from tests.small_models import (
  collect,
  normal,
  pack,
  packed_logits,
  random_params,
  rich_config,
)


@pytest.fixture(scope='module')
def case():
  config = rich_config(depth=1, width=48, mlp_dim=96)
  params = random_params(config)
  stats = collect(config, params, [normal((8, 8, 8, 3))])
  return config, pack(config, 'int8_static', params, stats)


def test_a_program_of_codes_gives_the_bits_of_one_that_is_handed_them(case):
  config, packed = case
  images = normal((16, 8, 8, 3), 1)
  wanted = packed_logits(config, packed, images)
  whole, given = fixed.split(packed.variables)
  apply = models.build_model(config, packed.ops).apply
  run = jax.jit(lambda given, x: apply(whole(given), x))
  compiled, _ = timing.compile_timed(run, given, images)
  np.testing.assert_array_equal(compiled(given, images), wanted)
  # No arguments any more, but memory that is reported.
  codes = sum(
    x.nbytes
    for name, x in tree.flatten(packed.variables).items()
    if name.endswith('kernel/data')
  )
  memory = timing.memory(compiled)
  assert memory['arguments'] <= images.nbytes + 4096
  assert memory['peak'] > memory['arguments'] + codes > 20_000


def test_a_float_model_stays_arguments():
  variables = {'a': jnp.ones(3), 'b': {'d': jnp.ones(2, jnp.bfloat16)}}
  whole, given = fixed.split(variables)
  assert given is variables
  assert whole(given) is variables


def test_codes_on_several_devices_stay_where_they_are():
  code = (
    'import jax, jax.numpy as jnp\n'
    'from jax.sharding import AxisType, NamedSharding, PartitionSpec as P\n'
    'from qvit_jax.evaluation import fixed\n'
    "mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))\n"
    'many = jax.device_put(jnp.arange(8), NamedSharding(mesh, P()))\n'
    'for x in many, jnp.arange(8):\n'
    "  _, given = fixed.split({'codes': x, 'scale': jnp.ones(8)})\n"
    '  print(len(given))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=os.environ | EIGHT_DEVICES,
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.stdout == '2\n0\n', done.stderr
