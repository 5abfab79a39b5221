"""log.tracker='wandb': the real library, offline."""

import json
import struct
import sys

import pytest

from qvit_jax import modes
from qvit_jax.errors import ConfigError
from tests.conftest import make_digits_config

wandb = pytest.importorskip('wandb', reason='requirements-wandb.txt')


def config_of(steps):
  config = make_digits_config()
  config.train.steps = steps
  config.eval.update(every=2, num_examples=60)
  config.log.update(every=1, tracker='wandb')
  return config


def records(folder):
  """Yields the records of an offline run, as the library stores them.

  A log of LevelDB behind 7 bytes: blocks of 32 KiB of chunks, each with a
  checksum, a length and whether it is whole (1), first, middle or last.
  """
  from wandb.proto import wandb_internal_pb2

  (path,) = folder.glob('*.wandb')
  content, at, parts = path.read_bytes(), 7, b''
  while at + 7 <= len(content):
    left = 2**15 - at % 2**15
    if left < 7:  # too little for another chunk
      at += left
      continue
    _, length, kind = struct.unpack_from('<IHB', content, at)
    parts += content[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(parts)
      yield record
      parts = b''


def history(folder):
  """Returns {step: {name: value}} of what was logged."""
  found = {}
  for record in records(folder):
    if record.WhichOneof('record_type') == 'history':
      row = {
        '.'.join(item.nested_key) or item.key: json.loads(item.value_json)
        for item in record.history.item
      }
      found.setdefault(record.history.step.num, {}).update(row)
  return found


def test_a_run_and_its_resume_are_one_run_there(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  workdir = tmp_path / 'run'
  modes.run('train', config_of(4), str(workdir))
  (first,) = (workdir / 'wandb').glob('offline-run-*')
  rows = history(first)
  assert {1, 2, 3, 4} <= set(rows)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  for line in map(json.loads, lines):
    split, step = line.pop('split'), line.pop('step')
    for name, value in line.items():
      assert rows[step][f'{split}/{name}'] == pytest.approx(value)
  image = {name.partition('confusion.')[2]: x for name, x in rows[4].items()}
  assert image['_type'] == 'image-file'
  assert (first / 'files' / image['path']).is_file()
  (start,) = (
    r.run for r in records(first) if r.WhichOneof('record_type') == 'run'
  )
  stored = {
    item.key: json.loads(item.value_json) for item in start.config.update
  }
  assert stored['train']['steps'] == 4
  modes.run('train', config_of(6), str(workdir))
  (second,) = set((workdir / 'wandb').glob('offline-run-*')) - {first}
  (again,) = (
    r.run for r in records(second) if r.WhichOneof('record_type') == 'run'
  )
  name = json.loads((workdir / 'wandb.json').read_text())['id']
  assert (start.run_id, again.run_id) == (name, name)
  assert {5, 6} <= set(history(second))


def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ConfigError, match='requirements-wandb.txt') as error:
    modes.run('train', config_of(2), str(tmp_path / 'run'))
  assert '\n' not in str(error.value)
