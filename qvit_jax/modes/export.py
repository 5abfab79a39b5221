"""What `--mode=export` writes of parameters in the layout of others."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.experiment.model import Model
from qvit_jax.modes import deploy, onnx_file, packing, session, stablehlo
from qvit_jax.modes.session import say
from qvit_jax.store import files
from qvit_jax.store import tensors as tensor_files


def write_weights(
  model: Model, place: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Writes WORKDIR/export/model.*, with parity.json beside it.

  Raises:
    ExportError: There is nothing to export, or not for this model.
  """
  config, kind = model.config, model.config.export
  params, facts = deploy.float_arrays(model, place, say)
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
  beside: list[str] = []
  library: dict[str, Any] = {}
  if weights.LAYOUTS[layout].transformers:
    text = weights.hf_config(
      shape, tensors, layout, class_names=facts.get('class_names', ())
    )
    processor = weights.hf_processor(config.data, config.model.image_size)
    for name, content in (
      ('config.json', text), ('preprocessor_config.json', processor)
    ):  # fmt: skip
      files.write_text(target.with_name(name), content)
      beside.append(name)
    library = {
      'library': 'transformers', 'code': weights.how_to_open(shape, layout),
    }  # fmt: skip
  for line in weights.how_to_build(shape, tensors, layout):
    say(f'note: {line}')
  again, _ = weights.read_weights(str(target), model.shapes)
  same = all(np.array_equal(again[n], params[n]) for n in params)
  largest = max(float(np.abs(again[n] - params[n]).max()) for n in params)
  size = target.stat().st_size
  deploy.conclude(
    config, target, model,
    {'layout': layout, 'tensors': len(tensors), 'reads_back_equal': same,
     'largest_difference': largest},
    beside, is_float=model.method.quantizes, **library,
  )  # fmt: skip
  read = 'bit for bit' if same else f'within {largest:.2g}'
  say(
    f'{len(tensors)} tensors, {size:,} bytes in {target} ({layout} '
    f'layout); reads back {read}'
  )


# Forms for runtimes, which hold the program and not the weights alone.
_PROGRAMS = {'onnx': onnx_file.write, 'stablehlo': stablehlo.write}


def export(config: Any, workdir: str) -> None:
  """Writes a model for runtimes, a packed one, or parameters for others."""
  with session.opened(workdir) as place:
    say('mode      export')
    if write := _PROGRAMS.get(config.export.format):
      config, packed = deploy.subject(config, place, say)
      say(f'model     {Model(config, packed).title}')
      write(config, packed, place, say)
      return
    deploy.check_unpacked(config)
    model = Model(config)
    say(f'model     {model.title}')
    if config.export.format == 'packed':
      packing.write_packed(model, place, say)
    else:
      write_weights(model, place, say)
