"""Fields that have to go together, as far as a mode reads them."""

from typing import Any

from qvit_jax.errors import ConfigError


def check(config: Any, context: Any) -> None:
  """Raises ConfigError where fields of a config contradict each other.

  Args:
    config: Resolved.
    context: A `resolve.Context`.
  """
  mode, method = context.mode, context.methods[config.quant.recipe]
  trains = mode.trains and not method.is_packed  # which is timed alone
  if trains and not config.train.steps and config.train.epochs <= 0:
    raise ConfigError(
      'train.steps=0 and train.epochs=0 train nothing; set one of them to a '
      'positive number'
    )
  if method.is_packed and not mode.takes_packed:
    names = [
      name
      for name, other in context.methods.items()
      if not other.is_packed and (mode.takes_bits or not other.quantizes)
    ]
    raise ConfigError(
      f'quant.recipe={config.quant.recipe!r} stands for a packed model, which '
      'only --mode=eval, predict, export and benchmark read; for '
      f'--mode={mode.name} set --config.quant.recipe={_listed(names)}'
    )
  _check_engine(config, mode)
  _check_granularity(config, method)
  _check_lora(config, mode, method)
  if mode.trains:
    _check_teacher(config)


def _check_engine(config: Any, mode: Any) -> None:
  """Raises ConfigError where a runtime cannot do what a mode does."""
  engine = config.eval.engine
  if engine == 'jax':
    return
  if not mode.takes_engine:
    more = ' (ptq.engines says which runtimes --mode=ptq times)'
    raise ConfigError(
      f'eval.engine={engine!r} runs finished models, in --mode=eval, predict '
      f'and benchmark alone; for --mode={mode.name} set '
      f'--config.eval.engine=jax{more if mode.name == "ptq" else ""}'
    )
  if config.lora.rank:
    raise ConfigError(
      f'eval.engine={engine!r} runs a whole model, but lora.rank='
      f'{config.lora.rank}; fold the adapters in with --mode=merge_lora, or '
      'set --config.eval.engine=jax'
    )


def _check_granularity(config: Any, method: Any) -> None:
  """Raises ConfigError for ranges that a method does not have."""
  asked, allowed = config.quant.act_granularity, method.granularities
  if asked and allowed and asked not in allowed:
    raise ConfigError(
      f'quant.act_granularity={asked!r} is not what quant.recipe='
      f'{config.quant.recipe!r} has: {" | ".join(allowed)}; set '
      f'--config.quant.act_granularity={allowed[0]}'
    )
  if config.quant.calibration_path and asked == 'per_head':
    raise ConfigError(
      f'quant.calibration_path={config.quant.calibration_path!r} holds no '
      "statistics of each head, which quant.act_granularity='per_head' wants; "
      'set --config.quant.act_granularity=per_tensor or per_position, or leave '
      'the path out'
    )


def _check_lora(config: Any, mode: Any, method: Any) -> None:
  """Raises ConfigError where adapters do not go with the rest of the config."""
  lora, train, recipe = config.lora, config.train, config.quant.recipe
  if not lora.rank:
    if lora.targets:
      raise ConfigError(
        f'lora.rank={lora.rank} adapts nothing, but lora.targets is '
        f'{tuple(lora.targets)}; set --config.lora.rank= to 1 or more, or '
        '--config.lora.targets="()"'
      )
    if mode.needs_adapters:
      raise ConfigError(
        '--mode=merge_lora folds adapters into kernels, but lora.rank is 0; '
        'set lora.* as in their training'
      )
    return
  if mode.needs_whole:
    raise ConfigError(
      f'--mode={mode.name} needs a whole model, but lora.rank={lora.rank}: its '
      'runs keep adapters alone; fold them in with --mode=merge_lora and give '
      'the result with --config.lora.rank=0 --config.lora.targets="()"'
    )
  stages = str(train.stages)
  for wrong, text in (
    (not lora.targets,
     f'lora.rank={lora.rank}, but lora.targets names no layer; set '
     '--config.lora.targets="(\'all\',)" or --config.lora.rank=0'),
    (method.is_packed,
     f'quant.recipe={recipe!r} reads a packed model, which lora.rank='
     f'{lora.rank} would not adapt; set --config.lora.rank=0 '
     '--config.lora.targets="()"'),
    (config.quant.calibration_path and lora.init == 'pissa',
     f'quant.calibration_path={config.quant.calibration_path!r} is of whole '
     "kernels, out of which lora.init='pissa' takes a part; set "
     '--config.lora.init=zero or leave the path out'),
    (train.trainable != ('auto',) and 'lora' not in train.trainable,
     f'train.trainable={tuple(train.trainable)} leaves the adapters of '
     f'lora.rank={lora.rank} untrained; add \'lora\' or leave it out'),
    (lora.base != 'float' and method.quantizes,
     f'lora.base={lora.base!r} packs the kernels that quant.recipe={recipe!r} '
     'would round in training; set --config.lora.base=float or '
     '--config.quant.recipe=none'),
    (lora.base != 'float' and config.mesh.tensor > 1,
     f'mesh.tensor={config.mesh.tensor} splits float kernels, not those of '
     f'lora.base={lora.base!r}; set --config.mesh.tensor=1'),
    (lora.base == 'float' and lora.init == 'loftq',
     "lora.init='loftq' makes up for packing, but lora.base is 'float'; set "
     '--config.lora.base=int4 or --config.lora.init=pissa'),
    (lora.dropout and method.quantizes,
     f'lora.dropout={lora.dropout:g} would have no effect: quant.recipe='
     f'{recipe!r} rounds kernels with the adapters in them, which have no '
     'inputs of their own; set it to 0'),
    ('freeze' in stages or config.quant.dampen,
     f'stage \'freeze\' and quant.dampen hold kernels, which lora.rank='
     f'{lora.rank} freezes anyway; leave them out'),
    (train.stages and lora.base != 'float',
     f'train.stages={tuple(train.stages)} choose what is rounded, but '
     f'lora.base={lora.base!r} is packed for good; leave the stages out'),
  ):  # fmt: skip
    if wrong:
      raise ConfigError(text)


def _check_teacher(config) -> None:
  """Raises ConfigError for a loss without teacher, or one without a loss."""
  train = config.train
  others = {
    'train.feature_weight': train.feature_weight,
    'quant.dgd': config.quant.dgd,
  }
  if not train.teacher:
    for name, value in others.items():
      if value:
        raise ConfigError(
          f'{name}={value:g} compares the model with a teacher, but '
          'train.teacher is empty; set --config.train.teacher=WORKDIR or '
          f'--config.{name}=0'
        )
  elif not any(others.values()) and (
    train.distill == 'none' or not train.distill_weight
  ):
    raise ConfigError(
      f'train.teacher={train.teacher!r} would have no effect: train.distill is '
      f'{train.distill!r} with weight {train.distill_weight:g}, and '
      'train.feature_weight and quant.dgd are 0; set one of them or leave the '
      'teacher out'
    )


def _listed(names: list[str]) -> str:
  *most, last = names
  return f'{", ".join(most)} or {last}' if most else last
