"""Checkpoints: written atomically by orbax, verified before use.

WORKDIR/checkpoints/STEP holds four orbax items: `variables`, `ema`, `training`
(optimizer and step) and `metadata` (JSON). Orbax writes them under a temporary
name in the background and renames the directory when all is on disk, so a
directory with a number is complete. `files.json` beside them lists every file.

Orbax notices neither a flipped bit nor that it casts an array to the wanted
type. So the files are compared with their list before it opens any; and the
metadata lists shape, type and a content digest of every array, and the config
and plan, which are compared before a value is used.
"""

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp

from qvit_jax import tree
from qvit_jax.errors import CheckpointError
from qvit_jax.models.batch_norm import COLLECTION
from qvit_jax.store import files, manifest
from qvit_jax.store.digest import digests
from qvit_jax.store.entries import printable

FORMAT = 1
# Paths of what a float model is made of: parameters, statistics of norms.
FLOATS = ('params/', f'{COLLECTION}/')
# What a step takes beside its arrays: metadata, indices, empty space.
_OVERHEAD_BYTES = 2**19
_ASIDE = '.replaced'
_TEMPORARY = '.orbax-checkpoint-tmp'  # orbax's own mark


def find_step(
  path: str, *, field: str = 'checkpoint.path'
) -> tuple[pathlib.Path, int | None]:
  """Returns (checkpoints directory, step or None) that a user's path means.

  Args:
    path: A workdir, its `checkpoints` directory, or one step in it.
    field: The config field that holds the path, for messages.

  Raises:
    CheckpointError: There is no such directory.
  """
  place = pathlib.Path(path).absolute()
  if not place.is_dir():
    raise CheckpointError(
      f'{field}={path!r} is no directory; give the workdir of a run '
      'or WORKDIR/checkpoints/STEP'
    )
  if place.name.isdigit() and place.parent.name == 'checkpoints':
    return place.parent, int(place.name)
  return (place if place.name == 'checkpoints' else place / 'checkpoints'), None


def params_items(metadata: dict[str, Any]) -> tuple[str, ...]:
  """Returns the items with `FLOATS` that are evaluated.

  Averages hold what was trained, which may be none or some of the parameters;
  they come last and count.
  """
  all_, averaged = (
    {p for p in metadata['arrays'].get(item, {}) if p.startswith(FLOATS)}
    for item in ('variables', 'ema')
  )
  if not averaged:
    return ('variables',)
  return ('ema',) if averaged == all_ else ('variables', 'ema')


class _ListedHandler(ocp.CompositeCheckpointHandler):
  """Lists the files of a step before it gets its name."""

  def finalize(self, directory) -> None:
    """Runs in the first process, when all have written."""
    super().finalize(directory)
    manifest.write(pathlib.Path(directory))


@ocp.args.register_with_handler(_ListedHandler, for_save=True, for_restore=True)
class _ListedSave(ocp.args.Composite):
  """The items of a step."""


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, directory: pathlib.Path, *, writer: bool):
    """Opens them; `writer` also clears what a killed run left behind."""
    self.directory = directory
    self._saver: ocp.AsyncCheckpointer | None = None
    self._keep: set[int] = set()
    if writer and directory.is_dir() and jax.process_index() == 0:
      self._clear()

  def steps(self) -> list[int]:
    """Returns the steps that are completely written, ascending."""
    if not self.directory.is_dir():
      return []
    return sorted(
      int(p.name) for p in self.directory.iterdir() if p.name.isdigit()
    )

  def latest(self) -> int | None:
    """Returns the newest step, or None."""
    return max(self.steps(), default=None)

  def best(self) -> int:
    """Returns the step that the newest checkpoint knows as the best so far.

    Raises:
      CheckpointError: There is none.
    """
    latest = self.latest()
    if latest is None:
      raise CheckpointError(
        f'{self.directory.parent} holds no checkpoint; train there first or '
        'set --config.checkpoint.path'
      )
    best = self.metadata(latest)['progress']['best_step']
    return latest if best is None else best

  def metadata(self, step: int) -> dict[str, Any]:
    """Returns what was saved beside the arrays of a step.

    Raises:
      CheckpointError: It is missing, damaged, or of a newer format.
    """
    path = self.directory / str(step) / 'metadata' / 'metadata'
    try:
      body = manifest.unseal(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
      if not (self.directory / str(step)).is_dir():
        raise CheckpointError(
          f'{self.directory} has no step {step}; it has '
          f'{", ".join(map(str, self.steps())) or "none"}'
        ) from error
      raise self._damaged(step, f'{path} is missing') from error
    except (OSError, ValueError) as error:
      raise self._damaged(step, f'{path}: {_first_line(error)}') from error
    if body.get('step', step) != step:
      raise self._damaged(step, f'it holds step {body["step"]}')
    if body['format'] > FORMAT:
      raise CheckpointError(
        f'{path.parents[1]} has format {body["format"]}, this version reads '
        f'up to {FORMAT}; update qvit_jax'
      )
    return body

  def save(
    self,
    step: int,
    items: dict[str, Any],
    metadata: dict[str, Any],
    *,
    best_step: int | None,
  ) -> None:
    """Starts to write a step; everything but it and the best goes afterwards.

    Args:
      step: Updates done.
      items: Item name to tree of arrays; empty trees are left out.
      metadata: JSON values to keep beside them.
      best_step: Step to keep besides this one.

    Raises:
      CheckpointError: The disk does not take it, now or at the last save.
    """
    self.wait()
    items = {
      name: value for name, value in items.items() if tree.flatten(value)
    }
    body = {
      **metadata,
      'format': FORMAT,
      'arrays': {name: _inventory(value) for name, value in items.items()},
    }
    self._check_space(items)
    saves = {
      name: ocp.args.StandardSave(tree.nest(tree.flatten(value)))
      for name, value in items.items()
    }
    sealed = manifest.seal(body)
    if step in self.steps() and jax.process_index() == 0:
      self._put_aside(step)
    self._guard(
      'written',
      lambda: self._async().save(
        self.directory / str(step),
        args=_ListedSave(metadata=ocp.args.JsonSave(sealed), **saves),
      ),
    )
    self._keep = {step} if best_step is None else {step, best_step}

  def wait(self) -> None:
    """Waits until the last save is on disk and drops what it replaces.

    Raises:
      CheckpointError: The disk did not take it; older steps are untouched.
    """
    if self._saver is None:
      return
    self._guard('written', self._saver.wait_until_finished)
    if self._keep and jax.process_index() == 0:
      for step in set(self.steps()) - self._keep:
        self._put_aside(step)
      self._clear()

  def close(self) -> None:
    """Finishes writing."""
    self.wait()
    if self._saver is not None:
      self._saver.close()
      self._saver = None

  def restore(
    self, step: int, wanted: dict[str, Any], *, verify: bool = True
  ) -> dict[str, Any]:
    """Returns the wanted items of a step, compared and verified.

    Args:
      step: Which one.
      wanted: Item name to tree of `jax.ShapeDtypeStruct` with shardings; paths,
        shapes and types must be those that were saved.
      verify: False skips the content digests.

    Raises:
      CheckpointError: Another structure was saved, or a file is damaged.
    """
    saved = self.metadata(step)['arrays']
    wanted = {name: v for name, v in wanted.items() if tree.flatten(v)}
    lines = []
    for name, value in wanted.items():
      found = {p: entry['array'] for p, entry in saved.get(name, {}).items()}
      here = {p: tree.describe(leaf) for p, leaf in tree.flatten(value).items()}
      lines += [f'{name}/{line}' for line in tree.differences(here, found)]
    if lines:
      raise CheckpointError(
        f'{self.directory / str(step)} is of another model: '
        f'{"; ".join(lines[:4])}{_more(lines, 4)}; use the config it was '
        'trained with, or another workdir'
      )
    self._check_files(step, wanted)
    out = {}
    for name, value in wanted.items():
      read = functools.partial(self._read, step, name, value)
      raw = self._guard('read', read, step)
      out[name] = tree.unflatten(tree.flatten(raw), value)
      if not verify:
        continue
      bad = [
          path for path, digest in digests(out[name]).items()
          if digest != saved[name][path]['digest']
      ]  # fmt: skip
      if bad:
        raise self._damaged(
          step,
          f'the content of {", ".join(f"{name}/{p}" for p in bad[:3])}'
          f'{_more(bad, 3)} is not what was saved',
        )
    return out

  def _check_files(self, step: int, items: Iterable[str]) -> None:
    """Raises CheckpointError where files of items are not what was saved."""
    place = self.directory / str(step)
    try:
      lines = manifest.differences(place, items)
    except ValueError as error:
      what = f'{place / manifest.NAME}: {_first_line(error)}'
      raise self._damaged(step, what) from error
    except OSError as error:
      raise self._damaged(step, _first_line(error)) from error
    if lines:
      what = printable(f'{"; ".join(lines[:3])}{_more(lines, 3)}')
      raise self._damaged(step, what)

  def _read(self, step: int, name: str, wanted: Any) -> Any:
    # Item by item: what orbax keeps of the whole step has no digest.
    return ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
      self.directory / str(step) / name,
      args=ocp.args.StandardRestore(tree.nest(tree.flatten(wanted))),
    )

  def _put_aside(self, step: int) -> None:
    # Renamed before it is deleted or replaced, so that a kill leaves either
    # the whole step or nothing of it.
    (self.directory / str(step)).rename(self.directory / f'{step}{_ASIDE}')

  def _clear(self) -> None:
    """Deletes leftovers; a newest step that was put aside comes back."""
    latest = self.latest() or -1
    for leftover in self.directory.iterdir():
      step = leftover.name.removesuffix(_ASIDE)
      if leftover.name.endswith(_ASIDE) and int(step) > latest:
        leftover.rename(self.directory / step)
      elif leftover.name.endswith(_ASIDE) or _TEMPORARY in leftover.name:
        shutil.rmtree(leftover, ignore_errors=True)

  def saved_shapes(self, step: int, item: str, sharding: Any) -> dict[str, Any]:
    """Returns what `restore` needs to read an item just as it was saved."""
    return tree.nest(
      {
        path: jax.ShapeDtypeStruct(
          entry['shape'], entry['dtype'], sharding=sharding
        )
        for path, entry in self.metadata(step)['arrays'][item].items()
      }
    )

  def _async(self) -> ocp.AsyncCheckpointer:
    if self._saver is None:
      self._saver = ocp.AsyncCheckpointer(_ListedHandler())
    return self._saver

  def _check_space(self, items: dict[str, Any]) -> None:
    """Asks the disk first: orbax waits for minutes where it cannot write."""
    needed = tree.num_bytes(items) + _OVERHEAD_BYTES
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      probe = self.directory / f'.probe{jax.process_index()}'
      probe.write_bytes(b'x')
      probe.unlink()
      free = shutil.disk_usage(self.directory).free
    except OSError as error:
      text = files.cannot_write(self.directory, error)
      raise CheckpointError(text) from error
    if needed > free:
      raise CheckpointError(
        f'{self.directory} needs {needed / 2**20:.1f} MiB for a checkpoint, '
        f'{free / 2**20:.1f} MiB are free; free some space and run the same '
        'command again (earlier checkpoints are untouched)'
      )

  def _guard(
    self, verb: str, action: Callable[[], Any], step: int | None = None
  ):
    try:
      return action()
    except OSError as error:
      self._bring_back(step)
      if step is None:
        raise CheckpointError(
          files.cannot_write(self.directory, error)
        ) from error
      raise self._damaged(step, _first_line(error)) from error
    except Exception as error:  # noqa: BLE001 - TensorStore raises bare ones
      self._bring_back(step)
      if step is None:
        raise CheckpointError(
          f'{self.directory} could not be {verb} ({_first_line(error)}); '
          'earlier checkpoints are untouched: free some space and run the '
          'same command again'
        ) from error
      raise self._damaged(step, _first_line(error)) from error

  def _bring_back(self, read_step: int | None) -> None:
    """After a failed write: a step that was to be replaced comes back."""
    if read_step is None and jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self._clear()

  def _damaged(self, step: int, what: str) -> CheckpointError:
    others = [s for s in self.steps() if s != step]
    advice = 'restore it from a copy or train anew in another workdir'
    if others:
      advice = (
        f'restore it from a copy, or delete that directory to go on from '
        f'step {others[-1]}'
      )
    return CheckpointError(
      f'checkpoint {self.directory / str(step)} is damaged: {what}; {advice}'
    )


def _inventory(values: Any) -> dict[str, dict[str, Any]]:
  hashes = digests(values)
  return {
    path: {
      'array': tree.describe(leaf),
      'dtype': leaf.dtype.name,
      'shape': list(leaf.shape),
      'digest': hashes[path],
    }
    for path, leaf in tree.flatten(values).items()
  }


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]


def _more(lines: list[str], shown: int) -> str:
  return f' and {len(lines) - shown} more' if len(lines) > shown else ''
