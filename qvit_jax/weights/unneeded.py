"""What a file has although the model has no use for it, and what contradicts.

Each function takes a `compare.Comparison`, before it looks for what is missing.
"""

import re

from qvit_jax.store.entries import Source, refuse
from qvit_jax.weights.keymap import Names, patch_shape

_KERNEL = 'patch_embed/kernel'


def with_gate(source: Source, names: Names | None) -> Names | None:
  """Returns the names, as of a SwiGLU in one layer where only shapes tell it.

  Raises:
    WeightsError: The two layers of an MLP do not fit each other.
  """
  first, last = (f'encoder/block_00/mlp/{n}/kernel' for n in ('fc1', 'fc2'))
  if not (names and names.layout.gated and {first, last} <= names.ours.keys()):
    return names
  (_, fc1), (_, fc2) = names.ours[first], names.ours[last]
  shapes = source.entries[fc1].shape, source.entries[fc2].shape
  if any(len(shape) != 2 for shape in shapes):
    return names
  outputs, inputs = shapes[0][0], shapes[1][1]
  if outputs not in (inputs, 2 * inputs):
    refuse(
      source.title,
      f'{fc1} has {outputs} outputs, {fc2} {inputs} inputs: neither as many, '
      'nor the two halves of a SwiGLU',
      'give other weights',
    )
  return names.gated() if outputs == 2 * inputs else names


def check_told(source: Source, names: Names, width: int) -> None:
  """Compares what is said of a model with what its tensors are.

  Args:
    source: The file.
    names: Its names as a layout of vision transformers.
    width: Channels of its tokens.

  Raises:
    WeightsError: It is another model's, or the file has no block.
  """
  if not names.depth:
    refuse(
      source.title,
      f'it has the patch embedding {names.ours[_KERNEL][1]}, but no block of '
      f'the {names.title} layout whose names begin alike',
      'give a file of the whole model',
    )
  for name, here in (('width', width), ('depth', names.depth)):
    if source.facts.get(name, here) != here:
      refuse(
        source.title,
        f'{source.places[name]} says a {name} of {source.facts[name]}, but its '
        f'tensors have {here}',
        'give the config.json of these weights, or none',
      )
  heads = source.facts.get('heads', 1)
  if heads < 1 or width % heads:
    refuse(
      source.title,
      f'{source.places["heads"]} says {heads} attention heads, which do not '
      f'divide its width {width}',
      'give the config.json of these weights, or none',
    )


def check_patch(file) -> None:
  """Compares the patch that config.json tells with that of the kernel.

  Raises:
    WeightsError: It is another one.
  """
  told, shape = file.source.facts.get('patch'), file.shape(_KERNEL)
  if told is None or shape is None or len(shape) != 4:
    return
  row, theirs = file.ours[_KERNEL]
  there = list(patch_shape(row, shape)[:2])
  if there != (told if isinstance(told, list) else [told, told]):
    refuse(
      file.source.title,
      f'its config.json says patch_size={told}, but {theirs} is of '
      f'{there[0]} x {there[1]} pixels',
      'give the config.json of these weights, or none',
    )


def check_pool(file) -> None:
  """An attention pooling beside a class token leaves that out: we cannot.

  Raises:
    WeightsError: The file has both, and the model no class token.
  """
  both = {'cls', 'pool/probe'}
  if both <= file.ours.keys() and 'pool/probe' in file.wanted:
    if 'cls' in file.wanted:
      return  # every token is asked there
    refuse(
      file.source.title,
      f'its attention pooling ({file.ours["pool/probe"][1]}) asks the patches '
      f'of a model with a class token ({file.ours["cls"][1]}), which no model '
      'here does',
      'choose other weights',
    )


def drop_empty(file) -> None:
  """Leaves registers behind of which there are none."""
  if 0 in (file.shape('registers') or ()):
    file.report.unused.append(file.ours.pop('registers')[1])


def drop_masked(file) -> None:
  """Keys get no bias where a mask takes it from them."""
  found = {template for template, _ in file.names.constants.values()}
  if file.names.layout.key_mask not in found:
    return
  for name in [n for n in file.ours if n.endswith('attn/key/bias')]:
    del file.ours[name]
    if name in file.wanted:
      file.report.zeros[name] = 'the file masks the biases of keys'


def drop_optional(file) -> None:
  """Leaves behind what models of the layout may do without, and this does."""
  for pattern in file.names.layout.optional:
    if any(re.search(pattern, name) for name in file.wanted):
      continue
    for name in [n for n in file.ours if re.search(pattern, n)]:
      theirs = file.ours.pop(name)[1]
      if theirs not in file.report.unused:
        file.report.unused.append(theirs)
