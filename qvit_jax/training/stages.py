"""Stages of a training: what is rounded and what is trained when.

A stage is a part of the updates with a compiled step of its own. The learning
rate, the optimizer's state and the averages go on through all of them.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qvit_jax import tree
from qvit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a stage does.

  Attributes:
    text: The same in words.
    operand: 'weights' or 'acts': only these are quantized; '': what the plan
      says.
    trains: Regex of the paths that are updated.
    freezes: Whether weights far from a rounding boundary are held.
    holds: Whether collections that change without gradients are held.
  """

  text: str
  operand: str = ''
  trains: str = ''
  freezes: bool = False
  holds: bool = False


KINDS = {
  'all': Kind('bits as planned, everything is trained'),
  # The first stage of GPLQ: Liang et al. 2025, arXiv:2506.11784. Differs: the
  # loss is that of the run, and the steps of activations are the recipe's;
  # those of kernels wait as they were fitted to the first kernels.
  'acts': Kind('kernels in float', operand='acts'),
  'weights': Kind('activations in float', operand='weights'),
  # The last components of a path: of a norm, a bias, LayerScale.
  'norms': Kind(
    'kernels and embeddings stay as they are',
    trains=r'^(?!params/|lora/)|/(scale[12]?|bias)$',
  ),
  # The annealing of OFQ: Liu et al. 2023, arXiv:2302.02210.
  'freeze': Kind(
    'weights farther than quant.freeze from a rounding boundary are held',
    freezes=True,
  ),
  # For the last part, where the noise of batches is in the way of codes that
  # have to settle: Krishnamoorthi 2018, arXiv:1806.08342 ("freezing").
  'held': Kind('statistics of norms stay as they are', holds=True),
}


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the updates.

  Attributes:
    name: A key of KINDS.
    first: Its first update, counted from 1.
    last: Its last update.
    place: Which of how many it is, counted from 1.
  """

  name: str
  first: int
  last: int
  place: tuple[int, int]

  @property
  def line(self) -> str:
    """One line: which stage begins and what it does."""
    number, count = self.place
    return (
      f'stage {number}/{count} {self.name}: steps {self.first} to {self.last}, '
      f'{KINDS[self.name].text}'
    )

  def __str__(self) -> str:
    return f'{self.name} {self.first}-{self.last}'


def resolve(stages: Any, total: int) -> tuple[Stage, ...]:
  """Returns the stages of `train.stages` with their updates, in order.

  Args:
    stages: 'NAME:SHARE' strings or (name, share) pairs; () is one stage 'all'.
    total: Updates of the whole run.

  Raises:
    ConfigError: A stage is unknown or malformed or has no update, or the
      shares do not sum to 1.
  """
  named = [_parse(stage, i) for i, stage in enumerate(stages or ('all:1',))]
  share = math.fsum(share for _, share in named)
  if not math.isclose(share, 1, abs_tol=1e-6):
    raise ConfigError(
      f'the shares of train.stages sum to {share:g}, not to 1; change them'
    )
  found, done, before = [], 0, 0.0
  for i, (name, share) in enumerate(named):
    before += share
    last = total if i == len(named) - 1 else round(total * before)
    if last <= done:
      raise ConfigError(
        f'train.stages[{i}]={name!r} has no update: the share {share:g} of '
        f'{total} steps is too small; raise it or train longer'
      )
    found.append(Stage(name, done + 1, last, (i + 1, len(named))))
    done = last
  return tuple(found)


def _parse(stage: Any, i: int) -> tuple[str, float]:
  try:
    name, share = stage.split(':') if isinstance(stage, str) else stage
    share = float(share)
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f"train.stages[{i}]={stage!r} is no stage; write 'NAME:SHARE' or "
      "(name, share), such as 'acts:0.3'"
    ) from error
  if name not in KINDS:
    raise ConfigError(
      f'train.stages[{i}] is named {name!r}; allowed: {", ".join(KINDS)}'
    )
  if not 0 < share <= 1:
    raise ConfigError(
      f'train.stages[{i}] has the share {share:g}; give a number above 0 and '
      'at most 1'
    )
  return name, share


def check(
  stages: Iterable[Stage],
  trainable: Any,
  specs: Sequence[Any],
  changing: Sequence[str] = (),
) -> None:
  """Checks that each stage has something to do.

  Args:
    stages: All of a run.
    trainable: Shapes of the collections that get gradients.
    specs: Bits of every product, as attributes `weights` and `acts`.
    changing: Collections that the model changes in training.

  Raises:
    ConfigError: A stage would train nothing, quantize nothing or hold nothing.
  """
  for stage in stages:
    field = f'train.stages[{stage.place[0] - 1}]={stage.name!r}'
    operand = KINDS[stage.name].operand
    if operand and not any(getattr(spec, operand) for spec in specs):
      kind = {'acts': 'activations', 'weights': 'kernels'}[operand]
      raise ConfigError(
        f'{field} quantizes {kind} alone, but no product has bits for them; '
        "set --config.quant.recipe=aqt and a spec such as 'w4a4', or leave the "
        'stage out'
      )
    if KINDS[stage.name].holds and not changing:
      raise ConfigError(
        f'{field} would have no effect: no norm of this training has '
        'statistics that change; leave the stage out'
      )
    if len(frozen(stage.name, trainable)) == len(tree.flatten(trainable)):
      raise ConfigError(
        f'{field} trains nothing: {", ".join(trainable)} (train.trainable) '
        f'hold none of its arrays ({KINDS[stage.name].text}); name another '
        'collection or leave the stage out'
      )


def frozen(name: str, trainable: Any) -> frozenset[str]:
  """Returns the paths of trainable arrays that a stage leaves as they are."""
  pattern = re.compile(KINDS[name].trains)
  return frozenset(p for p in tree.flatten(trainable) if not pattern.search(p))


def stop_gradients(
  apply: Callable[..., Any], paths: frozenset[str]
) -> Callable[..., Any]:
  """Returns `apply` whose first argument gets no gradient at these paths."""
  if not paths:
    return apply

  def stopped(variables, *args, **kwargs):
    flat = {
      path: jax.lax.stop_gradient(x) if path in paths else x
      for path, x in tree.flatten(variables).items()
    }
    return apply(tree.unflatten(flat, variables), *args, **kwargs)

  return stopped


def hold(
  tx: optax.GradientTransformation, paths: frozenset[str]
) -> optax.GradientTransformation:
  """Returns `tx` that moves neither these arrays nor their moments.

  The state keeps its structure, so that it goes from stage to stage.
  """
  if not paths:
    return tx
  ends = tuple(f'/{path}' for path in paths)

  def update(grads, state, params=None):
    updates, after = tx.update(grads, state, params)
    # x + 0.0 would turn -0.0 into 0.0; x + -0.0 keeps every bit.
    still = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
    updates = _mix(still, updates, lambda path: path in paths)
    return updates, _mix(state, after, lambda path: path.endswith(ends))

  return optax.GradientTransformation(tx.init, update)


Masks = Callable[[Any], dict[str, jax.Array]]


def stop_elements(
  apply: Callable[..., Any], movable: Masks
) -> Callable[..., Any]:
  """Returns `apply` whose first argument gets gradients where it may move.

  Args:
    apply: (variables, ...) -> anything.
    movable: variables -> {path: mask of what may move}; other paths may.
  """

  def stopped(variables, *args, **kwargs):
    flat = tree.flatten(variables)
    for path, mask in movable(variables).items():
      still = jax.lax.stop_gradient(flat[path])
      flat[path] = jnp.where(mask, flat[path], still)
    return apply(tree.unflatten(flat, variables), *args, **kwargs)

  return stopped


def hold_elements(
  tx: optax.GradientTransformation, movable: Masks
) -> optax.GradientTransformation:
  """Returns `tx` that moves nothing else, by moments or decay neither.

  Args:
    tx: The optimizer; moments go on with the gradients that it is given.
    movable: See `stop_elements`; it is asked anew at each update.
  """

  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    flat = tree.flatten(updates)
    for path, mask in movable(params).items():
      flat[path] = jnp.where(mask, flat[path], -0.0)  # see `hold`
    return tree.unflatten(flat, updates), state

  return optax.GradientTransformation(tx.init, update)


def _mix(old: Any, new: Any, holds: Callable[[str], bool]) -> Any:
  """Returns `new` with the leaves of `old` where a path holds."""
  before = tree.flatten(old)
  mixed = {
    path: before[path] if holds(path) else leaf
    for path, leaf in tree.flatten(new).items()
  }
  return tree.unflatten(mixed, new)
