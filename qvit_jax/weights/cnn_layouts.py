"""How others name the tensors of VGG and MobileNetV2: one key map each.

torchvision and timm number a VGG's layers with those that have no tensors, so
that every size has rows of its own.
"""

from qvit_jax.weights.layout import COLLECTION, KeyMap, Row

# Convolutions of each stage of a VGG.
VGGS = {
  '11': (1, 1, 2, 2, 2),
  '13': (2, 2, 2, 2, 2),
  '16': (2, 2, 3, 3, 3),
  '19': (2, 2, 4, 4, 4),
}
# Blocks of each stage of a MobileNetV2; those of the first do not expand.
BLOCKS = (1, 2, 3, 4, 3, 3, 1)

# What counts the updates of a norm, which only a mean over all of them needs.
_IGNORED = (r'num_batches_tracked$',)


def _conv(ours: str, theirs: str, *, bias: bool = False) -> tuple[Row, ...]:
  rows = (Row(f'{ours}/kernel', f'{theirs}.weight', 'conv'),)
  return (*rows, _bias(ours, theirs)) if bias else rows


def _bias(ours: str, theirs: str) -> Row:
  return Row(f'{ours}/bias', f'{theirs}.bias', 'vector')


def _dense(ours: str, theirs: str, kind: str = 'linear') -> tuple[Row, ...]:
  return Row(f'{ours}/kernel', f'{theirs}.weight', kind), _bias(ours, theirs)


def _norm(ours: str, theirs: str) -> tuple[Row, ...]:
  return (
    Row(f'{ours}/scale', f'{theirs}.weight', 'vector'),
    _bias(ours, theirs),
    Row(f'{COLLECTION}/{ours}/mean', f'{theirs}.running_mean', 'vector'),
    Row(f'{COLLECTION}/{ours}/var', f'{theirs}.running_var', 'vector'),
  )


def _features(counts: tuple[int, ...], *, norms: bool) -> tuple[Row, ...]:
  """Returns rows of a VGG's convolutions; activations count as layers."""
  rows, number = [], 0
  for stage, count in enumerate(counts):
    for k in range(count):
      name = f'{stage + 1}_{k + 1}'
      rows += _conv(f'conv{name}', f'features.{number}', bias=True)
      if norms:
        rows += _norm(f'norm{name}', f'features.{number + 1}')
      number += 3 if norms else 2
    number += 1  # the maximum
  return tuple(rows)


def _vggs(
  paper: tuple[Row, ...], linear: tuple[Row, ...]
) -> tuple[tuple[str, tuple[Row, ...]], ...]:
  """Returns (name, rows) of every VGG with either classifier."""
  return tuple(
    (
      f'VGG-{size}{" with BatchNorm" if norms else ""}{text}',
      _features(counts, norms=norms) + classifier,
    )
    for text, classifier in (('', paper), (' and one linear layer', linear))
    for size, counts in VGGS.items()
    for norms in (False, True)
  )


def _blocks() -> list[tuple[int, int, bool]]:
  """Returns (stage, number in it, whether it expands) of each block."""
  return [
    (stage, i, stage > 0)
    for stage, count in enumerate(BLOCKS)
    for i in range(count)
  ]


def _torchvision_mobilenet() -> tuple[Row, ...]:
  rows = [*_conv('stem', 'features.0.0'), *_norm('stem_norm', 'features.0.1')]
  blocks = _blocks()
  for number, (_, _, expands) in enumerate(blocks):
    ours, theirs = f'block_{number:02d}', f'features.{number + 1}.conv'
    at = 0
    for name in ('expand', 'depthwise') if expands else ('depthwise',):
      rows += _conv(f'{ours}/{name}', f'{theirs}.{at}.0')
      rows += _norm(f'{ours}/{name}_norm', f'{theirs}.{at}.1')
      at += 1
    rows += _conv(f'{ours}/project', f'{theirs}.{at}')
    rows += _norm(f'{ours}/project_norm', f'{theirs}.{at + 1}')
  end = f'features.{len(blocks) + 1}'
  rows += [*_conv('last', f'{end}.0'), *_norm('last_norm', f'{end}.1')]
  return (*rows, *_dense('head', 'classifier.1'))


def _timm_mobilenet() -> tuple[Row, ...]:
  rows = [*_conv('stem', 'conv_stem'), *_norm('stem_norm', 'bn1')]
  for number, (stage, i, expands) in enumerate(_blocks()):
    ours, theirs = f'block_{number:02d}', f'blocks.{stage}.{i}'
    names = {'expand': 'conv_pw', 'depthwise': 'conv_dw', 'project': 'conv_pwl'}
    if not expands:
      names = {'depthwise': 'conv_dw', 'project': 'conv_pw'}
    for k, (name, conv) in enumerate(names.items()):
      rows += _conv(f'{ours}/{name}', f'{theirs}.{conv}')
      rows += _norm(f'{ours}/{name}_norm', f'{theirs}.bn{k + 1}')
  rows += [*_conv('last', 'conv_head'), *_norm('last_norm', 'bn2')]
  return (*rows, *_dense('head', 'classifier'))


_VGG = dict(
  stem='conv1_1/kernel', pools=(), norm_eps=None, ignored=_IGNORED,
  counters=True,
)  # fmt: skip
_MOBILENET = {**_VGG, 'stem': 'stem/kernel'}
CNN_LAYOUTS = {
    'torchvision_vgg': KeyMap(
        'torchvision',
        variants=_vggs(
            (*_dense('fc1', 'classifier.0', 'linear_windows'),
             *_dense('fc2', 'classifier.3'), *_dense('head', 'classifier.6')),
            _dense('head', 'classifier'),
        ),
        **_VGG,
    ),
    'timm_vgg': KeyMap(
        'timm',
        variants=_vggs(
            (*_dense('fc1', 'pre_logits.fc1', 'conv_windows'),
             *_dense('fc2', 'pre_logits.fc2', 'conv_1x1'),
             *_dense('head', 'head.fc')),
            _dense('head', 'head.fc'),
        ),
        **_VGG,
    ),
    'torchvision_mobilenet_v2': KeyMap(
        'torchvision', _torchvision_mobilenet(), **_MOBILENET
    ),
    'timm_mobilenet_v2': KeyMap('timm', _timm_mobilenet(), **_MOBILENET),
}  # fmt: skip
