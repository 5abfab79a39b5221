"""What the rest of the project knows of a quantization method: one record."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from qvit_jax.ops import Core, Ops, Site
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan

# Fields of a config that every method reads which rounds.
BITS = (
  'quant.default', 'quant.attention', 'quant.rules', 'quant.act_granularity',
  'model.dtype',
)  # fmt: skip


Arrays = dict[str, Array]
# (core, parameters by path, the collection `quant` by path, compute dtype of
# the training) -> (other parameters, packed `quant`, how each site runs).
Pack = Callable[
  [Core, Arrays, Arrays, str],
  tuple[dict[str, Any], dict[str, Any], dict[str, SitePlan]],
]


@dataclasses.dataclass(frozen=True)
class Method:
  """A method that `quant.recipe` names.

  Attributes:
    make_ops: (config.quant, plan, layers behind a nonlinearity) -> arithmetic.
    reads: Fields of a config that count for some methods and for this one.
    granularities: What may share a range of activations; the first is what ''
      in `quant.act_granularity` means.
    collections: What is trained unless `train.trainable` says otherwise.
    quantizes: Whether anything is rounded while it runs.
    is_packed: Whether it stands for the file of a packed model.
    learns_steps: Whether activations have steps that can start from
      calibration; its core then has `calibrated_steps`.
    dampens: Whether kernels have learned steps, near which they can be kept.
    freezes: Whether kernels that are far from a boundary can be held.
    same: Fields of `config.quant` on which two runs must agree to exchange what
      was learned besides parameters.
    pack: How the codes of a training are packed; None: it has none.
    takes_step: (arithmetic of products, site, packed kernel, channels turned
      together) -> whether training rounds the kernel as it was packed, so that
      it goes on from the kernel's scale.
    note: (config.quant, arithmetic, plan) -> what the header of a run adds.
  """

  make_ops: Callable[[Any, QuantPlan, tuple[str, ...]], Ops]
  reads: tuple[str, ...] = BITS
  granularities: tuple[str, ...] = ()
  collections: tuple[str, ...] = ('params',)
  quantizes: bool = True
  is_packed: bool = False
  learns_steps: bool = False
  dampens: bool = False
  freezes: bool = False
  same: tuple[str, ...] = ('recipe',)
  pack: Pack | None = None
  takes_step: Callable[[Core, Site, QTensor, int], bool] = (
    lambda core, site, kernel, block: False
  )
  note: Callable[[Any, Ops, QuantPlan], str] = lambda quant, ops, plan: ''


NONE = Method(
  lambda quant, plan, hidden: Ops(), reads=('model.dtype',), quantizes=False
)
# Its arithmetic comes from the file.
PACKED = Method(
  lambda quant, plan, hidden: Ops(), reads=(), quantizes=False, is_packed=True
)
