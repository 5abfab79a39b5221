"""Fetches hf://owner/name[@revision] from the Hugging Face hub."""

import dataclasses
import errno
import pathlib
import re

from qvit_jax.errors import WeightsError
from qvit_jax.store import files

PREFIX = 'hf://'
_SAFE = ('*.safetensors', '*.safetensors.index.json')
_PICKLED = ('pytorch_model*.bin', 'pytorch_model.bin.index.json')
_CONFIGS = (
  'config.json', 'preprocessor_config.json', 'adapter_config.json',
)  # fmt: skip
_TIMEOUT = 10.0  # seconds, for the question whether the hub is there


class HubUnreachableError(WeightsError):
  """The hub does not answer and the cache has nothing."""


@dataclasses.dataclass(frozen=True)
class Fetched:
  """A folder in the cache, and the address with the commit it is of."""

  folder: pathlib.Path
  pinned: str


def fetch(address: str) -> Fetched:
  """Returns the folder with the files of hf://owner/name[@revision].

  Safetensors are preferred; without network the cache is used.

  Raises:
    HubUnreachableError: No network and nothing cached.
    WeightsError: The address is malformed, or huggingface_hub is missing.
  """
  found = re.fullmatch(
    r'hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', address, re.ASCII
  )
  if not found:
    raise WeightsError(
      f'weights.path={address!r} is no address on the hub; write '
      'hf://OWNER/NAME or hf://OWNER/NAME@REVISION'
    )
  name, revision = found.groups()
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as error:
    raise WeightsError(
      f'weights.path={address!r} needs the package huggingface_hub; run pip '
      'install huggingface_hub, or download the files and give their folder'
    ) from error
  try:
    info = huggingface_hub.HfApi().model_info(
      name, revision=revision, timeout=_TIMEOUT
    )
    revision = info.sha
    has_safe = any(f.rfilename.endswith(_SAFE[0][1:]) for f in info.siblings)
    patterns = [*(_SAFE if has_safe else _PICKLED), *_CONFIGS]
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=patterns
    )
  except (
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
  ) as error:
    raise WeightsError(
      f'weights.path={address!r}: the hub has no such model or revision, or it '
      'is private; check the spelling, or log in with `hf auth login`'
    ) from error
  except Exception as error:
    # The HTTP library beneath goes by several names; a defect stays one.
    is_network = type(error).__module__.startswith(('httpx', 'requests'))
    if not (is_network or isinstance(error, OSError)):
      raise
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
      raise WeightsError(files.cannot_write('the cache', error)) from error
    folder = _cached(huggingface_hub, name, revision)
    if folder is None:
      raise HubUnreachableError(
        f'weights.path={address!r} cannot be fetched ({type(error).__name__}) '
        'and is not in the cache; on a machine with network download '
        f'model.safetensors and config.json of {name} from the Hugging Face '
        'hub, put them into one folder, and set --config.weights.path=FOLDER'
      ) from error
  return Fetched(
    pathlib.Path(folder), f'{PREFIX}{name}@{pathlib.Path(folder).name}'
  )


def _cached(huggingface_hub, name: str, revision: str | None) -> str | None:
  """Returns the cached folder, or None if it holds no weights."""
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, local_files_only=True
    )
  except OSError:  # LocalEntryNotFoundError is one
    return None
  endings = {path.suffix for path in pathlib.Path(folder).iterdir()}
  return folder if endings & {'.safetensors', '.bin'} else None
