"""Writes our float parameters in the names and axes of others."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qvit_jax.errors import ExportError
from qvit_jax.weights.hf_config import swiglu_ratio
from qvit_jax.weights.keymap import KINDS, collapse
from qvit_jax.weights.layout import KeyMap, Row, flatten_model
from qvit_jax.weights.layouts import LAYOUTS

# Biases that some models do not have; zero everywhere, they are left out where
# the layout's library can be built without.
_OPTIONAL = re.compile(r'block_\d+/attn/(query|key|value)/bias')


def translate(
  params: Any, layout: str, pool: str = ''
) -> dict[str, np.ndarray]:
  """Returns {their name: array} of a model.

  What others may lack (positions of the class token and of registers, biases of
  queries, keys and values) is left out where it is zero and the layout allows
  it, so that an imported file becomes the same file.

  Counters of updates, of norms with statistics, are zero: they are not kept.

  Args:
    params: Our parameters, host or device arrays; or collections, with the
      statistics of norms among them.
    layout: Key of LAYOUTS, or a library's name; see `layout_of`.
    pool: `model.pool`; by default what the shapes tell, which do not tell
      'token' and 'patch_mean' apart.

  Raises:
    ExportError: The layout has no place for a parameter.
  """
  ours = {n: np.asarray(x) for n, x in flatten_model(params).items()}
  layout = layout_of(layout, ours)
  keymap = LAYOUTS[layout]
  _check_model(ours, layout, pool or _pool_of(ours))
  rows, homeless = _sort(keymap, ours)
  if homeless:
    raise ExportError(
      f'the layout {layout} has no place for {", ".join(collapse(homeless))}; '
      f'{_other_layouts(ours, pool or _pool_of(ours))}'
    )
  if 'patch_embed/bias' not in rows and 'patch_embed/bias' in ours:
    _fold_patch_bias(ours)
  ours = {name: x for name, x in ours.items() if name in rows}
  if 'pos_embed' not in ours:
    pass  # rotary positions have no parameters
  elif 'registers' in ours and keymap.slots[0] != 'all':
    _fold_positions(ours, keymap.slots[0])
  elif 'grid' in keymap.slots and 'cls' in ours:
    has_position = ours['pos_embed'][:, 0].any()
    ours['pos_embed'] = ours['pos_embed'][:, 0 if has_position else 1 :]
  parts: dict[str, list[np.ndarray]] = {}
  for name, (row, theirs) in sorted(
    rows.items(), key=lambda item: item[1][0].part or 0
  ):
    values = KINDS[row.kind].backward(ours[name])
    parts.setdefault(theirs, []).append(values)
  written = {
    name: np.ascontiguousarray(np.concatenate(values, axis=0))
    if len(values) > 1
    else np.ascontiguousarray(values[0])
    for name, values in parts.items()
  }
  written |= _constants(keymap, ours, written)
  if keymap.counters:
    written |= {
      f'{name.removesuffix("running_var")}num_batches_tracked': np.asarray(
        0, np.int64
      )
      for name in written
      if name.endswith('.running_var')
    }
  return written


def _sort(
  keymap: KeyMap, ours: dict[str, np.ndarray]
) -> tuple[dict[str, tuple[Row, str]], list[str]]:
  """Returns the places of what is written, and what has none but needs one.

  Neither is what others lack and what computes the same without it: biases that
  are zero, and the bias of patches, which goes into their positions.
  """
  left, patch = set(), 'patch_embed/bias'
  if 'pre_norm/scale' in ours and keymap.pre_norm_eps is not None:
    left.add(patch)
  biases = [name for name in ours if _OPTIONAL.search(name)]
  zeros = {n for n in (patch, *biases) if n in ours and not ours[n].any()}
  groups = [biases]
  if keymap.separate_biases:
    groups = [
      [name for name in biases if f'/{part}/' in name]
      for part in ('query', 'key', 'value')
    ]
  for group in groups:
    if not keymap.biases and zeros >= {*group}:
      left |= {*group}
  rows = _places(keymap, [name for name in ours if name not in left])
  homeless = [name for name in ours if name not in rows and name not in left]
  if keymap.key_mask:  # it would take them away
    homeless += [
      name for name in biases if '/key/' in name and name not in zeros
    ]
  return rows, [name for name in homeless if name not in zeros]


def _constants(
  keymap: KeyMap, ours: dict[str, np.ndarray], written: Iterable[str]
) -> dict[str, np.ndarray]:
  """Returns {their name: array} of what follows from the shape."""
  if not keymap.constants:
    return {}
  kernels = [name for name in ours if name.endswith('attn/query/kernel')]
  heads, dim = ours[kernels[0]].shape[1:]
  depth = len(kernels)
  found = {
    template.format(i=i): compute(heads, dim)
    for template, compute in keymap.constants
    for i in range(depth if '{i}' in template else 1)
  }
  return {
    name: x
    for name, x in found.items()
    if not name.endswith('_mask') or name.removesuffix('_mask') in written
  }


def layout_of(name: str, ours: Iterable[str]) -> str:
  """Returns the key of a library's layout that is of this kind of model.

  Args:
    name: Key of LAYOUTS: it counts, unless a layout 'NAME_...' of the same
      library is of models with such a stem and it is not.
    ours: Paths of the model's parameters.
  """
  ours = set(ours)
  fits = lambda key: LAYOUTS[key].stem in ours
  others = [key for key in LAYOUTS if key.startswith(f'{name}_') and fits(key)]
  return others[0] if others and not fits(name) else name


def _places(
  keymap: KeyMap, ours: Iterable[str]
) -> dict[str, tuple[Row, str]]:
  """Returns {our path: (row, their name)} of what the layout has places for.

  Of its kinds of models that which has places for most, and fewest in vain.
  """
  ours = list(ours)
  prefix = keymap.prefixes[0]
  if 'registers' in ours:
    prefix = keymap.register_prefix or prefix
  found = [
    (_places_in(rows, ours, prefix), -len(rows)) for _, rows in keymap.choices
  ]
  return max(found, key=lambda one: (len(one[0]), one[1]))[0]


def _places_in(
  rows: Sequence[Row], ours: list[str], prefix: str
) -> dict[str, tuple[Row, str]]:
  by_path: dict[str, Row] = {}
  for row in rows:
    by_path.setdefault(row.ours, row)
  places = {}
  for name in ours:
    found = re.search(r'block_(\d+)', name)
    number = found[1] if found else ''
    general = re.sub(r'block_\d+', 'block_{i}', name)
    if row := by_path.get(name) or by_path.get(general):
      theirs = row.theirs.replace('~', prefix)
      places[name] = row, theirs.format(i=int(number or 0))
  return places


def _pool_of(ours: dict[str, np.ndarray]) -> str:
  if 'pool/probe' in ours:
    return 'token_attention' if 'cls' in ours else 'attention'
  if 'cls' not in ours:
    return 'mean'
  width = ours['patch_embed/kernel'].shape[-1]
  return 'token' if ours['head/kernel'].shape[0] == width else 'token_mean'


def _check_model(ours: dict[str, np.ndarray], layout: str, pool: str) -> None:
  """Refuses a model that no class of the layout's library is."""
  if problems := _problems(ours, layout, pool):
    raise ExportError(
      f'no model of the layout {layout} is like this: {"; ".join(problems)}; '
      f'{_other_layouts(ours, pool)}'
    )


def _problems(ours: dict[str, np.ndarray], layout: str, pool: str) -> list[str]:
  keymap = LAYOUTS[layout]
  registers = ours['registers'].shape[1] if 'registers' in ours else 0
  problems = []
  if keymap.pools and pool not in keymap.pools:
    problems.append(f'model.pool is {pool}, not {" or ".join(keymap.pools)}')
  if keymap.registers not in (None, registers):
    problems.append(f'model.registers is {registers}, not {keymap.registers}')
  norms = ('encoder/norm/scale', 'pool_norm/scale')
  is_vit = 'patch_embed/kernel' in ours
  if is_vit and keymap.has_positions != ('pos_embed' in ours):
    here = 'learned' if 'pos_embed' in ours else 'rope'
    problems.append(f'model.position is {here}')
  has_norm = any(name in ours for name in norms)
  if pool in keymap.normless:
    if has_norm:
      problems.append(f'model.pool={pool} reads tokens before the last norm')
  elif is_vit and keymap.last_norm and not has_norm:
    problems.append('the model has no last norm')
  if keymap.has_pre_norm and 'pre_norm/scale' not in ours:
    problems.append('the model has no norm before the blocks')
  if layout == 'hf_dinov2' and 'encoder/block_00/mlp/gate/kernel' in ours:
    width, dim = ours['encoder/block_00/mlp/gate/kernel'].shape
    if not swiglu_ratio(width, dim):
      problems.append(f'model.mlp_dim is {dim}, not a multiple of 8')
  if keymap.has_scales and 'encoder/block_00/scale1' not in ours:
    problems.append('the model has no LayerScale')
  return problems


def _other_layouts(ours: dict[str, np.ndarray], pool: str) -> str:
  """Returns what to do: which layouts can hold such a model."""
  fitting = [
    layout
    for layout, keymap in LAYOUTS.items()
    if not _problems(ours, layout, pool)
    and not _sort(keymap, ours)[1]
  ]
  if fitting:
    return f'choose --config.export.layout={" or ".join(fitting)}'
  return (
    'no layout can hold it; --config.export.format=packed keeps a quantized '
    'run whole'
  )


def _fold_patch_bias(ours: dict[str, np.ndarray]) -> None:
  """Adds the bias of the patches to their positions: the layout has none."""
  bias = ours.pop('patch_embed/bias')
  if bias.any():
    first = ('cls' in ours) + (
      ours['registers'].shape[1] if 'registers' in ours else 0
    )
    positions = ours['pos_embed'].copy()
    positions[:, first:] += bias
    ours['pos_embed'] = positions


def _fold_positions(ours: dict[str, np.ndarray], slots: str) -> None:
  """Adds the positions that a layout has no slots for to their tokens."""
  count, has_cls = ours['registers'].shape[1], 'cls' in ours
  cls, registers, grid = np.split(
    ours['pos_embed'], [has_cls, has_cls + count], axis=1
  )
  ours['registers'] = ours['registers'] + registers
  if slots == 'grid':
    if has_cls:
      ours['cls'] = ours['cls'] + cls
    ours['pos_embed'] = grid
  else:
    ours['pos_embed'] = np.concatenate([cls, grid], axis=1)
