"""What a file's header, its name or its architecture say of where it is from.

How a model pads is in no tensor: models of TensorFlow put fewer zeros around an
image than those of PyTorch.
"""

import re
from collections.abc import Mapping
from typing import Any

# What stands before a model of timm that came from TensorFlow, which puts fewer
# zeros around images, and its epsilon of BatchNorm.
_FROM_TENSORFLOW = re.compile(r'^tf_(mobilenet|efficientnet)')
_BATCH_NORM_EPS = 1e-3
# Models of timm and files of torchvision that pad as PyTorch.
_FROM_TORCH = re.compile(
  r'^mobilenetv2_\d|^mobilenet_v2-[0-9a-f]{8}(?:\.|$)'
)
_SCALE = re.compile(r'x ?/ ?(\d+(?:\.\d+)?) ?- ?1(?:\.0)?')


def read_texts(texts: Mapping[str, str]) -> dict[str, Any]:
  """Returns what the texts in the header of a file say, as `read_facts`.

  Args:
    texts: Of a safetensors file: `padding` ('same', 'torch', or a sentence that
      begins with 'TF SAME'), and `scale`, such as 'x/128-1'.
  """
  facts: dict[str, Any] = {}
  padding = texts.get('padding', '').strip().casefold()
  if padding.startswith(('same', 'tf same')):
    facts['padding'] = 'same'
  elif padding.startswith(('torch', 'symmetric')):
    facts['padding'] = 'torch'
  if found := _SCALE.fullmatch(texts.get('scale', '').strip()):
    facts['mean'] = facts['std'] = [float(found[1]) / 255] * 3
  return facts


def of_name(name: str) -> dict[str, Any]:
  """Returns what the name of a file or of a model of timm says: `padding`.

  And `batch_norm_eps` where TensorFlow's is another one.
  """
  if _FROM_TENSORFLOW.search(name):
    return {'padding': 'same', 'batch_norm_eps': _BATCH_NORM_EPS}
  return {'padding': 'torch'} if _FROM_TORCH.search(name) else {}
