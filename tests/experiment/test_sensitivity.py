"""Each site alone, and the search for bits under a budget."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvit_jax import models, modes, tree
from qvit_jax.errors import ConfigError, DivergedError, QuantError
from qvit_jax.evaluation import metrics
from qvit_jax.experiment import sensitivity
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.ops import FloatCore, Ops, Site
from qvit_jax.quantization import dequantize, qtensor, quantize, spec
from qvit_jax.quantization.ptq import mixed_precision, plans
from qvit_jax.quantization.ptq.mixed_precision import Option, choose
from qvit_jax.quantization.ptq.switch_core import SwitchCore, switches
from qvit_jax.quantization.spec import QuantSpec
from tests.conftest import make_digits_config
from tests.small_models import products


def small_config(**ptq):
  config = make_digits_config()
  config.ptq.update({'sensitivity_examples': 40, **ptq})
  return config


def uneven_params(config, seed=0):
  """Host parameters by path, with biases and norms that do something."""
  model = models.build_model(config)
  images = jnp.zeros((1, config.model.image_size, config.model.image_size, 3))
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  rng = np.random.default_rng(seed)
  return {
    name: np.asarray(x) + 0.2 * rng.normal(size=x.shape).astype(np.float32)
    for name, x in tree.flatten(params).items()
  }


@pytest.fixture(scope='module')
def experiment():
  return Experiment(small_config(), training=True)


@pytest.fixture(scope='module')
def params(experiment):
  return uneven_params(experiment.config)


@pytest.fixture(scope='module')
def measured(experiment, params, tmp_path_factory):
  """(table, what the core was traced for) of a whole run."""
  calls = []
  compute = SwitchCore.__call__

  def counted(self, module, site, *rest):
    calls.append((self.bits, site.path))
    return compute(self, module, site, *rest)

  place = tmp_path_factory.mktemp('table')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(SwitchCore, '__call__', counted)
    found = sensitivity.measure(experiment, params, place, lambda text: None)
  return found, calls


@pytest.fixture(scope='module')
def table(measured):
  return measured[0]


# The core


def slow_levels(x, bits, axis):
  """Asymmetric levels along one axis: NumPy."""
  x = np.asarray(x)
  low = np.minimum(x.min(axis=axis, keepdims=True), 0)
  high = np.maximum(x.max(axis=axis, keepdims=True), 0)
  scale = (high - low) / np.float32(2**bits - 1)
  zero = np.round(-low / scale)
  codes = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
  return jnp.asarray((codes - zero) * scale)


class SlowCore(FloatCore):
  """Rounds the activations of one site in NumPy, so outside of jit."""

  def __init__(self, path, bits):
    object.__setattr__(self, 'path', path)
    object.__setattr__(self, 'bits', bits)

  def __call__(self, module, site, lhs, rhs, dims):
    if site.path == self.path:
      ((left,), (right,)), _ = dims
      lhs = slow_levels(lhs, self.bits, left)
      if not site.is_layer:
        rhs = slow_levels(rhs, self.bits, right)
    return super().__call__(module, site, lhs, rhs, dims)


def test_a_switch_rounds_its_site_alone(experiment, params):
  config, sites = experiment.config, experiment.model.plan.sites
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  rng = np.random.default_rng(1)
  images = jnp.asarray(rng.normal(size=(3, 8, 8, 3)), 'float32')
  switched = models.build_model(config, Ops(core=SwitchCore(3)))
  forward = jax.jit(switched.apply)
  base = forward({**variables, 'switch': switches(sites, None)}, images)
  plain = jax.jit(models.build_model(config).apply)(variables, images)
  np.testing.assert_allclose(base, plain, atol=1e-5)
  for site in sites:
    found = forward({**variables, 'switch': switches(sites, site.path)}, images)
    slow = models.build_model(config, Ops(core=SlowCore(site.path, 3)))
    np.testing.assert_allclose(
      found, slow.apply(variables, images), atol=2e-4, err_msg=site.path
    )
    assert np.abs(found - base).max() > 1e-3, site.path


def test_one_program_for_all_sites_of_a_choice(measured):
  found, calls = measured
  assert len(found['sites']) == 10
  # Traced once in float, at 4 and at 8 bits: not once a site.
  assert len(calls) == 3 * 10
  assert len(set(calls)) == len(calls)


# The table


def test_what_is_measured_is_what_a_site_alone_does(experiment, params, table):
  config, sites = experiment.config, experiment.model.plan.sites
  assert table['choices'] == ['w4a4', 'w4a8', 'w8a8']
  assert table['examples'] == 40
  assert [row['path'] for row in table['sites']] == [s.path for s in sites]
  train = experiment.data.train
  index = next(
    train.train_batches(seed=0, batch=40, rows=slice(0, 40), first=1, last=1)
  )['index']
  images = train.images[index].astype('float32') / 255
  images = (images - config.data.mean) / np.asarray(config.data.std, 'float32')
  path = 'encoder/block_00/mlp/fc1'
  kernel = params[f'{path}/kernel']
  near = dequantize(quantize(jnp.asarray(kernel), 4))
  logits = [
    np.asarray(
      models.build_model(config, Ops(core=core)).apply(
        {'params': tree.nest(jax.tree.map(jnp.asarray, given))},
        jnp.asarray(images, 'float32'),
      ),
      np.float64,
    )
    for core, given in (
      (FloatCore(), params),
      (SlowCore(path, 4), {**params, f'{path}/kernel': near}),
    )
  ]
  base, rounded = logits
  noise = np.square(rounded - base).sum() / np.square(base).sum()
  p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits)
  found = next(r for r in table['sites'] if r['path'] == path)['spec']['w4a4']
  assert found['noise'] == pytest.approx(noise, rel=1e-2)
  assert found['sqnr_db'] == pytest.approx(-10 * np.log10(noise), abs=0.05)
  assert found['kl'] == pytest.approx(
    (p * np.log(p / q)).sum(axis=1).mean(), rel=2e-2
  )
  assert found['agreement'] == np.mean(base.argmax(1) == rounded.argmax(1))


def test_more_bits_make_less_noise(table):
  for row in table['sites']:
    noise = {text: found['noise'] for text, found in row['spec'].items()}
    if row['kind'] in ('qk', 'av'):  # no weights: the same thing
      assert noise['w4a8'] == noise['w8a8'] < noise['w4a4']
    elif row['kind'] == 'conv':  # eight bits for pixels anyway
      assert noise['w8a8'] < noise['w4a8'] == noise['w4a4']
    else:
      assert noise['w8a8'] < 0.1 * min(noise['w4a8'], noise['w4a4'])
  total = lambda text: sum(r['spec'][text]['noise'] for r in table['sites'])
  assert total('w8a8') < total('w4a8') < total('w4a4')


def test_weights_alone_leave_attention_products_as_they_are(params, tmp_path):
  config = small_config(choices=('w3',), sensitivity_examples=8)
  experiment = Experiment(config, training=True)
  found = sensitivity.measure(experiment, params, tmp_path, lambda text: None)
  untouched = {'sqnr_db': None, 'agreement': 1.0, 'kl': 0.0, 'noise': 0.0}
  for row in found['sites']:
    is_product = row['kind'] in ('qk', 'av')
    assert (row['spec']['w3'] == untouched) == is_product


def test_an_interrupted_run_goes_on(experiment, params, table, tmp_path):
  lines = []

  def say(text):
    lines.append(text)
    if len(lines) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    sensitivity.measure(experiment, params, tmp_path, say)
  path = tmp_path / 'sensitivity.json'
  assert len(json.loads(path.read_text())['sites']) == 3
  lines.extend(['not', 'again'])
  found = sensitivity.measure(experiment, params, tmp_path, say)
  assert lines[5] == '3 of 10 sites done before'
  assert len(lines) == 6 + 7
  assert found == table == json.loads(path.read_text())


def test_what_is_done_is_not_measured_again(
  experiment, params, table, tmp_path, monkeypatch
):
  (tmp_path / 'sensitivity.json').write_text(json.dumps(table))
  monkeypatch.delattr(sensitivity.Sensitivity, '_logits')
  lines = []
  found = sensitivity.measure(experiment, params, tmp_path, lines.append)
  assert found == table
  assert lines == ['10 of 10 sites done before']


@pytest.mark.parametrize(
  'changed', ['weights', 'choices', 'examples', 'seed', 'rules']
)
def test_another_question_starts_anew(
  changed, experiment, params, table, tmp_path, monkeypatch
):
  (tmp_path / 'sensitivity.json').write_text(json.dumps(table))
  config = small_config()
  if changed == 'weights':
    params = {**params, 'head/bias': params['head/bias'] + 1}
  elif changed == 'choices':
    config.ptq.choices = ('w8a8', 'w4a4')
  elif changed == 'examples':
    config.ptq.sensitivity_examples = 39
  elif changed == 'rules':
    config.quant.rules = (('head', 'w8a8'),)
  else:
    config.seed = 1
  measured = []

  def site(self, site, images, base):
    measured.append(site.path)
    return dict.fromkeys(self.plans, metrics.compare_logits(base, base))

  monkeypatch.setattr(sensitivity.Sensitivity, '_site', site)
  experiment = Experiment(config, training=True)
  sensitivity.measure(experiment, params, tmp_path, lambda text: None)
  assert len(measured) == 10


def test_the_first_choice_of_a_file_ranked(table, tmp_path):
  assert sensitivity.ranked(tmp_path, 'none yet') is None
  path = tmp_path / 'sensitivity.json'
  path.write_text(json.dumps(table))
  assert sensitivity.ranked(tmp_path, 'of others') is None
  found = sensitivity.ranked(tmp_path, table['weights_digest'])
  assert found['spec'] == 'w4a4'
  noise = [site['noise'] for site in found['sites']]
  assert noise == sorted(noise, reverse=True)
  assert len(noise) == 10
  cut = json.dumps(table)[:12]
  others = [], None, {**table, 'choices': []}, {**table, 'sites': [{}]}
  for damaged in (cut, *map(json.dumps, others)):
    path.write_text(damaged)
    with pytest.raises(ConfigError, match='is no table of sites'):
      sensitivity.ranked(tmp_path, table['weights_digest'])


# The search


def random_options(rng, sites, specs, *, scale=1):
  return {
    f'site{i}': {
      f's{j}': Option(
        float(rng.random()),
        int(scale * rng.integers(1, 30)) + int(rng.integers(0, 2)),
        int(scale * rng.integers(1, 30)) + int(rng.integers(0, 2)),
      )
      for j in range(specs)
    }
    for i in range(sites)
  }


def brute_force(options, budget_bytes, budget_bops):
  """The least cost over every assignment within both budgets, or None."""
  best = None
  for specs in itertools.product(*options.values()):
    chosen = dict(zip(options, specs, strict=True))
    cost, size, bops = (
      mixed_precision.total(options, chosen, k)
      for k in ('cost', 'bytes', 'bops')
    )
    if size <= budget_bytes and bops <= budget_bops:
      best = cost if best is None else min(best, cost)
  return best


# At 10**11 one assignment more or less is below the solver's tolerance.
@pytest.mark.parametrize('scale', [1, 10**11])
@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('kinds', ['bytes', 'bops', 'both'])
def test_the_search_is_exact(seed, kinds, scale):
  options = random_options(np.random.default_rng(seed), 6, 3, scale=scale)
  budget = 6 * (17 if kinds == 'both' else 12) * scale
  size = budget if kinds != 'bops' else None
  bops = budget if kinds != 'bytes' else None
  wanted = brute_force(options, size or np.inf, bops or np.inf)
  chosen = choose(options, budget_bytes=size, budget_bops=bops)
  assert list(chosen) == list(options)
  assert mixed_precision.total(options, chosen, 'cost') == pytest.approx(
    wanted, rel=1e-12
  )
  for name, limit in (('bytes', size), ('bops', bops)):
    used = mixed_precision.total(options, chosen, name)
    assert limit is None or used <= limit


def test_small_costs_count_too():
  # Noise of 1e-9 beside one of 1: the solver alone would not look at it.
  options = {
    'a': {'low': Option(1.0, 1, 1), 'high': Option(0.5, 9, 9)},
    'b': {'low': Option(3e-9, 1, 1), 'high': Option(1e-9, 2, 2)},
  }
  found = choose(options, budget_bytes=3, budget_bops=None)
  assert found == {'a': 'low', 'b': 'high'}


@pytest.mark.parametrize('kinds', ['bytes', 'bops', 'both'])
def test_a_budget_too_small_names_the_smallest(kinds):
  options = random_options(np.random.default_rng(7), 5, 3, scale=1001)
  budgets = {
    'budget_bytes': None if kinds == 'bops' else 2,
    'budget_bops': None if kinds == 'bytes' else 3,
  }
  fields = {
    'budget_bytes': ('ptq.budget_mb', 1e6),
    'budget_bops': ('ptq.budget_gbops', 1e9),
  }
  named = []
  for _ in range(2):
    try:
      choose(options, **budgets)
      break
    except QuantError as error:
      text = str(error)
    (name,) = (k for k, (f, _) in fields.items() if text.startswith(f))
    field, unit = fields[name]
    assert f'--config.{field}' in text
    value = re.search(r'smallest possible is (\d[\d.e-]*\d)', text)[1]
    budgets[name] = float(value) * unit
    named.append(name)
    with pytest.raises(QuantError, match='smallest possible'):
      choose(options, **{**budgets, name: budgets[name] - 1})
  choose(options, **budgets)
  assert len(named) == (2 if kinds == 'both' else 1)


def test_a_budget_beside_another_is_named_with_it():
  options = {'a': {'x': Option(0.0, 1, 9), 'y': Option(0.0, 9, 1)}}
  with pytest.raises(QuantError) as error:
    choose(options, budget_bytes=5, budget_bops=5)
  assert 'ptq.budget_mb=5e-06' in str(error.value)
  assert 'beside ptq.budget_gbops=5e-09' in str(error.value)
  assert 'smallest possible is 9e-06' in str(error.value)
  assert choose(options, budget_bytes=9, budget_bops=5) == {'a': 'y'}


@pytest.mark.parametrize('text', ['w4a4', 'w3', 'w8a8', 'w5', 'a8'])
def test_bytes_and_operations_of_a_site(text):
  site = Site('x', 'dense', (3, 7), (7, 5), 105)
  found = spec.parse_spec(text, field='')
  option = mixed_precision.make_option(site, found, 0.5)
  w = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), 'float32')
  wanted = 4 * 35
  if found.weights:
    wanted = qtensor.quantize(w, found.weights).num_bytes()
  plan = spec.QuantPlan((site,), (found,), 'per_token')
  assert option == Option(0.5, wanted, plan.bops())
  product = Site('y', 'qk', (3, 7), (3, 7), 63)
  option = mixed_precision.make_option(product, QuantSpec(None, 6), 0.1)
  plan = spec.QuantPlan((product,), (QuantSpec(None, 6),), 'per_token')
  assert option == Option(0.1, 0, plan.bops())


# Assignments and rules


def test_the_most_sensitive_sites_get_the_bits(experiment, table):
  config, sites = experiment.config, experiment.model.plan.sites
  specs = sensitivity.assign(config, sites, table)
  assert list(specs) == [site.path for site in sites]
  assert specs['encoder/block_00/attn/qk'] == QuantSpec(None, 8)
  assert specs['patch_embed'].acts == 8
  kernels = {s.weights for p, s in specs.items() if p[-2:] not in ('qk', 'av')}
  assert kernels == {4, 8}  # halfway between the two
  used = sum(
    mixed_precision.make_option(site, specs[site.path], 0.0).bytes
    for site in sites
  )
  small, large = (
    sum(
      mixed_precision.make_option(site, spec, 0.0).bytes
      for site, spec in zip(sites, plan.specs, strict=True)
    )
    for plan in plans.plan_choices(('w4a4', 'w8a8'), products(config)).values()
  )
  assert small < used <= (small + large) / 2
  config = small_config(budget_mb=small / 1e6)
  specs = sensitivity.assign(config, sites, table)
  assert {s.weights for s in specs.values()} == {4, None}


def test_rules_of_the_user_are_kept_by_the_search(experiment, table):
  """And their bytes count in the budget."""
  sites = experiment.model.plan.sites
  config = small_config()
  config.quant.rules = (('fc1$', 'w8a6'), ('attn/av', 'a5'), ('head', 'float'))
  specs = sensitivity.assign(config, sites, table)
  assert str(specs['encoder/block_00/mlp/fc1']) == 'w8a6'
  assert str(specs['encoder/block_00/attn/av']) == 'a5'
  assert str(specs['head']) == 'float'
  kept = {'encoder/block_00/mlp/fc1', 'head'}
  used = sum(
    mixed_precision.make_option(s, specs[s.path], 0.0).bytes for s in sites
  )
  least = sum(
    mixed_precision.make_option(
      s, specs[s.path] if s.path in kept else QuantSpec(4, 4), 0.0
    ).bytes
    for s in sites
  )
  config.ptq.budget_mb = least / 1e6
  tight = sensitivity.assign(config, sites, table)
  assert {tight[path] for path in kept} == {specs[path] for path in kept}
  weights = {s.weights for p, s in tight.items() if p not in kept}
  assert weights == {4, None} and used > least
  config.ptq.budget_mb = (least - 1) / 1e6
  with pytest.raises(QuantError, match='met by no assignment'):
    sensitivity.assign(config, sites, table)


def test_a_budget_of_operations_takes_bits_of_activations(experiment, table):
  sites = experiment.model.plan.sites
  plans = {}
  for gbops in (0.0004, 0.0006, 0.1):
    config = small_config(budget_gbops=gbops)
    specs = sensitivity.assign(config, sites, table)
    plan = spec.QuantPlan(sites, tuple(specs.values()), 'per_token')
    assert plan.bops() <= gbops * 1e9
    plans[gbops] = plan.bops()
  assert plans[0.0004] < plans[0.0006] < plans[0.1]


def resolved(sites, specs):
  rules = mixed_precision.make_rules(specs)
  plan = spec.resolve(sites, default='w2a2', attention='float', rules=rules)
  return plan.by_path, rules


@pytest.mark.parametrize('seed', range(8))
def test_rules_resolve_to_the_assignment(seed):
  config = small_config()
  config.model.depth = 12
  sites = models.list_sites(config)
  rng = np.random.default_rng(seed)
  texts = [('w4a4', 'w8a8'), ('w3', 'w4a8', 'a4')][seed % 2]
  choices = [*plans.plan_choices(texts, products(config)).values()]
  specs = {
    site.path: choices[int(rng.random() ** 4 * len(choices))].by_path[site.path]
    for site in sites
  }
  found, rules = resolved(sites, specs)
  assert found == specs
  for pattern, text in rules:
    matched = {p for p in specs if re.search(pattern, p)}
    assert matched
    assert {str(specs[p]) for p in matched} == {text}


def test_rules_of_like_sites_are_one():
  config = small_config()
  config.model.depth = 12
  sites = models.list_sites(config)
  specs = {
    s.path: QuantSpec(8, 8) if s.path.endswith('fc2') else QuantSpec(4, 4)
    for s in sites
    if s.is_layer
  }
  specs['encoder/block_07/mlp/fc2'] = QuantSpec(4, 4)
  rules = mixed_precision.make_rules(specs)
  blocks = '|'.join(f'{i:02d}' for i in range(12) if i != 7)
  assert rules == (
    (rf'^encoder/block_({blocks})/mlp/fc2$', 'w8a8'),
    ('^patch_embed$', 'w4a4'),
    (r'^encoder/block_\d+/(attn/query|attn/key|attn/value|attn/out|mlp/fc1)$',
     'w4a4'),
    ('^encoder/block_07/mlp/fc2$', 'w4a4'),
    ('^head$', 'w4a4'),
  )  # fmt: skip


# The mode


def test_the_mode_prints_a_ranking_and_rules(tmp_path, capsys):
  config = small_config(sensitivity_examples=8)
  modes.run('train', config, str(tmp_path / 'float'))
  config.checkpoint.path = str(tmp_path / 'float')
  capsys.readouterr()
  modes.run('sensitivity', config, str(tmp_path / 'out'))
  out = capsys.readouterr().out
  table = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
  assert out.count('\nsite ') == 10
  ranked = re.findall(r'^ ?(\d+)  (\S+) +(?:dense|conv|qk|av) ', out, re.M)
  assert [int(place) for place, _ in ranked] == list(range(1, 11))
  worst = max(table['sites'], key=lambda row: row['spec']['w4a4']['noise'])
  assert ranked[0][1] == worst['path']
  pasted = re.search(r'config\.quant\.rules = (\(\n.*?\n  \))', out, re.S)[1]
  config.quant.update(recipe='aqt', rules=eval(pasted))
  plan = Experiment(config, training=False).model.plan
  assert plan.by_path == sensitivity.assign(config, plan.sites, table)


@pytest.mark.parametrize(
  ('ptq', 'parts'),
  [
    ({'choices': ('w4a4', 'float')}, ("'float'", 'quantizes nothing')),
    ({'choices': ('w4a4', 'w8', 'w4a4')}, ("'w4a4' twice",)),
    ({'choices': ('w4a4', 'w04a4')}, ("'w04a4' twice",)),
    ({'choices': ('w9a4',)}, ("ptq.choices='w9a4'", '2 to 8')),
    ({'choices': ('int8',)}, ("ptq.choices='int8'", 'is no spec')),
    ({'sensitivity_examples': 5000}, ('has only 1437 images',)),
    ({'budget_mb': 0.0001}, ('ptq.budget_mb=0.0001', 'smallest possible')),
  ],
)
def test_what_cannot_be_measured_is_refused_at_once(
  ptq, parts, params, tmp_path
):
  experiment = Experiment(small_config(**ptq), training=True)
  with pytest.raises(ConfigError) as error:
    sensitivity.measure(experiment, params, tmp_path, lambda text: None)
  for part in parts:
    assert part in str(error.value)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_model_of_zeros_and_a_torn_file_are_refused(
  experiment, params, tmp_path
):
  zeros = {name: np.zeros_like(x) for name, x in params.items()}
  with pytest.raises(DivergedError, match='trained checkpoint'):
    sensitivity.measure(experiment, zeros, tmp_path, lambda text: None)
  (tmp_path / 'sensitivity.json').write_text('{"sites": [')
  with pytest.raises(ConfigError, match='delete it'):
    sensitivity.measure(experiment, params, tmp_path, lambda text: None)


def test_a_quantized_recipe_is_refused(tmp_path):
  config = small_config()
  config.quant.recipe = 'aqt'
  with pytest.raises(ConfigError, match='--mode=sensitivity .*recipe=none'):
    modes.run('sensitivity', config, str(tmp_path))
