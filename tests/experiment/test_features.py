"""Features of a frozen backbone: once, or why not; losses are the same."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common
from qvit_jax import models, modes, tree
from qvit_jax.config.resolve import with_fields
from qvit_jax.errors import Preempted, WeightsError
from qvit_jax.experiment import features, first_state
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.store import runs
from qvit_jax.store.checkpoint import Checkpoints
from tests.conftest import SHARED, make_digits_config
from tests.small_cnns import mobilenet_config, run_config
from tests.training.test_resume import end_state, rows, stop_after

POOLED = ('params/pool', 'params/head')


def probe_config(config=None, *, trainable=('params/head',), **fields):
  config = config or make_digits_config()
  config.train.trainable = trainable
  config.log.every = 1
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  return config


def built(config):
  return Experiment(with_fields(config, {}), training=True)


def trained(experiment, state, *, kept, steps=3):
  """Returns (ticks, last state, FLOPs of a step) of the first updates."""
  experiment.features, line = features.find(experiment)
  assert line.startswith('of ') and experiment.features.line == line
  source = experiment.replicate(experiment.data.train.source)
  if kept:
    source = experiment.features.compute(experiment, state.variables, print)
  else:
    experiment.features = None
  step, ticks = jax.jit(experiment.train_step_function()), []
  batches = list(experiment.train_batches(1, steps))
  step = step.lower(state, source, batches[0]).compile()
  for batch in batches:
    state, tick = step(state, source, batch)
    ticks.append(np.asarray(tick))
  return np.array(ticks), state, step.cost_analysis()['flops']


def needed(function, *shapes):
  """Returns the paths of what a function's result follows from."""
  traced = jax.make_jaxpr(function)(*shapes).jaxpr
  wanted = {id(var) for var in traced.outvars}
  for equation in reversed(traced.eqns):
    if wanted & {id(var) for var in equation.outvars}:
      wanted |= {id(var) for var in equation.invars}
  paths = tree.flatten(shapes)
  pairs = zip(paths, traced.invars, strict=True)
  return {path for path, var in pairs if id(var) in wanted}


def of_family(name, monkeypatch):
  """A small model with whatever draws at random behind its last cut."""
  if name == 'mobilenet_v2':
    config = mobilenet_config(monkeypatch, head_dropout=0.3)
  elif name == 'vgg':
    config = run_config(head_dropout=0.3)
  elif name == 'vgg_paper':
    config = run_config(classifier='paper')
  else:
    config = make_digits_config()
    config.model.update(pool=name, head_dropout=0.3)
  config.train.update(steps=4, batch_size=16)
  return config


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('token', {'train.accumulate': 2, 'train.ema_decay': 0.9}),
    ('token_mean', {'model.dtype': 'float16'}),
    ('token_attention', {'trainable': POOLED, 'model.dtype': 'bfloat16'}),
    ('vgg', {}),
  ],
)
def test_losses_are_those_of_features_computed_anew(name, fields, monkeypatch):
  config = probe_config(of_family(name, monkeypatch), **fields)
  experiment = built(config)
  before = experiment.fresh_state(jax.random.key(0))
  once, state, few = trained(experiment, before, kept=True)
  anew, _, many = trained(experiment, before, kept=False)
  np.testing.assert_allclose(once, anew, rtol=1e-6)
  assert len({tick[0] for tick in once}) == 3  # something is learned
  assert few < 0.6 * many
  before, after = (tree.flatten(x.variables) for x in (before, state))
  changed = {p for p in after if not np.array_equal(before[p], after[p])}
  starts = tuple(f'{name}/' for name in config.train.trainable)
  head = {'params/head/kernel', 'params/head/bias'}
  assert head <= changed
  assert all(path.startswith(starts) for path in changed)
  assert set(tree.flatten(state.ema)) == (head if state.ema else set())


@pytest.mark.parametrize(
  'name', ['token', 'token_attention', 'vgg', 'vgg_paper', 'mobilenet_v2']
)
def test_cuts_are_what_their_records_say(name, monkeypatch):
  """What passes follows from images and what lies before, not from draws."""
  config = of_family(name, monkeypatch)
  size = config.model.image_size
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  for cut in models.cuts(config):
    for field in models.family(config).reads:
      field = field.removeprefix('model.')
      if 'dropout' in field or field == 'stochastic_depth':
        config.model[field] = 0.0 if field in cut.draws else 0.5
    experiment = built(config)
    ops, shapes = experiment.model.ops, experiment.model.shapes
    passing = []
    tapped = models.build_model(
      config, dataclasses.replace(ops, cut=functools.partial(keep, passing))
    )

    def passes(variables, images, key, model=tapped, cut=cut, kept=passing):
      kept.clear()
      model.apply(
        variables, images, True, rngs={'dropout': key}, mutable=['batch_stats']
      )
      return dict(kept)[cut.name]

    x = jax.eval_shape(passes, shapes, images, key)
    before = needed(passes, shapes, images, key)
    assert '1' in before and '2' not in before
    apply = features.Features(cut, x.shape[1:], x.dtype, 2).behind(config, ops)
    behind = needed(apply, shapes, x)
    modules = {path.split('/')[2] for path in behind if path != '1'}
    assert '1' in behind and modules == set(cut.behind)
    both = {path for path in before | behind if path.startswith('0/params/')}
    assert both == {f'0/{path}' for path in tree.flatten(
        {'params': shapes['params']}
    )}  # fmt: skip


def keep(passing, module, at, x):
  """A cut that notes what passes."""
  del module
  passing.append((at, x))
  return x


@pytest.mark.parametrize(
  ('fields', 'reason'),
  [
    ({'data.flip': True}, 'data.flip=True changes images'),
    ({'data.pad': 1, 'data.flip': True},
     'data.pad=1 and data.flip=True change images'),
    ({'data.crop': 0.5}, 'data.crop=0.5 changes images'),
    ({'data.jitter': 0.1}, 'data.jitter=0.1 changes images'),
    ({'data.randaugment': (2, 9)}, 'data.randaugment=(2, 9) changes images'),
    ({'data.erase': 0.1}, 'data.erase=0.1 changes images'),
    ({'data.mixup': 0.2}, 'data.mixup=0.2 changes images'),
    ({'data.cutmix': 1.0, 'model.dropout': 0.1},
     'model.dropout=0.1 draws at random; data.cutmix=1.0 changes images'),
    ({'model.embedding_dropout': 0.1, 'model.stochastic_depth': 0.1},
     'model.embedding_dropout=0.1 and model.stochastic_depth=0.1 draw'),
    ({'model.attention_dropout': 0.1}, 'attention_dropout=0.1 draws at'),
    ({'trainable': ('params/head', 'params/encoder/norm')},
     'params/encoder/norm is trained, before every cut'),
    ({'trainable': ('params/cls', 'params/encoder')},
     'params/cls, params/encoder are trained, before every cut'),
    ({'quant.recipe': 'aqt'}, 'quant.recipe=aqt rounds what makes them'),
    ({'train.teacher': 'runs/float'}, 'train.teacher sees the images'),
    ({'data.resident_mib': 0},
     'those of 1,437 images take 0.1 MiB, more than data.resident_mib=0'),
  ],
  ids=str,
)  # fmt: skip
def test_why_they_are_computed_anew_is_one_line(fields, reason):
  kept, line = features.find(built(probe_config(**fields)))
  assert kept is None
  assert line.startswith('are computed anew each step: ') and reason in line
  assert '\n' not in line


def test_every_field_that_changes_images_is_asked_for():
  assert {f'data.{name}' for name in features._AUGMENTS} == {
    name for name in modes._AUGMENTED if name.startswith('data.')
  }


def test_what_draws_at_random_is_passed_by_an_earlier_cut():
  """Between VGG's hidden layers: the head's cut lies behind, fc1's before."""
  shape = (7 * 7 * 8,)
  for dropout, cut, wanted in ((0.0, 'head', (64,)), (0.5, 'fc1', shape)):
    config = run_config(classifier='paper', head_dropout=dropout)
    kept, line = features.find(built(probe_config(config)))
    assert (kept.cut.name, kept.shape) == (cut, wanted)
    assert line == (
      f'of 1,437 training images are computed once, before {cut}: '
      f'{list(wanted)} float32 each, {1437 * math.prod(wanted) * 4 / 2**20:.1f}'
      ' MiB'
    )


def test_streamed_images_are_seen_anew(tmp_path):
  for name in ('train/a/1', 'train/b/1', 'test/a/1', 'test/b/1'):
    path = tmp_path / f'{name}.png'
    path.parent.mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(path)
  config = probe_config(
    **{'data.source': 'folder', 'data.dir': str(tmp_path),
       'train.batch_size': 2}
  )  # fmt: skip
  _, line = features.find(built(config))
  assert line.endswith('step: the training images are streamed')


@pytest.mark.parametrize('trainable', [('auto',), ('params',)])
def test_nothing_is_said_where_the_backbone_is_trained(trainable):
  experiment = built(probe_config(trainable=trainable))
  assert features.find(experiment) == (None, '')
  assert experiment.model.trained_lines() == []


# Through --mode=train.


def noisy_config():
  config = probe_config(**{'model.head_dropout': 0.2, 'train.ema_decay': 0.9})
  config.train.steps = 4
  config.eval.every = 2
  return config


def test_a_stopped_run_ends_in_the_same_bits(tmp_path, monkeypatch, capsys):
  whole, parts = (str(tmp_path / name) for name in ('whole', 'parts'))
  modes.run('train', noisy_config(), whole)
  once = 'features  of 1,437 training images are computed once, before head: '
  printed = capsys.readouterr().out
  assert printed.count(once) == 1
  assert 'trained   170 of 3,306 numbers: params/head\n' in printed
  with monkeypatch.context() as context:
    stop_after(context, 3)
    with pytest.raises(Preempted):
      modes.run('train', noisy_config(), parts)
  modes.run('train', noisy_config(), parts)
  assert capsys.readouterr().out.count(once) == 2
  assert end_state(tmp_path / 'parts') == end_state(tmp_path / 'whole')
  assert rows(tmp_path / 'parts') == rows(tmp_path / 'whole')
  modes.run('train', noisy_config(), parts)  # nothing is left to do
  assert once not in capsys.readouterr().out


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
  """A finished run whose head sees the class token."""
  workdir = tmp_path_factory.mktemp('backbone')
  modes.run('train', make_digits_config(), str(workdir))
  return workdir


def parameters(workdir):
  found = runs.open_run(workdir).read_parameters(runs.own_device())
  return {name: np.asarray(x) for name, x in found.items()}


def attentive(backbone, **fields):
  return probe_config(
    trainable=POOLED,
    **{'model.pool': 'token_attention', 'weights.path': str(backbone)} | fields,
  )


def test_an_attentive_probe_trains_its_pooling_and_head_alone(
  backbone, tmp_path, capsys
):
  config = attentive(backbone, **{'optim.lr': 0.02, 'train.steps': 12})
  modes.run('train', config, str(tmp_path))
  printed = capsys.readouterr().out
  assert 'head/kernel, head/bias: it follows another pooling there' in printed
  assert 'pool/probe: the file has none' in printed
  assert 'before pool: [5, 16] float32 each' in printed
  before, after = parameters(backbone), parameters(tmp_path)
  fresh = {name for name in after if name not in before}
  assert all(name.startswith('params/pool/') for name in fresh)
  same = {n for n in before if np.array_equal(before[n], after[n])}
  assert set(before) - same == {'params/head/kernel', 'params/head/bias'}
  losses = [row['loss'] for row in rows(tmp_path, 'train')]
  assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
  ('trainable', 'missing'),
  [(('params/head',), 'pool/'), (('params/pool',), 'head/')],
)
def test_what_starts_fresh_has_to_be_trained(
  backbone, tmp_path, trainable, missing
):
  config = attentive(backbone, **{'train.trainable': trainable})
  with pytest.raises(WeightsError) as raised:
    modes.run('train', config, str(tmp_path))
  assert f'bring no {missing}' in str(raised.value)
  assert f"random; add 'params/{missing[:-1]}' to it" in str(raised.value)


def test_a_fresh_pooling_is_not_evaluated(backbone, tmp_path):
  with pytest.raises(WeightsError, match='brings no .*params/pool/probe'):
    modes.run('eval', attentive(backbone), str(tmp_path))


@pytest.mark.slow
def test_a_probe_of_a_real_vit_is_five_times_as_fast(
  cifar_dir, tmp_path, capsys
):
  path = SHARED / 'weights' / 'vits14_c100_98px_timm.fp16.safetensors'
  if not path.is_file():
    pytest.skip('the real ViT-S/14 is not here')
  config = common.get_config()
  config.model.update(
    size='S/14', image_size=98, layer_scale=1e-5, num_classes=100
  )
  config.data.update(
    source='tfds', name='cifar100', dir=cifar_dir, train_split='train[:160]',
    eval_split='test[:32]',
  )  # fmt: skip
  config.train.update(trainable=('params/head',), steps=5, batch_size=32)
  config.eval.batch_size = 32
  modes.run('benchmark', config, str(tmp_path))
  result = json.loads((tmp_path / 'benchmark.json').read_text())['train']
  assert result['ratios']['recomputed_to_model']['p10'] > 5
  config.weights.path = str(path)
  losses = {}
  for kept in (True, False):
    experiment = built(config)
    own = Checkpoints(tmp_path / 'checkpoints', writer=True)
    state, *_ = first_state.initial_state(experiment, own)
    losses[kept] = trained(experiment, state, kept=kept, steps=5)[0]
  np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
