"""Which of timm's vision transformers fit, by the shapes of its registry.

timm and PyTorch are no requirements of ours: without them this is skipped.

  pip install torch timm
  pytest tests/weights/test_timm.py -m slow -s
"""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from qvit_jax import tree
from qvit_jax.errors import ExportError, QvitError
from qvit_jax.models import architecture, build_model
from qvit_jax.store.entries import Entry, Source
from qvit_jax.weights import (
  eva_arguments,
  timm_arguments,
  timm_names,
  translate,
)
from qvit_jax.weights.fit import Import
from qvit_jax.weights.keymap import recognise
from tests.weights.test_foreign_forms import OPTIONS, pairwise, random_model
from tests.weights.test_weights import shapes_of

FITTING = 160  # of the 230 names of timm 1.0.31; the README lists them by kind
# Regex of an error of ours, or of what timm's model says of itself -> a word.
REASONS = {
    'relative positions': r'rel_pos|relative_position',
    'a convolutional stem': r'backbone|patch_embed\.(conv|proj)\.\d|stem',
    'another attention pooling': r'attn_pool|prefix tokens',
    'a norm of the patches': r'patch_embed\.norm',
    'rotary positions': r'EvaBlock|rope|gamma_1|missing pos_embed',
    'another activation': r'^activation',
    'another block': r'^block|unknown tensor .*attn',
    'another patch embedding': r'embedder|video|patch_generator',
}  # fmt: skip


@pytest.fixture(scope='module')
def timm():
  """The library; its torchvision may lack its compiled operators."""
  torch = pytest.importorskip('torch', reason='timm needs PyTorch')
  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    library = torch.library.Library('torchvision', 'DEF')
    for operator in ('nms', 'qnms'):
      library.define(f'{operator}(Tensor a, Tensor b, float c) -> Tensor')
  except ImportError:
    pass
  return pytest.importorskip('timm', reason='timm is not installed')


def fields_of(model, shapes):
  """Returns the fields of `config.model` that a user would set."""
  blocks = [k for k in shapes if k.startswith('blocks.0.')]
  patch, width = shapes['patch_embed.proj.weight'][2:], model.embed_dim
  size = model.patch_embed.img_size[0] // patch[0] * patch[0]
  registers = [shapes[k][1] for k in ('reg_token', 'dist_token') if k in shapes]
  pool = 'patch_mean' if 'cls_token' in shapes else 'mean'
  pool = {'token': 'token', 'map': 'attention'}.get(
    getattr(model, 'global_pool', 'token'), pool
  )
  return dict(
    patch=patch[0], width=width, depth=1, image_size=size,
    heads=model.blocks[0].attn.num_heads,
    mlp_dim=shapes['blocks.0.mlp.fc2.weight'][1],
    activation='swiglu' if is_gated(shapes) else 'gelu',
    num_classes=shapes.get('head.weight', (5,))[0], pool=pool,
    registers=sum(registers),
    norm_after_pool='fc_norm.weight' in shapes,
    layer_scale=float(any(re.search('ls1|gamma_1', k) for k in blocks)),
    position='learned' if 'pos_embed' in shapes else 'rope',
    qk_norm=any('q_norm' in k for k in blocks), norm_eps=1e-6,
    pre_norm='norm_pre.weight' in shapes,
    last_norm=bool({'norm.weight', 'fc_norm.weight'} & shapes.keys()),
  )  # fmt: skip


def is_gated(shapes):
  """Whether the MLP is a SwiGLU: two first layers, or one that holds both."""
  first = shapes.get('blocks.0.mlp.fc1.weight')
  last = shapes['blocks.0.mlp.fc2.weight']
  return first is None or first[0] == 2 * last[1]


def name_of(activation):
  """Returns our name of one of torch's or timm's activations, or None."""
  kind = type(activation).__name__
  if kind == 'GELU' and activation.approximate == 'none':
    return 'gelu'
  return {
    'GELU': 'gelu_tanh', 'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu',
    'SiLU': 'swiglu',
  }.get(kind)  # fmt: skip


def is_dinov3(model):
  """Whether the rotary positions of timm's Eva are those of DINOv3."""
  return (
    type(model.rope).__name__ == 'RotaryEmbeddingDinoV3'
    and (model.rope.temperature, model.rope.rotate_half) == (100, True)
    and model.rope.normalize_coords == 'separate'
  )


def problem_of(model):
  """Returns '' where the first block and the rest fit, else what is wrong."""
  shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  shapes = {
    k: v for k, v in shapes.items() if not re.match(r'blocks\.[1-9]', k)
  }
  try:
    fields = fields_of(model, shapes)
  except (AttributeError, KeyError, IndexError, TypeError) as error:
    return f'block {error} {" ".join(shapes)}'
  config = common.get_config()
  config.model.update(fields)
  entries = {
    name: Entry(shape, np.dtype('float32'), lambda s=shape: np.broadcast_to(
      np.float32(0), s)) for name, shape in shapes.items()
  }  # fmt: skip
  names = recognise(list(entries))
  if names is None:
    return 'nobody we know ' + ' '.join(shapes)
  try:
    _, report = Import(
      Source(entries, 'x'), tree.flatten(shapes_of(config)), names
    ).run()
  except QvitError as error:
    return str(error)
  assert bool(report.reinitialised) == ('head.weight' not in shapes)
  block = type(model.blocks[0]).__name__
  if block == 'EvaBlock' and not is_dinov3(model):
    return 'other rope'
  if block not in ('Block', 'EvaBlock'):
    return f'block {block}'
  kind = getattr(model.blocks[0].mlp, 'act', None)
  if name_of(kind) is None:
    return f'activation {kind}'
  if getattr(model, 'global_pool', 'token') not in ('token', 'avg', 'map'):
    return f'pooling {model.global_pool}'
  return ''


def reason_of(problem):
  for word, pattern in REASONS.items():
    if re.search(pattern, problem):
      return word
  return problem[:200]


@pytest.mark.slow
def test_the_registry_by_shapes(timm):
  import torch

  names = [n for n in timm.list_models() if n.startswith(('vit_', 'deit'))]
  fitting, others = [], collections.defaultdict(list)
  alike = set()
  for name in names:
    with torch.device('meta'):
      model = timm.create_model(name)
    problem = problem_of(model)
    if re.search(r'^(block \w+$|other rope|activation|pooling)', problem):
      alike.add(name)
    if problem:
      others[reason_of(problem)].append(name)
      continue
    fitting.append(name)
    # What no shape tells is told by the name.
    kind = name_of(model.blocks[0].mlp.act)
    assert kind in (timm_names.activation(name), 'swiglu'), name
    heads = model.blocks[0].attn.num_heads
    assert timm_names.heads(name, model.embed_dim) == heads, name
  print(f'\n{len(fitting)} of {len(names)} fit:', *fitting)
  for word, refused in others.items():
    print(f'{len(refused)} {word}:', *refused)
  assert len(fitting) == FITTING
  assert set(others) <= set(REASONS)
  # What no shape tells is known by the name that a config.json gives.
  known = {name for name in names if timm_names.computes_otherwise(name)}
  assert alike and alike <= known and not known & {*fitting}


EVA = {
    'pool': ('token', 'mean', 'patch_mean'), 'norm_after_pool': (False, True),
    'registers': (0, 3), 'layer_scale': (0.0, 1.0), 'qk_norm': (False, True),
    'class_position': (True,), 'qkv_bias': (True, False), 'pre_norm': (False,),
    'activation': ('gelu', 'swiglu'), 'last_norm': (True,),
    'position': ('rope',),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  'case', [*pairwise(OPTIONS), *pairwise(EVA)], ids=str
)
def test_the_library_computes_what_we_export(case, timm):
  import torch

  config, params = random_model(case)
  if case['position'] == 'rope':  # whose keys have no bias
    for name in params:
      if name.endswith('key/bias'):
        params[name] = np.zeros_like(params[name])
  layout = 'timm' if case['position'] == 'learned' else 'timm_eva'
  try:
    tensors = translate(tree.nest(params), layout, config.model.pool)
  except ExportError:
    pytest.skip('timm has no such model')
  kind, arguments = timm.models.VisionTransformer, timm_arguments
  if layout == 'timm_eva':
    kind, arguments = timm.models.eva.Eva, eva_arguments
  arguments = arguments(architecture(config), tensors)
  if 'mlp_layer' in arguments:
    assert arguments['mlp_layer'] == 'timm.layers.SwiGLUPacked'
    arguments['mlp_layer'] = timm.layers.SwiGLUPacked
  model = kind(**arguments).eval()
  model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
  images = images.astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
  variables = {'params': tree.nest(jax.tree.map(jnp.asarray, params))}
  ours = build_model(config).apply(variables, jnp.asarray(images))
  scale = np.abs(theirs).max()
  assert math.isfinite(scale)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)
