"""Mode `sites`: prints every product with its bits; makes no array."""

from typing import Any

from qvit_jax.experiment.model import Model
from qvit_jax.modes.session import say


def sites(config: Any, workdir: str) -> None:
  """Prints every quantizable product with its spec."""
  del workdir  # nothing is written
  model = Model(config)
  say(f'model  {model.title}')
  say(f'bits   {model.bits}')
  for line in model.adapter_lines():
    say(f'lora   {line}')
  say(model.plan.table())
