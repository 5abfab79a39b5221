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
  # They are no arguments any more, but memory that is reported.
  codes = sum(
    x.nbytes
    for name, x in tree.flatten(packed.variables).items()
    if name.endswith('kernel/data')
  )
  rest = tree.num_bytes(packed.variables) - codes
  memory = timing.memory(compiled)
  assert codes > 20_000
  assert memory['arguments'] <= rest + images.nbytes + 4096
  assert memory['peak'] > codes + rest


def test_what_is_no_integer_stays_an_argument():
  variables = {'a': jnp.ones(3), 'b': {'c': jnp.arange(3), 'd': jnp.ones(2)}}
  whole, given = fixed.split(variables)
  assert [x.shape for x in jax.tree.leaves(given)] == [(3,), (2,)]
  again = whole(jax.tree.map(lambda x: 2 * x, given))
  assert jax.tree.structure(again) == jax.tree.structure(variables)
  np.testing.assert_array_equal(again['a'], [2, 2, 2])
  np.testing.assert_array_equal(again['b']['c'], [0, 1, 2])


def test_codes_on_several_devices_stay_where_they_are():
  code = (
    'import jax, jax.numpy as jnp\n'
    'from jax.sharding import AxisType, NamedSharding, PartitionSpec as P\n'
    'from qvit_jax.evaluation import fixed\n'
    "mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))\n"
    'many = jax.device_put(jnp.arange(8), NamedSharding(mesh, P()))\n'
    "_, given = fixed.split({'many': many, 'one': jnp.arange(3)})\n"
    'print(given[0].sharding.num_devices, given[1])\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=os.environ | EIGHT_DEVICES,
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.stdout == '8 None\n', done.stderr
