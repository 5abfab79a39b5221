"""Fits one file's tensors into the places of our model.

Every name and shape is compared first; only then are the tensors read, one at
a time, so that no second copy of the file lies in memory.
"""

import math
import re

import numpy as np

from qvit_jax.errors import WeightsError
from qvit_jax.store.entries import refuse
from qvit_jax.weights import adapt, positions
from qvit_jax.weights.compare import Comparison
from qvit_jax.weights.keymap import KINDS, as_tokens, collapse
from qvit_jax.weights.layout import EPSILON, Row
from qvit_jax.weights.report import Report

_VARIANCE = re.compile(r'^batch_stats/.*/var$')


class Import(Comparison):
  """One import: compares everything first, then reads."""

  def run(self) -> tuple[dict[str, np.ndarray], Report]:
    """Returns our path -> array, and the report.

    Raises:
      WeightsError: Something does not fit, or is not finite.
    """
    self.compare()
    return self._read(), self.report

  def _read(self) -> dict[str, np.ndarray]:
    """Reads every tensor once."""
    readers: dict[str, list[tuple[Row, str]]] = {}
    for name, (row, theirs) in self.ours.items():
      readers.setdefault(theirs, []).append((row, name))
    taken: dict[str, np.ndarray] = {}
    bad = []
    for theirs, rows in readers.items():
      with np.errstate(over='ignore'):  # becomes infinite, said below
        values = self.source.entries[theirs].read().astype(np.float32)
      if not np.isfinite(values).all():
        bad.append(theirs)
        continue
      for row, ours in rows:
        # A copy, so that the tensor itself can go.
        taken[ours] = np.ascontiguousarray(self._convert(row, ours, values))
    if bad:
      raise WeightsError(
        f'weights {self.source.title}: infinite or NaN values in '
        f'{", ".join(collapse(bad))}; give other weights'
      )
    self._check_constants()
    self._shift_variances(taken)
    if 'pos_embed' in taken:
      taken['pos_embed'] = self._positions(taken['pos_embed'])
    taken.pop('cls', None) if 'cls' not in self.wanted else None
    for name in self.report.zeros:
      taken[name] = np.zeros(self.wanted[name].shape, np.float32)
    other = {*self.report.adapted, *self.report.zeros}
    self.report.matched += [name for name in taken if name not in other]
    return {name: taken[name] for name in self.wanted if name in taken}

  def _check_constants(self) -> None:
    """Compares what follows from the shape; half precision is only said."""
    if not (self.names and self.names.constants):
      return
    compute = dict(self.names.layout.constants)
    _, heads, dim = self.wanted['encoder/block_00/attn/query/kernel'].shape
    rounded = []
    for name, (template, _) in self.names.constants.items():
      wanted = compute[template](heads, dim)
      found = self.source.entries[name].read().astype(np.float32)
      if found.shape != wanted.shape or not np.allclose(
        found, wanted, rtol=2**-8, atol=0
      ):  # fmt: skip
        refuse(
          self.source.title,
          f'{name} is not what {heads} heads of {dim} channels have '
          f'({str(found.ravel()[:4].tolist())[1:-1]} ... of shape '
          f'{list(found.shape)}, not {str(wanted[:4].tolist())[1:-1]} ... of '
          f'{list(wanted.shape)})',
          'set model.heads to the heads of these weights, or give others',
        )
      if not np.array_equal(found, wanted):
        rounded.append(name)
    if rounded:
      self.report.notes.append(
        f'{", ".join(collapse(rounded))} rounded there, exact here'
      )

  def _shift_variances(self, taken: dict[str, np.ndarray]) -> None:
    """Makes variances hold what another epsilon adds to them."""
    names = [name for name in taken if _VARIANCE.search(name)]
    bad = [self.ours[name][1] for name in names if (taken[name] < 0).any()]
    if bad:
      raise WeightsError(
        f'weights {self.source.title}: negative variances in '
        f'{", ".join(collapse(bad[:4]))}; give other weights'
      )
    there = self.source.facts.get('batch_norm_eps', EPSILON)
    if there == EPSILON:
      return
    for name in names:
      taken[name] = (taken[name] + np.float64(there - EPSILON)).astype(
        np.float32
      )
      self._note_adapted(
        name, f'holds the epsilon of {there:g} there, beyond {EPSILON:g} here',
        taken[name].shape,
      )  # fmt: skip

  def _convert(self, row: Row, ours: str, values: np.ndarray) -> np.ndarray:
    if row.part is not None:
      size = values.shape[0] // row.parts
      values = values[row.part * size : (row.part + 1) * size]
    if ours in ('pos_embed', 'cls'):
      return values.reshape(as_tokens(row, values.shape))
    if ours == 'patch_embed/kernel':
      return self._patch(KINDS[row.kind].forward(values, values.shape))
    return KINDS[row.kind].forward(values, self.wanted[ours].shape)

  def _patch(self, kernel: np.ndarray) -> np.ndarray:
    here = self.wanted['patch_embed/kernel'].shape
    done = []
    before = kernel.shape
    if kernel.shape[2] != here[2]:
      # A grey image is three equal channels: their kernels add up.
      kernel = kernel.sum(axis=2, keepdims=True)
      done.append('3 channels summed to 1')
    if kernel.shape[0] != here[0]:
      done.append(
        f'patch {kernel.shape[0]} -> {here[0]} px (pseudo-inverse resize)'
      )
      kernel = adapt.resize_patch(kernel, here[0])
    if done:
      self._note_adapted('patch_embed/kernel', ', '.join(done), before)
    return kernel

  def _note_adapted(self, ours: str, how: str, before) -> None:
    self.report.adapted[ours] = how
    self.report.mis_shaped[ours] = (
      f'{list(before)} -> {list(self.wanted[ours].shape)}'
    )

  def _resize_method(self, has_registers: bool) -> str:
    if self.names is None:
      return 'timm'
    layout = self.names.layout
    return (has_registers and layout.resize_with_registers) or layout.resize

  def _positions(self, values: np.ndarray) -> np.ndarray:
    """Returns positions for the model's tokens and grid."""
    there, here = self.tokens()
    count = self.wanted['pos_embed'].shape[1] - here.cls - here.registers
    slots = self.find_slots()
    values, done = positions.fit_positions(
      values, slots, there, here, size=math.isqrt(count),
      method=self._resize_method(there.registers > 0),
    )  # fmt: skip
    if done:
      self._note_adapted('pos_embed', ', '.join(done), self.shape('pos_embed'))
    told = self.told_grid()
    if told and slots.grid != told:
      self.report.notes.append(
        f'config.json tells {told[0]} x {told[1]} patches, the file has '
        '{} x {}, which counts'.format(*slots.grid)
      )
    return values
