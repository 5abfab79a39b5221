"""The one reader of what we wrote: runs, packed models, adapters.

`open_run` opens any of them by its content; a `Run` then answers what it is
and reads its arrays by kind. `finished` reads the numbers of a training.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from qvit_jax import tree
from qvit_jax.config.resolve import upgraded
from qvit_jax.errors import CheckpointError
from qvit_jax.ops import Site
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import adapters, artifacts, checkpoint, files, tensors

_PREPROCESSING = ('mean', 'std', 'resize')


@dataclasses.dataclass(frozen=True)
class Run:
  """A step of a run, a packed model or adapters, opened.

  Attributes:
    kind: 'run', 'packed' or 'adapter'.
    place: The folder of the step, or the file.
    facts: What it says of itself; its config with the field names of today.
    step: Updates done; None where the file does not say.
  """

  kind: str
  place: pathlib.Path
  facts: dict[str, Any]
  step: int | None = None

  @property
  def origin(self) -> str:
    """Phrase: which one of where."""
    if self.kind == 'run':
      return f'step {self.step} of {self.workdir}'
    name = self.place.stem
    if self.kind == 'adapter':
      return f'adapter {name} of {self.place.parent}'
    return f'{name} of {self.place}'

  @property
  def workdir(self) -> pathlib.Path:
    """The folder that the run was trained in, or that the file lies in."""
    return self.place.parents[1] if self.kind == 'run' else self.place.parent

  @property
  def config(self) -> dict[str, Any] | None:
    """The resolved config, as JSON; None where a packed model has none."""
    return self.facts.get('config')

  @property
  def architecture(self) -> dict[str, Any]:
    """Everything that a tensor's shape or meaning depends on."""
    return self.facts['architecture']

  @property
  def plan(self) -> list[str]:
    """Bits of every product, a line each."""
    if self.kind != 'packed':
      return self.facts['plan']
    specs = self.facts['specs'].items()
    return [f'{site} w{w} a{a}' for site, (w, a) in specs]

  @property
  def class_names(self) -> list[str]:
    """Names by label; [] where they were not saved."""
    return self.facts.get('class_names', [])

  @property
  def preprocessing(self) -> dict[str, Any] | None:
    """What images went through: mean, std, resize, image_size (px).

    None where it was not saved.
    """
    if self.config is None:
      return None
    data = self.config['data']
    size = self.config['model']['image_size']
    return {n: data[n] for n in _PREPROCESSING} | {'image_size': size}

  @property
  def holds_adapters(self) -> bool:
    """Whether its arrays lie on a base that it does not hold."""
    return 'base' in self.facts

  def check_whole(self) -> None:
    """Raises CheckpointError where it holds adapters and no kernels."""
    if self.holds_adapters:
      raise CheckpointError(
        f'{self.workdir} holds adapters alone, no kernels; fold them in with '
        '--mode=merge_lora and give WORKDIR/merged/NAME'
      )

  @property
  def digests(self) -> dict[str, dict[str, str]]:
    """{item: {path: content digest}} of the arrays of a run; else {}."""
    return {
      item: {path: entry['digest'] for path, entry in entries.items()}
      for item, entries in self.facts.get('arrays', {}).items()
    }

  @property
  def learned(self) -> set[str]:
    """Paths of what a run holds beside parameters, averages aside."""
    paths = self.facts['arrays']['variables']
    return {path for path in paths if not path.startswith('params/')}

  @functools.cached_property
  def _stored(self) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(self.place.parent, writer=False)

  def read_evaluated(self, sharding: Any) -> dict[str, Any]:
    """Returns {path: array} of what is evaluated: averages where there are.

    Args:
      sharding: Where every array goes.

    Raises:
      CheckpointError: It is damaged.
    """
    items = [n for n in ('variables', 'ema') if n in self.facts['arrays']]
    return self._read(items, sharding)

  def read_parameters(self, sharding: Any) -> dict[str, Any]:
    """Returns the same of a float model: parameters, statistics of norms.

    Raises:
      CheckpointError: It is damaged.
    """
    found = self._read(checkpoint.params_items(self.facts), sharding)
    return {n: x for n, x in found.items() if n.startswith(checkpoint.FLOATS)}

  def _read(self, items: Sequence[str], sharding: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:  # averages come last and count
      shapes = self._stored.saved_shapes(self.step, item, sharding)
      found |= tree.flatten(self._stored.restore(self.step, {item: shapes}))
    # The first part of a path is the item.
    return {name.partition('/')[2]: x for name, x in found.items()}

  def place_evaluated(self, wanted: Any) -> Any:
    """Returns what is evaluated as a model wants it.

    Args:
      wanted: Tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      CheckpointError: It is damaged, or of another model.
    """
    flat = tree.flatten(wanted)
    items = {'variables': wanted}
    if averaged := self.facts['arrays'].get('ema'):
      items['ema'] = tree.nest({n: flat[n] for n in averaged if n in flat})
    restored = self._stored.restore(self.step, items)
    found = tree.flatten(restored['variables'])
    return tree.unflatten(found | tree.flatten(restored.get('ema', {})), wanted)

  def read_adapters(self) -> dict[str, Any]:
    """Returns {path: array} of an adapter's file.

    Raises:
      CheckpointError, WeightsError: It is damaged.
    """
    return adapters.load(self.place)[0]

  def read_packed(
    self, sites: Sequence[Site], architecture: dict[str, Any]
  ) -> Packed:
    """Returns the packed model of a file.

    Raises:
      WeightsError: It is damaged, or of another model.
    """
    return artifacts.load(self.place, sites, architecture)


def kind_of(path: str | pathlib.Path) -> str:
  """Returns 'run', 'packed' or 'adapter' by content; '' for anything else."""
  place = pathlib.Path(path)
  with contextlib.suppress(OSError, ValueError):  # said when it is opened
    if path and place.is_file():
      keys = tensors.read_metadata(place).keys()
      kinds = {artifacts.KEY: 'packed', adapters.KEY: 'adapter'}
      return next((kind for key, kind in kinds.items() if key in keys), '')
    if path and place.is_dir() and _is_run(place):
      return 'run'
  return ''


def _is_run(place: pathlib.Path) -> bool:
  return (
    (place / 'checkpoints').is_dir()
    or (place.name == 'checkpoints' and not any(place.glob('*.*')))
    or (place.name.isdigit() and place.parent.name == 'checkpoints')
  )


def open_adapter(place: pathlib.Path) -> Run:
  """Opens an adapter's file.

  Raises:
    CheckpointError: There is no such file, or it holds no adapter of ours.
    WeightsError: It is damaged.
  """
  facts = adapters.read_header(place)
  return Run('adapter', place, _of_today(facts), facts['step'])


def open_run(
  path: str | pathlib.Path, *, field: str = 'checkpoint.path'
) -> Run:
  """Opens what a path means; of a workdir, the best step.

  Args:
    path: A workdir, its `checkpoints`, one step in it, a packed model's file
      or an adapter's.
    field: The config field that holds the path, for messages.

  Raises:
    CheckpointError: There is nothing of ours, or it is damaged.
  """
  place = pathlib.Path(path)
  kind = kind_of(place)
  if kind == 'adapter':
    return open_adapter(place)
  if kind == 'packed':
    return Run(kind, place, _of_today(artifacts.read_header(place)))
  directory, step = checkpoint.find_step(str(place), field=field)
  stored = checkpoint.Checkpoints(directory, writer=False)
  step = stored.best() if step is None else step
  facts = _of_today(stored.metadata(step))
  return Run('run', directory / str(step), facts, step)


def _of_today(facts: dict[str, Any]) -> dict[str, Any]:
  """Returns facts whose config has the field names of today."""
  config = facts.get('config')
  return facts if config is None else facts | {'config': upgraded(config)}


def has_steps(workdir: pathlib.Path) -> bool:
  """Returns whether a workdir holds a checkpoint of its own."""
  stored = checkpoint.Checkpoints(workdir / 'checkpoints', writer=False)
  return bool(stored.steps())


def own_device() -> jax.sharding.Sharding:
  """Returns the first device of this process, to read arrays onto."""
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@dataclasses.dataclass(frozen=True)
class Finished:
  """What a training wrote of itself as it ended, without arrays.

  Attributes:
    row: Of the evaluated model, as in results.json.
    config: The resolved config; None where config.json is not there.
    evaluations: The lines of its evaluations, by step; [] without
      metrics.jsonl.
  """

  row: dict[str, Any]
  config: dict[str, Any] | None
  evaluations: list[dict[str, Any]]


def finished(path: str | pathlib.Path) -> Finished:
  """Returns the numbers of a finished training.

  Args:
    path: Its workdir.

  Raises:
    CheckpointError: There are none, or they cannot be read.
  """
  place = pathlib.Path(path)
  try:
    results = json.loads(_text(place / 'results.json') or '{}')
    config = json.loads(_text(place / 'config.json') or 'null')
    config = None if config is None else upgraded(config)
    lines = [
      json.loads(line)
      for line in _text(place / 'metrics.jsonl').splitlines()
    ]
    return Finished(
      results['baseline'], config, [x for x in lines if x['split'] == 'eval']
    )
  except (OSError, *files.UNREADABLE) as error:
    raise no_results(path, error) from error


def no_results(path: str | pathlib.Path, error: Exception) -> CheckpointError:
  """Returns the error for a workdir whose numbers cannot be read."""
  what = f'{type(error).__name__}: {" ".join(str(error).split())}'
  return CheckpointError(
    f'{path} holds no results of a finished training ({what[:100]}); give a '
    'workdir of --mode=train that ended'
  )


def _text(path: pathlib.Path) -> str:
  return path.read_text(encoding='utf-8') if path.is_file() else ''
