"""What `--mode=merge_lora` writes: kernels with adapters in them."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import ExportError
from qvit_jax.experiment import calibration, sources, statistics
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.experiment.model import folded
from qvit_jax.lora import adapter as lora
from qvit_jax.models import batch_norm
from qvit_jax.modes import session
from qvit_jax.modes.session import say
from qvit_jax.quantization.finite import at_site, check_finite
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.methods.packing import put_outputs
from qvit_jax.quantization.packed import assemble
from qvit_jax.quantization.ptq import apply as ptq
from qvit_jax.quantization.ptq.rows import Row
from qvit_jax.store import artifacts, files
from qvit_jax.store.checkpoint import FLOATS, Checkpoints
from qvit_jax.training.loop import Progress

_IMAGES = 32  # random ones, on which logits are compared
_ALLOWED = 1e-3  # of the largest logit; kernels that stay float differ by 1e-6


def _merge(
  experiment: Experiment, place: pathlib.Path, say: Callable[[str], None]
) -> None:
  """Folds the adapters in, compares, evaluates both, writes.

  A float base becomes a run in WORKDIR/merged/NAME, a packed one the artifact
  WORKDIR/merged/NAME.safetensors.

  Args:
    experiment: With adapters.
    place: The workdir.
    say: Prints a line.

  Raises:
    CheckpointError: There are no adapters, or they are of another base.
    ExportError: The merged model computes something else.
    QuantError: A merged kernel is not finite.
  """
  variables, run, lines = sources.adapted(experiment, place)
  config, frozen = experiment.config, experiment.model.frozen
  for line in lines:
    say(f'start     {line}')
  shapes = experiment.model.float_shapes['params']
  params = frozen.unpacked(variables, shapes)
  params = lora.merge(params, variables['lora'], frozen.adapter.spec)
  check_finite(tree.flatten(params))
  target = place / 'merged' / config.lora.name
  if frozen.bits is None:
    whole, merged = _float_run(experiment, variables, params)
  else:
    whole, merged = _packed(experiment, variables, params, target, say)
  found = _compare(experiment, variables, whole, merged)
  say(
    f'logits of {_IMAGES} random images within {found["difference"]:.2g} of '
    f'those with adapters (the largest is {found["largest"]:.3g}), '
    f'{found["equal"]:.1%} of the classes equal'
  )
  is_near = found['difference'] <= _ALLOWED * found['largest']  # NaN is not
  if frozen.bits is None and not is_near:
    raise ExportError(
      f'the merged model of adapter {config.lora.name!r} computes other logits '
      f'(by {found["difference"]:.2g}); nothing was written'
    )
  before = experiment.make_evaluator()(variables)
  after = whole.make_evaluator()(merged)
  for name, metrics in (('before', before), ('after', after)):
    say(
      f'{name:9} top1 {metrics["top1"]:.4f}  loss {metrics["loss"]:.4f}  '
      f'({metrics["num_examples"]} images)'
    )
  taken = '--config.lora.rank=0 --config.lora.targets="()"'
  if frozen.bits is None:
    _save(whole, merged, target, run.step)
    say(
      f'merged into {target}; take it with {taken} '
      f'--config.checkpoint.path={target}'
    )
  else:
    path = whole.config.checkpoint.path
    say(
      f'merged into {path}, {pathlib.Path(path).stat().st_size:,} bytes; take '
      f'it with {taken} --config.quant.recipe=ptq '
      f'--config.checkpoint.path={path}'
    )


def _whole(config: Any) -> Any:
  """Returns the config of the merged model."""
  return config_lib.with_fields(
    config,
    {
      'lora.rank': 0,
      'lora.targets': (),
      'train.trainable': ('auto',),
      'weights.path': '',  # it is its own source
      'checkpoint.path': '',
    },
  )


def _float_run(experiment: Experiment, variables, params):
  """Returns (experiment, variables) of the merged model."""
  whole = Experiment(
    _whole(experiment.config), training=False, data=experiment.data
  )
  places = whole.abstract_variables()
  merged = {name: variables[name] for name in places if name != 'params'}
  merged['params'] = jax.tree.map(
    lambda x, wanted: jax.device_put(x, wanted.sharding),
    params,
    places['params'],
  )
  return whole, merged


def _packed(experiment: Experiment, variables, params, target, say):
  """Returns the same of kernels that are rounded again, from their file."""
  config, frozen = _whole(experiment.config), experiment.model.frozen
  sites, floats = experiment.model.plan.sites, {**variables, 'params': params}
  flat, outputs = _without_norms(config, floats)
  gptq = config.lora.requantize == 'gptq'
  row = Row('merged', group=frozen.group, solvers=('gptq',) if gptq else ())
  stats = None
  if gptq:
    plain = Experiment(folded(config), training=False, data=experiment.data)
    stats = calibration.Calibration(
      plain, target, say, hessians=True
    ).observe((), statistics.folded_params(config, floats))
  plans, quant = {}, {}
  for site in sites:
    packs = site.is_layer and site.path != frozen.head
    plans[site.path] = SitePlan(frozen.bits if packs else None)
    if not site.is_layer:
      continue
    name = f'{site.path}/kernel'
    w = flat.pop(name).reshape(site.rhs_shape)
    if not packs:
      quant[name] = w.astype(config.model.dtype)
    elif site.path not in frozen.adapter.by_path:
      quant[name] = frozen.kernel(variables, site.path)  # nothing was added
    else:
      hessian = jnp.asarray(stats[site.path].hessian) if gptq else None
      with at_site(site.path):
        quant[name] = ptq.round_kernel(row, w, hessian, frozen.bits)
  put_outputs(flat, quant, outputs)
  packed = assemble(
    flat, quant, plans, sites, config.model.dtype, 'per_token'
  )
  path, facts = (
    target.with_name(f'{target.name}.safetensors'),
    models.architecture(folded(config)),
  )
  names = experiment.data.class_names  # those of the adapters
  artifacts.save(
    packed, path, facts, class_names=names, config=config_lib.to_json(config)
  )
  packed = artifacts.load(path, sites, facts)
  config = config_lib.with_fields(
    config, {'quant.recipe': 'ptq', 'checkpoint.path': str(path)}
  )
  whole = Experiment(
    config, training=False, data=experiment.data, packed=packed
  )
  return whole, whole.replicate(packed.variables)


def _without_norms(config: Any, floats: dict[str, Any]):
  """Returns (parameters by path, what norms do to layers' outputs)."""
  flat, outputs = {}, {}
  for name, x in tree.flatten(floats).items():
    if name.startswith(FLOATS):
      flat[name] = x
  if batch_norm.norms(flat):
    flat, outputs = batch_norm.without_norms(models.statistics(config), flat)
  return {n.removeprefix('params/'): x for n, x in flat.items()}, outputs


def _compare(experiment: Experiment, variables, whole: Experiment, merged):
  """Returns how far the logits of both models are apart.

  Where nothing is rounded, in float32: how far kernels are apart, not how
  bfloat16 rounds.
  """
  size = experiment.config.model.image_size
  images = jax.random.normal(jax.random.key(0), (_IMAGES, size, size, 3))
  images = experiment.replicate(images)
  logits = []
  for one, values in ((experiment, variables), (whole, merged)):
    config = one.config  # norms of one may be folded in the other
    if not experiment.model.method.quantizes:
      config = config_lib.with_fields(config, {'model.dtype': 'float32'})
    module = models.build_model(config, one.model.ops)
    with jax.default_matmul_precision('highest'):
      logits.append(np.asarray(jax.jit(module.apply)(values, images)))
  with_adapters, after = logits
  return {
    'difference': float(np.abs(after - with_adapters).max()),
    'largest': float(np.abs(with_adapters).max()),
    'equal': float((after.argmax(1) == with_adapters.argmax(1)).mean()),
  }


def _save(whole: Experiment, merged, target: pathlib.Path, step: int) -> None:
  """Writes a merged model as a run that others can start from."""
  stored = Checkpoints(target / 'checkpoints', writer=True)
  progress = dataclasses.asdict(Progress(best_step=step, evaluated_step=step))
  stored.save(
    step,
    {'variables': merged},
    whole.metadata() | {'step': step, 'progress': progress},
    best_step=step,
  )
  stored.close()
  if jax.process_index() == 0:
    files.write_json(target / 'config.json', config_lib.to_json(whole.config))


def merge_lora(config: Any, workdir: str) -> None:
  """Folds adapters into the kernels and checks that outputs agree."""
  with session.opened(workdir) as place:
    # Only GPTQ looks at images of the training split.
    calibrates = config.lora.requantize == 'gptq'
    experiment = Experiment(config, training=False, calibrating=calibrates)
    session.header('merge_lora', experiment, place)
    _merge(experiment, place, say)
