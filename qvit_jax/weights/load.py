"""Weights of others (or of our own runs) in the places of our model.

Finds out what a path means, opens it, and recognises whose names it has.
"""

import pathlib
import re
from typing import Any, NoReturn

import numpy as np

from qvit_jax import tree
from qvit_jax.config.resolve import expand
from qvit_jax.errors import CheckpointError, WeightsError
from qvit_jax.store import runs
from qvit_jax.store.entries import Entry, Source, printable, refuse
from qvit_jax.weights import hub, peft, unsupported
from qvit_jax.weights.containers import open_source
from qvit_jax.weights.fit import Import
from qvit_jax.weights.keymap import Names, collapse, nearest, recognise
from qvit_jax.weights.layout import flatten_model, full_path
from qvit_jax.weights.layouts import LAYOUTS
from qvit_jax.weights.report import Report

# Files of ours that hold no float kernels, and what to do with them.
_OURS = {
  'packed': (
    'it is a packed model, which has no float kernels',
    'name it by checkpoint.path with quant.recipe=ptq, or give its float run',
  ),
  'adapter': (
    'it is an adapter, which has no kernels',
    'name it by lora.path and lora.name beside its base, or give what '
    '--mode=merge_lora made of it',
  ),
}


def load_weights(path: str, target: Any) -> tuple[Any, Report]:
  """Returns `target` filled with the weights behind `path`, and a report.

  Args:
    path: A safetensors, .pth/.bin or .npz file, a folder as on the hub, the
      workdir of one of our runs, or hf://OWNER/NAME[@REVISION].
    target: The model's variables, of which parameters and statistics of norms
      are filled, or the tree of their collection `params`: arrays or
      `jax.ShapeDtypeStruct`.

  Returns:
    The same tree with float32 NumPy arrays; leaves that no tensor fits (the
    report's `reinitialised`) are those of `target`.

  Raises:
    WeightsError: The file is unsafe, damaged, or of another model; all places
      that do not fit are listed.
  """
  taken, report = read_weights(path, target)
  if isinstance(target, dict) and 'params' in target:
    taken = {full_path(name): values for name, values in taken.items()}
  return tree.unflatten({**tree.flatten(target), **taken}, target), report


def resolve(path: str) -> tuple[str, str]:
  """Returns (local path, address with the commit pinned) of a weights path."""
  if not path.startswith(hub.PREFIX):
    return expand(path), path
  fetched = hub.fetch(path)
  return str(fetched.folder), fetched.pinned


def read_weights(path: str, target: Any) -> tuple[dict[str, Any], Report]:
  """Returns {our path: float32 array} of what fits `target`, and a report.

  Paths of statistics begin with their collection, those of parameters do not.

  Args:
    path: As of `load_weights`.
    target: As of `load_weights`.

  Raises:
    WeightsError: As `load_weights`.
  """
  if not path:
    raise WeightsError('no weights were named; set --config.weights.path=')
  local, _ = resolve(path)
  wanted = flatten_model(target)
  place = pathlib.Path(local)
  kind = runs.kind_of(place)
  if kind == 'run':
    return Import(_own_source(str(place)), wanted, None).run()
  source, names = open_named(place)
  return Import(source, wanted, names).run()


def open_named(place: pathlib.Path) -> tuple[Source, Names]:
  """Returns the tensors of a file of others, unread, and their names.

  Args:
    place: A file, or a folder as on the hub.

  Raises:
    WeightsError: The file is unsafe, damaged, packed by us, or nobody we know
      names tensors so.
  """
  if kind := runs.kind_of(place):
    refuse(place, *_OURS[kind])
  source = open_source(place)
  unsupported.check(source)
  try:
    names = recognise(list(source.entries))
  except WeightsError as error:
    text = f'weights {source.title}: {error}'
    raise WeightsError(printable(text)) from error
  if names is None:
    _refuse_names(source)
  _note_start(source, names)
  return source, names


def _refuse_names(source: Source) -> NoReturn:
  names = list(source.entries)
  if adapters := [name for name in names if re.search(r'\blora_\w+\b', name)]:
    what = f'it holds adapters of PEFT ({adapters[0]}), not a model'
    refuse(source.title, what, peft.MERGE)
  listed = ', '.join(collapse(names)[:6])[:300]
  refuse(
    source.title,
    f'nobody we know names tensors like these ({listed}); known are '
    f'{", ".join(LAYOUTS)}, the nearest is {nearest(names)}',
    'rename them or give other weights',
  )


def _note_start(source: Source, names: Names) -> None:
  """Says what was dropped from names, and which tensors are left behind."""
  if not names.start:
    return
  note = f'{names.start!r} dropped from every name'
  if names.outside:
    note = (
      f'read are the tensors whose names begin with {names.start!r}, which is '
      f"dropped; {len(names.outside)} others are not the model's"
    )
  source.notes.append(printable(note))


def _own_source(path: str) -> Source:
  """Returns the parameters that a run of ours evaluates: EMA if it has one."""
  try:
    run = runs.open_run(path, field='weights.path')
    run.check_whole()
    values = run.read_parameters(runs.own_device())
  except CheckpointError as error:
    raise WeightsError(f'weights.path={path!r}: {error}') from error
  entries = {
    name.removeprefix('params/'): Entry(
      x.shape, np.dtype(x.dtype), lambda x=x: np.asarray(x)
    )
    for name, x in values.items()
  }
  known = run.architecture
  told = ('heads', 'norm_eps', 'image_size', 'pool', 'padding')
  facts = {name: known[name] for name in told if name in known}
  if 'heads' in known:  # of which runs leave out what is usual
    facts['activation'] = known.get('activation', 'gelu')
    facts['position'] = known.get('position', 'learned')
  if run.class_names:
    facts['class_names'] = run.class_names
  return Source(entries, run.origin, facts)
