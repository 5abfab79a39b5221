"""One update as one jitted function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qvit_jax import tree
from qvit_jax.training import loss_scale, losses
from qvit_jax.training.state import (
  TrainState,
  join_collections,
  split_collections,
)

# Order of the numbers that a step reports; those of a teacher and of a penalty
# come after them.
TICK = ('loss', 'top1', 'grad_norm')
# What follows them under loss scaling: the scale of the next update, and
# whether this one was skipped.
SCALING = ('loss_scale', 'skipped')


def _accumulated(gradient: Callable, parts: int) -> Callable:
  """Returns the gradient of the mean loss, taken over slices of the batch."""
  if parts == 1:
    return gradient

  def slices(x):
    # Every slice takes each parts-th image, so that it stays spread over all
    # devices.
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

  def accumulated(trained, fixed, images, labels, key):
    frozen, given, moving = fixed

    def one(moving, *part):
      (loss, (numbers, moving)), grads = gradient(
        trained, (frozen, given, moving), *part
      )
      return (loss, numbers, grads), moving

    def body(carry, part):
      total, moving = carry
      found, moving = one(moving, *part)
      total = jax.tree.map(lambda a, b: a + b / parts, total, found)
      return (total, moving), None

    inputs = (slices(images), slices(labels), jax.random.split(key, parts))
    shapes, _ = jax.eval_shape(one, moving, *(x[0] for x in inputs))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # What the model changes goes from slice to slice, as from step to step.
    carry, _ = jax.lax.scan(body, (zero, moving), inputs)
    (loss, numbers, grads), moving = carry
    return (loss, (numbers, moving)), grads

  return accumulated


def _beside_params(variables: Any) -> dict[str, Any]:
  return {name: x for name, x in variables.items() if name != 'params'}


def learned_paths(trained: Any) -> tuple[str, ...]:
  """Returns the paths of what is trained beside parameters, as counted."""
  return tuple(tree.flatten(_beside_params(trained)))


def make_train_step(
  *,
  apply: Callable[..., jax.Array],
  tx: optax.GradientTransformation,
  gather: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
  prepare: Callable[[jax.Array, jax.Array, jax.Array], tuple],
  batch_sharding: Any,
  train: Any,
  seed: int,
  teacher: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]] | None = None,
  penalty: tuple[float, Callable[[Any], jax.Array]] | None = None,
  changing: tuple[str, ...] = (),
) -> Callable[..., tuple[TrainState, jax.Array]]:
  """Returns step(state, source, batch, given) -> (next state, tick).

  Args:
    apply: `model.apply`; what it returns beside logits has what the teacher
      wants to see of the model, where there is one.
    tx: The optimizer of the trainable collections.
    gather: Makes uint8 images and labels of (source, batch).
    prepare: Makes augmented images and targets of (key, images, labels).
    batch_sharding: Where the images of a batch lie.
    train: `config.train`.
    seed: Of augmentation and dropout, together with the step.
    teacher: Makes (loss, its parts) of (given, images, logits, what was seen,
      loss of the labels). `given` are the teacher's own arrays, an argument of
      the step, so that they are not compiled into it.
    penalty: (weight, function of the variables) of a term of the loss.
    changing: Collections that the model changes as it sees a batch; they get
      no gradient.

  Returns:
    The function; its tick is float32: the mean loss and top-1 of the batch, the
    norm of the gradient before clipping, the parts of the teacher's loss, the
    penalty without its weight, SCALING where the state is one of `loss_scale`,
    and, where more than parameters is trained, `tree.first_not_finite` of the
    rest (`learned_paths` names it) after the update.
  """
  loss_of = _loss_function(apply, prepare, train, teacher, penalty, changing)

  def step(state: TrainState, source: Any, batch: Any, given: Any = None):
    number = state.step + 1
    key = jax.random.fold_in(jax.random.key(seed), number)
    images, labels = jax.lax.with_sharding_constraint(
      gather(source, batch), batch_sharding
    )
    trained, frozen = split_collections(state.variables, train.trainable)
    moving = {name: frozen.pop(name) for name in changing}
    gradient = _accumulated(
      loss_scale.value_and_grad(loss_of, state.opt_state), train.accumulate
    )
    (loss, ((top1, parts), moved)), grads = gradient(
      trained, (frozen, given, moving), images, labels, key
    )
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    before, trained = (trained, moving), optax.apply_updates(trained, updates)
    ema = state.ema
    if train.ema_decay:
      # Young averages follow faster, or the random init would linger.
      decay = jnp.minimum(train.ema_decay, number / (number + 9))
      # A stage may hold what others change.
      beside = {n: (frozen | moved)[n] for n in ema if n not in trained}
      ema = jax.tree.map(
        lambda a, b: a + (b - a) * (1 - decay), ema, trained | beside
      )
    tick = [loss, top1, optax.global_norm(grads), *parts]
    if isinstance(opt_state, loss_scale.ScaledState):
      finite = loss_scale.all_finite(grads)
      (trained, moved), ema = loss_scale.select(
        finite, ((trained, moved), ema), (before, state.ema)
      )
      tick += [opt_state.scale, 1 - finite]
    if learned := _beside_params(trained):
      tick.append(tree.first_not_finite(learned))
    variables = join_collections(frozen | moved, trained)
    state = TrainState(number, variables, opt_state, ema)
    return state, jnp.stack(tick).astype(jnp.float32)

  return step


def _loss_function(apply, prepare, train, teacher, penalty, changing):
  """Returns the loss of a batch, and what the model changed.

  It is (trained, (frozen, given, moving), images, labels, key) -> (loss,
  ((top1, parts), moved)).
  """

  def loss_of(trained, fixed, images, labels, key):
    frozen, given, moving = fixed
    augment_key, dropout_key, rounding_key = jax.random.split(key, 3)
    x, targets = prepare(augment_key, images, labels)
    variables = join_collections(frozen | moving, trained)
    logits, seen = apply(
      variables,
      x,
      train=True,
      rngs={'dropout': dropout_key, 'rounding': rounding_key},
      mutable=[*changing],
    )
    moved = {name: seen[name] for name in changing}
    loss = losses.cross_entropy(logits, targets, train.label_smoothing)
    parts: tuple[jax.Array, ...] = ()
    if teacher:
      loss, parts = teacher(given, x, logits, seen, loss)
    if penalty:
      weight, of_variables = penalty
      parts = (*parts, of_variables(variables))
      loss = loss + weight * parts[-1]
    return loss, ((losses.top1(logits, targets), parts), moved)

  return loss_of
