"""What a file tells of its model: by names, shapes and what lies beside it.

`tell` says it in the fields of a config, each with the place where it stands.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qvit_jax.errors import WeightsError
from qvit_jax.store.entries import Source, printable
from qvit_jax.weights import positions, timm_names, unneeded
from qvit_jax.weights.keymap import Names, as_tokens, patch_shape
from qvit_jax.weights.layout import Row

_BLOCK = 'encoder/block_00/'
_STEM = 'patch_embed/kernel'
_RESIZES = ('bicubic', 'bilinear')  # that `data.resize` can be
_LAYER_SCALE = 1e-5  # it is replaced by the file's


@dataclasses.dataclass(frozen=True)
class Told:
  """A value for a field.

  Attributes:
    value: Of the field.
    place: Where it stands, or why it is assumed.
    is_sure: Whether the file says so; else a config may say otherwise.
  """

  value: Any
  place: str
  is_sure: bool = True


def complete_facts(source: Source, names: Names) -> None:
  """Adds to the facts of a file what its names and its layout tell.

  Args:
    source: The file; its facts and places are changed.
    names: Its names as a layout.
  """
  facts, ours = source.facts, names.ours

  def add(name: str, value: Any, place: str) -> None:
    if name not in facts:
      facts[name] = value
      source.places[name] = place

  if f'{_BLOCK}mlp/gate/kernel' in ours:
    facts.pop('activation', None)
    add('activation', 'swiglu', 'two layers before the second of the MLP')
  usual = names.layout.norm_eps
  if 'pre_norm/scale' in ours:
    usual = names.layout.pre_norm_eps
  if usual is not None:
    add('norm_eps', usual, f'usual of {names.layout.title}')
  bias = ours.get(f'{_BLOCK}attn/query/bias')
  if bias and bias[0].kind == 'same':  # its axes are ours: heads, channels
    shape = source.entries[bias[1]].shape
    if len(shape) == 2:  # else refused later
      add('heads', shape[0], f'{bias[1]} {list(shape)}')
  stem = stem_shape(source, ours)
  if 'architecture' in facts and 'width' not in facts and stem:
    count = timm_names.heads(facts['architecture'], stem[-1])
    if count:
      place = f'architecture={facts["architecture"]!r} of config.json'
      add('heads', count, place)
  if names.layout.is_dinov3:
    add('position', 'rope', f'the {names.layout.title} layout')
  if names.layout.optional and 'head/kernel' in ours:
    return  # which of the poolings it reads only a config.json tells
  if 'pool_norm/scale' in ours:
    add('pool', 'mean', ours['pool_norm/scale'][1])
  if 'pool/probe' in ours:
    add('pool', 'attention', ours['pool/probe'][1])
  if facts.get('pool') == 'mean' and 'cls' in ours:
    facts['pool'] = 'patch_mean'


def stem_shape(
  source: Source, ours: Mapping[str, tuple[Row, str]]
) -> tuple[int, ...]:
  """Returns [p, p, c, d] of a file's patch embedding; () where it is not so."""
  if _STEM not in ours:
    return ()
  row, name = ours[_STEM]
  shape = source.entries[name].shape
  return patch_shape(row, shape) if len(shape) == 4 else ()


def head_classes(
  source: Source, ours: Mapping[str, tuple[Row, str]]
) -> int | None:
  """Returns the classes of the file's head; None where no shape tells."""
  if 'head/bias' in ours:
    return math.prod(source.entries[ours['head/bias'][1]].shape)
  if 'head/kernel' not in ours:
    return None
  row, name = ours['head/kernel']
  shape = source.entries[name].shape
  return shape[row.kind == 'same'] if len(shape) == 2 else None


def tell(source: Source, names: Names) -> dict[str, Told]:
  """Returns {'section.field': what the file tells of it}.

  What nothing tells is not in it: `model.heads`, `model.image_size` or, of a
  file without a head, `model.num_classes`.

  Args:
    source: The file.
    names: Its names as a layout of vision transformers.

  Raises:
    WeightsError: Shapes are not those of such a model.
  """
  if _STEM not in names.ours:
    raise WeightsError(
      f'weights {printable(source.title)} have the {names.title} layout, which '
      "is of no vision transformer, and model.size='auto' reads those alone; "
      'set --config.model.name= and --config.model.size= to theirs'
    )
  names = unneeded.with_gate(source, names)
  is_usual = 'norm_eps' not in source.facts
  complete_facts(source, names)
  facts, places, ours = source.facts, source.places, names.ours
  stem = stem_shape(source, ours)
  if not stem or 0 in stem or stem[0] != stem[1]:
    raise WeightsError(
      f'weights {printable(source.title)}: the patch embedding '
      f'{ours[_STEM][1]} has the shape '
      f'{list(source.entries[ours[_STEM][1]].shape)}, which is no square patch '
      'of 4 axes; give other weights'
    )

  def shape(name: str) -> tuple[int, ...]:
    if name not in ours:
      return ()
    row, theirs = ours[name]
    return as_tokens(row, source.entries[theirs].shape)

  def stands(name: str) -> str:
    return f'{ours[name][1]} {list(shape(name))}'

  unneeded.check_told(source, names, stem[-1])
  told = {
    'model.patch': Told(stem[0], stands(_STEM)),
    'model.width': Told(stem[-1], stands(_STEM)),
    'model.depth': Told(names.depth, f'blocks 0 to {names.depth - 1}'),
  }
  hidden = f'{_BLOCK}mlp/fc1/kernel'
  if len(shape(hidden)) == 2:
    row = ours[hidden][0]
    axis = 1 if row.kind == 'same' else 0
    parts = row.parts if row.part is not None else 1
    told['model.mlp_dim'] = Told(shape(hidden)[axis] // parts, stands(hidden))
  registers = math.prod(shape('registers') or (0,)) // stem[-1]
  for field, value, name in (
    ('registers', registers, 'registers'),
    ('norm_after_pool', True, 'pool_norm/scale'),
    ('pre_norm', True, 'pre_norm/scale'),
    ('qk_norm', True, f'{_BLOCK}attn/query_norm/scale'),
    ('layer_scale', _LAYER_SCALE, f'{_BLOCK}scale1'),
  ):
    told[f'model.{field}'] = (
      Told(value, stands(name))
      if name in ours
      else Told(type(value)(0), 'no such tensor')
    )
  told['model.last_norm'] = _last_norm(source, names)
  told |= _pool(source, names, stem[-1])
  told |= _image_size(source, names, stem, registers)
  if 'activation' in facts:
    told['model.activation'] = Told(facts['activation'], places['activation'])
  else:
    told['model.activation'] = Told('gelu', 'assumed, nothing tells it', False)
  if 'pos_embed' in ours:
    told['model.position'] = Told('learned', stands('pos_embed'))
  elif not names.layout.has_positions:
    place = 'no positions among the tensors'
    told['model.position'] = Told('rope', place)
  for name in ('norm_eps', 'heads', 'position'):
    if name in facts:
      is_sure = name != 'norm_eps' or not is_usual
      told[f'model.{name}'] = Told(facts[name], places[name], is_sure)
  for name in ('mean', 'std'):
    if name in facts:
      told[f'data.{name}'] = Told(tuple(facts[name]), places[name])
  if how := facts.get('resize'):
    place = places['resize']
    told['data.resize'] = Told(how, place)
    if how not in _RESIZES:
      place = f'in place of {how!r} of {place}, which is not known here'
      told['data.resize'] = Told(_RESIZES[0], place, False)
  if classes := head_classes(source, ours):
    name = 'head/bias' if 'head/bias' in ours else 'head/kernel'
    told['model.num_classes'] = Told(classes, stands(name))
  return told


def _reads_early(names: Names) -> bool:
  """Returns whether a head reads tokens before the last norm, in its class."""
  return bool(names.layout.normless) and 'head/kernel' in names.ours


def _last_norm(source: Source, names: Names) -> Told:
  """Returns what is told of `model.last_norm`."""
  if 'last_norm' in source.facts:
    return Told(source.facts['last_norm'], source.places['last_norm'])
  if _reads_early(names):
    return Told(False, 'assumed of a file with a head', False)
  for name in ('encoder/norm/scale', 'pool_norm/scale'):
    if name in names.ours:
      return Told(True, names.ours[name][1])
  return Told(False, 'no such tensor')


def _pool(source: Source, names: Names, width: int) -> dict[str, Told]:
  """Returns what is told of `model.pool`."""
  facts, ours = source.facts, names.ours
  pool = facts.get('pool')
  if pool is not None:
    place = source.places['pool']
    if place == ours.get('pool_norm/scale', ('', ''))[1]:
      return {'model.pool': Told(pool, f'assumed behind {place}', False)}
    return {'model.pool': Told(pool, place)}
  if _reads_early(names):
    early = names.layout.normless[0]
    return {'model.pool': Told(early, 'assumed of a file with a head', False)}
  if 'cls' not in ours:
    return {'model.pool': Told('mean', 'there is no class token')}
  if 'head/kernel' in ours:
    row, name = ours['head/kernel']
    shape = source.entries[name].shape
    if len(shape) == 2 and shape[row.kind != 'same'] == 2 * width:
      return {'model.pool': Told('token_mean', f'{name} {list(shape)}')}
  place = ours['cls'][1]
  if len(names.layout.pools) > 1:
    place = f'assumed, there is {place}'
  return {'model.pool': Told('token', place, False)}


def _image_size(
  source: Source, names: Names, stem: tuple[int, ...], registers: int
) -> dict[str, Told]:
  """Returns what is told of `model.image_size`: a multiple of the patch."""
  patch, told = stem[0], source.facts.get('image_size')
  sides = told if isinstance(told, list) else [told or 0] * 2
  if min(sides) >= patch:
    place = source.places['image_size']
    if sides[0] != sides[1]:
      place += f' says {sides[0]} x {sides[1]}; the shorter side counts'
    size = int(min(sides)) // patch * patch
  elif 'pos_embed' in names.ours:
    name = names.ours['pos_embed'][1]
    shape = source.entries[name].shape
    before = positions.Tokens('cls' in names.ours, registers)
    slots = positions.find_slots(
      math.prod(shape) // stem[-1], before, names.layout.slots, None
    )
    size = slots.grid[0] * patch if slots else 0
    place = f'{name} {list(shape)}'
  else:
    return {}
  return {'model.image_size': Told(size, place)} if size else {}
