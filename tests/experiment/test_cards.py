"""The model card beside an export or a table of rows."""

import json

import numpy as np
import pytest
import yaml

import qvit_jax
from qvit_jax import modes
from tests.conftest import make_digits_config


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A float run and a run of 8 bits, both evaluated, and a table."""
  place = tmp_path_factory.mktemp('made')
  for recipe in ('none', 'aqt'):
    config = make_digits_config()
    config.train.update(steps=3)
    config.eval.update(every=3, num_examples=50)
    config.quant.recipe = recipe
    if recipe == 'aqt':
      config.quant.default = 'w8a8'
    modes.run('train', config, str(place / recipe))
  config = make_digits_config()
  config.checkpoint.path = str(place / 'none')
  config.eval.num_examples = 50
  config.ptq.update(rows=('fp32', 'int8_weight_only'), rounds=2,
                    calibration_examples=16, latency_batch=4)  # fmt: skip
  modes.run('ptq', config, str(place / 'table'))
  return place


def parts(folder):
  """Returns the front matter and the rest of a README.md."""
  _, front, rest = (folder / 'README.md').read_text().split('---\n', 2)
  return yaml.safe_load(front), rest


def export(run, recipe, **fields):
  config = make_digits_config()
  config.quant.recipe = recipe
  if recipe == 'aqt':
    config.quant.default = 'w8a8'
  config.export.update(fields)
  modes.run('export', config, str(run))
  return run / 'export'


def check_row(row, front, rest):
  (found,) = (one for one in front['model-index'] if one['name'] == row['name'])
  (result,) = found['results']
  assert result['metrics'] == [{'type': 'accuracy', 'value': row['top1']}]
  assert result['dataset']['split'] == row['split']
  (line,) = (x for x in rest.splitlines() if x.startswith(f'| {row["name"]} |'))
  cells = [cell.strip() for cell in line.split('|')]
  assert float(cells[3]) == row['top1']
  assert float(cells[5]) == row['loss']
  assert int(cells[6].replace(',', '')) == row['size_bytes']
  count, data = row['num_examples'], row['data']['name']
  assert f'Of {count} images of the split {row["split"]!r} of {data}' in rest


def test_the_card_of_a_packed_run_has_the_numbers_of_its_results(made):
  run = made / 'aqt'
  folder = export(run, 'aqt', format='packed')
  front, rest = parts(folder)
  row = json.loads((run / 'results.json').read_text())['baseline']
  check_row(row, front, rest)
  assert front['pipeline_tag'] == 'image-classification'
  assert 'quantized' in front['tags']
  assert front['datasets'] == ['digits']
  assert 'w8a8' in rest
  size = (folder / 'model.packed.safetensors').stat().st_size
  assert f'`model.packed.safetensors` ({size:,} bytes)' in rest
  # Its code runs as it stands.
  code = rest.split('```python\n')[1].split('```')[0]
  code = code.replace("load('", f"load('{folder}/")
  found = {'images': np.zeros((1, 8, 8, 3), np.uint8)}
  exec(code, found)
  assert found['logits'].shape == (1, 10)


def test_the_card_of_a_table_has_its_rows(made):
  front, rest = parts(made / 'table' / 'artifacts')
  results = json.loads((made / 'table' / 'results.json').read_text())
  for row in results['rows']:
    check_row(row, front, rest)
  assert 'images at once' in rest
  # And that of a file of the table its own.
  config = make_digits_config()
  config.quant.recipe = 'ptq'
  path = made / 'table' / 'artifacts' / 'int8_weight_only.safetensors'
  config.checkpoint.path = str(path)
  config.export.format = 'stablehlo'
  modes.run('export', config, str(made / 'one'))
  front, rest = parts(made / 'one' / 'export')
  check_row(results['rows'][1], front, rest)
  assert front['library_name'] == 'jax'
  assert len(front['model-index']) == 1


def test_a_folder_for_transformers_says_how_images_are_prepared(made):
  folder = export(made / 'none', 'none', layout='hf')
  names = {path.name for path in folder.iterdir()}
  assert names == {'README.md', 'config.json', 'model.safetensors',
                   'parity.json', 'preprocessor_config.json'}  # fmt: skip
  found = json.loads((folder / 'preprocessor_config.json').read_text())
  config = qvit_jax.load(made / 'none').config
  assert found['image_mean'] == list(config.data.mean)
  assert found['size'] == {'shortest_edge': config.model.image_size}
  front, rest = parts(folder)
  assert front['library_name'] == 'transformers'
  assert 'AutoModelForImageClassification.from_pretrained' in rest
  # What belongs to it goes when another form takes its place.
  export(made / 'none', 'none', layout='timm')
  names = {path.name for path in folder.iterdir()}
  assert names == {'README.md', 'model.safetensors', 'parity.json'}


def test_what_nobody_evaluated_has_no_numbers(made):
  (made / 'none' / 'results.json').rename(made / 'none' / 'gone.json')
  try:
    front, rest = parts(export(made / 'none', 'none', layout='timm'))
  finally:
    (made / 'none' / 'gone.json').rename(made / 'none' / 'results.json')
  assert 'model-index' not in front
  assert 'No numbers of just this model' in rest


def test_float_parameters_of_a_rounded_run_have_not_its_numbers(made):
  front, rest = parts(export(made / 'aqt', 'aqt', layout='timm'))
  assert 'model-index' not in front
  assert 'quantized' not in front['tags']
  said = 'the float parameters of a model that was trained with 8 layers w8a8'
  assert said in rest
