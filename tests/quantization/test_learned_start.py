"""Learned steps from a calibration file; what a diverged run names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qvit_jax import modes, tree
from qvit_jax.errors import ConfigError, DivergedError, QuantError
from qvit_jax.experiment import first_state
from qvit_jax.experiment.calibration import Calibration
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.quantization import numerics
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.methods.learned_core import GELU_CLIP
from qvit_jax.quantization.methods.learned_start import calibrated_steps
from qvit_jax.quantization.ptq import calibrate
from qvit_jax.quantization.ptq.ranges import choose_range
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training import optimizer
from tests.conftest import make_digits_config, notes_of
from tests.small_models import seen
from tests.training.test_resume import end_state, rows, stop_after

LEARNED = {
  'quant.recipe': 'lsq', 'quant.default': 'w4a4', 'quant.attention': 'a3',
  'quant.rules': (('patch_embed|head', 'w8a8'),),
}  # fmt: skip


def config_of(**fields):
  config = make_digits_config()
  config.ptq.update(rows=('fp32',), calibration_examples=40)
  config.update_from_flattened_dict(fields)
  return config


def variables_of(place, step):
  stored = Checkpoints(place / 'checkpoints', writer=False)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = stored.saved_shapes(step, 'variables', device)
  return tree.flatten(stored.restore(step, {'variables': shapes})['variables'])


@pytest.fixture(scope='module')
def float_run(tmp_path_factory):
  place = tmp_path_factory.mktemp('float') / 'run'
  modes.run('train', config_of(), str(place))
  return place


def calibrated(float_run, place, scales):
  """The statistics of the run, in the files that --mode=ptq writes."""
  params = {
    name.removeprefix('params/'): np.asarray(x)
    for name, x in variables_of(float_run, 6).items()
  }
  experiment = Experiment(config_of(**{'ptq.scales': scales}), training=True)
  return Calibration(experiment, place, print).observe((), params)


@pytest.fixture(scope='module')
def files(float_run, tmp_path_factory):
  place = tmp_path_factory.mktemp('files')
  stats = calibrated(float_run, place, 'per_tensor')
  return 'per_tensor', stats, str(place / 'calibration')


def start(float_run, files, tmp_path, **fields):
  """The config, the first variables and the lines that say whence."""
  scales, _, folder = files
  config = config_of(
    **LEARNED | {
      'quant.calibration_path': folder, 'quant.act_granularity': scales,
      'checkpoint.path': str(float_run),
    } | fields
  )  # fmt: skip
  notes_of(config, mode='train', overrides=())
  experiment = Experiment(config, training=True)
  own = Checkpoints(tmp_path / 'checkpoints', writer=True)
  state, _, lines = first_state.initial_state(experiment, own)
  return config, tree.flatten(state.variables), lines


@pytest.mark.parametrize(
  ('recipe', 'scales', 'method'),
  [
    ('lsq', 'per_tensor', 'mse'),
    pytest.param('qvit', 'per_position', 'minmax', marks=pytest.mark.slow),
  ],
)
def test_a_run_starts_from_the_scales_of_a_static_row(
  float_run, files, tmp_path, recipe, scales, method
):
  if scales != files[0]:
    stats = calibrated(float_run, tmp_path, scales)
    files = scales, stats, str(tmp_path / 'calibration')
  fields = {'quant.recipe': recipe, 'ptq.range': method}
  config, found, lines = start(float_run, files, tmp_path, **fields)
  assert lines[1] == (
    f'steps of activations from {files[2]}/plain.safetensors (40 images, range '
    f'{method})'
  )
  plan = Experiment(config, training=True).model.plan
  _, stats, _ = files
  count = 0
  for site in plan.sites:
    bits = plan.by_path[site.path].acts
    assert bits == (8 if site.path in ('patch_embed', 'head') else
                    4 if site.is_layer else 3)  # fmt: skip
    for side in ('lhs',) if site.is_layer else ('lhs', 'rhs'):
      operand = getattr(stats[site.path], side)
      low, high = map(jnp.asarray, choose_range(operand, bits, method))
      scale, zero = numerics.scale_of(low, high, bits, symmetric=False)
      for name, wanted in (('step', scale), ('zero', zero)):
        value = found[f'quant/{site.path}/{side}_{name}']
        np.testing.assert_array_equal(np.ravel(value), np.ravel(wanted))
        assert not np.shape(wanted) or (1, *value.shape) == wanted.shape
        count += 1
  assert count == 2 * sum(1 if s.is_layer else 2 for s in plan.sites)


@pytest.mark.slow
def test_kernel_steps_start_as_without_it(float_run, files, tmp_path):
  _, found, _ = start(float_run, files, tmp_path)
  fields = {'quant.calibration_path': ''}
  _, plain, _ = start(float_run, files, tmp_path / 'plain', **fields)
  assert found.keys() == plain.keys()
  changed = {n for n in found if not np.array_equal(found[n], plain[n])}
  assert not [n for n in changed if n.endswith('kernel_step')]
  assert not [n for n in changed if n.startswith('params/')]
  assert len([n for n in changed if n.endswith('lhs_step')]) > 4


def test_codes_without_a_learned_zero_are_signed_or_not(
  float_run, files, tmp_path
):
  fields = {'quant.zero_point': False, 'ptq.range': 'minmax'}
  _, found, _ = start(float_run, files, tmp_path, **fields)
  for name, value in found.items():
    if name.endswith('_zero'):
      bits = 8 if 'head' in name or 'patch' in name else (
        3 if '/qk/' in name or '/av/' in name else 4
      )  # fmt: skip
      path, side = name.removeprefix('quant/').rsplit('/', 1)
      operand = getattr(files[1][path], side[:3])
      is_signed = np.asarray(operand.low) < -1e-5
      wanted = np.where(is_signed, 2 ** (bits - 1), 0)
      np.testing.assert_array_equal(np.ravel(value), np.ravel(wanted))
      levels = np.where(is_signed, 2 ** (bits - 1) - 1, 2**bits - 1)
      most = np.maximum(np.abs(operand.low), np.abs(operand.high))
      step = found[name.replace('_zero', '_step')]
      wanted = np.maximum(most / levels, lsq.LEAST)
      np.testing.assert_allclose(np.ravel(step), np.ravel(wanted), rtol=1e-6)


def test_a_range_ends_where_qvit_clips(digits_config):
  digits_config.quant.update(recipe='qvit', default='w4a4')
  core = Experiment(digits_config, training=True).model.ops.core
  x = np.linspace(-30, 40, 1000)
  stats = {s.path: calibrate.SiteStats(seen(x)) for s in core.plan.sites}
  found = calibrated_steps(core, stats, 'minmax')
  (hidden,) = core.clipped
  step = found[f'{hidden}/lhs_step']
  assert step == pytest.approx(2 * GELU_CLIP / 15)
  assert found['head/lhs_step'] == pytest.approx(70 / 15)
  assert 'encoder/block_00/attn/qk/lhs_step' not in found  # in float


@pytest.fixture(scope='module')
def learned_run(float_run, files, tmp_path_factory):
  """The fields and the workdir of a finished run from a calibration."""
  place = tmp_path_factory.mktemp('learned')
  fields = LEARNED | {
    'quant.calibration_path': files[2], 'quant.act_granularity': files[0],
    'checkpoint.path': str(float_run), 'train.ema_decay': 0.9,
  }  # fmt: skip
  modes.run('train', config_of(**fields), str(place))
  return fields, place


@pytest.mark.slow
def test_a_resumed_run_needs_no_file_and_goes_on_bitwise(
  learned_run, tmp_path, monkeypatch
):
  fields, flat = learned_run
  with monkeypatch.context() as context:
    stop_after(context, 4)
    with pytest.raises(Exception, match='stopped by'):
      modes.run('train', config_of(**fields), str(tmp_path / 'cut'))
  fields = fields | {'quant.calibration_path': 'gone'}
  modes.run('train', config_of(**fields), str(tmp_path / 'cut'))
  assert end_state(tmp_path / 'cut') == end_state(flat)
  assert rows(tmp_path / 'cut') == rows(flat)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'checkpoint.path': ''}, 'plain.safetensors is of other weights; run'),
    pytest.param(
      {'checkpoint.path': '', 'model.norm_eps': 1e-5},
      'of another architect',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'quant.act_granularity': 'per_position'},
      'holds statistics per_tensor, not per',
      marks=pytest.mark.slow,
    ),
    ({'quant.calibration_path': 'nowhere'}, 'nowhere/plain.safetensors is no '),
    (
      {'quant.act_granularity': 'per_head'},
      "which quant.act_granularity='per_head' wants; set ",
    ),
  ],
)
def test_statistics_of_something_else_are_refused(
  float_run, files, tmp_path, fields, message
):
  with pytest.raises((QuantError, ConfigError)) as error:
    start(float_run, files, tmp_path, **fields)
  assert message in str(error.value)
  assert 'quant.calibration_path=' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_checkpoint_with_learned_steps_needs_no_calibration(
  float_run, files, learned_run, tmp_path
):
  with pytest.raises(ConfigError, match='brings learned steps; leave it out'):
    start(
      float_run, files, tmp_path / 'next',
      **{'checkpoint.path': str(learned_run[1])},
    )  # fmt: skip


def test_where_a_calibration_has_no_effect_it_is_refused():
  config = config_of(**{'quant.recipe': 'aqt', 'quant.calibration_path': 'x'})
  with pytest.raises(ConfigError, match="quant.recipe='aqt' does not read it"):
    modes.run('train', config, 'unused', overrides=['quant.calibration_path'])


@pytest.mark.slow
def test_the_range_counts_with_a_calibration(
  float_run, files, tmp_path, capsys
):
  scales, _, folder = files
  fields = {
    'quant.calibration_path': folder, 'quant.act_granularity': scales,
    'checkpoint.path': str(float_run), 'train.steps': 1,
    'ptq.range': 'percentile',
  }  # fmt: skip
  config, given = config_of(**LEARNED | fields), ['ptq.range', 'ptq.rows']
  modes.run('train', config, str(tmp_path), overrides=given)
  out = capsys.readouterr().out
  assert 'range percentile)' in out
  assert '--config.ptq.rows has no effect' in out
  assert '--config.ptq.range has no effect' not in out


# Runs that diverge.


def test_paths_of_what_is_not_finite_come_in_order():
  good, bad = jnp.ones(2), jnp.asarray([1.0, jnp.inf])
  found = {'b': {'x': bad, 'y': good}, 'a': jnp.nan * good, 'c': jnp.arange(3)}
  assert tree.not_finite(found) == ['a', 'b/x']
  assert tree.not_finite({'c': good}) == []


@pytest.mark.slow
@pytest.mark.parametrize('clip_norm', [0.0, 1.0])
def test_a_step_that_an_update_breaks_is_named(
  tmp_path, monkeypatch, clip_norm
):
  """Nothing is saved or evaluated then: later updates spread it to all."""
  config = config_of(**LEARNED | {'train.steps': 6, 'eval.every': 6})
  config.optim.clip_norm = clip_norm
  site = 'encoder/block_00/mlp/fc1'
  make = optimizer.make_optimizer

  def make_broken(*given):
    tx = make(*given)

    def update(grads, state, params=None):
      updates, state = tx.update(grads, state, params)
      flat = tree.flatten(updates)
      is_third = optax.tree_utils.tree_get(state, 'count', filtering=(
          lambda path, _: 'Adam' in str(path))) == 3  # fmt: skip
      path = f'quant/{site}/lhs_step'
      flat[path] += jnp.where(is_third, jnp.inf, 0)
      return tree.unflatten(flat, updates), state

    return optax.GradientTransformation(tx.init, update)

  monkeypatch.setattr(optimizer, 'make_optimizer', make_broken)
  with pytest.raises(DivergedError) as error:
    modes.run('train', config, str(tmp_path))
  message = str(error.value)
  assert message.startswith(f'quant/{site}/lhs_step is not finite at step 3')
  assert '\n' not in message


def test_the_first_broken_leaf_is_found_if_others_are_whole():
  good, bad = jnp.ones(2), jnp.asarray([1.0, jnp.nan])
  found = [tree.first_not_finite(x) for x in (
      [good, bad, bad], [good, good], [bad, bad], [bad, good])]  # fmt: skip
  assert [int(x) for x in found] == [1, -1, -1, 0]


@pytest.mark.slow
def test_a_step_that_overflows_is_named(tmp_path, monkeypatch):
  """The loss of the last update is still good; what it left is not."""
  config = config_of(**LEARNED | {'train.steps': 2})
  site = 'encoder/block_00/mlp/fc1'
  compiled = Experiment.compile_train_step

  def break_one(self, *args, **kwargs):
    step, seconds = compiled(self, *args, **kwargs)

    def broken(*given):
      state, tick = step(*given)
      flat = tree.flatten(state.variables)
      flat[f'quant/{site}/lhs_step'] *= jnp.inf
      return state.replace(
        variables=tree.unflatten(flat, state.variables)
      ), tick

    return broken, seconds

  monkeypatch.setattr(Experiment, 'compile_train_step', break_one)
  config.checkpoint.every, config.eval.every = 1, 2
  with pytest.raises(DivergedError) as error:
    modes.run('train', config, str(tmp_path))
  message = str(error.value)
  count = len(tree.flatten(Experiment(config, training=True).model.shapes))
  assert message.startswith(
    f'a variable is not finite at step 1 (not finite: quant/{site}/lhs_step, 1 '
    f'of {count} arrays); no checkpoint was written yet. Lower optim.lr'
  )
