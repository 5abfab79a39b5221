"""Regex rules over paths: the first match wins, a dead rule is an error. Row 2.

One matcher for quantization, weight decay and sharding; it does not know what
a rule's value means.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qvit_jax.errors import RuleError


def match(
  rules: Sequence[tuple[str, Any]],
  paths: Iterable[str],
  *,
  field: str,
  applies: Callable[[str, Any], bool] = lambda path, value: True,
) -> dict[str, Any]:
  """Returns {path: value of the first rule whose regex is found in it}.

  Args:
    rules: (regex, value) pairs, tried in order with `re.search`.
    paths: Paths such as 'encoder/block_03/attn/query'.
    field: Name of the config field, for messages.
    applies: Says whether a matching rule may be used on a path.

  Returns:
    Only the paths that some rule matches.

  Raises:
    RuleError: A regex does not compile, matches no path, or every path that it
      matches is taken by an earlier rule.
  """
  paths = list(paths)
  patterns = [_compile(rule, i, field) for i, rule in enumerate(rules)]
  matched: dict[str, Any] = {}
  for i, (pattern, value) in enumerate(patterns):
    hits = [p for p in paths if pattern.search(p) and applies(p, value)]
    fresh = [p for p in hits if p not in matched]
    if not fresh:
      raise RuleError(_dead(pattern.pattern, hits, paths, f'{field}[{i}]'))
    matched.update(dict.fromkeys(fresh, value))
  return matched


def _compile(rule, i: int, field: str) -> tuple[re.Pattern, Any]:
  if not isinstance(rule, (tuple, list)) or len(rule) != 2:
    raise RuleError(
      f'{field}[{i}]: {rule!r} is no rule; write (regex, value) pairs such '
      "as (('head', 'w8a8'),)"
    )
  try:
    return re.compile(rule[0]), rule[1]
  except (re.error, TypeError) as error:
    raise RuleError(
      f'{field}[{i}]: {rule[0]!r} is no regular expression ({error}); '
      'mend the pattern'
    ) from error


def _dead(pattern: str, hits: list[str], paths: list[str], field: str) -> str:
  if hits:
    return (
      f'{field}: {pattern!r} has no effect, earlier rules take all it '
      f'matches ({", ".join(hits[:3])}); move it up or delete it'
    )
  letters = re.sub(r'\\d|[^a-zA-Z0-9_/]', '', pattern)
  near = difflib.get_close_matches(letters, paths, n=3, cutoff=0.0)
  return (
    f'{field}: {pattern!r} matches nothing; closest: {", ".join(near)}. '
    'List all sites with --mode=sites'
  )
