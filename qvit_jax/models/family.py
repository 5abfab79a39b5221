"""What the rest of the project knows of a kind of model: one record."""

import dataclasses
from collections.abc import Callable
from typing import Any

from qvit_jax.models.batch_norm import Statistics
from qvit_jax.models.graph import Graph
from qvit_jax.ops import Ops, Pair, Stream


@dataclasses.dataclass(frozen=True)
class Cut:
  """A place in a model through which all goes that the layers behind it see.

  Where they alone are trained, what passes there can be computed once.

  Attributes:
    name: By which the model hands it to `Ops.cut`.
    behind: Paths of all modules with parameters behind it.
    draws: Fields of `config.model` that draw at random before it.
  """

  name: str
  behind: tuple[str, ...]
  draws: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of model. A new one is a file that makes this record, and a line.

  Attributes:
    from_config: (config.model, arithmetic) -> Flax module.
    architecture: config.model -> what decides its arrays and function, as JSON
      values; raises ConfigError where no such model is possible.
    title: config.model -> its size in a few words.
    tensor_rules: (parameter regex, axis that `mesh.tensor` splits) rules.
    stem: Path of the first layer, which sees pixels.
    head: Path of the last layer, which gives the logits.
    targets: {name: regex of layer paths} that `lora.targets` may name.
    reads: Fields of `config.model` that only some families read, and this one
      does ('model.heads'); the others are refused where somebody sets them.
    stream: config.model -> its residual stream; None: the family has none
      whose channels could be turned or scaled as one.
    pairs: config.model -> layers between which channels can be scaled.
    cuts: config.model -> its cuts, in the order in which an image passes them.
    tells: Whether weights and runs tell all of `config.model`, so that
      `model.size` may be 'auto'.
    draw: (config.model, graph) -> None; adds the operations of a model without
      norms that can be folded. None: no other runtime can be given it.
    statistics: How norms keep statistics; None: no norm of the family does.
  """

  from_config: Callable[[Any, Ops], Any]
  architecture: Callable[[Any], dict[str, Any]]
  title: Callable[[Any], str]
  tensor_rules: tuple[tuple[str, int], ...]
  stem: str
  head: str
  targets: dict[str, str]
  reads: tuple[str, ...]
  stream: Callable[[Any], Stream] | None = None
  pairs: Callable[[Any], tuple[Pair, ...]] = lambda model: ()
  cuts: Callable[[Any], tuple[Cut, ...]] = lambda model: ()
  tells: bool = False
  draw: Callable[[Any, Graph], None] | None = None
  statistics: Statistics | None = None
