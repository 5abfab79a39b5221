"""Optimizers, learning-rate schedules and weight decay by rule."""

from typing import Any

import jax
import optax

from qvit_jax import rules, tree
from qvit_jax.errors import ConfigError
from qvit_jax.training import loss_scale


def warmup_steps(config, total: int, per_epoch: int) -> int:
  """Returns the updates of the warm-up.

  `optim.warmup_epochs` shrinks with the training where `train.steps` cuts a
  run of `train.epochs` short.

  Args:
    config: A whole config.
    total: Updates of the run.
    per_epoch: Updates of a pass over the training split.

  Raises:
    ConfigError: The warm-up would fill the whole training.
  """
  optim, train = config.optim, config.train
  field, steps = 'steps', optim.warmup_steps
  if not steps:
    field, steps = 'epochs', round(optim.warmup_epochs * per_epoch)
    if train.steps and train.epochs > optim.warmup_epochs:
      steps = min(steps, round(total * optim.warmup_epochs / train.epochs))
  if steps and steps >= total:
    raise ConfigError(
      f'optim.warmup_{field}={optim[f"warmup_{field}"]} makes {steps} warm-up '
      f'steps, not less than the {total} of the training; lower it or train '
      'longer'
    )
  return steps


def make_schedule(config, total: int, warmup: int) -> optax.Schedule:
  """Returns the learning rate as a function of the updates done before.

  Linear from `warmup_from` to `lr`, then by `optim.schedule` to `end_lr`.
  """
  optim = config.optim
  after = {
    'constant': lambda: optax.constant_schedule(optim.lr),
    'linear': lambda: optax.linear_schedule(
      optim.lr, optim.end_lr, total - warmup
    ),
    'cosine': lambda: optax.cosine_decay_schedule(
      optim.lr, total - warmup, alpha=optim.end_lr / optim.lr
    ),
  }[optim.schedule]()
  if not warmup:
    return after
  rise = optax.linear_schedule(optim.warmup_from, optim.lr, warmup)
  return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
  config, schedule: optax.Schedule, trainable: Any
) -> optax.GradientTransformation:
  """Returns the transformation that `config.optim` describes.

  Args:
    config: A whole config.
    schedule: The learning rate.
    trainable: Shapes of the collections that get gradients.

  Raises:
    RuleError: A pattern of `optim.decay_rules` matches no parameter.
  """
  optim = config.optim
  decay = optim.weight_decay
  mask = jax.tree.map(lambda _: False, trainable)
  if decay:
    flat = tree.flatten(trainable)
    decays = rules.match(
        [(pattern, True) for pattern in optim.decay_rules], flat,
        field='optim.decay_rules',
    )  # fmt: skip
    mask = tree.unflatten(
      {p: p in decays and not p.startswith('quant/') for p in flat}, trainable
    )
  moments = dict(b1=optim.b1, b2=optim.b2, weight_decay=decay, mask=mask)
  if optim.name == 'adamw':
    update = optax.adamw(schedule, **moments)
  elif optim.name == 'lamb':
    update = optax.lamb(schedule, **moments)
  else:
    direction = {
      'sgd': lambda: optax.trace(optim.momentum),
      # Shazeer & Stern 2018, arXiv:1804.04235, with the learning rate given
      # from outside; optax.adafactor would not scale its decay by the rate.
      'adafactor': lambda: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
      ),
    }[optim.name]()
    parts = [direction, optax.add_decayed_weights(decay, mask)]
    if optim.name == 'sgd':
      parts.reverse()  # classic L2: the decay enters the momentum
    update = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
  if optim.quant_lr and 'quant' in trainable:
    # On the same schedule, and in shares of each array's own size: a step of a
    # kernel is a hundredth of one of activations. Those of LAMB are such.
    faster = optax.scale(optim.quant_lr / optim.lr)
    if optim.name != 'lamb':
      faster = optax.chain(optax.scale_by_param_block_rms(), faster)
    update = optax.chain(
      update,
      optax.masked(faster, {name: name == 'quant' for name in trainable}),
    )
  if optim.clip_norm:
    update = optax.chain(optax.clip_by_global_norm(optim.clip_norm), update)
  if config.model.dtype != 'float16':
    return update
  return loss_scale.dynamic(
    update, initial=optim.loss_scale, growth=optim.loss_scale_growth
  )
