"""Which of several models in one file counts."""

import re

_AVERAGED = re.compile(r'(^|[_.])ema([_.]|$)|averaged')


def averaged(names: list[str]) -> str | None:
  """Returns the one name of the averaged weights, as timm reads them.

  A teacher beside a student is the student's average (self-distillation).
  None where several names are left.

  Args:
    names: What the models of one file are called; a single one is returned.
  """
  if len(names) == 1:
    return names[0]
  found = [
    name
    for name in names
    if _AVERAGED.search(name)
    or ('teacher' in name and name.replace('teacher', 'student') in names)
  ]
  return found[0] if len(found) == 1 else None
