"""Weights of other libraries: read, adapted, written back."""

from qvit_jax.weights.builders import (
  clip_arguments,
  eva_arguments,
  how_to_build,
  timm_arguments,
)
from qvit_jax.weights.containers import open_source
from qvit_jax.weights.facts import is_reordered, one_form, order_of
from qvit_jax.weights.hf_config import hf_config, hf_processor, how_to_open
from qvit_jax.weights.hub import HubUnreachableError
from qvit_jax.weights.layout import full_path
from qvit_jax.weights.layouts import LAYOUTS
from qvit_jax.weights.load import (
  load_weights,
  open_named,
  read_weights,
  resolve,
)
from qvit_jax.weights.report import Report
from qvit_jax.weights.save import layout_of, translate
from qvit_jax.weights.tell import Told, tell
from qvit_jax.weights.timm_names import usual_heads

__all__ = [
    'LAYOUTS', 'HubUnreachableError', 'Report', 'Told', 'clip_arguments',
    'eva_arguments', 'full_path', 'hf_config', 'hf_processor', 'how_to_build',
    'how_to_open', 'is_reordered',
    'layout_of', 'load_weights', 'one_form', 'open_named', 'open_source',
    'order_of', 'read_weights', 'resolve', 'tell', 'timm_arguments',
    'translate', 'usual_heads',
]  # fmt: skip
