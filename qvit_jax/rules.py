"""Regex rules over paths: the first match wins, a dead rule is an error.

One matcher for quantization, weight decay and sharding; it does not know what
a rule's value means.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qvit_jax.errors import RuleError


def match(
  rules: Sequence[Any],
  paths: Iterable[str],
  *,
  field: str,
  applies: Callable[[str, Any], bool] = lambda path, value: True,
) -> dict[str, Any]:
  """Returns {path: value of the first rule whose regex is found in it}.

  Args:
    rules: (regex, value) pairs, tried in order with `re.search`.
    paths: Paths such as 'stage1/conv2'.
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
      unfit = [p for p in paths if pattern.search(p) and p not in hits]
      text = _dead(pattern.pattern, value, hits, unfit, paths)
      raise RuleError(f'{field}[{i}]: {text}')
    matched.update(dict.fromkeys(fresh, value))
  return matched


def _compile(rule, i: int, field: str) -> tuple[re.Pattern, Any]:
  if not isinstance(rule, (tuple, list)) or len(rule) != 2:
    raise RuleError(
      f'{field}[{i}]: {rule!r} is no rule; write (regex, value) pairs such '
      "as (('REGEX', 'w8a8'),)"
    )
  try:
    return re.compile(rule[0]), rule[1]
  except (re.error, TypeError) as error:
    raise RuleError(
      f'{field}[{i}]: {rule[0]!r} is no regular expression ({error}); '
      'mend the pattern'
    ) from error


def _dead(
  pattern: str, value: Any, hits: list[str], unfit: list[str], paths: list[str]
) -> str:
  """Says why a rule has no effect, and what would help."""
  if hits:
    return (
      f'{pattern!r} has no effect, earlier rules take all it matches '
      f'({", ".join(hits[:3])}); move it up or delete it'
    )
  if unfit:
    return (
      f'{pattern!r} matches only {", ".join(unfit[:3])}, where {value!r} does '
      'not apply; give another value or delete it'
    )
  letters = re.sub(r'\\d|[^a-zA-Z0-9_/]', '', pattern)
  near = difflib.get_close_matches(letters, paths, n=3, cutoff=0.0)
  return (
    f'{pattern!r} matches nothing; closest: {", ".join(near)}. '
    'List all sites with --mode=sites'
  )
