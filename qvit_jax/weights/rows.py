"""Rows that layouts of vision transformers have in common."""

from qvit_jax.weights.layout import Row

BLOCK = 'encoder/block_{i}/'
PARTS = ('query', 'key', 'value')


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a LayerNorm in PyTorch's names."""
  return (
    Row(f'{ours}/scale', f'{theirs}.weight', 'vector'),
    Row(f'{ours}/bias', f'{theirs}.bias', 'vector'),
  )


def linear(ours: str, theirs: str, kind: str = 'linear') -> tuple[Row, ...]:
  """Returns the rows of a layer in PyTorch's names; `kind` as of `Row`."""
  return (
    Row(f'{ours}/kernel', f'{theirs}.weight', kind),
    Row(f'{ours}/bias', f'{theirs}.bias', 'vector'),
  )


def fused(
  weight: str, bias: str, ours: str = f'{BLOCK}attn'
) -> tuple[Row, ...]:
  """Returns query, key and value as the thirds of one tensor."""
  rows = []
  for part, name in enumerate(PARTS):
    rows += [
      Row(f'{ours}/{name}/kernel', weight, 'linear', part),
      Row(f'{ours}/{name}/bias', bias, 'vector', part),
    ]
  return tuple(rows)


# What Facebook's releases have behind their tokens.
FACEBOOK = (
    *linear('patch_embed', 'patch_embed.proj', 'conv'),
    *norm(BLOCK + 'norm1', 'blocks.{i}.norm1'),
    *fused('blocks.{i}.attn.qkv.weight', 'blocks.{i}.attn.qkv.bias'),
    *linear(BLOCK + 'attn/out', 'blocks.{i}.attn.proj', 'linear_in2'),
    Row(BLOCK + 'scale1', 'blocks.{i}.ls1.gamma', 'vector'),
    *norm(BLOCK + 'norm2', 'blocks.{i}.norm2'),
    *linear(BLOCK + 'mlp/fc1', 'blocks.{i}.mlp.fc1'),
    *linear(BLOCK + 'mlp/fc2', 'blocks.{i}.mlp.fc2'),
    Row(BLOCK + 'scale2', 'blocks.{i}.ls2.gamma', 'vector'),
    *norm('encoder/norm', 'norm'),
    *linear('head', 'head'),
)  # fmt: skip


def gated(theirs: str) -> tuple[Row, ...]:
  """Returns gate and first layer of a SwiGLU as the halves of one layer."""
  rows = []
  for part, name in enumerate(('gate', 'fc1')):
    ours = f'{BLOCK}mlp/{name}'
    rows += [
      Row(f'{ours}/kernel', f'{theirs}.weight', 'linear', part, 2),
      Row(f'{ours}/bias', f'{theirs}.bias', 'vector', part, 2),
    ]
  return tuple(rows)


def without_first(rows: tuple[Row, ...]) -> tuple[Row, ...]:
  """Returns rows without those of the MLP's first layer."""
  return tuple(
    row for row in rows if not row.ours.startswith(f'{BLOCK}mlp/fc1/')
  )


def without_mlp(rows: tuple[Row, ...]) -> tuple[Row, ...]:
  """Returns rows without those of the MLP's layers."""
  return tuple(row for row in rows if not row.ours.startswith(f'{BLOCK}mlp/'))
