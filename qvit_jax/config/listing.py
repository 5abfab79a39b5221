"""Fields as text: for `--help`, and for configs/common.py.

  python -m qvit_jax.config.listing configs/common.py

prints today's rows into the docstring of that page, for whoever reads it; the
program itself works from the rows.
"""

import difflib
import pathlib
import runpy
import sys
import textwrap
from typing import Any

from qvit_jax.config.fields import Field
from qvit_jax.config.resolve import FIELDS, RENAMED, flatten
from qvit_jax.errors import ConfigError

SECTIONS = tuple(dict.fromkeys(field.section for field in FIELDS.values()))


def describe(
  topic: str, ignored_by: dict[str, list[str]], values: dict[str, Any]
) -> str:
  """Returns what `--help TOPIC` prints.

  Args:
    topic: A section, or 'section.field'.
    ignored_by: {field: modes that do not read it}.
    values: {'section.field': default}.

  Raises:
    ConfigError: There is neither such a section nor such a field.
  """
  if topic in FIELDS:
    field = FIELDS[topic]
    return '\n'.join(_whole(field, ignored_by[topic], values[topic]))
  if topic in SECTIONS:
    fields = [field for field in FIELDS.values() if field.section == topic]
    return '\n'.join(
      line for field in fields for line in lines(field, values[field.name])
    )
  if topic in RENAMED:
    raise ConfigError(
      f'{topic} is now {RENAMED[topic]}; see --help {RENAMED[topic]}'
    )
  known = [*SECTIONS, *FIELDS]
  near = difflib.get_close_matches(topic, known, n=1, cutoff=0.0)[0]
  raise ConfigError(
    f'--help {topic}: there is no such section or field; the nearest is '
    f'{near} (sections: {", ".join(SECTIONS)})'
  )


def lines(field: Field, value: Any) -> list[str]:
  """Returns a field with its default and meaning, in lines of 80 columns.

  Args:
    field: The row.
    value: The default.
  """
  text = textwrap.wrap(
    field.text, 80, initial_indent='    ', subsequent_indent='    '
  )
  head = textwrap.wrap(
    f'{field.name} = {value!r}',
    80,
    initial_indent='  ',
    subsequent_indent='      ',
  )
  return [*head, *text]


def _whole(field: Field, ignored_by: list[str], value: Any) -> list[str]:
  found = lines(field, value)
  if field.check[1]:
    found.append(f'    allowed: {field.check[1]}')
  if field.is_path:
    found.append('    a path: ~ is the home folder')
  if field.of_method:
    found.append('    counts where quant.recipe reads it')
  if field.of_family:
    found.append('    counts where the family model.name reads it')
  for need in field.needs:
    found.append(f'    does not count where {need.hint}')
  if ignored_by:
    found.append(f'    not read by --mode={", ".join(ignored_by)}')
  return found


def page(values: dict[str, Any]) -> str:
  """Returns every field, section by section, for configs/common.py.

  Args:
    values: {'section.field': default}.
  """
  found = []
  for section in SECTIONS:
    found.append(f'{section}')
    for field in FIELDS.values():
      if field.section == section:
        found += lines(field, values[field.name])
    found.append('')
  return '\n'.join(found)


def write(path: str) -> None:
  """Puts the list of every field into the docstring of configs/common.py.

  Args:
    path: The file; its docstring ends with the list.
  """
  config = runpy.run_path(path)['get_config']()
  file = pathlib.Path(path)
  text = file.read_text()
  start = text.index(f'\n{SECTIONS[0]}\n') + 1
  end = text.index('\n"""\n')
  file.write_text(text[:start] + page(flatten(config)).rstrip() + text[end:])


if __name__ == '__main__':
  write(sys.argv[1])
