"""Whether a checkpoint is of the model that a config describes."""

import pathlib

import pytest

from qvit_jax import models
from qvit_jax.config import resolve
from qvit_jax.errors import CheckpointError
from qvit_jax.experiment import checks
from qvit_jax.experiment.model import Model
from qvit_jax.store import runs
from tests.conftest import make_digits_config


def model_of(**fields):
  config = make_digits_config()
  config.model.update(pool='patch_mean', **fields)
  return Model(config)


def run_of(model):
  """What a checkpoint of the model says of itself."""
  facts = {
    'architecture': models.architecture(model.config),
    'plan': model.plan.digest_lines(),
    'config': resolve.to_json(model.config),
  }
  return runs.Run('run', pathlib.Path('RUN/checkpoints/2'), facts, 2)


def test_a_key_of_one_side_alone_is_a_difference():
  """Keys that are newer than the first files stand there where they are on."""
  plain, normed = model_of(), model_of(norm_after_pool=True)
  name, keys = 'norm_after_pool', models.architecture(normed.config).keys()
  assert keys - models.architecture(plain.config).keys() == {name}
  for here, there, text in (
    (plain, normed, f'{name} is True there, None here'),
    (normed, plain, f'{name} is None there, True here'),
  ):
    with pytest.raises(CheckpointError, match=text):
      checks.check_same(here, run_of(there), same_plan=True)
    checks.check_same(here, run_of(here), same_plan=True)
