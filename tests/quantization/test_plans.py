"""One language for bits: defaults and rules, in rows, choices and budgets."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from qvit_jax import models
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import QuantError, RuleError
from qvit_jax.quantization.ptq import plans, rows
from qvit_jax.quantization.spec import QuantSpec, parse_spec
from tests.small_models import (
  collect,
  normal,
  pack,
  packed_logits,
  products,
  random_params,
  rich_config,
)

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
# What rows were before rules reached them, over the products of `rich_config`.
BEFORE = json.loads((FIXTURES / 'rows.json').read_text())
QUANTIZED = [
  name
  for name in config_lib.FIELDS['ptq.rows'].default
  if not rows.parse_row(name).is_float
]


@pytest.fixture(scope='module')
def model():
  config = rich_config()
  return config, random_params(config)


def chosen_of(sites, given):
  """Every other product at 8 bits, the first and its like at 4."""
  two = [*plans.plan_choices(('w4a4', 'w8a8'), given).values()]
  return {s.path: two[i % 2].by_path[s.path] for i, s in enumerate(sites)}


def runs_of(texts):
  grouped = itertools.groupby(texts)
  return ', '.join(f'{len(list(same))} {text}' for text, same in grouped)


@pytest.mark.parametrize('name', [*dict.fromkeys([*BEFORE, *QUANTIZED])])
def test_rows_have_the_bits_they_had(model, name):
  config, params = model
  given, row = products(config), rows.parse_row(name)
  plan = plans.plan_row(row, given, params, chosen_of(given.sites, given))
  found = plans.plan_sites(row, plan, models.stream(config))
  texts = []
  for site, spec in plan.by_path.items():
    own = found[site]
    assert (own.weights, own.acts) == (spec.weights, spec.acts)
    block = f' block{own.block}' if own.block else ''
    texts.append(f'{spec}{" static" if own.is_static else ""}{block}')
  assert runs_of(texts) == BEFORE[name]['sites']
  assert row.method(plans.row_notes(row, given)) == BEFORE[name]['method']


RULES = (('head|fc1$', 'w8a6'), ('block_00/attn/qk', 'a5'), ('out', 'float'))
WANTED = {
  'head': 'w8a6',
  'encoder/block_01/mlp/fc1': 'w8a6',
  'encoder/block_00/attn/qk': 'a5',
  'encoder/block_01/attn/out': 'float',
}


@pytest.mark.parametrize('name', QUANTIZED)
def test_rules_win_over_the_bits_of_every_row(model, name):
  config, params = model
  row = rows.parse_row(name)
  free, ruled = products(config), products(config, RULES)
  chosen = chosen_of(free.sites, free)
  before = plans.plan_row(row, free, params, chosen).by_path
  after = plans.plan_row(row, ruled, params, chosen).by_path
  for path, text in WANTED.items():
    assert str(after[path]) == text
  touched = {path for path in after if 'fc1' in path or 'out' in path}
  touched |= {'head', 'encoder/block_00/attn/qk'}
  for path in set(after) - touched:  # the rest stays, the first layer too
    assert after[path] == before[path], path
  assert 'quant.rules' in row.method(plans.row_notes(row, ruled))


@pytest.mark.parametrize(
  ('rules', 'bits', 'line'),
  [
    ((), 'w4a8', '^patch_embed$ a8 (first layer)'),
    ((('head', 'w8a8'),), 'w4a8', '^patch_embed$ a8 (first layer)'),
    ((('^patch_embed$', 'w8a4'),), 'w8a4', ''),
    ((('embed|head', 'float'),), 'float', ''),
    ((('', 'w3a3'), ), 'w3a3', ''),
  ],
)  # fmt: skip
def test_the_rule_of_the_first_layer_is_printed_and_gives_way(
  model, rules, bits, line
):
  config, _ = model
  given, row = products(config, rules), rows.parse_row('w4a4')
  assert str(plans.plan_row(row, given).by_path['patch_embed']) == bits
  assert given.stem_line(row.default) == line
  assert ('stem activations 8 bit' in plans.row_notes(row, given)) == bool(line)
  assert given.stem_line(QuantSpec(8, 8)) == given.stem_line(QuantSpec(4)) == ''


def test_the_stem_is_the_layer_that_the_family_names(model):
  """Not every convolution: a model may have many."""
  config, _ = model
  given = plans.Products(models.list_sites(config), 'head')
  specs = plans.plan_row(rows.parse_row('w4a4'), given).by_path
  assert (str(specs['head']), str(specs['patch_embed'])) == ('w4a8', 'w4a4')


@pytest.mark.parametrize(
  ('rules', 'error', 'parts'),
  [
    ((('haed', 'w8a8'),), RuleError, ("'haed' matches nothing", 'head')),
    ((('qk', 'w8a8'),), RuleError, ('does not apply',)),
    ((('', 'w8a8'), ('head', 'w4a4')), RuleError, ('no effect', 'head')),
    ((('head', 'w9a9'),), QuantError, ('9 bits',)),
    ((('head', 'eight'),), QuantError, ("'eight'",)),
  ],
)
def test_rules_without_effect_are_refused_as_in_training(
  model, rules, error, parts
):
  with pytest.raises(error) as found:
    products(model[0], rules)
  text = str(found.value)
  assert 'quant.rules' in text
  for part in parts:
    assert part in text


def test_rules_hold_at_every_choice_of_the_search(model):
  given = products(model[0], RULES)
  found = plans.plan_choices(('w4a4', 'w3', 'w8a8'), given)
  for text, plan in found.items():
    own = parse_spec(text, field='')
    for path, wanted in WANTED.items():
      assert str(plan.by_path[path]) == wanted
    assert plan.by_path['encoder/block_00/attn/query'] == own
    assert plan.by_path['encoder/block_01/attn/av'] == QuantSpec(None, own.acts)
  stems = [str(plan.by_path['patch_embed']) for plan in found.values()]
  assert stems == ['w4a8', 'w3', 'w8a8']


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('int8_static', marks=pytest.mark.slow),
    'w4a4+plain',
    'int8_weight_only',
    'mixed_simple+plain',
  ],
)
def test_packed_rows_carry_the_bits_of_rules(model, name):
  config, params = model
  images = normal((4, 8, 8, 3))
  stats = None
  if name == 'int8_static':
    stats = collect(config, params, [images])
  packed = pack(config, name, params, stats, rules=RULES)
  free = pack(config, name, params, stats)
  found = {n: (p.weights, p.acts) for n, p in packed.site_plans.items()}
  for path, text in WANTED.items():
    spec = parse_spec(text, field='')
    assert found[path] == (spec.weights, spec.acts)
  assert packed.plan.bits('weights') != free.plan.bits('weights')
  assert np.isfinite(packed_logits(config, packed, images)).all()
  assert packed.num_bytes() > free.num_bytes()


def test_a_float_kernel_is_turned_with_its_input(model):
  """Of a rule that rounds activations alone, behind a nonlinearity."""
  config, params = model
  rules = (('mlp/fc2', 'a8'),)
  turned = pack(config, 'w8a8+hadamard', params, rules=rules)
  blocks = {n: p.block for n, p in turned.site_plans.items() if p.block}
  assert set(blocks) == set(models.stream(config).hidden)
  plain = pack(config, 'w8a8+plain', params, rules=rules)
  images = normal((4, 8, 8, 3), 1)
  found, wanted = (
    packed_logits(config, packed, images) for packed in (turned, plain)
  )
  assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize('bits', [10, 12, 16])
def test_the_ladder_goes_up_to_sixteen_bits(model, bits):
  config, params = model
  packed = pack(config, f'w{bits}a{bits}', params)
  images = normal((4, 8, 8, 3), 1)
  found = packed_logits(config, packed, images)
  wanted = packed_logits(config, pack(config, 'fp32', params), images)
  error = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
  assert 0 < error < 8 * 2.0**-bits
