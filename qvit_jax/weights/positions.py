"""Puts the positions of a file into the places of our tokens and patches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qvit_jax.weights import adapt

Grid = tuple[int, int]  # patches from top to bottom, from left to right


@dataclasses.dataclass(frozen=True)
class Tokens:
  """What stands before the patches.

  Attributes:
    cls: Whether there is a class token.
    registers: How many others there are.
  """

  cls: bool
  registers: int


@dataclasses.dataclass(frozen=True)
class Slots:
  """What the positions of a file are of.

  Attributes:
    grid: The patches.
    count: Positions before those of the patches.
    kind: Which tokens have them; as `KeyMap.slots`.
  """

  grid: Grid
  count: int
  kind: str


def find_slots(
  positions: int, tokens: Tokens, kinds: Sequence[str], told: Grid | None
) -> Slots | None:
  """Returns what a number of positions means, or None where it fits nothing.

  With k tokens before the patches, k of the positions are theirs, or one, or
  none; what remains is the grid that was told, else a perfect square.

  Args:
    positions: How many the file has.
    tokens: Of the file's model.
    kinds: Which tokens may have positions, the likeliest first.
    told: The grid by image and patch size, if these are known.
  """
  if not tokens.registers:  # what registers lack is no likelier then
    kinds = ('all', *(kind for kind in kinds if kind != 'all'))
  counts = {
    'all': tokens.cls + tokens.registers,
    'class': int(tokens.cls),
    'grid': 0,
  }
  if told:
    for kind in kinds:
      if math.prod(told) + counts[kind] == positions:
        return Slots(told, counts[kind], kind)
    if told[0] != told[1]:
      return None
  for kind in kinds:
    side = math.isqrt(max(0, positions - counts[kind]))
    if side and side * side + counts[kind] == positions:
      return Slots((side, side), counts[kind], kind)
  return None


def grid_of(facts: dict[str, Any]) -> Grid | None:
  """Returns the grid by `image_size` and `patch`, numbers or pairs of them."""
  sides = []
  for name in ('image_size', 'patch'):
    value = facts.get(name)
    sides.append(value if isinstance(value, list) else [value, value])
  if None in (*sides[0], *sides[1]):
    return None
  rows, columns = (int(a // b) for a, b in zip(*sides, strict=True))
  return rows, columns


def fit_positions(
  values: Float[np.ndarray, '1 n d'],
  slots: Slots,
  there: Tokens,
  here: Tokens,
  *,
  size: int,
  method: str,
) -> tuple[Float[np.ndarray, '1 m d'], list[str]]:
  """Returns positions for the model's tokens and grid, and what was done.

  Args:
    values: Of the file.
    slots: What they are of.
    there: Tokens of the file's model.
    here: Tokens of ours.
    size: Patches on a side of ours.
    method: Key of `adapt.RESIZES`.
  """
  width, done = values.shape[-1], []
  first, grid = values[0, : slots.count], values[0, slots.count :]
  cls = first[:1] if slots.kind != 'grid' and there.cls else first[:0]
  others = first[len(cls) :]
  if here.cls and not len(cls):
    cls = np.zeros((1, width), np.float32)
    if there.cls:
      done.append('the class token without position gets zeros')
  if not here.cls and len(cls):
    cls = cls[:0]
    done.append('position of the class token dropped')
  if here.registers and not len(others):
    others = np.zeros((here.registers, width), np.float32)
    done.append('registers without positions get zeros')
  if slots.grid != (size, size):
    grid = adapt.resize_positions(
      grid.reshape(*slots.grid, width), size, method
    ).reshape(size * size, width)
    rows, columns = slots.grid
    done.append(
      f'grid {rows} x {columns} -> {size} x {size} ({adapt.RESIZES[method][1]})'
    )
  return np.concatenate([cls, others, grid])[None], done
