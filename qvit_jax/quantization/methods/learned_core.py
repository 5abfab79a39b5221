"""Products with learned steps: the core of recipes lsq, statsq, qvit.

Steps and zero points of an operand lie in the collection `quant` under the
layer's path: `lhs_step`, `lhs_zero`, `rhs_step`, `rhs_zero` of activations and
`kernel_step` of a kernel. Applying the model with `quant` mutable fits them to
the images at hand, layer after layer, each seeing what the rounded ones before
it give.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from qvit_jax.arithmetic.products import Window, multiply, shared_axes
from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops, Site
from qvit_jax.quantization import numerics, qtensor
from qvit_jax.quantization.hadamard import hadamard_block, turn_blocks
from qvit_jax.quantization.integer_core import SitePlan
from qvit_jax.quantization.methods import lsq
from qvit_jax.quantization.methods.method import BITS, Method
from qvit_jax.quantization.qtensor import QTensor
from qvit_jax.quantization.spec import QuantPlan

STEPS = ('per_tensor', 'per_head', 'per_position', 'per_token')
# Q-ViT clips what a GELU gives (Li et al. 2022, released code).
GELU_CLIP = 10.0


@dataclasses.dataclass(frozen=True)
class LearnedCore:
  """Computes each product as its line in the plan says. See `ops.Core`.

  Attributes:
    plan: Bits; its granularity is one of STEPS.
    kernels: 'step' (LSQ) or 'statsq'.
    has_zero: Whether activations learn a zero point (LSQ+).
    clipped: Layers whose input is clipped to +-GELU_CLIP.
    turned: Layers whose input and kernel are turned by Hadamard blocks before
      they are rounded (`hadamard.turn_blocks`).
  """

  plan: QuantPlan
  kernels: str = 'step'
  has_zero: bool = True
  clipped: tuple[str, ...] = ()
  turned: tuple[str, ...] = ()
  is_packed = False

  def block(self, site: Site) -> int:
    """Returns the channels that are turned together, 0 for none."""
    if (
      site.path not in self.turned or self.plan.by_path[site.path].acts is None
    ):
      return 0
    return hadamard_block(site.rhs_shape[0])

  def __call__(self, module, site: Site, lhs, rhs, dims):
    """See `ops.Core`."""
    spec = self.plan.by_path[site.path]
    if site.path in self.clipped:
      lhs = jnp.clip(lhs, -GELU_CLIP, GELU_CLIP)
    dtype, block = lhs.dtype, self.block(site)
    if block:
      lhs = turn_blocks(lhs.astype(jnp.float32), block)
      rhs = turn_blocks(rhs.T, block).T
    coders, learned = [None, None], [None, None]
    if spec.acts is not None:
      for side, x in enumerate((lhs,) if site.is_layer else (lhs, rhs)):
        heads = () if isinstance(dims, Window) else dims[1][side][1:]
        axes = step_axes(
          x.ndim, shared_axes(dims, side), heads, self.plan.act_granularity
        )
        coders[side], learned[side] = self._activation(
          module, ('lhs', 'rhs')[side], x, axes, spec.acts
        )
    if site.is_layer and spec.weights is not None:
      coders[1], learned[1] = self._kernel(module, rhs, spec.weights)
    if coders == [None, None]:
      return multiply(lhs, rhs.astype(lhs.dtype), dims)
    if coders[1] is None:
      rhs = rhs.astype(lhs.dtype)
    product = lsq.Product(dims, *coders, dtype)
    return lsq.coded_product(product, lhs, rhs, *learned)

  def _activation(self, module, side: str, x, axes, bits: int):
    """Returns (coder, (step, zero)) of activations."""
    if self.plan.act_granularity == 'per_token':
      seen = jax.lax.stop_gradient(x).astype(jnp.float32)
      low = seen.min(axis=axes, keepdims=True)
      high = seen.max(axis=axes, keepdims=True)
      coder = lsq.Coder(bits, method='dynamic')
      return coder, numerics.scale_of(low, high, bits, symmetric=False)
    shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    count = x.size // x.shape[0] // math.prod(shape)
    coder = lsq.Coder(bits, has_zero=self.has_zero)
    share = lsq.gradient_share(count, coder)
    coder = dataclasses.replace(coder, share=share)
    step, zero = _variables(
      module,
      (f'{side}_step', f'{side}_zero'),
      shape[1:],  # no axis of the batch
      lambda: lsq.fit(x, coder, axes, has_zero=self.has_zero),
    )
    if not self.has_zero:
      zero = jax.lax.stop_gradient(zero)
    return coder, (step, zero)

  def _kernel(self, module, w, bits: int):
    """Returns (coder, (step, zero) or None) of a kernel [i, o]."""
    coder = lsq.Coder(bits, method=self.kernels, is_signed=True)
    if self.kernels != 'step':
      return coder, None
    share = lsq.gradient_share(w.shape[0], coder)
    coder = dataclasses.replace(coder, share=share)
    (step,) = _variables(
      module,
      ('kernel_step',),
      (w.shape[1],),
      lambda: lsq.fit(w, coder, (0,), has_zero=False)[:1],
    )
    return coder, (step, jnp.zeros_like(step))

  def pack(self, params, learned, dtype):
    """See `method.Pack`."""
    rest, quant, plans = dict(params), {}, {}
    plan = self.plan
    for site, spec in zip(plan.sites, plan.specs, strict=True):
      weights = spec.weights if site.is_layer else None
      clip = GELU_CLIP if site.path in self.clipped else 0.0
      block = self.block(site)
      is_static = spec.acts is not None and plan.act_granularity != 'per_token'
      plans[site.path] = SitePlan(
        weights, spec.acts, is_static=is_static, block=block, clip=clip
      )
      if site.is_layer:
        name = f'{site.path}/kernel'
        w = rest.pop(name).reshape(site.rhs_shape)
        if block:
          w = turn_blocks(w.T, block).T
        # As trained: a turned float kernel meets turned float32 inputs.
        quant[name] = w if block else w.astype(dtype)
        if weights:
          coder = lsq.Coder(weights, self.kernels, is_signed=True)
          step = learned.get(f'{site.path}/kernel_step')
          zero = jnp.zeros(())
          codes, worth = lsq.encode(w, step, zero, coder)
          quant[name] = qtensor.from_codes(
            codes,
            worth.reshape(1, -1),
            weights,
            is_odd=self.kernels == 'statsq',
          )
      if is_static:
        for side in ('lhs',) if site.is_layer else ('lhs', 'rhs'):
          start = f'{site.path}/{side}'
          step = learned[f'{start}_step']
          quant[f'{start}_scale'] = jnp.maximum(step, lsq.LEAST)
          quant[f'{start}_zero'] = lsq.whole_zero(
            learned[f'{start}_zero'], lsq.Coder(spec.acts)
          )
    quant |= {
      path: x
      for path, x in learned.items()
      if path.endswith(('_gamma', '_beta'))  # of rectified queries and keys
    }
    return rest, quant, plans

  def takes_step(self, site: Site, kernel: QTensor, block: int) -> bool:
    """See `Method.takes_step`."""
    if self.kernels != 'step':
      return False
    here = self.plan.by_path[site.path].weights, 1, False, self.block(site)
    return here == (kernel.bits, len(kernel.scale), kernel.is_odd, block)


def step_axes(
  ndim: int, summed: tuple[int, ...], heads: tuple[int, ...], steps: str
) -> tuple[int, ...]:
  """Returns the axes of activations that share a step.

  Args:
    ndim: Of the operand.
    summed: Over which the product sums (`products.shared_axes`); always shared,
      as is the batch.
    heads: The axis of heads of an attention product's operand, or none.
    steps: One of STEPS: one step; one for each head of an attention product;
      one for each token position (and head, and channel of values); none, but
      the range of each token of each image (and head, and channel of values).
      A convolution has one step, or the range of each image.
  """
  if steps == 'per_token':
    return summed
  if steps == 'per_position':
    return (0, *summed)
  kept = heads if steps == 'per_head' else ()
  return tuple(i for i in range(ndim) if i not in kept)


def _variables(module, names, shape, fit):
  """Returns float32 variables, fitted now where `quant` is mutable."""
  shape = tuple(shape)
  if not module.is_mutable_collection('quant'):
    return [module.get_variable('quant', name) for name in names]
  values = [x.reshape(shape).astype(jnp.float32) for x in fit()]
  for name, value in zip(names, values, strict=True):
    module.put_variable('quant', name, value)
  return values


def _make_ops(quant, plan, hidden, kernels: str = 'step') -> Ops:
  turned = hidden if quant.hadamard else ()
  core = LearnedCore(plan, kernels, has_zero=quant.zero_point, turned=turned)
  if quant.hadamard and not any(map(core.block, plan.sites)):
    raise QuantError(
      'quant.hadamard=True would have no effect: no layer behind a '
      'nonlinearity rounds its input; give one bits of activations, or leave '
      'hadamard out'
    )
  return Ops(core=core)


def note(quant, ops: Ops, plan: QuantPlan) -> str:
  """Returns what a header says of kernels that are dampened, inputs turned."""
  core, text = ops.core, ''
  if core.kernels == 'step' and quant.dampen:
    text += f', kernels dampened by {quant.dampen:g}'
  if core.turned:
    count = sum(plan.by_path[path].acts is not None for path in core.turned)
    text += f', inputs of {count} layers turned'
  return text


# What recipes with learned steps have in common.
LEARNED = Method(
  _make_ops,
  reads=(*BITS, 'quant.calibration_path', 'optim.quant_lr'),
  granularities=STEPS,
  collections=('params', 'quant'),
  learns_steps=True,
  pack=LearnedCore.pack,
  takes_step=LearnedCore.takes_step,
  note=note,
)
_LSQ_READS = (*LEARNED.reads, 'quant.zero_point', 'quant.hadamard')
LSQ = dataclasses.replace(
  LEARNED,
  reads=(*_LSQ_READS, 'quant.dampen'),
  dampens=True,
  same=('recipe', 'zero_point', 'hadamard'),
)
STATSQ = dataclasses.replace(
  LEARNED,
  make_ops=functools.partial(_make_ops, kernels='statsq'),
  reads=(*_LSQ_READS, 'quant.freeze'),
  freezes=True,
  same=('recipe', 'zero_point', 'hadamard'),
)
