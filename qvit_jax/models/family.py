"""What the rest of the project knows of a kind of model: one record."""

import dataclasses
from collections.abc import Callable
from typing import Any

from qvit_jax.ops import Ops, Stream


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of model. A new one is a file that makes this record, and a line.

  Attributes:
    from_config: (config.model, arithmetic) -> Flax module.
    resolve_shape: config.model -> {field: value} that decides its arrays.
    stream: config.model -> its residual stream.
    tensor_rules: (parameter regex, axis that `mesh.tensor` splits) rules.
    stem: Path of the first layer, which sees pixels.
    head: Path of the last layer, which gives the logits.
    targets: {name: regex of layer paths} that `lora.targets` may name.
  """

  from_config: Callable[[Any, Ops], Any]
  resolve_shape: Callable[[Any], dict[str, int]]
  stream: Callable[[Any], Stream]
  tensor_rules: tuple[tuple[str, int], ...]
  stem: str
  head: str
  targets: dict[str, str]
