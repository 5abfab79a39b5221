"""Fits positions and patch kernels to other image and patch sizes.

All of it is linear, so each resize is one small matrix.
"""

import math

import numpy as np
from jaxtyping import Float


def _cubic(t: float, a: float) -> float:
  """Returns Keys' cubic kernel (1981, IEEE ASSP 29(6), eq. 4) at distance t."""
  t = abs(t)
  if t <= 1:
    return (a + 2) * t**3 - (a + 3) * t**2 + 1
  if t < 2:
    return a * (t**3 - 5 * t**2 + 8 * t - 4)
  return 0.0


def _antialiased(size: int, out: int) -> np.ndarray:
  """Bicubic (a = -1/2), widened when shrinking; weights outside are lost."""
  scale = max(size / out, 1.0)
  rows = np.zeros((out, size))
  for i in range(out):
    center = (i + 0.5) * size / out - 0.5
    rows[i] = [_cubic((j - center) / scale, -0.5) for j in range(size)]
  return rows / rows.sum(axis=1, keepdims=True)


def _interpolated(size: int, centers: np.ndarray) -> np.ndarray:
  """Bicubic (a = -3/4) at given places; the border repeats outwards."""
  rows = np.zeros((len(centers), size))
  for i, center in enumerate(centers):
    first = math.floor(center)
    for j in range(first - 1, first + 3):
      rows[i, min(max(j, 0), size - 1)] += _cubic(j - center, -0.75)
  return rows


def _torch(size: int, out: int) -> np.ndarray:
  return _interpolated(size, (np.arange(out) + 0.5) * size / out - 0.5)


def _torchvision(size: int, out: int) -> np.ndarray:
  step = (size - 1) / (out - 1) if out > 1 else 0.0
  return _interpolated(size, np.arange(out) * step)


def _dinov2(size: int, out: int) -> np.ndarray:
  return _interpolated(size, (np.arange(out) + 0.5) * size / (out + 0.1) - 0.5)


def _bilinear(size: int, out: int) -> np.ndarray:
  centers = (np.arange(out) + 0.5) * size / out - 0.5
  centers = np.clip(centers, 0, size - 1)
  low = np.minimum(np.floor(centers).astype(int), max(size - 2, 0))
  rows = np.zeros((out, size))
  rows[np.arange(out), low] += 1 - (centers - low)
  rows[np.arange(out), np.minimum(low + 1, size - 1)] += centers - low
  return rows


# How each library resizes positions; name: (matrix, what reports call it).
RESIZES = {
    'timm': (_antialiased, 'bicubic with antialias, as timm does'),
    'torch': (_torch, 'bicubic, as transformers does'),
    'torchvision': (_torchvision, 'bicubic with aligned corners, as '
                                  'torchvision does'),
    'bilinear': (_bilinear, 'bilinear, as timm reads npz'),
    'dinov2': (_dinov2, 'bicubic with an offset of 0.1, as DINOv2 does'),
}  # fmt: skip


def resize_positions(
  grid: Float[np.ndarray, 'n m d'], size: int, method: str
) -> Float[np.ndarray, 's s d']:
  """Returns a grid of positions resized to `size` x `size`.

  Args:
    grid: Positions of the patches, row by row.
    size: Patches on a side, wanted.
    method: Key of RESIZES.
  """
  matrix = RESIZES[method][0]
  rows, columns = matrix(grid.shape[0], size), matrix(grid.shape[1], size)
  out = np.einsum('ah,hwd,bw->abd', rows, grid.astype(np.float64), columns)
  return out.astype(grid.dtype)


def resize_patch(
  kernel: Float[np.ndarray, 'p p c d'], size: int
) -> Float[np.ndarray, 'q q c d']:
  """Returns the kernel for patches of `size` px that sees what the old saw.

  Of all kernels it is the one whose product with a bilinearly resized patch is
  nearest to the old product with the patch itself; equal when enlarging.

  Source: Beyer et al. 2022 (FlexiViT), arXiv:2212.08013, section 3.4, eq. 5.
  """
  old = kernel.shape[0]
  rows = _bilinear(old, size)
  both = np.kron(rows, rows)  # [size^2, old^2]
  flat = kernel.reshape(old * old, -1).astype(np.float64)
  out = np.linalg.pinv(both.T) @ flat
  return out.reshape(size, size, *kernel.shape[2:]).astype(kernel.dtype)
