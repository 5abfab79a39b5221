"""Fills in the pages of this folder: no script, no address."""

import pathlib
from collections.abc import Callable
from typing import Any

import jinja2


def render(
  name: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any
) -> str:
  """Returns a page; what a row lacks is undefined there, not an error.

  Args:
    name: Of the template in this folder.
    filters: Functions that it calls, by name.
    values: What it is filled with; text is escaped.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.ChainableUndefined,
  )  # fmt: skip
  environment.filters |= filters or {}
  return environment.get_template(name).render(**values)


def is_missing(value: Any) -> bool:
  """Returns whether a template was not given a value."""
  return value is None or isinstance(value, jinja2.Undefined)
