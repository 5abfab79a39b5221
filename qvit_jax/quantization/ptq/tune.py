"""Fits what a packed model leaves in float to the float model's logits.

Codes stay as they are; norms, biases, LayerScale, tokens and positions move,
and so do the scales of kernels and of static activations. Nothing is added to
the model, and no label is used.

Source: the idea of tuning norms after quantization: Frumkin et al. 2023,
arXiv:2308.10814, and Ghaffari et al. 2025, arXiv:2508.20293. Tuning the scales
with them and mixing pairs of calibration images is ours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from qvit_jax import tree
from qvit_jax.ops import FloatCore, Ops
from qvit_jax.quantization.finite import check_finite, check_learned
from qvit_jax.quantization.packed import Packed

_BATCH = 32


def divergence(
  teacher: Float[Array, 'b classes'], logits: Float[Array, 'b classes']
) -> Float[Array, '']:
  """Returns the mean KL(softmax(teacher) || softmax(logits)) in nats."""
  wanted = jax.nn.log_softmax(teacher)
  found = jax.nn.log_softmax(logits)
  return (jnp.exp(wanted) * (wanted - found)).sum(axis=-1).mean()


def _is_scale(path) -> bool:
  """Whether a leaf of `quant` is a scale: of a QTensor, or of activations."""
  return str(path[-1]).strip(".[]'").endswith('scale')


def _movable(variables: dict[str, Any]) -> list[bool]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
  return [path[0].key == 'params' or _is_scale(path) for path, _ in leaves]


def _moved(variables: dict[str, Any], moves: Sequence[Any]) -> dict[str, Any]:
  """Returns variables shifted (parameters) or stretched (scales) by moves."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(variables)
  left = iter(moves)
  new = []
  for (path, x), moves_too in zip(leaves, _movable(variables), strict=True):
    if moves_too:
      by = next(left)
      x = x + by if path[0].key == 'params' else x * jnp.exp(by)
    new.append(x)
  return jax.tree.unflatten(treedef, new)


def tune(
  build: Callable[[Ops], Any],
  packed: Packed,
  teacher: dict[str, Any],
  images: Float[np.ndarray, 'm h w c'],
  *,
  steps: int,
  lr: float = 1e-3,
  seed: int = 0,
  progress: Callable[[str], None] = lambda text: None,
) -> Packed:
  """Returns the packed model with what is float in it fitted.

  Args:
    build: Ops -> model.
    packed: Of IntegerCore.
    teacher: Variables of the float model.
    images: Calibration images, prepared.
    steps: Updates of Adam on 32 images each, mirrored and mixed at random.
    lr: The first one's learning rate; it falls to 0 by a cosine.
    seed: Of the choice of images.
    progress: Called with a line now and then.

  Raises:
    QuantError: What was fitted is not finite.
  """
  core: Any = packed.ops.core
  soft = build(Ops(core=dataclasses.replace(core, is_exact=False)))
  plain = build(Ops(core=FloatCore()))
  chain = optax.adam(optax.cosine_decay_schedule(lr, steps))

  @jax.jit
  def step(moves, memory, variables, teacher, batch):
    wanted = plain.apply(teacher, batch)

    def loss(moves):
      return divergence(wanted, soft.apply(_moved(variables, moves), batch))

    value, grads = jax.value_and_grad(loss)(moves)
    updates, memory = chain.update(grads, memory)
    return optax.apply_updates(moves, updates), memory, value

  leaves = jax.tree.leaves(packed.variables)
  moves = [
    jnp.zeros(x.shape)
    for x, moves_too in zip(leaves, _movable(packed.variables), strict=True)
    if moves_too
  ]
  memory = chain.init(moves)
  rng = np.random.default_rng(seed)
  losses = []
  for number in range(1, steps + 1):
    batch = _draw(images, rng)
    moves, memory, value = step(moves, memory, packed.variables, teacher, batch)
    losses.append(float(value))
    if number % max(1, steps // 4) == 0:
      recent = np.mean(losses[-max(1, steps // 4) :])
      progress(f'tune: step {number}/{steps}, divergence {recent:.4f} nats')
  variables = jax.jit(_moved)(packed.variables, moves)
  check_finite(tree.flatten(variables['params']))
  check_learned(tree.flatten(variables['quant']))
  return dataclasses.replace(packed, variables=variables)


def _draw(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns a batch: half of it mirrored, half of it mixed with another."""
  count = min(_BATCH, len(images))
  batch = images[rng.choice(len(images), count, replace=False)]
  other = images[rng.choice(len(images), count, replace=False)]
  each = (count, 1, 1, 1)
  batch = np.where(rng.random(each) < 0.5, batch[:, :, ::-1], batch)
  share = rng.random(each) * (rng.random(each) < 0.5)
  return np.float32((1 - share) * batch + share * other)
