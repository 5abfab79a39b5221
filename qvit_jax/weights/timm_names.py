"""What the names of timm's vision transformers say that no shape shows.

Found by building each model of timm 1.0.31; a test repeats it.
"""

import re

# Shapes of these fit, but they compute something else.
_OTHERWISE = {
  'norms behind the branches': '_rpn_',
  'other rotary positions': '_rope_|_pe_',
}
# Models with an activation that is not the usual one.
_ACTIVATIONS = {
    'gelu_tanh': 'base_patch32_siglip|giantopt_patch16_siglip|'
                 'so400m_patch16_siglip|large_patch16_siglip(_gap)?_512',
    'quick_gelu': 'quickgelu',
}  # fmt: skip
# Attention heads by width, and models that have others.
_HEADS = {
    192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 832: 13, 896: 14,
    1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16, 1792: 16,
    2432: 32, 4096: 32,
}  # fmt: skip
_OTHER_HEADS = {
  'vit_base_patch16_gap_224': 16,
  '_huge_plus_': 20,
  '_giantopt_|_gigantic_': 16,
}


def is_known(architecture: str) -> bool:
  """Returns whether a name is like those of timm's vision transformers."""
  return bool(re.match('(vit|deit3?|eva)_', architecture))


def computes_otherwise(architecture: str) -> str:
  """Returns what a model does that no shape shows, '' for nothing."""
  for what, pattern in _OTHERWISE.items():
    if re.search(pattern, architecture):
      return what
  return ''


def activation(architecture: str) -> str:
  """Returns the activation of a model, as `model.activation` names it."""
  for ours, pattern in _ACTIVATIONS.items():
    if re.search(pattern, architecture):
      return ours
  return 'gelu'


def usual_heads(width: int) -> int | None:
  """Returns how many heads most models of a width have; None: nobody knows."""
  return _HEADS.get(width)


def heads(architecture: str, width: int) -> int | None:
  """Returns the attention heads of a model; None where they are not known.

  Args:
    architecture: Its name.
    width: Channels of a token.
  """
  for pattern, count in _OTHER_HEADS.items():
    if re.search(pattern, architecture):
      return count
  return usual_heads(width)
