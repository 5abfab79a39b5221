"""The papers' formulas in slow, obvious NumPy; everything is float64."""

import math

import numpy as np
from scipy import special

# AQT: Abdolrashidi et al. 2021, arXiv:2105.03536.


def quantize(x, bits, axes):
  """Returns x rounded to the grid of `bits`, one scale along `axes`.

  `bits` None leaves x alone; `axes` None means one scale for all of x.
  """
  x = np.asarray(x, np.float64)
  if bits is None:
    return x
  absmax = np.abs(x).max(axis=axes, keepdims=True)
  scale = absmax / (2 ** (bits - 1) - 0.5)
  scale = np.where(scale == 0, 1, scale)
  most = 2 ** (bits - 1) - 1
  return np.round(np.clip(x / scale, -most, most)) * scale  # half to even


def quantized_dot(formula, lhs, rhs, bits, whole):
  """Returns the quantized operands of an einsum and their product.

  Args:
    formula: An einsum of two operands, such as 'bni,io->bno'.
    lhs: Left operand.
    rhs: Right operand.
    bits: (bits of lhs, bits of rhs), each a number or None.
    whole: (one scale for all of lhs, the same for rhs); otherwise each slice
      along the contracted axes has its own.
  """
  inputs, out = formula.split('->')
  quantized = []
  for letters, x, b, one_scale in zip(
    inputs.split(','), (lhs, rhs), bits, whole, strict=True
  ):
    contracted = tuple(i for i, c in enumerate(letters) if c not in out)
    quantized.append(quantize(x, b, None if one_scale else contracted))
  return *quantized, np.einsum(formula, *quantized)


def quantized_dot_gradients(formula, lhs_q, rhs_q, g):
  """Returns d lhs and d rhs: rounding counts as the identity."""
  inputs, out = formula.split('->')
  lhs, rhs = inputs.split(',')
  return (
    np.einsum(f'{out},{rhs}->{lhs}', g, rhs_q),
    np.einsum(f'{lhs},{out}->{rhs}', lhs_q, g),
  )


# ViT: Dosovitskiy et al. 2020, arXiv:2010.11929.


def layer_norm(x, params, eps):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + eps) * params['scale'] + params['bias']


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def gelu(x):
  return x * 0.5 * (1 + special.erf(x / math.sqrt(2)))


def embed_patches(images, params, patch):
  """Multiplies every patch, row by row, with the convolution kernel."""
  _, height, width, _ = images.shape
  tokens = []
  for top in range(0, height, patch):
    for left in range(0, width, patch):
      window = images[:, top : top + patch, left : left + patch]
      tokens.append(np.einsum('bhwc,hwcd->bd', window, params['kernel']))
  return np.stack(tokens, axis=1) + params['bias']


def rotary(x, place):
  """DINOv3's: x of one patch at (row, column), both from -1 to 1."""
  dim = x.shape[-1]
  out = np.array(x)
  for i in range(dim // 2):
    axis, j = divmod(i, dim // 4)
    angle = 2 * math.pi * place[axis] / 100 ** (4 * j / dim)
    a, b = x[..., i], x[..., i + dim // 2]
    out[..., i] = a * math.cos(angle) - b * math.sin(angle)
    out[..., i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
  return out


def turned(x, grid):
  """Returns queries or keys [b, n, dim], whose last tokens are turned."""
  height, width = grid
  out, first = np.array(x), x.shape[1] - height * width
  for row in range(height):
    for column in range(width):
      place = (2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1)
      n = first + row * width + column
      out[:, n] = rotary(x[:, n], place)
  return out


def attention(x, params, eps, context=None, grid=None):
  """Attends head by head; with 'query_norm' in params, q and k are normed."""
  context = x if context is None else context
  kernel = {name: params[name]['kernel'] for name in ('query', 'key', 'value')}
  bias = {name: params[name]['bias'] for name in kernel}
  out = np.zeros_like(x)
  for head in range(kernel['query'].shape[1]):
    q, k, v = (
      (x if n == 'query' else context) @ kernel[n][:, head] + bias[n][head]
      for n in kernel
    )
    if 'query_norm' in params:
      q = layer_norm(q, params['query_norm'], eps)
      k = layer_norm(k, params['key_norm'], eps)
    if grid is not None:
      q, k = turned(q, grid), turned(k, grid)
    weights = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
    out = out + weights @ v @ params['out']['kernel'][head]
  return out + params['out']['bias']


def gelu_tanh(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return x * 0.5 * (1 + np.tanh(inner))


def quick_gelu(x):
  return x / (1 + np.exp(-1.702 * x))


ACTIVATIONS = {'gelu': gelu, 'gelu_tanh': gelu_tanh, 'quick_gelu': quick_gelu}


def mlp(x, params, activation='gelu'):
  first = x @ params['fc1']['kernel'] + params['fc1']['bias']
  if activation == 'swiglu':
    gate = x @ params['gate']['kernel'] + params['gate']['bias']
    x = first * gate / (1 + np.exp(-gate))
  else:
    x = ACTIVATIONS[activation](first)
  return x @ params['fc2']['kernel'] + params['fc2']['bias']


def block(
  x, params, eps, keep=(1.0, 1.0), activation='gelu', grid=None
):
  """Pre-norm block; `keep` multiplies its two branches (stochastic depth)."""
  y = layer_norm(x, params['norm1'], eps)
  y = attention(y, params['attn'], eps, grid=grid)
  x = x + keep[0] * params.get('scale1', 1) * y
  y = layer_norm(x, params['norm2'], eps)
  y = mlp(y, params['mlp'], activation)
  return x + keep[1] * params.get('scale2', 1) * y


def attention_pool(x, params, eps, activation):
  """SigLIP's: a learned token asks; an MLP with a shortcut follows."""
  probe = np.repeat(params['probe'], len(x), axis=0)
  x = attention(probe, params['attn'], eps, x)
  y = mlp(layer_norm(x, params['norm'], eps), params['mlp'], activation)
  return (x + y)[:, 0]


def vit(
  params, images, *, patch, pool, eps=1e-6, keep=None, activation='gelu'
):
  """Returns logits; `keep` gives the factors of the blocks' branches."""
  params = _float64(params)
  images = np.asarray(images, np.float64)
  x = embed_patches(images, params['patch_embed'], patch)
  first = [params[name] for name in ('cls', 'registers') if name in params]
  num_first = sum(tokens.shape[1] for tokens in first)
  first = [np.repeat(tokens, len(x), axis=0) for tokens in first]
  x = np.concatenate([*first, x], axis=1)
  grid = None
  if 'pos_embed' in params:
    x = x + params['pos_embed']
  else:
    grid = [n // patch for n in images.shape[1:3]]
  if 'pre_norm' in params:
    x = layer_norm(x, params['pre_norm'], eps)
  encoder = params['encoder']
  depth = sum(name.startswith('block_') for name in encoder)
  for i in range(depth):
    factors = keep[i] if keep else (1.0, 1.0)
    x = block(
      x, encoder[f'block_{i:02d}'], eps, factors, activation, grid
    )
  if 'norm' in encoder:
    x = layer_norm(x, encoder['norm'], eps)
  if pool in ('attention', 'token_attention'):
    x = x[:, num_first:] if pool == 'attention' else x
    x = attention_pool(x, params['pool'], eps, activation)
  else:
    x = x[:, 0] if pool == 'token' else x[:, num_first:].mean(axis=1)
  if 'pool_norm' in params:
    x = layer_norm(x, params['pool_norm'], eps)
  return x @ params['head']['kernel'] + params['head']['bias']


def random_params(shapes, seed=0):
  """Returns a tree of float32 arrays in which no parameter is idle."""
  random = np.random.default_rng(seed)

  def fill(tree, name):
    if isinstance(tree, dict):
      return {key: fill(tree[key], key) for key in tree}
    noise = 0.3 * random.standard_normal(tree.shape)
    return (noise + ('scale' in name)).astype(np.float32)

  return fill(shapes, '')


def _float64(tree):
  if isinstance(tree, dict):
    return {name: _float64(leaf) for name, leaf in tree.items()}
  return np.asarray(tree, np.float64)


# Losses and optimizers.


def log_softmax(logits):
  return np.log(softmax(np.asarray(logits, np.float64)))


def cross_entropy(logits, targets, label_smoothing=0.0):
  """Mean over images, in nats; a share of each target is spread evenly."""
  targets = np.asarray(targets, np.float64)
  even = np.full_like(targets, 1 / targets.shape[1])
  targets = (1 - label_smoothing) * targets + label_smoothing * even
  return -(targets * log_softmax(logits)).sum(axis=1).mean()


def adamw(p, grads, rates, *, b1, b2, decay, eps=1e-8):
  """Loshchilov & Hutter 2017, arXiv:1711.05101: p after all the gradients."""
  m, v = np.zeros_like(p), np.zeros_like(p)
  for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    p = p - rate * (direction + decay * p)
  return p


def sgd(p, grads, rates, *, momentum, decay):
  """Heavy ball with L2: the decay is part of the gradient."""
  m = np.zeros_like(p)
  for g, rate in zip(grads, rates, strict=True):
    m = momentum * m + g + decay * p
    p = p - rate * m
  return p


# Learned steps, float64. Esser et al. 2020 (LSQ), section 2; the zero point as
# in LSQ+ (Bhalgat et al. 2020, section 3) with the offset -s * round(z).


def lsq(x, step, zero, first, last):
  """Returns (x^, dx^/dx, dx^/dstep, dx^/dzero), element by element."""
  x, step = np.asarray(x, np.float64), np.asarray(step, np.float64)
  zero = np.clip(np.round(np.asarray(zero, np.float64)), first, last)
  v = x / step + zero
  near = np.round(np.clip(v, first, last))
  inside = (first <= v) & (v <= last)
  of_step = np.where(inside, near - zero - x / step, near - zero)
  of_zero = np.where(inside, 0.0, -step)
  return step * (near - zero), inside.astype(float), of_step, of_zero


def statsq(w, bits):
  """Returns (w^, dw^/dw) of OFQ's kernels (Liu et al. 2023, section 4.1)."""
  w = np.asarray(w, np.float64)
  s, n = 2 * np.abs(w).mean(axis=0, keepdims=True), 2 ** (bits - 1)
  c = np.clip(w / s, -1, 1 - 1e-6)
  return s * (np.round(c * n - 0.5) + 0.5) / n, (np.abs(w / s) <= 1) * 1.0


def near_boundary(w, bits, reach):
  """Which weights OFQ's annealing trains (same paper), one after the other."""
  w = np.asarray(w, np.float64)
  n, found = 2 ** (bits - 1), np.zeros(w.shape, bool)
  for i, o in np.ndindex(w.shape):
    s = 2 * np.abs(w[:, o]).mean()
    u = np.clip(w[i, o] / s, -1, 1 - 1e-6) * n - 0.5
    found[i, o] = min(abs(u - k - 0.5) for k in range(-n - 1, n)) <= reach
  return found


# Nagel et al. 2022, arXiv:2203.11086, section 4.1.


def dampening(w, step, bits, of=None):
  """Returns |w^ - clip(w)|^2 where w^ is that of the weights `of`."""
  w, most = np.asarray(w, np.float64), 2 ** (bits - 1)
  of = w if of is None else np.asarray(of, np.float64)
  level = step * np.round(np.clip(of / step, -most, most - 1))
  return ((level - np.clip(w, -most * step, (most - 1) * step)) ** 2).sum()


def rectify(x, gamma, beta):
  """Returns Q-ViT's rectified queries [b, n, k, dim]; gamma, beta [k, 1]."""
  out = np.empty_like(x)
  for b in range(x.shape[0]):
    for k in range(x.shape[2]):
      head = x[b, :, k]
      size = np.sqrt(head.var() + 1e-5)
      out[b, :, k] = (head - head.mean() + beta[k]) / (gamma[k] * size)
  return out


# Distillation: Hinton et al. 2015, arXiv:1503.02531.


def soft_distillation(logits, teacher, temperature):
  """Returns T^2 KL(teacher || student), averaged over images."""
  p, q = (
    softmax(x.astype(np.float64) / temperature) for x in (teacher, logits)
  )
  return temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()


# Q-ViT's DGD: Li et al. 2022, arXiv:2210.06707.


def map_distance(x, teacher):
  """Returns sum over heads of |G_T - G|, averaged over images; [b, n, k, d]."""
  total = 0.0
  for image in range(len(x)):
    for head in range(x.shape[2]):
      a, b = (z[image, :, head].astype(np.float64) for z in (x, teacher))
      maps = [z @ z.T / np.linalg.norm(z @ z.T) for z in (a, b)]
      total += np.linalg.norm(maps[1] - maps[0])
  return total / len(x)


def lora_kernel(w, a, b, scale, m=None):
  """W + scale * a b; with lengths m, each column scaled to its own (DoRA)."""
  w, a, b = (np.asarray(x, np.float64) for x in (w, a, b))
  w = w + scale * (a @ b)
  if m is None:
    return w
  return w * (np.asarray(m, np.float64) / np.linalg.norm(w, axis=0))


def lora_gradients(x, w, a, b, scale, g, m=None):
  """Gradients of sum(g * x W') for x, a, b and, under DoRA, m.

  The lengths of the columns count as constants (DoRA, section 4.3).
  """
  x, w, a, b, g = (np.asarray(v, np.float64) for v in (x, w, a, b, g))
  merged = w + scale * (a @ b)
  found = {}
  if m is not None:
    norm = np.linalg.norm(merged, axis=0)
    found['m'] = (g * (x @ merged)).sum(axis=0) / norm
    g = g * (m / norm)
  found['x'] = g @ merged.T
  found['a'] = scale * x.T @ (g @ b.T)
  found['b'] = scale * (x @ a).T @ g
  return found


def nearest_of_rank(w, rank):
  """The matrix of that rank with the least squared error (Eckart-Young)."""
  u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
  return (u[:, :rank] * s[:rank]) @ v[:rank]
