"""A README.md that says what a file is, as the Hugging Face hub wants it.

Source: Mitchell et al. 2019, "Model Cards for Model Reporting",
arXiv:1810.03993; the front matter is that of huggingface.co/docs/hub.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Card:
  """What a card tells.

  Attributes:
    title: One line: the model and its size.
    library: That opens the file: 'qvit_jax', 'transformers', 'onnx' and others.
    code: Lines of Python that do.
    bits: One line.
    sites: Bits of every product, a line each; () of a float model.
    origin: Lines: from which run or weights it was made.
    config: The resolved config, as JSON.
    class_names: By label.
    files: (name, bytes) of what lies beside the card.
    rows: Of results.json: what was measured.
    environment: Of results.json; {} without rows.
    parity: Of parity.json: how the file compares; {} where it does not say.
  """

  title: str
  library: str
  code: Sequence[str]
  bits: str
  sites: Sequence[str]
  origin: Sequence[str]
  config: Mapping[str, Any]
  class_names: Sequence[str]
  files: Sequence[tuple[str, int]]
  rows: Sequence[Mapping[str, Any]] = ()
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  parity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def text(card: Card) -> str:
  """Returns the README.md of a card."""
  parts = [
    _front(card), f'# {card.title}', _what(card), _numbers(card),
    _runtimes(card), _made(card), _images(card), _bits(card), _load(card),
  ]  # fmt: skip
  return '\n\n'.join(part for part in parts if part) + '\n'


def _front(card: Card) -> str:
  """Returns the YAML between dashes."""
  name = card.config['model']['name']
  tags = ['image-classification', 'jax', 'qvit_jax', name.replace('_', '-')]
  if card.sites:
    tags.append('quantized')
  lines = [
    f'library_name: {card.library}', 'pipeline_tag: image-classification',
  ]  # fmt: skip
  lines += ['tags:', *(f'- {tag}' for tag in tags)]
  if data := _data(card):
    lines += ['datasets:', f'- {_quoted(data)}']
  lines += ['metrics:', '- accuracy']
  source = card.config['weights']['path']
  if source.startswith('hf://'):
    lines.append('base_model: ' + source.removeprefix('hf://').split('@')[0])
  if card.rows:
    lines += ['model-index:', *_index(card)]
  return '\n'.join(['---', *lines, '---'])


def _index(card: Card) -> list[str]:
  """Returns the numbers as the hub reads them."""
  lines = []
  for row in card.rows:
    lines += [
      f'- name: {_quoted(row["name"])}',
      '  results:',
      '  - task:',
      '      type: image-classification',
      '    dataset:',
      f'      name: {_quoted(row["data"]["name"])}',
      f'      type: {_quoted(row["data"]["name"])}',
      f'      split: {_quoted(row["split"])}',
      '    metrics:',
      '    - type: accuracy',
      f'      value: {row["top1"]}',
    ]
  return lines


def _quoted(value: str) -> str:
  return json.dumps(value, ensure_ascii=False)


def _data(card: Card) -> str:
  if card.rows:
    return card.rows[0]['data']['name']
  data = card.config['data']
  return data['name'] or data['source']


def _what(card: Card) -> str:
  count = card.config['model']['num_classes']
  files = ', '.join(f'`{name}` ({size:,} bytes)' for name, size in card.files)
  return (
    f'An image classifier of {count} classes: {card.bits}. Files: {files}. '
    'Made with qvit_jax.'
  )


def _numbers(card: Card) -> str:
  """Returns the table of what was measured, and of what."""
  if not card.rows:
    return (
      '## Accuracy\n\nNo numbers of just this model lie where it was made; '
      '`--mode=eval` measures them.'
    )
  first, machine = card.rows[0], card.environment
  lines = [
    '## Accuracy and speed', '',
    f'Of {first["num_examples"]:,} images of the split {first["split"]!r} of '
    f'{first["data"]["name"]} (digest {first["data"]["digest"]}).', '',
    '| | bits (weights, activations) | top-1 | top-5 | loss | bytes | '
    'images/s | execution |',
    '|---|---|---|---|---|---|---|---|',
  ]  # fmt: skip
  for row in card.rows:
    speed = row['images_per_second']
    lines.append(
      f'| {row["name"]} | {row["weight_bits"]:g}, {row["act_bits"]:g} | '
      f'{row["top1"]} | {row["top5"]} | {row["loss"]} | '
      f'{row["size_bytes"]:,} | {"" if speed is None else f"{speed:.1f}"} | '
      f'{row["execution"]} |'
    )
  if any(row['images_per_second'] for row in card.rows):
    batch = card.config['ptq']['latency_batch']
    lines += ['', f'Speed in JAX {machine["packages"]["jax"]} on '
              f'{machine["num_devices"]} x {machine["device"]}, {batch} images '
              'at once.']  # fmt: skip
  return '\n'.join(lines)


def _runtimes(card: Card) -> str:
  """Returns how an exported program fares in other runtimes."""
  if 'engines' not in card.parity:
    return ''
  found = card.parity
  lines = [
    '## In other runtimes', '',
    f'Of {found["num_examples"]:,} images of the split {found["split"]!r}; '
    f'our own evaluation has top-1 {found["jax"]["top1"]}, loss '
    f'{found["jax"]["loss"]}.', '',
    '| runtime | top-1 | loss | same class as ours |', '|---|---|---|---|',
    *(
      f'| {name} {row["version"]} | {row["top1"]} | {row["loss"]} | '
      f'{row["agreement"]} |'
      for name, row in found['engines'].items()
    ),
  ]  # fmt: skip
  return '\n'.join(lines)


def _made(card: Card) -> str:
  """Returns where it comes from, and what is known of its licence."""
  config = card.config
  lines = ['## Origin', '', *(f'- {line}' for line in card.origin)]
  if source := config['weights']['path']:
    lines.append(
      f'- It began as the weights {source}; their licence counts for it too.'
    )
  optim, train = config['optim'], config['train']
  length = (
    f'{train["steps"]} updates' if train['steps'] else
    f'{train["epochs"]} epochs'
  )  # fmt: skip
  lines.append(
    f'- The config says: {length} of {train["batch_size"]} images, '
    f'{optim["name"]}, learning rate {optim["lr"]:g}, seed {config["seed"]}.'
  )
  return '\n'.join(lines)


def _images(card: Card) -> str:
  data, size = card.config['data'], card.config['model']['image_size']
  names = ', '.join(card.class_names[:20])
  more = len(card.class_names) - 20
  if more > 0:
    names += f' and {more} more'
  lines = [
    '## Images', '',
    f'RGB, {size} x {size} pixels, resized ({data["resize"]}) on the shorter '
    'side and cut in the middle, divided by 255, less '
    f'{_listed(data["mean"])}, over {_listed(data["std"])}.',
  ]  # fmt: skip
  if names:
    lines += ['', f'Classes: {names}.']
  return '\n'.join(lines)


def _listed(values: Sequence[float]) -> str:
  return f'({", ".join(f"{x:g}" for x in values)})'


def _bits(card: Card) -> str:
  if not card.sites:
    return ''
  return '\n'.join([
    '## Bits of every product', '', '<details>', '', '```', *card.sites, '```',
    '', '</details>',
  ])  # fmt: skip


def _load(card: Card) -> str:
  return '\n'.join(['## Use', '', '```python', *card.code, '```'])
