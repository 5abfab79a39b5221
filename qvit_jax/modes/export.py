"""What `--mode=export` writes of parameters in the layout of others."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.errors import ExportError
from qvit_jax.experiment import checks, sources
from qvit_jax.experiment.model import Model
from qvit_jax.modes import packing, session
from qvit_jax.modes.session import say
from qvit_jax.store import files, runs
from qvit_jax.store import tensors as tensor_files


def write_weights(
  model: Model, place: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Writes WORKDIR/export/model.*, with parity.json beside it.

  Raises:
    ExportError: There is nothing to export, or not for this model.
  """
  config, kind = model.config, model.config.export
  params, facts = _read(model, place, say)
  if model.method.quantizes:
    say('note: the float parameters are written; this form knows no bits')
  if model.ops.rectify:
    say(
      'note: queries and keys are not rectified there, so it computes '
      'something else; --config.export.format=packed keeps all'
    )
  pool, shape = config.model.pool, models.architecture(config)
  layout = weights.layout_of(kind.layout, params)
  tensors = weights.translate(tree.nest(params), layout, pool)
  target = place / 'export' / f'model.{kind.format}'
  texts = {name: shape[name] for name in ('padding',) if name in shape}
  tensor_files.save_tensors(
    tensors, target, form=kind.format, metadata=texts
  )
  stale = {'model.safetensors', 'model.npz', 'config.json', packing.NAME}
  stale.remove(target.name)
  if weights.LAYOUTS[layout].transformers:
    text = weights.hf_config(
      shape, tensors, layout, class_names=facts.get('class_names', ())
    )
    files.write_text(target.with_name('config.json'), text)
    stale.remove('config.json')
  for line in weights.how_to_build(shape, tensors, layout):
    say(f'note: {line}')
  for name in stale:  # of an export in another layout or format
    target.with_name(name).unlink(missing_ok=True)
  again, _ = weights.read_weights(str(target), model.shapes)
  same = all(np.array_equal(again[n], params[n]) for n in params)
  largest = max(float(np.abs(again[n] - params[n]).max()) for n in params)
  size = target.stat().st_size
  files.write_json(
    target.with_name('parity.json'),
    {'file': target.name, 'layout': layout, 'tensors': len(tensors),
     'bytes': size, 'reads_back_equal': same, 'largest_difference': largest},
  )  # fmt: skip
  read = 'bit for bit' if same else f'within {largest:.2g}'
  say(
    f'{len(tensors)} tensors, {size:,} bytes in {target} ({layout} '
    f'layout); reads back {read}'
  )


def _read(
  model: Model, place: pathlib.Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the parameters by path, and what else is known of them."""
  config = model.config
  source = sources.find(config, place)
  path, has_own = source.path, runs.has_steps(place)
  if source == sources.Source('run', str(place)) and not has_own:
    raise ExportError(
      f'{place} holds no checkpoint to export; train there first, or set '
      '--config.checkpoint.path= or --config.weights.path='
    )
  params, report = weights.read_weights(path, model.shapes)
  if report.reinitialised:
    why = next(iter(report.reinitialised.values()))
    advice = 'train first (--mode=train)'
    if theirs := re.match(r'(\d+) classes there', why):
      advice += f' or set --config.model.num_classes={theirs[1]}'
    raise ExportError(
      f'{path} brings no {", ".join(report.reinitialised)}: {why}; {advice}'
    )
  report.notes += checks.compare_facts(report, config)
  for line in report.lines():
    say(f'start     {line}')
  if has_own and config.weights.path:
    say('note: there is a checkpoint, so weights.path is not read')
  there = report.facts.get('norm_eps', config.model.norm_eps)
  if there != config.model.norm_eps:
    raise ExportError(
      f'{path} was trained with norm_eps={there:g}, the model here has '
      f'{config.model.norm_eps:g}; set --config.model.norm_eps={there:g}'
    )
  return params, report.facts


def export(config: Any, workdir: str) -> None:
  """Writes a packed model, or float parameters in the layout of others."""
  with session.opened(workdir) as place:
    model = Model(config)
    say('mode      export')
    say(f'model     {model.title}')
    if config.export.format == 'packed':
      packing.write_packed(model, place, say)
    else:
      write_weights(model, place, say)
