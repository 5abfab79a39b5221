"""Which field of `config.model` decides whether a parameter is there."""

import re
from collections.abc import Iterable

# The field that decides whether the model has a parameter.
_FIELDS = {
    'cls': 'model.pool', 'pool': 'model.pool', 'registers': 'model.registers',
    'gate': 'model.activation', 'norm': 'model.last_norm',
    'pos_embed': 'model.position',
    'pool_norm': 'model.norm_after_pool', 'pre_norm': 'model.pre_norm',
    'scale1': 'model.layer_scale', 'scale2': 'model.layer_scale',
    'query_norm': 'model.qk_norm', 'key_norm': 'model.qk_norm',
}  # fmt: skip
# The same where many layers come and go together: regex of their paths.
_NORM = re.compile(
  r'(^|/)(norm\d_\d|(stem|expand|depthwise|project|last)_norm)/'
)
_GROUPS = {
    r'^fc\d/': 'model.classifier',
    r'^conv\d_\d/|^block_': 'model.size',
}  # fmt: skip


def of_path(ours: str) -> str:
  """Returns which field decides whether there is such a parameter."""
  for part in ours.split('/'):
    if part in _FIELDS:
      return f' ({_FIELDS[part]} decides that)'
  return ''


def has_norms(paths: Iterable[str]) -> bool:
  """Returns whether a model with these paths has norms with statistics."""
  return any(_NORM.search(path) for path in paths)


def grouped(
  names: dict[str, str], both: bool
) -> tuple[list[str], list[str]]:
  """Returns paths of no group, and a line for each group of the others.

  Args:
    names: {our path: what to call it}.
    both: Whether models there and here have norms with statistics, so that
      norms are missing with the layers before them.
  """
  groups: dict[str, list[str]] = {}
  for path in names:
    field = next((f for p, f in _GROUPS.items() if re.search(p, path)), '')
    if _NORM.search(path):
      field = 'model.size' if both else 'model.batch_norm'
    groups.setdefault(field, []).append(path)
  rest = groups.pop('', [])
  lines = []
  for field, paths in groups.items():
    more = f' and {len(paths) - 1} more' if len(paths) > 1 else ''
    lines.append(f'{names[paths[0]]}{more} ({field} decides that)')
  return rest, lines
