"""What is behind an import takes today's backbones as it takes the ViT."""

import json

import pytest

from qvit_jax import modes
from tests.conftest import make_digits_config
from tests.small_models import CLIP, DINOV3_PLUS, SIGLIP

KINDS = {'clip': CLIP, 'siglip': SIGLIP, 'dinov3': DINOV3_PLUS}


def small(kind, **fields):
  config = make_digits_config()
  config.model.update(KINDS[kind])
  config.train.update(steps=2, batch_size=16)
  config.eval.update(every=0, num_examples=120)
  for name, value in fields.items():
    section, field = name.split('__')
    config[section][field] = value
  return config


def results(workdir):
  return json.loads((workdir / 'results.json').read_text())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """{kind: the workdir of its float run}, each trained once."""
  found = {}
  for kind in KINDS:
    found[kind] = tmp_path_factory.mktemp(kind)
    modes.run('train', small(kind), str(found[kind]))
  return found


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_adapters_of_one_step_merge_into_the_same_function(
  kind, trained, tmp_path, capsys
):
  adapted = {
    'lora__rank': 2, 'lora__targets': ('all',), 'lora__init': 'pissa',
    'weights__path': str(trained[kind]), 'train__steps': 1,
  }  # fmt: skip
  modes.run('train', small(kind, **adapted), str(tmp_path))
  capsys.readouterr()
  modes.run('merge_lora', small(kind, **adapted), str(tmp_path))
  text = capsys.readouterr().out
  apart = float(text.partition('random images within ')[2].split()[0])
  assert apart < 1e-5
  lines = [x for x in text.splitlines() if x.startswith(('before', 'after'))]
  assert len({line.split('top1 ')[1].split()[0] for line in lines}) == 1


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_qvit_compares_maps_with_a_teacher_of_the_same_kind(
  kind, trained, tmp_path
):
  taught = {
    'quant__recipe': 'qvit', 'quant__attention': 'a4', 'quant__dgd': 1.0,
    'train__teacher': str(trained[kind]), 'train__feature_weight': 1.0,
  }  # fmt: skip
  modes.run('train', small(kind, **taught), str(tmp_path))
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  losses = [line for line in lines if line['split'] == 'train']
  assert losses[-1]['dgd_loss'] > 0
  assert losses[-1]['feature_loss'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_sensitivity_ranks_every_product(kind, trained, tmp_path):
  config = small(kind, checkpoint__path=str(trained[kind]))
  config.ptq.sensitivity_examples = 32
  modes.run('sensitivity', config, str(tmp_path))
  text = (tmp_path / 'sensitivity.json').read_text()
  wanted = {
    'clip': ['mlp/fc1'], 'siglip': ['pool/attn/qk', 'pool/mlp/fc2'],
    'dinov3': ['mlp/gate', 'mlp/fc1', 'mlp/fc2'],
  }[kind]  # fmt: skip
  assert all(name in text for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_table_has_the_rows_and_their_files_compute_them(
  kind, trained, tmp_path
):
  config = small(kind, checkpoint__path=str(trained[kind]))
  config.ptq.update(rows=('fp32', 'int8_static', 'w4a8', 'w4a4'))
  config.ptq.calibration_examples = 32
  modes.run('ptq', config, str(tmp_path))
  rows = {row['name']: row for row in results(tmp_path)['rows']}
  assert [*rows] == ['fp32', 'int8_static', 'w4a8', 'w4a4']
  # Two steps teach nothing: logits, not classes, are compared.
  assert rows['int8_static']['sqnr_db'] > 20
  assert rows['w4a8']['sqnr_db'] > 8
  for name in ('int8_static', 'w4a4'):
    packed = small(
      kind, quant__recipe='ptq',
      checkpoint__path=str(tmp_path / 'artifacts' / f'{name}.safetensors'),
    )  # fmt: skip
    place = tmp_path / name
    modes.run('eval', packed, str(place))
    evaluated = results(place)['baseline']
    assert evaluated['top1'] == rows[name]['top1']
    assert evaluated['execution'] == 'integer'
