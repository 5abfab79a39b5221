"""Says what an adapter of the library PEFT is; it is no model."""

import pathlib
from typing import Any

from qvit_jax.errors import WeightsError
from qvit_jax.store.entries import parse_json, printable

CONFIG = 'adapter_config.json'
WEIGHTS = ('adapter_model.safetensors', 'adapter_model.bin')
MERGE = (
  'merge it into its base where PEFT is installed (PeftModel.from_pretrained('
  'BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER)) and give FOLDER'
)


def refuse_adapter(folder: pathlib.Path) -> None:
  """Raises WeightsError: it is an adapter, of which base, and what to do."""
  config: Any = {}
  if (folder / CONFIG).is_file():
    config = parse_json(folder / CONFIG, (folder / CONFIG).read_bytes())
  config = config if isinstance(config, dict) else {}
  base = config.get('base_model_name_or_path')
  kind = str(config.get('peft_type') or 'LORA')[:20]
  of = f'of {str(base)[:100]!r}' if base else 'of a base that it does not name'
  raise WeightsError(
    printable(
      f'weights {folder}: it is a PEFT adapter ({kind}) {of}, not a model; '
      f'{MERGE}'
    )
  )
