"""Low-rank adapters beside frozen kernels; knows nothing of bits.

An adapted layer of kernel W [i, o] computes x . W + scale * (x . a) . b with a
[i, r] and b [r, o], which lie in the collection `lora` under the layer's path.
Where kernels are rounded in training, a and b are added to the kernel before it
is (L4Q), so that what comes out has no side path.

Sources: LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1. Scaling by the
root of the rank: Kalajdzievski 2023, arXiv:2312.03732. PiSSA: Meng et al. 2024,
arXiv:2404.02948, section 3. LoftQ: Li et al. 2023, arXiv:2310.08659, algorithm
1. DoRA: Liu et al. 2024, arXiv:2402.09353, sections 4.1 and 4.3. L4Q: Jeon et
al. 2024, arXiv:2402.04902, section 3.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qvit_jax import rules, tree
from qvit_jax.arithmetic.products import multiply
from qvit_jax.errors import ConfigError
from qvit_jax.models import Family
from qvit_jax.ops import Site

_LOFTQ_STEPS = 5  # as the paper's experiments
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class LoraSpec:
  """What adapters look like; `configs/common.py` explains each field."""

  rank: int
  alpha: float = 16.0
  dropout: float = 0.0
  scaling: str = 'alpha/r'
  init: str = 'zero'
  dora: bool = False

  @property
  def scale(self) -> float:
    """Returns what a . b is multiplied by."""
    by_root = self.scaling == 'rsqrt'
    return self.alpha / (math.sqrt(self.rank) if by_root else self.rank)


def update(factors: Mapping[str, Array], spec: LoraSpec) -> Float[Array, 'i o']:
  """Returns scale * a . b in full float32."""
  product = jnp.matmul(
    spec.scale * factors['a'], factors['b'], precision='highest'
  )
  # On its own, so that no compiler folds it into the sum: a trained kernel and
  # the merged one then have the same bits and round to the same codes.
  return jax.lax.optimization_barrier(product)


def norms(w: Float[Array, 'i o']) -> Float[Array, ' o']:
  """Returns the length of each output channel's column."""
  return jnp.sqrt(jnp.square(w).sum(axis=0) + _EPSILON)


def merged(
  w: Float[Array, 'i o'], factors: Mapping[str, Array], spec: LoraSpec
) -> Float[Array, 'i o']:
  """Returns the kernel that does what w and its adapter do.

  Args:
    w: Frozen kernel.
    factors: 'a' [i, r], 'b' [r, o] and, under DoRA, 'm' [o].
    spec: Their scale.
  """
  w = w + update(factors, spec)
  if not spec.dora:
    return w
  # The length counts as a constant for gradients: section 4.3 of DoRA.
  return w * (factors['m'] / jax.lax.stop_gradient(norms(w)))


def _unmerged(w, factors, spec: LoraSpec):
  return w - update(factors, spec)


def merge(params: Any, adapters: Any, spec: LoraSpec) -> Any:
  """Returns parameters whose kernels contain the adapters.

  Args:
    params: Collection `params` with float kernels, nested.
    adapters: Collection `lora`, nested.
    spec: As in training.
  """
  return _each_kernel(merged, params, adapters, spec)


def unmerge(params: Any, adapters: Any, spec: LoraSpec) -> Any:
  """Returns what `merge` was given, within the rounding of float32.

  Raises:
    ConfigError: Under DoRA merged kernels have forgotten the lengths of the
      frozen ones.
  """
  if spec.dora:
    raise ConfigError(
      'lora.dora=True: a merged kernel does not tell the length of the frozen '
      'one, so it cannot be unmerged; keep the base'
    )
  return _each_kernel(_unmerged, params, adapters, spec)


def _each_kernel(function, params, adapters, spec: LoraSpec):
  flat = tree.flatten(params)
  one_kernel = jax.jit(function, static_argnums=2)
  for path, factors in by_layer(adapters).items():
    name = f'{path}/kernel'
    kernel = jnp.asarray(flat[name])
    i, o = len(factors['a']), factors['b'].shape[1]
    new = one_kernel(kernel.reshape(i, o), factors, spec)
    flat[name] = new.reshape(kernel.shape)
  return tree.unflatten(flat, params)


def by_layer(adapters: Any) -> dict[str, dict[str, Any]]:
  """Returns {layer: {'a': .., 'b': ..}} of a collection `lora`."""
  found: dict[str, dict[str, Any]] = {}
  for path, x in tree.flatten(adapters).items():
    layer, _, name = path.rpartition('/')
    found.setdefault(layer, {})[name] = x
  return found


def principal(
  w: Float[Array, 'i o'], spec: LoraSpec
) -> dict[str, Float[Array, '...']]:
  """Returns a and b whose scaled product is the nearest one to w of the rank.

  Both share the singular values evenly, as PiSSA and LoftQ do.
  """
  u, s, v = jnp.linalg.svd(w, full_matrices=False)
  root = jnp.sqrt(s[: spec.rank] / spec.scale)
  return {'a': u[:, : spec.rank] * root, 'b': root[:, None] * v[: spec.rank]}


def start(
  w: Float[Array, 'i o'],
  factors: dict[str, Array],
  spec: LoraSpec,
  *,
  pack: Callable[[Array], Any] | None = None,
  unpack: Callable[[Any], Array] | None = None,
) -> tuple[Any, dict[str, Array]]:
  """Returns (frozen kernel, factors) that start from a trained kernel.

  Args:
    w: The trained kernel.
    factors: Random a, zero b.
    spec: `init` says how: 'zero' leaves them, 'pissa' takes the principal part
      of w out of it, 'loftq' that of what packing loses.
    pack: Makes a packed kernel; None: it stays in float.
    unpack: The reverse.
  """
  dense = unpack or (lambda base: base)
  pack = pack or (lambda w: w)
  factors = dict(factors)

  def refine(_, found):
    return principal(w - dense(pack(w - update(found, spec))), spec)

  if spec.init == 'zero':
    base = pack(w)
  elif spec.init == 'pissa':
    factors |= principal(w, spec)
    base = pack(w - update(factors, spec))
  else:
    found = {name: jnp.zeros_like(factors[name]) for name in 'ab'}
    found = jax.lax.fori_loop(0, _LOFTQ_STEPS - 1, refine, found)
    base = pack(w - update(found, spec))
    factors |= principal(w - dense(base), spec)
  if spec.dora:
    factors['m'] = norms(dense(base) + update(factors, spec))
  return base, factors


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The delta slot. See `ops.Delta`.

  Attributes:
    spec: What adapters look like.
    layers: (path, target that names it) of every adapted layer.
    merges: Whether they are added to the kernel before the product (L4Q).
    unpack: Makes the float kernel of a packed one.
  """

  spec: LoraSpec
  layers: tuple[tuple[str, str], ...]
  merges: bool = False
  unpack: Callable[[Any], Array] | None = None

  @functools.cached_property
  def by_path(self) -> dict[str, str]:
    """Returns {layer: target that names it}."""
    return dict(self.layers)

  def kernel(self, module: nn.Module, site: Site, w: Any) -> Any:
    """See `ops.Delta`."""
    if not self.merges or site.path not in self.by_path:
      return w
    return merged(w, self._factors(module, site), self.spec)

  def output(
    self, module: nn.Module, site: Site, x: Array, w: Any, y: Array
  ) -> Array:
    """See `ops.Delta`."""
    if self.merges or site.path not in self.by_path:
      return y
    spec, factors = self.spec, self._factors(module, site)
    if spec.dropout and module.has_rng('dropout'):  # which training gives
      kept = 1 - spec.dropout
      mask = jax.random.bernoulli(module.make_rng('dropout'), kept, x.shape)
      x = jnp.where(mask, x / kept, 0).astype(x.dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    low = multiply(x, factors['a'].astype(x.dtype), dims).astype(x.dtype)
    y = y + spec.scale * multiply(low, factors['b'].astype(x.dtype), dims)
    if not spec.dora:
      return y
    if w is None:
      w = self.unpack(module.get_variable('quant', 'kernel'))
    length = jax.lax.stop_gradient(norms(w + update(factors, spec)))
    return y * (factors['m'] / length)

  def _factors(self, module: nn.Module, site: Site) -> dict[str, Array]:
    i, o = site.rhs_shape
    rank = self.spec.rank

    def random():  # uniform within 1 / sqrt(i), as the authors' code
      init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
      return init(module.make_rng('params'), (i, rank), jnp.float32)

    makers = {'a': random, 'b': lambda: jnp.zeros((rank, o), jnp.float32)}
    if self.spec.dora:
      makers['m'] = lambda: jnp.ones((o,), jnp.float32)
    return {
      name: module.variable('lora', name, make).value
      for name, make in makers.items()
    }


def resolve(
  section: Any,
  sites: Sequence[Site],
  family: Family,
  *,
  merges: bool,
  unpack: Callable[[Any], Array] | None = None,
) -> Adapter | None:
  """Returns the slot that `config.lora` describes; None where it is off.

  Args:
    section: `config.lora`.
    sites: All products of the model.
    family: Names groups of layers, and the head, which gets no adapter: it is
      trained itself.
    merges: See `Adapter`.
    unpack: See `Adapter`.

  Raises:
    RuleError: A target matches no layer.
    ConfigError: A target is a convolution, or the rank is above its smaller
      dimension.
  """
  if not section.rank:
    return None
  layers = {s.path: s for s in sites if s.is_layer and s.path != family.head}
  # A target that is no name is a regex itself.
  patterns = [(family.targets.get(x, x), x) for x in section.targets]
  named = rules.match(patterns, layers, field='lora.targets')
  dense = [path for path, site in layers.items() if site.window is None]
  for path in named:
    if path not in dense:
      raise ConfigError(_not_dense(section.targets, path, dense))
    shape = layers[path].rhs_shape
    if section.rank > min(shape):
      raise ConfigError(
        f'lora.rank={section.rank} is above the smaller dimension of {path} '
        f'{list(shape)}; give a rank up to {min(shape)}, or other lora.targets'
      )
  spec = LoraSpec(
    **{f.name: section[f.name] for f in dataclasses.fields(LoraSpec)}
  )
  return Adapter(spec, tuple(named.items()), merges, unpack)


def _not_dense(targets: Any, path: str, dense: list[str]) -> str:
  """Says that a target is a convolution, and what would do."""
  allowed = (
    f'the dense layers {", ".join(dense)}; set --config.lora.targets="('
    f'{dense[0]!r},)"'
    if dense
    else 'dense layers, of which this model has none but its head, which is '
    'trained itself; set --config.lora.rank=0 --config.lora.targets="()"'
  )
  return (
    f'lora.targets={tuple(targets)} takes in the convolution {path}; allowed: '
    f'{allowed}'
  )


def count_lines(
  adapter: Adapter, adapters: Any, sites: Sequence[Site]
) -> list[str]:
  """Returns a line for each target: layers, trained numbers, frozen ones.

  Args:
    adapter: The slot.
    adapters: Collection `lora`, arrays or shapes.
    sites: All products of the model.
  """
  sizes = {p: tree.num_elements(f) for p, f in by_layer(adapters).items()}
  kernels = {s.path: math.prod(s.rhs_shape) for s in sites if s.is_layer}
  lines = []
  for target in dict.fromkeys(adapter.by_path.values()):
    paths = [p for p, name in adapter.layers if name == target]
    trained, frozen = (
      sum(table[p] for p in paths) for table in (sizes, kernels)
    )
    lines.append(
      f'{target}: {len(paths)} layers, {trained:,} trained beside {frozen:,} '
      'frozen'
    )
  return lines
