"""Classes of weights of others: by name, or not at all."""

import json

import numpy as np
import pytest
import safetensors.numpy

from qvit_jax import modes
from qvit_jax.errors import WeightsError
from qvit_jax.experiment.foreign import put_classes_in_order
from qvit_jax.weights import Report
from tests.conftest import make_digits_config

ORDER = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)  # output i of the file is of this digit


def head(names=None, classes=3):
  """Returns (arrays, report) as an import gives them: output i is all i."""
  values = np.arange(classes, dtype=np.float32)
  taken = {'head/kernel': np.tile(values, (4, 1)), 'head/bias': values.copy()}
  report = Report('a file', 'timm')
  report.facts = {'class_names': names} if names else {}
  return taken, report


def arranged(names, here, *, must_agree, classes=3):
  taken, report = head(names, classes)
  config = make_digits_config()
  put_classes_in_order(taken, report, config, here, must_agree=must_agree)
  np.testing.assert_array_equal(taken['head/kernel'][0], taken['head/bias'])
  return list(taken['head/bias']), report.notes


@pytest.mark.parametrize('must_agree', [True, False])
def test_outputs_follow_the_names(must_agree):
  names, here = ['dog', 'cat', 'cow'], ('cat', 'cow', 'dog')
  order, notes = arranged(names, here, must_agree=must_agree)
  assert order == [1, 2, 0]
  assert 'by the names beside the weights' in notes[0]
  order, notes = arranged(names, ('cow', 'dog'), must_agree=must_agree)
  assert order == [2, 0, 1]  # the class that the data does not have is last
  assert arranged(names, tuple(names), must_agree=must_agree)[1] == []
  assert arranged(None, here, must_agree=must_agree) == ([0, 1, 2], [])


def test_other_names_are_refused_where_labels_count():
  names, here = ['dog', 'cat', 'cow'], ('cat', 'cow', 'hen')
  with pytest.raises(WeightsError, match="no class is 'hen' there") as error:
    arranged(names, here, must_agree=True)
  assert '\n' not in str(error.value)
  order, notes = arranged(names, here, must_agree=False)
  assert order == [0, 1, 2]
  assert "no class is 'hen' there" in notes[0]


def test_names_of_another_number_of_outputs_are_not_used():
  order, notes = arranged(['b', 'a'], ('a', 'b', 'c'), must_agree=True)
  assert order == [0, 1, 2]
  assert 'not those of the 3 outputs' in notes[0]


def write(folder, order, names):
  """Writes a classifier of digits whose output i is of the digit order[i]."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  tensors = {'cls_token': rng.normal(size=(1, 1, 16)),
             'pos_embed': rng.normal(size=(1, 5, 16)),
             'patch_embed.proj.weight': rng.normal(size=(16, 3, 4, 4)),
             'patch_embed.proj.bias': np.zeros(16)}  # fmt: skip
  for norm in ('blocks.0.norm1', 'blocks.0.norm2', 'norm'):
    tensors |= {f'{norm}.weight': np.ones(16), f'{norm}.bias': np.zeros(16)}
  for name, o, i in (('attn.qkv', 48, 16), ('attn.proj', 16, 16),
                     ('mlp.fc1', 32, 16), ('mlp.fc2', 16, 32)):  # fmt: skip
    tensors[f'blocks.0.{name}.weight'] = rng.normal(size=(o, i))
    tensors[f'blocks.0.{name}.bias'] = np.zeros(o)
  tensors['head.weight'] = rng.normal(size=(10, 16))[list(order)]
  tensors['head.bias'] = np.zeros(10)
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()},
    folder / 'model.safetensors',
  )
  text = json.dumps({'label_names': names})
  (folder / 'config.json').write_text(text)
  return str(folder)


def test_an_evaluation_does_not_depend_on_the_order_of_the_outputs(tmp_path):
  losses = []
  for name, order in (('a', range(10)), ('b', ORDER)):
    config = make_digits_config()
    config.weights.path = write(
      tmp_path / name, order, [str(digit) for digit in order]
    )
    modes.run('eval', config, str(tmp_path / f'run_{name}'))
    results = json.loads((tmp_path / f'run_{name}/results.json').read_text())
    losses.append(results['baseline']['loss'])
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
  config.weights.path = write(tmp_path / 'c', ORDER, list('abcdefghij'))
  with pytest.raises(WeightsError, match="no class is '0' there"):
    modes.run('eval', config, str(tmp_path / 'run_c'))
