"""Classes of weights of others, in the order of the data's classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qvit_jax import models, weights
from qvit_jax.errors import WeightsError
from qvit_jax.store.entries import printable


def put_classes_in_order(
  taken: dict[str, np.ndarray],
  report: weights.Report,
  config: Any,
  class_names: Sequence[str],
  *,
  must_agree: bool,
) -> None:
  """Reorders the head's outputs where the weights name their classes.

  The report says what was done.

  Args:
    taken: Our path to array; the head's are replaced.
    report: Of the import.
    config: Of the model.
    class_names: Of the data, by label.
    must_agree: Whether other names are an error; a training may start from a
      head of other classes.

  Raises:
    WeightsError: The names are others, so that labels mean nothing.
  """
  there, head = report.facts.get('class_names'), models.family(config).head
  paths = [f'{head}/{leaf}' for leaf in ('kernel', 'bias')]
  if not there or not all(path in taken for path in paths):
    return
  classes = taken[paths[1]].shape[0]
  if len(there) != classes:
    report.notes.append(
      f'the {len(there)} class names beside the weights are not those of the '
      f'{classes} outputs of the head, so they are not used'
    )
    return
  order, why = weights.order_of(there, class_names)
  if order is None and must_agree:
    raise WeightsError(
      printable(
        f'weights {report.source} were trained on other classes than those of '
        f'the data set: {why}; give the classes of the data set the names that '
        'stand beside the weights (id2label or label_names of config.json), or '
        'take those away if the order is the same'
      )
    )
  if order is None:
    report.notes.append(
      printable(
        f'the head was trained on other classes ({why}); it is where training '
        'starts, with the labels as they are there'
      )
    )
  elif order != list(range(classes)):
    for path in paths:
      taken[path] = np.ascontiguousarray(taken[path][..., order])
    report.notes.append(
      'the outputs of the head were put into the order of the classes of the '
      'data set, by the names beside the weights'
    )
