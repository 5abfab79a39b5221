"""Main directions of features."""

import numpy as np
from jaxtyping import Float


def principal_directions(
  features: Float[np.ndarray, 'm d'], share: float
) -> Float[np.ndarray, 'd n']:
  """Returns the fewest directions that hold a share of the variance.

  Args:
    features: One row for each image.
    share: 0 to 1.

  Returns:
    float32 [d, n], orthonormal columns, the largest variance first; n >= 1.
  """
  centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
  _, scales, rows = np.linalg.svd(centred, full_matrices=False)
  held = np.cumsum(scales**2)
  # Rounding must not ask for more directions than there are.
  count = 1 + int((held < share * held[-1] * (1 - 1e-12)).sum())
  return rows[:count].T.astype(np.float32)
