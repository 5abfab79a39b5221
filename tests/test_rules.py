"""Regex rules over paths."""

import pytest

from qvit_jax import rules
from qvit_jax.errors import ConfigError, RuleError

PATHS = (
  'patch_embed',
  'encoder/block_00/attn/query',
  'encoder/block_00/mlp/fc1',
  'encoder/block_01/mlp/fc1',
  'head',
)


def match(*pairs, **options):
  return rules.match(pairs, PATHS, field='quant.rules', **options)


def failure(*pairs, **options):
  with pytest.raises(RuleError) as raised:
    match(*pairs, **options)
  return str(raised.value)


def test_no_rules_match_nothing():
  assert match() == {}


def test_first_matching_rule_wins():
  assert match(('block_00', 'first'), ('mlp', 'second')) == {
    'encoder/block_00/attn/query': 'first',
    'encoder/block_00/mlp/fc1': 'first',
    'encoder/block_01/mlp/fc1': 'second',
  }


def test_order_of_rules_decides():
  assert match(('mlp', 'second'), ('block_00', 'first')) == {
    'encoder/block_00/attn/query': 'first',
    'encoder/block_00/mlp/fc1': 'second',
    'encoder/block_01/mlp/fc1': 'second',
  }


def test_regex_is_searched_for_not_matched_from_the_start():
  assert set(match(('fc1$', 1))) == {p for p in PATHS if p.endswith('fc1')}
  assert set(match(('^head', 1))) == {'head'}


def test_alternatives_reach_both_paths():
  assert match(('patch_embed|head', 8)) == {'patch_embed': 8, 'head': 8}


def test_rule_may_be_a_list():
  assert match(['head', 8]) == {'head': 8}


def test_dead_rule_names_itself_and_the_nearest_paths():
  message = failure(('head', 1), ('patch_embde', 2))
  assert "quant.rules[1]: 'patch_embde' matches nothing" in message
  near = message.split('closest: ')[1].split('. ')[0].split(', ')
  assert near[0] == 'patch_embed'
  assert len(near) == 3 and set(near) <= set(PATHS)


def test_nearest_paths_are_found_through_the_signs_of_a_regex():
  message = failure((r'^encoder/block_\d\d/atn/query$', 1))
  assert 'closest: encoder/block_00/attn/query' in message


def test_shadowed_rule_names_what_earlier_rules_took():
  message = failure(('mlp', 1), ('block_01/mlp', 2))
  assert "quant.rules[1]: 'block_01/mlp' has no effect" in message
  assert 'encoder/block_01/mlp/fc1' in message
  assert 'move it up or delete it' in message


def test_partly_shadowed_rule_is_allowed():
  taken = match(('block_01/mlp', 1), ('mlp', 2))
  assert taken['encoder/block_00/mlp/fc1'] == 2


def test_duplicate_rule_is_an_error():
  assert 'has no effect' in failure(('head', 1), ('head', 1))


@pytest.mark.parametrize('pattern', ['(', '*head', '[a'])
def test_bad_regex_is_an_error(pattern):
  message = failure((pattern, 1))
  assert f'quant.rules[0]: {pattern!r} is no regular expression' in message


@pytest.mark.parametrize('pattern', [None, 3])
def test_pattern_that_is_no_text_is_an_error(pattern):
  assert 'is no regular expression' in failure((pattern, 1))


@pytest.mark.parametrize('rule', ['head', ('head',), ('head', 1, 2), 5])
def test_rule_that_is_no_pair_is_an_error(rule):
  message = failure(rule)
  assert f'quant.rules[0]: {rule!r} is no rule' in message
  assert "(('REGEX', 'w8a8'),)" in message


def test_rule_is_not_used_where_it_does_not_apply():
  applies = lambda path, value: path != 'head'
  assert match(('patch_embed|head', 8), applies=applies) == {'patch_embed': 8}
  assert match(('patch_embed|head', 8), ('mlp', 4), applies=applies).keys() == {
    p for p in PATHS if 'mlp' in p
  } | {'patch_embed'}


def test_rule_that_applies_nowhere_is_dead():
  failure(('head', 8), applies=lambda path, value: path != 'head')


def test_rule_errors_are_config_errors():
  assert issubclass(RuleError, ConfigError)
