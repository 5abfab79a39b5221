"""How a convolution slides over an image."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Window:
  """How a convolution slides over an image.

  Attributes:
    size: Height and width of the kernel.
    strides: Of both axes.
    padding: (before, after) of both axes, in pixels; zeros are put there.
    groups: Into which channels are cut; each has a kernel of its own.
  """

  size: tuple[int, int]
  strides: tuple[int, int] = (1, 1)
  padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
  groups: int = 1

  def kernel_shape(self, matrix: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns [kh, kw, i, o] of a kernel matrix."""
    return (*self.size, matrix[0] // math.prod(self.size), matrix[1])

  def out_size(self, height: int, width: int) -> tuple[int, int]:
    """Returns height and width of the result."""
    return tuple(
      (n + sum(pad) - k) // s + 1
      for n, k, s, pad in zip(
        (height, width), self.size, self.strides, self.padding, strict=True
      )
    )
