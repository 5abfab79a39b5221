"""Pytrees seen as flat maps from 'a/b/c' paths to leaves."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def path_string(path) -> str:
  """Returns a JAX key path as 'a/b/c'."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  )


def flatten(tree: PyTree) -> dict[str, Any]:
  """Returns {'a/b/c': leaf}, in the tree's own order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_string(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any], like: PyTree) -> PyTree:
  """Returns a tree built like `like` with the leaves of `flat`, by path."""
  treedef = jax.tree_util.tree_structure(like)
  return jax.tree_util.tree_unflatten(
    treedef, [flat[path] for path in flatten(like)]
  )


def nest(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns nested dicts: {'a/b': 1} becomes {'a': {'b': 1}}."""
  nested: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return nested


def num_elements(tree: PyTree) -> int:
  """Returns the count of numbers in all leaves."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
  """Returns the bytes of all leaves, counted from bits (int4 is half a byte).

  `.nbytes` counts an int4 element as one byte, which is not what is stored.
  """
  bits = 0
  for leaf in jax.tree.leaves(tree):
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    width = 4 if 'int4' in dtype.name else np.dtype(dtype).itemsize * 8
    bits += math.prod(leaf.shape) * width
  return -(-bits // 8)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
  """Returns whether no float leaf holds an infinity or NaN."""
  floats = [
    x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def not_finite(tree: PyTree) -> list[str]:
  """Returns the paths of float leaves with an infinity or NaN, in order.

  Asks leaf by leaf; `all_finite` is the quick question.
  """
  return [
    path
    for path, x in flatten(tree).items()
    if jnp.issubdtype(x.dtype, jnp.floating) and not jnp.isfinite(x).all()
  ]


def first_not_finite(tree: PyTree) -> jax.Array:
  """Returns the place of the first float leaf with an infinity or NaN.

  float32, for use under jit; -1 where there is none, or where no leaf is whole:
  then it is not one of them that broke the others.
  """
  bad = jnp.stack([~jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
  place = jnp.where(bad.any() & ~bad.all(), bad.argmax(), -1)
  return place.astype(jnp.float32)


def describe(leaf) -> str:
  """Returns 'float32[16, 8]' for an array or a ShapeDtypeStruct."""
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
  """Returns one line for each path that is missing, extra or different."""
  lines = [f'missing {path}' for path in wanted if path not in found]
  lines += [f'unexpected {path}' for path in found if path not in wanted]
  lines += [
    f'{path}: {found[path]} instead of {wanted[path]}'
    for path in wanted
    if path in found and wanted[path] != found[path]
  ]
  return lines
