"""Turns the residual stream so that no channel stands out.

Outlier channels make 4-bit activations coarse. A rotation Q of the channels,
absorbed into the kernels that write to the stream and those that read from it,
spreads them over all channels and changes no output.

LayerNorm stays what it is: Q maps the vector of ones to itself, so means and
variances of a token are those of the turned token. What LayerNorm learned
(scale and bias) and LayerScale go into the neighbouring kernels first.

Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 4, for RMSNorm;
that a rotation which fixes the ones commutes with LayerNorm is our step. What a
nonlinearity puts out nothing can turn beforehand; see `hadamard.turn_blocks`.
"""

import numpy as np

from qvit_jax.ops import Stream
from qvit_jax.quantization.ptq.solver import Solver


def fold_norms(
  params: dict[str, np.ndarray], stream: Stream
) -> dict[str, np.ndarray]:
  """Returns parameters with LayerScale and LayerNorm's affine part absorbed.

  Args:
    params: Path to float32 array.
    stream: Their places.
  """
  p = dict(params)
  for writer, scale in stream.writers:
    if scale and scale in p:
      p[f'{writer}/kernel'] = p[f'{writer}/kernel'] * p[scale]
      p[f'{writer}/bias'] = p[f'{writer}/bias'] * p[scale]
      p[scale] = np.ones_like(p[scale])
  for norm, layers in stream.readers:
    scale, bias = p[f'{norm}/scale'], p[f'{norm}/bias']
    for layer in layers:
      kernel = p[f'{layer}/kernel']
      flat = kernel.reshape(kernel.shape[0], -1)
      times = kernel.shape[0] // scale.shape[0]  # 2 behind token and mean
      full_scale, full_bias = np.tile(scale, times), np.tile(bias, times)
      shape = p[f'{layer}/bias'].shape
      p[f'{layer}/bias'] = p[f'{layer}/bias'] + (full_bias @ flat).reshape(
        shape
      )
      p[f'{layer}/kernel'] = (full_scale[:, None] * flat).reshape(kernel.shape)
    p[f'{norm}/scale'] = np.ones_like(scale)
    p[f'{norm}/bias'] = np.zeros_like(bias)
  return p


def orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a random orthogonal matrix, uniformly over all of them."""
  q, r = np.linalg.qr(rng.normal(size=(size, size)))
  return q * np.sign(np.diag(r))


def orthogonal_fixing_ones(size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a random orthogonal matrix that maps the ones to themselves."""
  # The first columns of a basis: the ones, then anything.
  basis = rng.normal(size=(size, size))
  basis[:, 0] = 1
  basis, _ = np.linalg.qr(basis)
  inner = np.eye(size)
  inner[1:, 1:] = orthogonal(size - 1, rng)
  return basis @ inner @ basis.T


def turn(
  params: dict[str, np.ndarray], stream: Stream, *, seed: int
) -> dict[str, np.ndarray]:
  """Returns parameters of the same function in a turned stream.

  The channels of every head's values, and of its queries and keys together,
  are turned too; they alone where the stream has no writers.

  Args:
    params: With norms folded, see `fold_norms`.
    stream: Their places.
    seed: Of the rotations.
  """
  rng = np.random.default_rng(seed)
  p = {name: x.astype(np.float64) for name, x in params.items()}
  if stream.writers:
    _turn_stream(p, stream, rng)
  for value, out in stream.values:
    dim = p[f'{value}/bias'].shape[-1]
    r = orthogonal(dim, rng)
    p[f'{value}/kernel'] = p[f'{value}/kernel'] @ r  # [d, k, dim]
    p[f'{value}/bias'] = p[f'{value}/bias'] @ r
    p[f'{out}/kernel'] = np.einsum('ji,kjd->kid', r, p[f'{out}/kernel'])
  for query, key in stream.queries:
    r = orthogonal(p[f'{query}/bias'].shape[-1], rng)
    for layer in (query, key):
      p[f'{layer}/kernel'] = p[f'{layer}/kernel'] @ r
      p[f'{layer}/bias'] = p[f'{layer}/bias'] @ r
  return {name: x.astype(np.float32) for name, x in p.items()}


def _turn_stream(p, stream: Stream, rng: np.random.Generator) -> None:
  """Turns what writes to the stream and what reads from it, in place."""
  width = p[f'{stream.readers[0][0]}/scale'].shape[0]
  q = orthogonal_fixing_ones(width, rng)
  for name in stream.tokens:
    if name in p:
      p[name] = p[name] @ q
  for writer, _ in stream.writers:
    p[f'{writer}/kernel'] = p[f'{writer}/kernel'] @ q
    p[f'{writer}/bias'] = p[f'{writer}/bias'] @ q
  for _, layers in stream.readers:
    for layer in layers:
      kernel = p[f'{layer}/kernel']
      parts = kernel.reshape(-1, width, int(np.prod(kernel.shape[1:])))
      p[f'{layer}/kernel'] = (q.T @ parts).reshape(kernel.shape)


def _transform(params, stream, observe, seed: int):
  del observe  # it goes by the model alone
  return turn(fold_norms(params, stream), stream, seed=seed)


SOLVER = Solver(_transform, needs_stream=True)
