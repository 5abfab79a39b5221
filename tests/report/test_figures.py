"""Figures: what is drawn of a confusion matrix."""

import numpy as np

from qvit_jax.report import figures


def parts(figure):
  (axes,) = figure.axes
  labels = [text.get_text() for text in axes.get_yticklabels()]
  cells = {
    (round(text.get_position()[1]), round(text.get_position()[0])):
    text.get_text() for text in axes.texts
  }  # fmt: skip
  return axes, labels, cells


def test_a_confusion_matrix_has_names_and_counts():
  axes, labels, cells = parts(
    figures.named_confusion([[3, 1, 0], [0, 0, 0], [0, 2, 5]], ['cat', 'dog'])
  )
  assert labels == ['cat', 'dog', '2']
  assert cells == {(0, 0): '3', (0, 1): '1', (2, 1): '2', (2, 2): '5'}
  assert (axes.get_xlabel(), axes.get_ylabel()) == (
    'predicted class', 'true class',
  )  # fmt: skip
  shares = axes.images[0].get_array()
  np.testing.assert_allclose(shares[0], [0.75, 0.25, 0])
  np.testing.assert_allclose(shares[1], 0)  # a class without examples


def test_of_many_classes_those_are_drawn_that_are_confused():
  counts = np.diag(np.full(100, 9))
  counts[70, 3] = 2
  axes, labels, cells = parts(figures.named_confusion(counts, []))
  assert len(labels) == 25
  assert {'3', '70'} <= set(labels)
  assert axes.get_title() == 'the 25 of 100 classes confused most'
  at = labels.index('70'), labels.index('3')
  assert cells[at] == '2'
  # Of its whole class, whichever columns are shown.
  assert axes.images[0].get_array()[at] == 2 / 11


def test_pixels_of_a_confusion_matrix_are_those_of_an_image():
  image = figures.confusion_pixels([[1, 0], [1, 5]], ['a', 'b'])
  assert image.dtype == np.uint8
  assert image.shape == (1, 700, 750, 3)
  assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
