"""Writes predictions.html: what a model says of images, to look at.

One page without scripts and addresses. Where the images lie in folders that are
named as classes it shows what was mistaken for what, the worst first.
"""

import base64
import collections
import heapq
import io
import os
import pathlib
from collections.abc import Collection
from typing import Any

from PIL import Image

from qvit_jax.data import decode
from qvit_jax.report import html
from qvit_jax.store import files

MOST = 200  # images of a page; as many mistakes
_PAIRS = 50  # of classes that are confused
_THUMBNAIL = 112  # px of the longer side
_BARS = 3  # classes of an image


class Gallery:
  """What the page shows of a stream of answers; it holds no image."""

  def __init__(
    self, root: str, class_names: Collection[str], *, max_pixels: int
  ):
    """Starts it.

    Args:
      root: The folder that names of files count from.
      class_names: Folders of these names are labels.
      max_pixels: `data.max_pixels`.
    """
    self._root, self._classes = root, frozenset(class_names)
    self._max_pixels = max_pixels
    self._first: list[dict[str, Any]] = []
    self._wrong: list[tuple[float, int, dict[str, Any]]] = []
    self._pairs: collections.Counter = collections.Counter()
    self.count = self.labelled = self.right = 0

  def add(self, answer: dict[str, Any]) -> None:
    """Takes a line of predictions.jsonl."""
    self.count += 1
    label = self._label(answer['file'])
    answer = {**answer, 'label': label}
    if len(self._first) < MOST:
      self._first.append(answer)
    if not label:
      return
    self.labelled += 1
    best = answer['classes'][0]
    if best['name'] == label:
      self.right += 1
      return
    self._pairs[label, best['name']] += 1
    entry = best['probability'], -self.count, answer  # ties: the earlier one
    push = heapq.heappush if len(self._wrong) < MOST else heapq.heappushpop
    push(self._wrong, entry)

  def _label(self, name: str) -> str:
    """Returns the class that an image's folder names; '' where it is none."""
    folder = os.path.basename(os.path.dirname(name))
    return folder if folder in self._classes else ''

  def write(self, path: pathlib.Path, title: str) -> None:
    """Writes the page.

    Args:
      path: Of the file.
      title: Which model answered.
    """
    wrong = [answer for *_, answer in sorted(self._wrong, reverse=True)]
    content = html.render(
      'predictions.html.jinja', title=title, count=self.count,
      labelled=self.labelled, right=self.right,
      pairs=self._pairs.most_common(_PAIRS), all_pairs=len(self._pairs),
      mistakes=sum(self._pairs.values()), wrong=map(self._card, wrong),
      shown=len(wrong), first=map(self._card, self._first),
      firsts=len(self._first),
    )  # fmt: skip
    files.write_text(path, content)

  def _card(self, answer: dict[str, Any]) -> dict[str, Any]:
    bars = [
      {'name': one['name'], 'percent': 100 * one['probability']}
      for one in answer['classes'][:_BARS]
    ]
    picture = self._thumbnail(os.path.join(self._root, answer['file']))
    return {
      'file': answer['file'], 'label': answer['label'], 'bars': bars,
      'picture': picture,
    }  # fmt: skip

  def _thumbnail(self, path: str) -> str:
    """Returns a small JPEG as text; '' where the file has gone meanwhile."""
    try:
      pixels = decode.read_image(
        path, max_pixels=self._max_pixels, size=_THUMBNAIL
      )
    except decode.BadImageError:
      return ''
    small, content = Image.fromarray(pixels), io.BytesIO()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(content, 'JPEG', quality=80)
    return base64.b64encode(content.getvalue()).decode()
