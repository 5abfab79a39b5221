"""Files whose names are known, but whose models are none of ours."""

import re

from qvit_jax.store.entries import Source, refuse

_TEXT = re.compile(r'(^|\.)(token_embedding|text_model\.embeddings)\.')
_IMAGE = re.compile(
  r'conv1\.weight$|patch_embed|vision_model\.|visual\.|vision_tower\.'
)
_RESNET = re.compile(r'(^|\.)visual\.(layer1\.|attnpool\.)')
_NAFLEX = re.compile(r'(^|\.)embeddings\.patch_embedding\.weight$')


def check(source: Source) -> None:
  """Refuses what no model here can be; reads no tensor.

  Raises:
    WeightsError: A text tower alone, CLIP's ResNet, or SigLIP 2 for images of
      any shape.
  """
  names = list(source.entries)
  find = lambda pattern: [name for name in names if pattern.search(name)]
  if (found := find(_TEXT)) and not find(_IMAGE):
    refuse(
      source.title,
      f'it holds a text tower alone ({found[0]})',
      'give the file that has the image tower',
    )
  if found := find(_RESNET):
    refuse(
      source.title,
      f'its image tower is a ResNet ({found[0]}), not a vision transformer',
      'choose a CLIP whose name has ViT in it',
    )
  for name in find(_NAFLEX):
    if len(source.entries[name].shape) == 2:
      refuse(
        source.title,
        f'it is a SigLIP 2 for images of any shape ({name} is a linear layer)',
        'choose one of a fixed resolution, without naflex in its name',
      )
