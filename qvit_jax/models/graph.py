"""A model as a list of operations, for those who write it in other forms.

Families draw it from their options; what a product is made of (codes, scales,
bias) is looked up by its path. Values are named, and their shapes are those of
the model: images [b, h, w, c], tokens [b, n, d], heads [b, n, k, d / k].

Kinds of operations, with their inputs and what else they say:
  patches         images; patch           -> [b, n, patch * patch * c]
  dense           x; path                 -> [..., o], its output axes as one
  conv            image; path             -> [b, p, q, o]
  product         a, b; path, of          -> 'qk' of heads: [b, k, n, m];
                                             'av': [b, n, k * d]
  norm            x; path, epsilon        LayerNorm of the last axis
  tokens          x; paths, position,     learned tokens [1, t, d] before the
                  patches                    patches, positions added to all
  probe           x; path                 -> learned token [b, 1, d]
  rotate          x; angles [n, d / 2]    rotary positions of heads
  rectify         x; path, name, form     Q-ViT's rectified queries or keys
  scale           x; path or factor       times a vector, or a number
  add, multiply   a, b                    elementwise
  gelu, gelu_tanh, quick_gelu, silu, relu, relu6, softmax    x
  heads           x; count                [b, n, d] -> [b, n, k, d / k]
  cut             x; start, stop          of the tokens
  token           x                       the first one, [b, d]
  mean            x                       of tokens or of pixels, [b, d]
  join            a, b                    channels side by side
  max_pool        image                   the largest of 2 x 2
  windows_mean    image; size             means over size x size windows
  flatten         image                   -> [b, h * w * c]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

IMAGES = 'images'


@dataclasses.dataclass(frozen=True)
class Node:
  """One operation; see the module.

  Attributes:
    kind: What is done.
    inputs: Values it reads.
    output: The value it gives.
    path: Of the layer, norm or parameter.
    facts: What else is known.
  """

  kind: str
  inputs: tuple[str, ...]
  output: str
  path: str = ''
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Graph:
  """Operations in the order in which they are done.

  Attributes:
    rectify: Form of Q-ViT's rectified queries and keys; '' without.
    nodes: All operations; the last one gives the logits.
  """

  def __init__(self, rectify: str = ''):
    """Starts without an operation."""
    self.rectify = rectify
    self.nodes: list[Node] = []

  def add(self, kind: str, *inputs: str, path: str = '', **facts: Any) -> str:
    """Adds an operation; returns the name of its value."""
    output = f'{path or kind}:{len(self.nodes)}'
    self.nodes.append(Node(kind, inputs, output, path, facts))
    return output

  @property
  def output(self) -> str:
    """The value of the last operation."""
    return self.nodes[-1].output

  def readers(self, value: str) -> list[Node]:
    """Returns the operations that read a value."""
    return [node for node in self.nodes if value in node.inputs]
