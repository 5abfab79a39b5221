"""The one reader of what we wrote: kinds, facts, damage of files of ours."""

import json

import numpy as np
import pytest

from qvit_jax import weights
from qvit_jax.errors import CheckpointError, WeightsError
from qvit_jax.store import adapters, runs, tensors

CONFIG = {
  'data': {'mean': [0.3] * 3, 'std': [0.4] * 3, 'resize': 'bicubic'},
  'model': {'image_size': 8},
}
FACTS = {
  'architecture': {'name': 'vit', 'width': 4},
  'base': '0123456789abcdef',
  'class_names': ['cat', 'owl'],
  'config': CONFIG,
  'plan': ['head float -'],
  'step': 7,
}


@pytest.fixture
def adapter(tmp_path):
  path = tmp_path / 'adapters' / 'mine.safetensors'
  arrays = {'lora': {'head': {'a': np.arange(6, dtype=np.float32)}}}
  adapters.save(path, arrays, FACTS)
  return path


def test_an_adapter_says_what_it_is(adapter):
  run = runs.open_run(adapter)
  assert (run.kind, run.step) == ('adapter', 7)
  assert run.origin == f'adapter mine of {adapter.parent}'
  assert run.class_names == ['cat', 'owl']
  assert run.preprocessing == {
    'mean': [0.3] * 3,
    'std': [0.4] * 3,
    'resize': 'bicubic',
    'image_size': 8,
  }
  np.testing.assert_array_equal(run.read_adapters()['lora/head/a'], range(6))
  with pytest.raises(CheckpointError, match='holds adapters alone'):
    run.check_whole()


def test_every_flipped_bit_of_a_file_of_ours_is_found(adapter):
  """Or changes nothing of what is read."""
  content = adapter.read_bytes()
  expected = runs.open_run(adapter)
  arrays = expected.read_adapters()
  found = 0
  for position in range(len(content)):
    bad = bytearray(content)
    bad[position] ^= 1 << position % 8
    adapter.write_bytes(bad)
    try:
      run = runs.open_adapter(adapter)
      again = run.read_adapters()
    except (CheckpointError, WeightsError) as error:
      assert '\n' not in str(error)  # noqa: PT017
      found += 1
      continue
    assert run.facts == expected.facts
    assert again.keys() == arrays.keys()
    for name, values in arrays.items():
      np.testing.assert_array_equal(again[name], values)
  assert found > 0.9 * len(content)


def test_a_file_older_than_the_digest_opens(adapter):
  texts = tensors.read_metadata(adapter)
  arrays, _ = tensors.read_described(adapter, adapters.KEY)
  del texts['qvit_jax_sha256']
  tensors.save_tensors(arrays, adapter, form='safetensors', metadata=texts)
  np.testing.assert_array_equal(
    runs.open_run(adapter).read_adapters()['lora/head/a'], range(6)
  )


def test_an_adapter_is_no_weights(adapter):
  with pytest.raises(WeightsError, match='it is an adapter.*merge_lora'):
    weights.load_weights(str(adapter), {'head': {'kernel': np.zeros(2)}})


def test_kinds_are_told_by_content(adapter, tmp_path):
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'text').write_text('hello')
  kinds = {'run': 'run', 'text': '', 'nothing': ''}
  assert {n: runs.kind_of(tmp_path / n) for n in kinds} == kinds
  assert runs.kind_of(adapter) == 'adapter'
  assert runs.kind_of('') == ''


@pytest.mark.parametrize(
  ('file', 'text'),
  [
    ('results.json', None), ('results.json', '{'), ('results.json', '[]'),
    ('config.json', '{"a":'), ('metrics.jsonl', '{"split": "eval"}\n{"spl'),
  ],
)  # fmt: skip
def test_results_that_cannot_be_read_are_one_line(tmp_path, file, text):
  (tmp_path / 'results.json').write_text(json.dumps({'baseline': {'top1': 1}}))
  assert runs.finished(tmp_path).row == {'top1': 1}
  (tmp_path / file).unlink(missing_ok=True)
  if text is not None:
    (tmp_path / file).write_text(text)
  with pytest.raises(CheckpointError, match='holds no results') as error:
    runs.finished(tmp_path)
  assert '\n' not in str(error.value)
