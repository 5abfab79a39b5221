"""Quantization specs and the plan that rules make of them."""

import pytest

from qvit_jax import models
from qvit_jax.errors import QuantError, RuleError
from qvit_jax.ops import Site
from qvit_jax.quantization import QuantPlan, QuantSpec, build_plan, parse_spec

ATTN = 'encoder/block_00/attn'
LAYERS = {
  'patch_embed',
  *(f'{ATTN}/{name}' for name in ('query', 'key', 'value', 'out')),
  *(f'encoder/block_00/mlp/{name}' for name in ('fc1', 'fc2')),
  'head',
}
PRODUCTS = {f'{ATTN}/qk', f'{ATTN}/av'}

# A layer of 2 tokens, 3 channels in and 5 out; a product of 2 x 3 by 4 x 3.
LAYER = Site('layer', 'dense', (2, 3), (3, 5), 30)
HEAD = Site('head', 'dense', (3,), (3, 7), 21)
PRODUCT = Site('qk', 'qk', (2, 1, 3), (4, 1, 3), 24)


@pytest.fixture
def make_plan(digits_config):
  """Returns the plan of one block under the given fields of `quant`."""

  def make(**quant):
    digits_config.quant.update(recipe='aqt', **quant)
    sites = models.list_sites(digits_config)
    assert {s.path for s in sites if s.is_layer} == LAYERS
    assert {s.path for s in sites if not s.is_layer} == PRODUCTS
    return build_plan(digits_config.quant, sites)

  return make


def texts(plan, paths=LAYERS | PRODUCTS):
  return {str(spec) for path, spec in plan.by_path.items() if path in paths}


def plan_of(*pairs):
  sites, specs = zip(*pairs, strict=True)
  return QuantPlan(
    sites,
    tuple(parse_spec(text, field='test') for text in specs),
    'per_token',
  )


@pytest.mark.parametrize(
    ('text', 'weights', 'acts'),
    [('w4a4', 4, 4), ('w2a8', 2, 8), ('w8a2', 8, 2), ('w3', 3, None),
     ('a5', None, 5), ('float', None, None)],
)  # fmt: skip
def test_legal_specs_parse_and_print_alike(text, weights, acts):
  parsed = parse_spec(text, field='quant.default')
  assert parsed == QuantSpec(weights, acts)
  assert str(parsed) == text


@pytest.mark.parametrize(
    'text',
    ['', 'w', 'a', 'a4w4', 'w4a', 'W4A4', 'w4a4 ', ' w4a4', 'w4a4\n', 'w-4a4',
     'w4.5', 'int8', 'w4a4w4', 'floats', '4', 'w4,a4'],
)  # fmt: skip
def test_illegal_specs_are_refused_with_the_grammar(text):
  with pytest.raises(QuantError) as raised:
    parse_spec(text, field='quant.default')
  message = str(raised.value)
  assert message.startswith(f'quant.default={text!r} is no spec')
  assert "'wXaY', 'wX', 'aY'" in message and "'float'" in message


@pytest.mark.parametrize('text', [None, 8, ('w4', 'a4')])
def test_spec_that_is_no_text_is_refused(text):
  with pytest.raises(QuantError, match='is no spec'):
    parse_spec(text, field='quant.rules')


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 7, 8])
def test_bits_from_2_to_8_are_allowed(bits):
  assert parse_spec(f'w{bits}a{bits}', field='f') == QuantSpec(bits, bits)


@pytest.mark.parametrize('bits', [0, 1, 9, 16, 32])
@pytest.mark.parametrize('form', ['w{}a4', 'w4a{}', 'w{}', 'a{}'])
def test_other_bits_are_refused_with_the_allowed_ones(bits, form):
  text = form.format(bits)
  with pytest.raises(QuantError) as raised:
    parse_spec(text, field='quant.default')
  message = str(raised.value)
  assert f'quant.default={text!r} asks for {bits} bits' in message
  assert 'allowed are 2 to 8' in message and "'w4a4'" in message


@pytest.mark.parametrize(
    ('fields', 'start'),
    [(dict(default='w9'), "quant.default='w9' asks for 9"),
     (dict(attention='a9'), "quant.attention='a9' asks for 9"),
     (dict(rules=(('head', 'w1'),)), "quant.rules='w1' asks for 1")],
)  # fmt: skip
def test_refused_bits_name_the_field_they_stand_in(make_plan, fields, start):
  with pytest.raises(QuantError) as raised:
    make_plan(**fields)
  assert str(raised.value).startswith(start)


def test_rule_value_that_is_no_text_is_refused(make_plan):
  with pytest.raises(QuantError, match=r'^quant\.rules=8 is no spec'):
    make_plan(rules=(('head', 8),))


def test_default_covers_every_layer_patch_embed_and_head_too(make_plan):
  plan = make_plan(default='w3a5')
  assert texts(plan, LAYERS) == {'w3a5'}


def test_attention_products_are_float_by_default(make_plan):
  assert texts(make_plan(default='w3a5'), PRODUCTS) == {'float'}


def test_attention_field_alone_sets_the_attention_products(make_plan):
  plan = make_plan(default='float', attention='a6')
  assert texts(plan, PRODUCTS) == {'a6'}
  assert texts(plan, LAYERS) == {'float'}


def test_attention_field_refuses_weight_bits(make_plan):
  with pytest.raises(QuantError, match="quant.attention='w4a4'.*no weights"):
    make_plan(attention='w4a4')


def test_rule_raises_patch_embed_and_head_to_8_bits(make_plan):
  plan = make_plan(default='w4a4', rules=(('patch_embed|head', 'w8a8'),))
  ends = {'patch_embed', 'head'}
  assert texts(plan, ends) == {'w8a8'}
  assert texts(plan, LAYERS - ends) == {'w4a4'}
  assert texts(plan, PRODUCTS) == {'float'}


def test_rule_with_weight_bits_leaves_attention_products_alone(make_plan):
  plan = make_plan(rules=(('.', 'w5a5'),), attention='a6')
  assert texts(plan, LAYERS) == {'w5a5'}
  assert texts(plan, PRODUCTS) == {'a6'}
  plan = make_plan(rules=(('attn', 'w2'),), attention='float')
  assert texts(plan, PRODUCTS) == {'float'}


def test_rule_with_activation_bits_only_reaches_attention_products(make_plan):
  plan = make_plan(rules=(('attn/qk', 'a7'),))
  assert str(plan.by_path[f'{ATTN}/qk']) == 'a7'
  assert str(plan.by_path[f'{ATTN}/av']) == 'float'


def test_float_rule_switches_a_product_and_a_layer_off(make_plan):
  plan = make_plan(attention='a8', rules=(('attn/av|fc1', 'float'),))
  assert str(plan.by_path[f'{ATTN}/av']) == 'float'
  assert str(plan.by_path['encoder/block_00/mlp/fc1']) == 'float'
  assert str(plan.by_path[f'{ATTN}/qk']) == 'a8'


def test_weight_rule_for_products_only_is_dead(make_plan):
  with pytest.raises(RuleError, match=r'quant\.rules\[0\]') as raised:
    make_plan(rules=(('attn/(qk|av)$', 'w8a8'),))
  # It does match; what it lacks is a spec that products can have.
  assert 'matches nothing' not in str(raised.value)


def test_first_rule_wins_and_dead_rules_are_errors(make_plan):
  plan = make_plan(rules=(('fc1', 'w8a8'), ('mlp', 'w6a6')))
  assert str(plan.by_path['encoder/block_00/mlp/fc1']) == 'w8a8'
  assert str(plan.by_path['encoder/block_00/mlp/fc2']) == 'w6a6'
  with pytest.raises(RuleError, match='has no effect'):
    make_plan(rules=(('mlp', 'w6a6'), ('fc1', 'w8a8')))
  with pytest.raises(RuleError, match='closest: .*mlp/fc'):
    make_plan(rules=(('mlp/fc3', 'w6a6'),))


def test_recipe_none_leaves_everything_in_float(digits_config):
  digits_config.quant.update(recipe='none', default='w4a4', attention='a4')
  plan = build_plan(digits_config.quant, models.list_sites(digits_config))
  assert texts(plan) == {'float'}


def test_macs_add_up():
  assert plan_of((LAYER, 'float'), (PRODUCT, 'a4')).macs() == 30 + 24


@pytest.mark.parametrize(
    ('text', 'bops'),
    [('w4a8', 30 * 4 * 8), ('w4', 30 * 4 * 32), ('a8', 30 * 32 * 8),
     ('float', 30 * 32 * 32)],
)  # fmt: skip
def test_bops_of_a_layer_are_macs_times_both_bits(text, bops):
  assert plan_of((LAYER, text)).bops() == bops


def test_bops_of_a_product_square_the_activation_bits():
  assert plan_of((PRODUCT, 'a4')).bops() == 24 * 4 * 4
  assert plan_of((PRODUCT, 'float')).bops() == 24 * 32 * 32
  both = plan_of((LAYER, 'w4a8'), (PRODUCT, 'a4'))
  assert both.bops() == 30 * 32 + 24 * 16


@pytest.mark.parametrize(
    ('text', 'packed'),
    # 15 codes of the layer's kernel and five float32 scales.
    [('w2', 4 + 20), ('w3', 6 + 20), ('w4a4', 8 + 20), ('w8', 15 + 20)],
)  # fmt: skip
def test_saved_bytes_count_packed_codes_and_scales(text, packed):
  assert plan_of((LAYER, text)).saved_bytes() == 4 * 15 - packed


@pytest.mark.parametrize('text', ['float', 'a4'])
def test_float_kernels_save_nothing(text):
  assert plan_of((LAYER, text), (PRODUCT, 'a4')).saved_bytes() == 0


def test_saved_bytes_add_up_over_layers():
  plan = plan_of((LAYER, 'w4'), (HEAD, 'w8'))
  assert plan.saved_bytes() == (60 - 28) + (84 - 21 - 28)


def test_mean_bits_weigh_weights_by_element_and_acts_by_mac():
  plan = plan_of((LAYER, 'w4a4'), (HEAD, 'w8a8'), (PRODUCT, 'a2'))
  assert plan.bits('weights') == round((15 * 4 + 21 * 8) / 36, 3)
  assert plan.bits('acts') == round((30 * 4 + 21 * 8) / 51, 3)
  same = plan_of((LAYER, 'w4a4'), (HEAD, 'w4a4'))
  assert same.bits('weights') == 4 and same.bits('acts') == 4


def test_table_lists_every_site_with_spec_and_totals(make_plan):
  plan = make_plan(rules=(('head', 'w8a8'),), act_granularity='per_tensor')
  header, *rows, total = plan.table().splitlines()
  assert header.split()[0] == 'site'
  assert [row.split()[0] for row in rows] == [s.path for s in plan.sites]
  for row, site, spec in zip(rows, plan.sites, plan.specs, strict=True):
    cells = row.split()
    assert cells[1] == site.kind
    assert f'{site.macs:,}' in cells and str(spec) in cells
  assert 'activations per_tensor' in rows[0]
  assert total == (
    f'{len(rows)} sites, {len(LAYERS)} quantized, 2 float; '
    f'{plan.macs():,} MACs and {plan.bops():,} BOPs an image'
  )


def test_digest_tells_plans_apart(make_plan):
  plan = make_plan()
  lines = plan.digest_lines()
  assert f'{ATTN}/query w4a4 per_token' in lines
  assert f'{ATTN}/qk float -' in lines
  assert len(lines) == len(plan.sites)
  changed = make_plan(rules=(('fc2', 'w4a8'),)).digest_lines()
  assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1
  assert make_plan(act_granularity='per_tensor').digest_lines() != lines
