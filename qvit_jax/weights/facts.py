"""What the files beside a file of weights say of the model and its images.

Read are config.json of transformers and of timm, preprocessor_config.json or
processor_config.json, the texts in the header of safetensors and names that a
library gives its files.
What nothing here reads, but what changes predictions, becomes a note.
"""

import math
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from qvit_jax.store.entries import guarded, parse_json, printable, refuse
from qvit_jax.weights import hf_facts, origin, timm_names

_MAX_JSON = 8 * 2**20
# Names of activations.
_ACTIVATIONS = {
    'gelu': 'gelu', 'gelu_erf': 'gelu', 'nn.GELU': 'gelu', 'GELU': 'gelu',
    'gelu_tanh': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh', 'GELUTanh': 'gelu_tanh',
    'quick_gelu': 'quick_gelu', 'QuickGELU': 'quick_gelu',
    'quickgelu': 'quick_gelu', 'swiglu': 'swiglu',
}  # fmt: skip
# Their name -> ours, for whole numbers of at least 1.
_COUNTS = {
    'num_attention_heads': 'heads', 'num_heads': 'heads',
    'hidden_size': 'width', 'embed_dim': 'width',
    'num_hidden_layers': 'depth', 'depth': 'depth',
}  # fmt: skip
_SIDES = {'image_size': 'image_size', 'img_size': 'image_size',
          'patch_size': 'patch'}  # fmt: skip
# Rotary positions of timm's Eva: those of DINOv3.
_ROPE = {
    'rope_type': 'dinov3', 'rope_temperature': 100, 'rope_rotate_half': True,
    'rope_grid_offset': 0, 'rope_grid_indexing': 'ij', 'use_rot_pos_emb': True,
}  # fmt: skip
_POOLS = {'token': 'token', 'avg': 'mean', 'map': 'attention'}
_DROPOUTS = {
    'hidden_dropout_prob': 'model.dropout',
    'attention_probs_dropout_prob': 'model.attention_dropout',
    'attention_dropout': 'model.attention_dropout',
    'drop_path_rate': 'model.stochastic_depth',
}  # fmt: skip
# Of images, read by nothing here: the value that changes nothing.
_UNREAD = {
    'crop_pct': 1.0, 'crop_mode': None, 'crop_border_pixels': 0,
    'test_input_size': None, 'test_crop_pct': None, 'label_offset': 0,
    'do_resize': True, 'do_rescale': True, 'rescale_factor': 1 / 255,
    'do_center_crop': False, 'crop_size': None, 'size': None,
}  # fmt: skip
# As PIL counts.
_RESAMPLE = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')
# Above them a number is no fact.
_MOST, _MOST_PIXELS = 1e9, 2**14


def read_json(path: pathlib.Path) -> Any:
  """Returns a JSON file's value. Raises WeightsError."""
  if path.stat().st_size > _MAX_JSON:
    refuse(path, f'it is over {_MAX_JSON:,} bytes long')
  return guarded(path, lambda: parse_json(path, path.read_bytes()))


def read_facts(
  folder: pathlib.Path, path: pathlib.Path
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
  """Returns what is said beside a file, in the words of our fields.

  Args:
    folder: Where config.json, preprocessor_config.json and
      processor_config.json may lie.
    path: The weights, for messages.

  Returns:
    Any of `architecture` (timm's name), `norm_eps`, `heads`, `width`, `depth`,
    `activation`, `image_size` and `patch` (a number, or [height, width] where
    they differ), `pool` ('token', 'mean', 'patch_mean' or 'attention'),
    `last_norm`, `position`, `padding`, `batch_norm_eps`, `mean`, `std`,
    `resize`, `class_names`; where each of them stands; and other lines.

  Raises:
    WeightsError: A file is damaged, or names what a model here cannot be.
  """
  facts: dict[str, Any] = {}
  places: dict[str, str] = {}
  notes: list[str] = []

  def take(found: dict[str, Any], place: str) -> None:
    facts.update(found)
    places.update(dict.fromkeys(found, place))

  take(origin.of_name(path.name), "the file's name")
  config = _object(folder / 'config.json')
  if config:
    timm = config.get('pretrained_cfg')
    timm = timm if isinstance(timm, dict) else {}
    made = config.get('model_args')  # how the model was built: it counts
    made = made if isinstance(made, dict) else {}
    name = str(config.get('architecture', ''))[:80]
    if timm_names.is_known(name):
      take({'architecture': name}, 'config.json')
    said = hf_facts.image_tower(path, config)
    take(hf_facts.of_class(config), 'config.json')
    take(_activation(path, said, made), 'config.json')
    for part in (timm, said, made):
      found, more = _numbers(part)
      take(found, 'config.json')
      notes += _unread('config.json', part, more)
    if re.search('_dinov3|_lingbot', name):  # DINOv3's
      take({'position': 'rope'}, 'config.json')
    _check_rope(path, made)
    for part in (timm, config):  # how it pads
      take(origin.of_name(str(part.get('architecture', ''))), 'config.json')
    found, more = _images(timm or config, 'mean', 'std', 'interpolation')
    take(found, 'config.json')
    notes += _unread('config.json', {}, more)
    found, more = _pool(path, config, made)
    take(found, 'config.json')
    notes += more
    found, more = _class_names(config, timm)
    take(found, 'config.json')
    notes += more
  place = 'preprocessor_config.json'
  images = _object(folder / place)
  if not images:  # transformers 5 writes it into that of images and texts
    place = 'processor_config.json'
    images = _object(folder / place).get('image_processor')
  if images and isinstance(images, dict):
    found, more = _images(images, 'image_mean', 'image_std', 'resample')
    take(found, place)
    if images.get('do_normalize') is False:
      take({'mean': [0.0] * 3, 'std': [1.0] * 3}, place)
    notes += _unread(place, images, more)
  return facts, places, [printable(note[:300]) for note in notes]


def _object(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON file's object, {} where there is no file."""
  value = read_json(path) if path.is_file() else {}
  if not isinstance(value, dict):
    what = f'it holds {type(value).__name__} where an object is wanted'
    refuse(path, what, 'mend it or take it away')
  return value


def _activation(
  path: pathlib.Path, config: dict, made: dict
) -> dict[str, Any]:
  """Returns {'activation': ours} where something tells it, or nothing."""
  name = str(config.get('architecture', ''))[:80]
  facts = {}
  if name.startswith('vit_'):
    facts['activation'] = timm_names.activation(name)
  for where, key in ((config, 'hidden_act'), (made, 'act_layer')):
    theirs = where.get(key)
    if theirs is None:
      continue
    if str(theirs) not in _ACTIVATIONS:
      refuse(
        path,
        f'its config.json says {key}={theirs!r}; known are '
        f'{", ".join(_ACTIVATIONS)}',
        'choose other weights',
      )
    facts['activation'] = _ACTIVATIONS[str(theirs)]
  if what := timm_names.computes_otherwise(name):
    refuse(
      path,
      f'its config.json says architecture={name!r}, which has {what}; that is '
      'not supported',
      'choose other weights',
    )
  return facts


def _check_rope(path: pathlib.Path, made: dict[str, Any]) -> None:
  """Refuses rotary positions of timm that are not those of DINOv3."""
  for name, usual in _ROPE.items():
    if made.get(name, usual) != usual:
      refuse(
        path,
        f'its config.json says {name}={made[name]!r}; rotary positions with '
        f'{usual!r} are supported',
        'choose other weights',
      )


def _pool(
  path: pathlib.Path, config: dict[str, Any], made: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Returns {'pool': ours} where timm's config.json tells it, and notes."""
  theirs = made.get('global_pool', config.get('global_pool'))
  if made.get('pool_include_prefix') and theirs != 'token':
    refuse(
      path,
      'its config.json says pool_include_prefix='
      f'{made["pool_include_prefix"]!r}, to pool the tokens before the patches '
      'too; that is not supported',
      'choose other weights',
    )
  if theirs is None:
    return {}, []
  if theirs in ('max', 'avgmax', 'catavgmax'):
    refuse(
      path,
      f'its config.json says global_pool={theirs!r}, by which its head was '
      f'trained; supported are {", ".join(_POOLS)}',
      'choose other weights',
    )
  if isinstance(theirs, str) and theirs in _POOLS:
    return {'pool': _POOLS[theirs]}, []
  return {}, [f'config.json says global_pool={theirs!r}, not known here']


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and -_MOST <= value <= _MOST


def _numbers(part: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Returns what a part of a config.json tells, and what is not read."""
  facts: dict[str, Any] = {}
  size = part.get('input_size')  # timm's: channels, height, width
  if isinstance(size, list) and len(size) == 3:
    facts |= _side('image_size', size[1:])
  for theirs, ours in _SIDES.items():
    facts |= _side(ours, part.get(theirs))
  for theirs, ours in _COUNTS.items():
    value = part.get(theirs)
    if _is_number(value) and value >= 1 and value == int(value):
      facts[ours] = int(value)
  value = part.get('layer_norm_eps')
  if _is_number(value) and value > 0:
    facts['norm_eps'] = value
  read = {**_SIDES, **_COUNTS, 'layer_norm_eps': 'norm_eps'}
  odd = [name for name, ours in read.items() if ours not in facts]
  return facts, [f'{n}={part[n]!r}' for n in odd if part.get(n) is not None]


def _side(name: str, value: Any) -> dict[str, Any]:
  """Returns {name: a number, or [height, width]}, or nothing."""
  if isinstance(value, dict):
    value = [value.get('height'), value.get('width')]
  sides = value if isinstance(value, list) else [value, value]
  if len(sides) != 2 or not all(
    _is_number(x) and 0 < x <= _MOST_PIXELS for x in sides
  ):
    return {}
  return {name: sides[0] if sides[0] == sides[1] else sides}


def _images(
  config: dict[str, Any], *names: str
) -> tuple[dict[str, Any], list[str]]:
  """Returns how images were resized and normalised, and what is not read."""
  mean, std, resize = names
  facts = {}
  for ours, theirs in (('mean', mean), ('std', std)):
    value = config.get(theirs)
    if (
      isinstance(value, list)
      and len(value) == 3
      and all(map(_is_number, value))
      and (ours == 'mean' or min(value) > 0)
    ):
      facts[ours] = value
  how = config.get(resize)
  if _is_number(how) and how in range(len(_RESAMPLE)):
    how = _RESAMPLE[int(how)]
  if isinstance(how, str) and how:
    facts['resize'] = how
  theirs = dict(zip(('mean', 'std', 'resize'), names, strict=True))
  odd = [name for ours, name in theirs.items() if ours not in facts]
  return facts, [f'{n}={config[n]!r}' for n in odd if config.get(n) is not None]


def _unread(
  file: str, part: dict[str, Any], more: Sequence[str] = ()
) -> list[str]:
  """Returns a note on what changes predictions and is read by nothing here.

  Args:
    file: Where it stands.
    part: All of it.
    more: What is read elsewhere, but says nothing that can be.
  """
  said = [
    f'{name}={part[name]!r}'
    for name, usual in _UNREAD.items()
    if part.get(name) is not None and not _is_same(part[name], usual)
  ]
  said += more
  notes = []
  if said:
    notes.append(f'not read of {file}: {", ".join(said)}')
  notes += [
    f'{file} says {name}={part[name]:g}; {ours} counts here'
    for name, ours in _DROPOUTS.items()
    if _is_number(part.get(name)) and part[name]
  ]
  return notes


def _is_same(value: Any, usual: Any) -> bool:
  if _is_number(value) and _is_number(usual):
    return math.isclose(value, usual, rel_tol=1e-6)
  if isinstance(value, dict):  # a square of pixels, as `image_size` says
    sides = {str(side) for side in value.values()}
    return {*value} == {'height', 'width'} and len(sides) == 1
  return value == usual


def _class_names(
  config: dict[str, Any], timm: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Returns the names of the head's classes by label, and notes.

  Placeholders such as LABEL_3 are no names.
  """
  numbers = config.get('label2id')
  if isinstance(numbers, dict):
    numbers = {str(number): name for name, number in numbers.items()}
  said = {
    'id2label': config.get('id2label'),
    'label2id': numbers,
    'label_names': config.get('label_names') or timm.get('label_names'),
    'labels': config.get('labels') or timm.get('labels'),
  }
  for key, value in said.items():
    if not value or not isinstance(value, (dict, list)):
      continue
    names = _in_order(value)
    if names is None:
      return {}, [f'{key} of config.json does not number its names from 0']
    if all(is_placeholder(i, name) for i, name in enumerate(names)):
      continue
    return {'class_names': names}, []
  return {}, []


def _in_order(value: dict[str, Any] | list[Any]) -> list[str] | None:
  if isinstance(value, dict):
    value = {int(k): v for k, v in value.items() if re.fullmatch(r'\d{1,9}', k)}
    if sorted(value) != list(range(len(value))) or not value:
      return None
    value = [value[i] for i in range(len(value))]
  return value if all(isinstance(x, str) for x in value) else None


def is_placeholder(label: int, name: str) -> bool:
  """Returns whether a class name says no more than its label."""
  found = re.fullmatch(r'(?:label|class)?[ _-]?(\d{1,9})', name, re.IGNORECASE)
  return bool(found) and int(found[1]) == label


def order_of(
  there: Sequence[str], here: Sequence[str]
) -> tuple[list[int] | None, str]:
  """Returns which output there each label here has, and what differs.

  Names are compared without regard to case, spaces, dashes and underscores.
  Outputs of classes that the data does not have come last.

  Args:
    there: Names by label of the weights.
    here: Names by label of the data.

  Returns:
    (outputs there, '') or, where a name is not found, (None, text).
  """
  every = list(range(len(there)))
  if list(there[: len(here)]) == list(here):
    return every, ''
  theirs = [_plain(name) for name in there]
  mine = [_plain(name) for name in here]
  if {*mine} <= {*theirs} and len({*theirs}) == len(theirs):
    first = [theirs.index(name) for name in mine]
    if len({*first}) == len(first):
      return [*first, *(i for i in every if i not in {*first})], ''
  if len(there) < len(here):
    return None, f'{len(there)} classes there, {len(here)} here'
  for label, name in enumerate(here):
    if mine[label] not in theirs:
      return None, f'no class is {name!r} there (label {label} here)'
  return None, 'some names stand twice'


def is_reordered(there: Sequence[str], here: Sequence[str]) -> bool:
  """Returns whether labels mean the same classes in another order."""
  order, _ = order_of(there, here)
  return order not in (None, list(range(len(there))))


def _plain(name: str) -> str:
  return re.sub(r'[\s_-]+', ' ', one_form(name).casefold()).strip()


def one_form(name: str) -> str:
  """Returns the one of a class name's two Unicode forms that is compared.

  File systems choose between them, so names that differ in it are one class.
  """
  return unicodedata.normalize('NFC', name)
