"""Adapters: their math, what is trained, what checkpoints hold."""

import dataclasses
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from qvit_jax import modes, tree
from qvit_jax.data import open_data
from qvit_jax.errors import CheckpointError, ConfigError, Preempted
from qvit_jax.experiment import sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import Model
from qvit_jax.lora import adapter as lora
from qvit_jax.lora import frozen as frozen_lib
from qvit_jax.lora.frozen_core import FrozenCore
from qvit_jax.ops import Ops, Site, SiteDense
from qvit_jax.quantization import QTensor, dequantize, quantize
from qvit_jax.store.checkpoint import Checkpoints
from qvit_jax.training.state import split_collections
from tests import reference
from tests.conftest import make_digits_config
from tests.small_models import normal
from tests.training.test_resume import end_state, rows, stop_after

SPEC = lora.LoraSpec(rank=2, alpha=6.0)
# features, input axes, shape of the input: each kind of layer of a ViT.
KINDS = {
  'dense': ((10,), 1, (2, 5, 6)),
  'heads': ((2, 4), 1, (2, 5, 6)),
  'out': ((8,), 2, (2, 5, 2, 4)),
  'conv': ((7,), 3, (2, 3, 2, 2, 3)),
}


def layer(kind, spec=SPEC, **ops):
  """Returns (module, variables with adapters that are not zero, input)."""
  features, in_dims, shape = KINDS[kind]
  adapter = lora.Adapter(spec, (('layer', 'all'),), unpack=dequantize)

  class Model(nn.Module):
    ops: Ops

    @nn.compact
    def __call__(self, x):
      return SiteDense(features, self.ops, in_dims=in_dims, name='layer')(x)

  x = normal(shape)
  module = Model(Ops(delta=adapter))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  variables = tree.unflatten(
    {
      path: normal(leaf.shape, seed)
      for seed, (path, leaf) in enumerate(tree.flatten(shapes).items())
    },
    shapes,
  )
  return module.clone(ops=Ops(delta=adapter, **ops)), variables, x


def matrices(variables, x):
  """Returns (x [n, i], kernel [i, o], factors, bias [o]) of a layer."""
  factors = variables['lora']['layer']
  i, o = len(factors['a']), factors['b'].shape[1]
  own = variables['params']['layer']
  return (
    x.reshape(-1, i),
    own['kernel'].reshape(i, o),
    factors,
    (own['bias'].reshape(o)),
  )


@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_an_adapted_layer_computes_the_papers_formula(kind, dora):
  spec = dataclasses.replace(SPEC, dora=dora)
  module, variables, x = layer(kind, spec)
  flat, w, f, bias = matrices(variables, x)
  assert set(f) == ({'a', 'b', 'm'} if dora else {'a', 'b'})
  wanted = flat @ reference.lora_kernel(w, f['a'], f['b'], 3.0, f.get('m'))
  found = module.apply(variables, x).reshape(wanted.shape)
  np.testing.assert_allclose(found, wanted + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('dora', [False, True])
def test_gradients_are_the_papers(dora):
  module, variables, x = layer('dense', dataclasses.replace(SPEC, dora=dora))
  flat, w, f, _ = matrices(variables, x)
  g = normal((len(flat), 10), 9)

  def total(adapters, x):
    y = module.apply({**variables, 'lora': {'layer': adapters}}, x)
    return (y.reshape(g.shape) * g).sum()

  grads, dx = jax.grad(total, argnums=(0, 1))(f, x)
  wanted = reference.lora_gradients(flat, w, f['a'], f['b'], 3.0, g, f.get('m'))
  for name, value in {**grads, 'x': dx.reshape(flat.shape)}.items():
    np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-3)


def test_a_packed_kernel_gives_the_gradient_of_the_dequantized_one():
  module, variables, x = layer('dense', core=FrozenCore())
  _, w, _, _ = matrices(variables, x)
  q = quantize(w, 4, group=4)
  packed = {
    'params': {'layer': {'bias': variables['params']['layer']['bias']}},
    'quant': {'layer': {'kernel': q}},
    'lora': variables['lora'],
  }
  dense = {**variables, 'params': {'layer': dict(variables['params']['layer'])}}
  dense['params']['layer']['kernel'] = dequantize(q)

  def total(adapters, x, variables):
    y = module.apply({**variables, 'lora': adapters}, x)
    return jnp.square(y).sum()

  found, wanted = (
    jax.grad(total, argnums=(0, 1))(variables['lora'], x, v)
    for v in (packed, dense)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
  ('scaling', 'expected'), [('alpha/r', 4.0), ('rsqrt', 8.0)]
)
def test_scale(scaling, expected):
  assert lora.LoraSpec(4, alpha=16.0, scaling=scaling).scale == expected


def test_dropout_drops_inputs_of_adapters_only_in_training():
  spec = dataclasses.replace(SPEC, dropout=0.5)
  module, variables, x = layer('dense', spec)
  plain, _, _ = layer('dense')
  np.testing.assert_array_equal(
    module.apply(variables, x), plain.apply(variables, x)
  )
  keys = jax.random.split(jax.random.key(0), 4000)
  many = jax.vmap(
    lambda key: module.apply(variables, x, rngs={'dropout': key})
  )(keys)
  mean = plain.apply(variables, x)
  assert np.abs(many[0] - mean).max() > 0.1
  error = many.std(axis=0) / np.sqrt(len(keys))
  assert (np.abs(many.mean(axis=0) - mean) / error).max() < 5


# Starts


def spread_kernel():
  """A kernel with a few strong directions, as trained ones have."""
  return normal((24, 4)) @ normal((4, 20), 1) + 0.2 * normal((24, 20), 2)


def start(w, init, **spec):
  factors = {'a': normal((24, 4), 3), 'b': jnp.zeros((4, 20))}
  pack = None
  if spec.pop('packed', False):
    pack = lambda w: quantize(w, 4)
  spec = lora.LoraSpec(4, alpha=2.0, init=init, **spec)
  unpack = dequantize if pack else None
  base, factors = lora.start(w, factors, spec, pack=pack, unpack=unpack)
  return (dequantize(base) if pack else base), factors, spec


@pytest.mark.parametrize('init', ['zero', 'pissa'])
@pytest.mark.parametrize('dora', [False, True])
def test_on_a_float_base_training_starts_from_the_trained_kernel(init, dora):
  w = spread_kernel()
  base, factors, spec = start(w, init, dora=dora)
  np.testing.assert_allclose(lora.merged(base, factors, spec), w, atol=1e-5)
  if init == 'zero':
    np.testing.assert_array_equal(base, w)


def test_pissa_takes_the_principal_part():
  w = spread_kernel()
  base, factors, spec = start(w, 'pissa')
  part = reference.nearest_of_rank(w, 4)
  np.testing.assert_allclose(lora.update(factors, spec), part, atol=1e-4)
  np.testing.assert_allclose(base, w - part, atol=1e-4)
  a, b = (
    np.linalg.norm(factors['a'], axis=0),
    np.linalg.norm(factors['b'], axis=1),
  )
  np.testing.assert_allclose(a, b, rtol=1e-4)  # singular values shared evenly


def test_loftq_starts_nearer_than_packing_alone():
  w = spread_kernel()
  errors = {}
  for init in ('zero', 'pissa', 'loftq'):
    base, factors, spec = start(w, init, packed=True)
    errors[init] = np.linalg.norm(lora.merged(base, factors, spec) - w)
  assert errors['loftq'] < 0.8 * errors['zero']
  assert errors['pissa'] < errors['zero']
  # Algorithm 1, step for step.
  near = np.zeros(w.shape)
  for _ in range(5):
    q = np.asarray(dequantize(quantize(jnp.asarray(w - near, 'float32'), 4)))
    near = reference.nearest_of_rank(w - q, 4)
  np.testing.assert_allclose(
    errors['loftq'], np.linalg.norm(q + near - w), rtol=1e-3
  )


# Merging


@pytest.mark.parametrize('kind', KINDS)
def test_unmerge_undoes_merge(kind):
  module, variables, x = layer(kind)
  params, adapters = variables['params'], variables['lora']
  merged = lora.merge(params, adapters, SPEC)
  back = lora.unmerge(merged, adapters, SPEC)
  for path, value in tree.flatten(back).items():
    np.testing.assert_allclose(value, tree.flatten(params)[path], atol=1e-5)
  kernel = merged['layer']['kernel']
  assert np.abs(kernel - params['layer']['kernel']).max() > 1
  plain = module.clone(ops=Ops())
  np.testing.assert_allclose(
    plain.apply({'params': merged}, x), module.apply(variables, x), atol=2e-4
  )


def test_merging_dora_gives_its_function_and_cannot_be_undone():
  spec = dataclasses.replace(SPEC, dora=True)
  module, variables, x = layer('heads', spec)
  merged = lora.merge(variables['params'], variables['lora'], spec)
  np.testing.assert_allclose(
    module.clone(ops=Ops()).apply({'params': merged}, x),
    module.apply(variables, x), rtol=1e-4, atol=1e-4,
  )  # fmt: skip
  with pytest.raises(ConfigError, match='cannot be unmerged; keep the base'):
    lora.unmerge(merged, variables['lora'], spec)


# What is trained


def lora_config(**fields):
  config = make_digits_config()
  config.model.depth = 2
  config.lora.update(rank=2, targets=('all',))
  config.lora.update(fields)
  return config


def test_only_adapters_and_the_head_have_gradients_and_moments():
  model = Model(lora_config())
  trained, rest = split_collections(model.shapes, model.config.train.trainable)
  assert set(trained) == {'lora', 'params'}
  assert set(trained['params']) == {'head'}
  assert 'head' not in rest['params']
  experiment = Experiment(lora_config(), training=True)
  moments = {
    path.split('/mu/')[1]
    for path in tree.flatten(experiment.state_shapes.opt_state)
    if '/mu/' in path
  }
  assert moments == set(tree.flatten(trained))
  layers = [s for s in model.plan.sites if s.is_layer and s.path != 'head']
  assert tree.num_elements(trained['lora']) == sum(
    2 * sum(s.rhs_shape) for s in layers
  )


def compiled_step(config):
  experiment = Experiment(config, training=True)
  state = experiment.abstract_state()
  source = jax.eval_shape(lambda: experiment.data.train.source)
  batch = next(experiment.train_batches(1, 1))
  step = jax.jit(experiment.train_step_function(), donate_argnums=0)
  return step.lower(state, source, batch, None).compile()


@pytest.mark.parametrize('base', ['float', 'int4'])
def test_weight_gradients_of_frozen_kernels_are_never_formed(base):
  """A product for one has the kernel's own shape, transposed or not."""

  def products(config):
    text = compiled_step(config).as_text()
    found = re.findall(r'= \w+\[([\d,]+)\]\S* dot\(', text)
    return {tuple(sorted(map(int, shape.split(',')))) for shape in found}

  fields = {'width': 24, 'mlp_dim': 40}  # shapes that nothing else has
  config, full = lora_config(base=base, group=8), make_digits_config()
  for one in (config, full):
    one.model.update(depth=2, heads=3, **fields)
  of_kernel = (24, 40)
  assert of_kernel in products(full)
  assert of_kernel not in products(config)


@pytest.mark.slow
def test_a_step_costs_two_thirds_of_the_operations():
  config, full = lora_config(rank=1), make_digits_config()
  for one in (config, full):
    one.model.update(width=64, heads=2, mlp_dim=256, depth=2)
  flops = [
    compiled_step(one).cost_analysis()['flops'] for one in (config, full)
  ]
  assert flops[0] < 0.75 * flops[1]


def test_packed_kernels_stay_packed_and_take_an_eighth():
  plain = Model(lora_config())
  for base, bits in (('int8', 8), ('int4', 4)):
    model = Model(lora_config(base=base, group=0))
    kernels = jax.tree.leaves(
      model.shapes['quant'], is_leaf=lambda x: isinstance(x, QTensor)
    )
    assert all(k.bits == bits for k in kernels)
    layers = [s for s in plain.plan.sites if s.is_layer and s.path != 'head']
    assert len(kernels) == len(layers)
    floats = 4 * sum(s.rhs_shape[0] * s.rhs_shape[1] for s in layers)
    scales = 4 * sum(s.rhs_shape[1] for s in layers)
    assert sum(k.num_bytes() for k in kernels) == floats * bits / 32 + scales
    names = tree.flatten(model.shapes['params'])
    assert [n for n in names if n.endswith('kernel')] == ['head/kernel']
    assert model.row_facts()['execution'] == 'simulated'


def test_the_start_prints_counts_for_each_target():
  model = Model(lora_config(targets=('qv', 'mlp/fc1'), base='int4', group=8))
  first, *lines = model.adapter_lines()
  assert 'LoRA rank 2, scale 8, init zero' in first
  assert 'int4, groups of 8' in first
  # Width 16, hidden 32, 2 blocks: (16 + 16) * 2 and (16 + 32) * 2 a layer.
  assert lines[0] == 'qv: 4 layers, 256 trained beside 1,024 frozen'
  assert lines[1] == 'mlp/fc1: 2 layers, 192 trained beside 1,024 frozen'
  assert lines[2] == 'params: 170 trained'
  total = tree.num_elements(model.float_shapes['params']) + 448
  assert lines[3].startswith(f'total: 618 of {total:,} trained')


# Errors


@pytest.mark.parametrize(
    ('fields', 'words'),
    [({'lora.rank': 0}, 'lora.rank=0 adapts nothing, but lora.targets is'),
     ({'lora.targets': ()}, 'lora.targets names no layer'),
     ({'lora.rank': 11, 'lora.targets': ('mlp',)}, None),
     ({'lora.rank': 17}, 'lora.rank=17 is above the smaller dimension of '
      'patch_embed [48, 16]; give a rank up to 16'),
     ({'lora.targets': ('fc3',)}, "lora.targets[0]: 'fc3' matches nothing; "
      'closest: encoder/block_01/mlp/fc2'),
     ({'lora.targets': ('head',)}, "lora.targets[0]: 'head' matches nothing"),
     ({'train.trainable': ('lora', 'params')}, 'trains the kernels that '
      'lora.rank=2 freezes'),
     ({'train.trainable': ('lora', 'params/encoder/block_01')},
      'freezes, such as params/encoder/block_01/'),
     ({'train.trainable': ('params/head',)}, 'leaves the adapters of'),
     ({'lora.init': 'loftq'}, "but lora.base is 'float'"),
     ({'lora.base': 'int4', 'quant.recipe': 'lsq'}, "quant.recipe='lsq' would "
      'round'),
     ({'lora.dropout': 0.1, 'quant.recipe': 'aqt'}, 'lora.dropout=0.1 would '
      'have no effect'),
     ({'quant.dampen': 1.0, 'quant.recipe': 'lsq'}, 'leave them out'),
     ({'mode': 'eval', 'quant.recipe': 'ptq', 'lora.base': 'int4'},
      "quant.recipe='ptq' reads a packed model, which lora.rank=2 would not"),
     ({'quant.calibration_path': 'x', 'quant.recipe': 'lsq',
       'lora.init': 'pissa'}, 'set --config.lora.init=zero or leave the path'),
     ({'mode': 'ptq'}, '--mode=ptq needs a whole model, but lora.rank=2'),
     ({'mode': 'export'}, 'fold them in with --mode=merge_lora')],
)  # fmt: skip
def test_each_contradiction_is_one_line(tmp_path, fields, words):
  config = lora_config()
  mode = fields.get('mode', 'sites')
  flat = {name: v for name, v in fields.items() if name != 'mode'}
  with config.unlocked():
    config.update_from_flattened_dict(flat)
  if words is None:
    return modes.run(mode, config, str(tmp_path))
  with pytest.raises(ConfigError) as raised:
    modes.run(mode, config, str(tmp_path))
  assert words in str(raised.value)
  assert '\n' not in str(raised.value)
  return None


def test_a_flag_without_adapters_has_no_effect(digits_config, tmp_path):
  with pytest.raises(ConfigError, match='lora.rank is 0; set'):
    modes.run('sites', digits_config, str(tmp_path), overrides=['lora.alpha'])


# Runs


def train_config(**fields):
  config = lora_config(
    **{'base': 'int4', 'group': 8, 'init': 'loftq', **fields}
  )
  config.model.depth = 1
  config.model.dropout = 0.1
  config.optim.lr = 3e-3
  config.train.ema_decay = 0.9
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a finished run on a packed base."""
  workdir = tmp_path_factory.mktemp('lora')
  modes.run('train', train_config(), str(workdir))
  return workdir


def loss(workdir):
  return json.loads((workdir / 'results.json').read_text())['baseline']['loss']


def test_checkpoints_and_files_hold_adapters_and_the_head_alone(trained):
  checkpoints = Checkpoints(trained / 'checkpoints', writer=False)
  body = checkpoints.metadata(checkpoints.latest())
  names = set(body['arrays']['variables'])
  assert {n for n in names if not n.startswith('lora/')} == {
    'params/head/kernel', 'params/head/bias',
  }  # fmt: skip
  assert re.fullmatch('[0-9a-f]{16}', body['base'])
  size = (trained / 'adapters' / 'adapter.safetensors').stat().st_size
  bytes_ = sum(
    4 * np.prod(x['shape']) for x in body['arrays']['variables'].values()
  )
  assert bytes_ < size < bytes_ + 20_000


def test_reloaded_adapters_give_the_same_loss(trained, tmp_path):
  wanted = loss(trained)
  modes.run('eval', train_config(), str(trained))
  assert loss(trained) == wanted
  config = train_config(path=str(trained / 'adapters'))
  modes.run('eval', config, str(tmp_path))  # from the file
  assert loss(tmp_path) == wanted


def test_another_base_is_an_error_with_the_digest(trained, tmp_path):
  checkpoints = Checkpoints(trained / 'checkpoints', writer=False)
  there = checkpoints.metadata(checkpoints.latest())['base']
  config = train_config(path=str(trained / 'adapters'))
  config.seed = 1
  with pytest.raises(CheckpointError) as raised:
    modes.run('eval', config, str(tmp_path))
  assert f'holds adapters for the base {there}' in str(raised.value)
  assert 'but the base here is' in str(raised.value)


@pytest.mark.parametrize(
    ('fields', 'words'),
    [({'name': 'cats'}, "holds no adapter 'cats'; it holds adapter: set"),
     ({'alpha': 3.0}, 'lora.alpha is 16.0 there, 3.0 here'),
     ({'rank': 3}, 'lora.rank is 2 there, 3 here')],
)  # fmt: skip
def test_adapters_of_other_settings_are_named(trained, tmp_path, fields, words):
  config = train_config(**{'path': str(trained / 'adapters'), **fields})
  with pytest.raises(CheckpointError) as raised:
    modes.run('eval', config, str(tmp_path))
  assert words in str(raised.value)


@pytest.mark.parametrize('folder', ['', 'adapters'])
def test_adapters_of_other_classes_are_an_error(trained, folder):
  config = train_config(path=folder and str(trained / folder))
  data = open_data(config, training=False)
  data = dataclasses.replace(data, class_names=('owl', *data.class_names[1:]))
  experiment = Experiment(config, training=False, data=data)
  with pytest.raises(CheckpointError, match="label 0 is '0' there, 'owl' here"):
    sources.adapted(experiment, trained)


def test_predict_names_the_classes_of_the_adapters(trained, tmp_path):
  config = train_config(path=str(trained / 'adapters'))
  config.checkpoint.path = str(tmp_path)  # of the base
  names, _ = sources.class_names(config, tmp_path)
  assert names == list('0123456789')


def test_a_run_that_goes_on_replaces_no_other_adapter(trained, tmp_path):
  place = tmp_path / 'run'
  shutil.copytree(trained, place)
  other = place / 'adapters' / 'other.safetensors'
  other.write_bytes(b'of another run')
  with pytest.raises(ConfigError, match="lora.name='other' is taken"):
    modes.run('train', train_config(name='other'), str(place))
  assert other.read_bytes() == b'of another run'


def test_adapters_alone_are_no_base_either(trained, tmp_path):
  config = train_config()
  config.checkpoint.path = str(trained)
  with pytest.raises(CheckpointError, match='or name them by lora.path'):
    modes.run('train', config, str(tmp_path))


def test_adapters_alone_are_no_model_to_start_from(trained, tmp_path):
  config = train_config()
  config.lora = common.get_config().lora
  config.checkpoint.path = str(trained)
  with pytest.raises(CheckpointError, match='holds adapters alone'):
    modes.run('eval', config, str(tmp_path))


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_bits(trained, tmp_path, monkeypatch):
  config = train_config()
  with monkeypatch.context() as context:
    stop_after(context, 4)
    with pytest.raises(Preempted):
      modes.run('train', config, str(tmp_path))
  modes.run('train', train_config(), str(tmp_path))
  assert end_state(tmp_path) == end_state(trained)
  assert rows(tmp_path) == rows(trained)


@pytest.mark.slow
def test_packing_depends_on_the_base_alone():
  """What the digest of the base stands for: the same codes every time."""
  model = Model(train_config())
  init = jax.jit(model.init)
  variables = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  sites = model.plan.sites
  packed = [
    frozen_lib.build(train_config(), sites).settle(variables) for _ in range(2)
  ]
  for a, b in zip(*map(jax.tree.leaves, packed), strict=True):
    np.testing.assert_array_equal(a, b)
  assert isinstance(sites[0], Site)
