"""What a run reports of a model: the rows of results.json."""

import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import jax

# Every row has every key; what was not measured is null.
_KEYS = (
    'name', 'split', 'data', 'method', 'weight_bits', 'act_bits', 'loss',
    'top1', 'top1_interval', 'top5', 'f1_macro', 'num_examples', 'size_bytes',
    'compression', 'bops', 'macs', 'latency_ms', 'images_per_second', 'speedup',
    'peak_memory_bytes', 'execution', 'why', 'per_class_top1', 'confusion',
    'agreement', 'sqnr_db', 'artifact_bytes', 'seconds', 'speedup_bf16',
    'collapsed', 'suspects', 'classes_predicted', 'sites',
    'engine', 'engines', 'paired',
)  # fmt: skip
# What the numbers of a row are of.
OF = ('split', 'data', 'num_examples')
_PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'aqtp', 'numpy',
)  # fmt: skip


def make_row(**measured: Any) -> dict[str, Any]:
  """Returns a row with what was measured, and null for the rest."""
  unknown = set(measured) - set(_KEYS)
  if unknown:
    raise TypeError(f'a row has no {sorted(unknown)}')
  return dict.fromkeys(_KEYS) | measured


def results(
  config: dict[str, Any], baseline: dict[str, Any], rows: list[dict]
) -> dict[str, Any]:
  """Returns the content of results.json.

  Raises:
    ValueError: The rows are not all of the same images.
  """
  subject = {key: baseline[key] for key in OF}
  for row in rows:
    if any(row[key] != subject[key] for key in OF):
      raise ValueError(f'row {row["name"]} is of other data than the baseline')
  return {
    'environment': environment(),
    'config_digest': config_digest(config),
    **subject,
    'baseline': baseline,
    'rows': rows,
  }


def config_digest(config: dict[str, Any]) -> str:
  """Returns the SHA-256 of the resolved config."""
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def environment() -> dict[str, Any]:
  """Returns versions and devices; no paths, no host name."""
  devices = jax.devices()
  return {
    'python': platform.python_version(),
    'platform': devices[0].platform,
    'device': devices[0].device_kind,
    'num_devices': len(devices),
    'num_processes': jax.process_count(),
    'packages': {name: importlib.metadata.version(name) for name in _PACKAGES},
  }
