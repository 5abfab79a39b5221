"""Scikit-learn's 1,797 handwritten digits: real images, no download."""

import numpy as np
from sklearn import datasets, model_selection

EVAL_SIZE = 360  # a fifth, every class in proportion
NUM_CLASSES = 10


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns the fixed splits {'train', 'test'} of (images, labels).

  Images are uint8 [n, 8, 8, 3] (the grey value three times; the set's 0..16
  spread over 0..255), labels int32 [n]; 1,437 for training and 360 for test.
  """
  digits = datasets.load_digits()
  grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
  images = np.repeat(grey[..., None], 3, axis=-1)
  labels = digits.target.astype(np.int32)
  train_x, test_x, train_y, test_y = model_selection.train_test_split(
    images, labels, test_size=EVAL_SIZE, stratify=labels, random_state=0
  )
  return {'train': (train_x, train_y), 'test': (test_x, test_y)}
