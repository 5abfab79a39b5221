"""Train, quantize and deploy image classifiers in JAX.

`load`, `quantize` and `Classifier` are all that a program needs; they come from
`qvit_jax.api`, which is imported when one of them is asked for.
"""

from typing import Any

__all__ = ['Classifier', 'load', 'quantize']


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from qvit_jax.api import classifier

  return getattr(classifier, name)
