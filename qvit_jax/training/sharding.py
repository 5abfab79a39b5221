"""The device mesh and where each array lies on it.

The batch is split over the axes `data` and `fsdp`; parameters and optimizer
state over `fsdp`, and along the axis that the model names for it over
`tensor`. Everything else is the compiler's business.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from qvit_jax import rules, tree
from qvit_jax.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))


def make_mesh(config, *, training: bool = True) -> jax.sharding.Mesh:
  """Returns the mesh that `config.mesh` describes, over all devices.

  Args:
    config: A validated config.
    training: Whether batches of training have to divide over it.

  Raises:
    ConfigError: The axes do not multiply to the device count, or a batch does
      not divide over them.
  """
  devices = jax.devices()
  data, fsdp, tensor = (config.mesh[axis] for axis in AXES)
  data = data or max(1, len(devices) // (fsdp * tensor))
  if data * fsdp * tensor != len(devices):
    raise ConfigError(
      f'mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} does not '
      f'make the {len(devices)} devices that are here; change one of them '
      '(mesh.data=0 takes what is left)'
    )
  batches = [('eval.batch_size', config.eval.batch_size, 1)]
  if training:
    train = config.train
    batches.append(('train.batch_size', train.batch_size, train.accumulate))
  for field, batch, parts in batches:
    if batch % (data * fsdp * parts):
      by = f'mesh.data x mesh.fsdp = {data * fsdp}'
      if parts > 1:
        by += f' times train.accumulate={parts}'
      raise ConfigError(
        f'{field}={batch} is not divisible by {by}; choose a multiple of '
        f'{data * fsdp * parts}'
      )
  # Auto axes: Flax layers leave the placement of results to the compiler.
  return jax.sharding.Mesh(
    np.asarray(devices).reshape(data, fsdp, tensor), AXES
  )


def _bytes(leaf: Any) -> int:
  # A key's dtype is no NumPy one, but knows its size.
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def infer(
  shapes: Any,
  mesh: jax.sharding.Mesh,
  tensor_rules: Sequence[tuple[str, int]],
  min_mib: float,
) -> tuple[Any, list[str]]:
  """Returns the sharding of every array and what stayed whole although asked.

  Args:
    shapes: Tree of shapes; paths end alike in parameters and optimizer state.
    mesh: The devices.
    tensor_rules: (path regex, axis to split over `tensor`) pairs.
    min_mib: `mesh.fsdp_min_mib`: smaller arrays, in MiB of the whole array,
      are not split over `fsdp`.

  Returns:
    A tree of NamedSharding, and one line for each array that an axis of the
    mesh could not split, with one for all that are too small for `fsdp`.
  """
  flat = tree.flatten(shapes)
  axis_of = {}
  if mesh.shape['tensor'] > 1:
    axis_of = rules.match(tensor_rules, flat, field='tensor rules of the model')
  specs, notes, small = {}, [], []
  for path, leaf in flat.items():
    spec: list[Any] = [None] * len(leaf.shape)
    axis = axis_of.get(path)
    if axis is not None and axis < len(spec):
      if leaf.shape[axis] % mesh.shape['tensor'] == 0:
        spec[axis] = 'tensor'
      else:
        notes.append(
          f'{path} {tree.describe(leaf)}: axis {axis} is not divisible by '
          f'mesh.tensor={mesh.shape["tensor"]}, every device keeps all of it'
        )
    size = _bytes(leaf)
    if mesh.shape['fsdp'] > 1 and size < min_mib * 2**20:
      small.append(size)
    elif mesh.shape['fsdp'] > 1:
      fits = [
          i for i, size in enumerate(leaf.shape)
          if spec[i] is None and size % mesh.shape['fsdp'] == 0
      ]  # fmt: skip
      if fits:
        spec[max(fits, key=lambda i: leaf.shape[i])] = 'fsdp'
      else:
        notes.append(
          f'{path} {tree.describe(leaf)}: no axis is divisible by '
          f'mesh.fsdp={mesh.shape["fsdp"]}, every device keeps all of it'
        )
    specs[path] = NamedSharding(mesh, PartitionSpec(*spec))
  if small:
    notes.append(
      f'{len(small)} of {len(flat)} arrays are smaller than '
      f'mesh.fsdp_min_mib={min_mib:g} ({sum(small) / 2**20:.1f} MiB in all), '
      'mesh.fsdp does not split them'
    )
  return tree.unflatten(specs, shapes), notes


def local_rows(mesh: jax.sharding.Mesh, batch: int) -> slice:
  """Returns the rows of a batch that this process' devices work on."""
  places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch,))
  starts, stops = zip(
    *(index[0].indices(batch)[:2] for index in places.values()), strict=True
  )
  return slice(min(starts), max(stops))


def place_batch(host: Any, mesh: jax.sharding.Mesh, batch: int, rows: slice):
  """Returns the batch on the devices; `host` holds this process' rows."""
  sharding = NamedSharding(mesh, BATCH)
  if jax.process_count() == 1:
    return jax.device_put(host, sharding)

  def place(array: np.ndarray):
    def part(index):
      start, stop, _ = index[0].indices(batch)
      return array[start - rows.start : stop - rows.start]

    shape = (batch, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(place, host)


def replicate(host: Any, mesh: jax.sharding.Mesh):
  """Returns host arrays as one copy on every device."""
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda array: jax.make_array_from_callback(
      array.shape, whole, lambda index: array[index]
    ),
    host,
  )


def is_same_everywhere(digest: str) -> bool:
  """Returns whether every process gives the same ASCII text."""
  if jax.process_count() == 1:
    return True
  own = hashlib.sha256(digest.encode()).digest()
  own = np.frombuffer(own, np.uint8)
  return bool((multihost_utils.process_allgather(own) == own).all())


def abstract(shapes: Any, shardings: Any) -> Any:
  """Returns the shapes with the places at which a restore shall put them."""
  return jax.tree.map(
    lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
    shapes,
    shardings,
  )
