"""What the model card of an export or of a table of rows tells."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qvit_jax.config import resolve as config_lib
from qvit_jax.experiment import sources
from qvit_jax.experiment.model import Model
from qvit_jax.report import card
from qvit_jax.store import files, runs

NAME = 'README.md'
_OURS = (
  'import qvit_jax', '', "model = qvit_jax.load('{file}')",
  'logits = model(images)  # uint8 [b, h, w, 3] -> [b, classes]',
)  # fmt: skip
_ONNX = (
  'import onnxruntime', '', "session = onnxruntime.InferenceSession('{file}')",
  '(logits,) = session.run(None, {session.get_inputs()[0].name: images})',
)  # fmt: skip
_STABLEHLO = (
  'from jax import export', '',
  "program = export.deserialize(bytearray(open('{file}', 'rb').read()))",
  'logits = program.call(images)  # float32, prepared as above',
)  # fmt: skip
# {suffix: (library, code)} of forms that hold a program.
_PROGRAMS = {'.onnx': ('onnx', _ONNX), '.stablehlo': ('jax', _STABLEHLO)}


def write_export(
  config: Any,
  place: pathlib.Path,
  target: pathlib.Path,
  model: Model,
  parity: Mapping[str, Any],
  *,
  library: str = 'qvit_jax',
  code: Sequence[str] = _OURS,
  is_float: bool = False,
) -> None:
  """Writes the card beside an export.

  Args:
    config: Resolved for `--mode=export`.
    place: The workdir.
    target: The exported file.
    model: What was exported.
    parity: As in parity.json.
    library: That opens it, where the suffix does not say so.
    code: Lines of Python that do.
    is_float: Whether the file has the float parameters alone of a model that
      was trained and evaluated with rounding.
  """
  library, code = _PROGRAMS.get(target.suffix, (library, code))
  source = sources.find(config, place)
  stored, rows, environment, names = config_lib.to_json(config), [], {}, []
  if source.kind == 'weights':
    origin = [f'The weights {source.path}.']
  else:
    run = runs.open_run(source.path)
    origin, names = [f'{run.origin}.'], run.class_names
    stored = run.config or stored
    rows, environment = _measured(run)
  bits, sites = model.bits, _sites(model)
  if is_float:
    bits = f'the float parameters of a model that was trained with {bits}'
    sites, rows, environment = [], [], {}
  _write(
    target.parent,
    card.Card(
      title=model.title, library=library,
      code=[line.replace('{file}', target.name) for line in code],
      bits=bits, sites=sites, origin=origin, config=stored,
      class_names=names, files=_files(target.parent), rows=rows,
      environment=environment, parity=parity,
    ),
  )  # fmt: skip


def write_table(
  place: pathlib.Path,
  model: Model,
  rows: Sequence[Mapping[str, Any]],
  environment: Mapping[str, Any],
  class_names: Sequence[str],
) -> None:
  """Writes the card beside the packed files of `--mode=ptq`.

  Args:
    place: The folder of the files.
    model: The float model that was quantized.
    rows: Of results.json.
    environment: The same.
    class_names: By label.
  """
  config = config_lib.to_json(model.config)
  source = config['checkpoint']['path'] or config['weights']['path']
  origin = [f'Post-training quantization of {source}, a file a row.']
  origin += [f'{row["name"]}: {row["method"]}.' for row in rows]
  first = next((n for n, _ in _files(place) if n.startswith('w4a4')), '')
  first = first or next((name for name, _ in _files(place)), 'FILE')
  _write(
    place,
    card.Card(
      title=model.title, library='qvit_jax',
      code=[line.replace('{file}', first) for line in _OURS],
      bits=f'{len(rows)} rows of {model.bits}', sites=(), origin=origin,
      config=config, class_names=class_names, files=_files(place), rows=rows,
      environment=environment,
    ),
  )  # fmt: skip


def _write(folder: pathlib.Path, content: card.Card) -> None:
  files.write_text(folder / NAME, card.text(content))


def _files(folder: pathlib.Path) -> list[tuple[str, int]]:
  return sorted(
    (path.name, path.stat().st_size)
    for path in folder.iterdir()
    if path.is_file() and path.name != NAME and not path.name.startswith('.')
  )


def _sites(model: Model) -> list[str]:
  return [] if model.plan.is_float else model.plan.digest_lines()


def _measured(run: runs.Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Returns the row of results.json that a run or a packed file has there.

  And the environment it was measured in; nothing where nobody evaluated it.
  """
  place = run.workdir
  if run.kind == 'packed':  # in WORKDIR/artifacts or WORKDIR/export
    place = place.parent
  try:
    found = json.loads((place / 'results.json').read_text(encoding='utf-8'))
    rows = [found['baseline'], *found['rows']]
    name = run.place.stem if run.kind == 'packed' else f'step {run.step}'
    row = next(row for row in rows if row['name'] == name)
    return [row], found['environment']
  except (OSError, StopIteration, *files.UNREADABLE):
    return [], {}
