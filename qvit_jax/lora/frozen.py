"""Models whose kernels are frozen, and packed if wanted, under adapters.

Kernels stay float or become codes of 8 or 4 bits (QLoRA: Dettmers et al. 2023,
arXiv:2305.14314; differs: codes are uniform, not NF4). The head stays float: it
is trained itself.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from qvit_jax import models, tree
from qvit_jax.errors import ConfigError
from qvit_jax.lora import adapter as lora
from qvit_jax.lora.frozen_core import BITS, FrozenCore, plan_frozen
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import METHODS, QuantPlan, dequantize, quantize
from qvit_jax.quantization.finite import check_finite

_start = jax.jit(
  lora.start, static_argnums=2, static_argnames=('pack', 'unpack')
)
_pack = jax.jit(quantize, static_argnames=('bits', 'group'))


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Adapters and what they lie beside.

  Attributes:
    adapter: The delta slot.
    sites: All products of the model.
    head: Path of the layer that is trained itself.
    bits: Of packed kernels; None: they stay in float.
    group: Input channels that share a scale; 0: all.
    collections: What is trained unless `train.trainable` says otherwise.
  """

  adapter: lora.Adapter
  sites: tuple[Site, ...]
  head: str
  bits: int | None
  group: int
  collections: tuple[str, ...]

  @functools.cached_property
  def _pack(self) -> Any:
    if self.bits is None:
      return None
    return functools.partial(_pack, bits=self.bits, group=self.group)

  def plan(self, plan: QuantPlan) -> QuantPlan:
    """Returns the bits of a model with these kernels."""
    if self.bits is None:
      return plan
    return plan_frozen(self.sites, self.bits, (self.head,))

  def ops(self, ops: Ops) -> Ops:
    """Returns the arithmetic with adapters, over packed kernels or not."""
    core = ops.core if self.bits is None else FrozenCore()
    return dataclasses.replace(ops, core=core, delta=self.adapter)

  def settle(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns variables to train of those with trained float kernels.

    Layer after layer, so that no more than one kernel is there twice.

    Raises:
      QuantError: A kernel that is to be packed is not finite.
    """
    params = tree.flatten(variables['params'])
    factors = lora.by_layer(variables['lora'])
    packed = {}
    for site in self.sites:
      if not site.is_layer or site.path == self.head:
        continue
      name = f'{site.path}/kernel'
      kernel = params.pop(name)
      if self._pack:
        check_finite({name: kernel})
      base = kernel.reshape(site.rhs_shape)
      if site.path in factors:
        base, factors[site.path] = _start(
            base, factors[site.path], self.adapter.spec, pack=self._pack,
            unpack=self.adapter.unpack,
        )  # fmt: skip
      elif self._pack:
        base = self._pack(base)
      if self._pack:
        packed[name] = base
      else:
        params[name] = base.reshape(kernel.shape)
    adapters = {
      f'{path}/{name}': x
      for path, one in factors.items()
      for name, x in one.items()
    }
    settled = {'params': tree.nest(params), 'lora': tree.nest(adapters)}
    if packed:
      settled['quant'] = tree.nest(packed)
    return {**variables, **settled}

  def kernel(self, variables: dict[str, Any], path: str) -> Any:
    """Returns the packed kernel of a layer."""
    node = variables['quant']
    for part in path.split('/'):
      node = node[part]
    return node['kernel']

  def unpacked(self, variables: dict[str, Any], shapes: Any) -> Any:
    """Returns all parameters in float.

    Args:
      variables: Of the model.
      shapes: Of its parameters before kernels were packed.
    """
    params = tree.flatten(variables['params'])
    for path, shape in tree.flatten(shapes).items():
      if path not in params:
        q = self.kernel(variables, path.removesuffix('/kernel'))
        params[path] = dequantize(q).reshape(shape.shape)
    return tree.unflatten(params, shapes)

  def lines(self, shapes: dict[str, Any], trained: Any) -> list[str]:
    """Returns what is printed at the start of a run.

    Args:
      shapes: Of the model's collections.
      trained: Shapes of what gets gradients.
    """
    spec = self.adapter.spec
    base = 'float' if self.bits is None else f'int{self.bits}'
    if self.bits is not None and self.group:
      base += f', groups of {self.group}'
    how = (
      'added to kernels before they are rounded'
      if (self.adapter.merges)
      else f'beside frozen kernels ({base})'
    )
    kind = 'DoRA' if spec.dora else 'LoRA'
    lines = [
      f'{kind} rank {spec.rank}, scale {spec.scale:g}, init {spec.init}, '
      f'dropout {spec.dropout:g}, {how}'
    ]
    lines += lora.count_lines(self.adapter, shapes['lora'], self.sites)
    for name, x in trained.items():
      if name != 'lora':
        lines.append(f'{name}: {tree.num_elements(x):,} trained')
    count, total = tree.num_elements(trained), self.num_elements(shapes)
    lines.append(
      f'total: {count:,} of {total:,} trained ({count / total:.2%}), '
      f'{tree.num_bytes(trained):,} of {tree.num_bytes(shapes):,} bytes'
    )
    return lines

  def num_elements(self, shapes: dict[str, Any]) -> int:
    """Returns the count of numbers in a model, packed codes one by one."""
    count = tree.num_elements({k: v for k, v in shapes.items() if k != 'quant'})
    if self.bits is None:
      return count + tree.num_elements(shapes.get('quant', {}))
    return count + sum(
      s.rhs_shape[0] * s.rhs_shape[1]
      for s in self.sites
      if s.is_layer and s.path != self.head
    )


def build(config: Any, sites: Sequence[Site]) -> Frozen | None:
  """Returns what `config.lora` describes; None where it is off.

  Raises:
    ConfigError: See `lora.resolve`; or kernels are to be trained themselves.
  """
  bits, family = BITS.get(config.lora.base), models.family(config)
  adapter = lora.resolve(
    config.lora,
    sites,
    family,
    merges=METHODS[config.quant.recipe].quantizes,
    unpack=dequantize if bits else None,
  )
  if adapter is None:
    return None
  names = tuple(config.train.trainable)
  for path, _ in adapter.layers:
    if any(f'params/{path}/kernel/'.startswith(f'{name}/') for name in names):
      raise ConfigError(
        f'train.trainable={names} trains the kernels that '
        f'lora.rank={config.lora.rank} freezes, such as params/{path}/kernel; '
        'leave it out, or set --config.lora.rank=0 --config.lora.targets="()"'
      )
  trained = ('lora', f'params/{family.head}')
  return Frozen(
    adapter, tuple(sites), family.head, bits, config.lora.group, trained
  )
