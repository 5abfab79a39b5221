"""Information rectification of queries and keys (IRM).

Source: Li et al. 2022 (Q-ViT), arXiv:2210.06707, section 3.2. The distillation
of the same paper is in `dgd.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qvit_jax.errors import QuantError
from qvit_jax.ops import Ops
from qvit_jax.quantization.methods.learned_core import LEARNED, LearnedCore

EPSILON = 1e-5


def rectify(
  x: Float[Array, 'b n k dim'],
  gamma: Float[Array, '...'],
  beta: Float[Array, '...'],
  *,
  form: str,
) -> Float[Array, 'b n k dim']:
  """Returns queries or keys whose codes keep more of their information.

  Args:
    x: Queries or keys of all heads.
    gamma: Learned factor, [k, 1] for 'paper', [k, dim] for 'layernorm'.
    beta: Learned shift, of the same shape.
    form: 'paper': (x - mean + beta) / (gamma * sqrt(var + eps)), with the
      statistics of each image and head over tokens and channels; 'layernorm':
      gamma * (x - mean) / sqrt(var + eps) + beta, with those of each token over
      channels, which is what the released code does.
  """
  mean, size = _statistics(x, form)
  if form == 'paper':
    return (x - mean + beta) / (gamma * size)
  return gamma * (x - mean) / size + beta


def _statistics(x, form: str):
  axes = (1, 3) if form == 'paper' else (3,)
  mean = x.mean(axis=axes, keepdims=True)
  return mean, jnp.sqrt(x.var(axis=axes, keepdims=True) + EPSILON)


def rectifier(form: str) -> 'Rectifier | None':
  """Returns the rectify slot of a form; '' is none."""
  return Rectifier(form) if form else None


@dataclasses.dataclass(frozen=True)
class Rectifier:
  """The rectify slot; gamma and beta lie in `quant` beside the attention.

  They start where the first batch is changed least, so that an imported model
  keeps what it knows.
  """

  form: str = 'paper'

  def __call__(self, module, name: str, x: jax.Array) -> jax.Array:
    """Returns rectified queries or keys [b, n, k, dim], in their dtype."""
    names = f'{name}_gamma', f'{name}_beta'
    wide = x.astype(jnp.float32)
    if module.is_mutable_collection('quant'):
      mean, size = _statistics(wide, self.form)
      gamma, beta = (v.mean(axis=(0, 1))[:, :1] for v in (size, mean))
      if self.form == 'paper':
        gamma = 1 / gamma
      else:
        gamma, beta = (jnp.broadcast_to(v, x.shape[2:]) for v in (gamma, beta))
      for key, value in zip(names, (gamma, beta), strict=True):
        module.put_variable('quant', key, value)
    gamma, beta = (module.get_variable('quant', key) for key in names)
    return rectify(wide, gamma, beta, form=self.form).astype(x.dtype)


def _make_ops(quant, plan, hidden) -> Ops:
  if not any(site.kind == 'qk' for site in plan.sites):
    raise QuantError(
      "quant.recipe='qvit' rectifies queries and keys; this model has none. "
      'Set --config.quant.recipe=lsq'
    )
  core = LearnedCore(plan, clipped=hidden)
  return Ops(core=core, rectify=Rectifier(quant.irm))


METHOD = dataclasses.replace(
  LEARNED,
  make_ops=_make_ops,
  reads=(*LEARNED.reads, 'quant.dampen', 'quant.irm'),
  dampens=True,
  same=('recipe', 'irm'),
)
