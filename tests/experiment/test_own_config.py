"""A run, a packed file and an adapter bring the config that they are of."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qvit_jax import modes
from qvit_jax.config import resolve
from qvit_jax.experiment import own_config
from qvit_jax.store import tensors
from tests.conftest import make_digits_config


def config_of(**sections):
  config = make_digits_config()
  config.train.update(batch_size=16, steps=3)
  config.eval.update(every=3, num_examples=50)
  config.log.tensorboard = False
  for name, fields in sections.items():
    config[name].update(fields)
  return config


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run of 8 bits, packed too, and adapters on a float run."""
  place = tmp_path_factory.mktemp('made')
  config = config_of(quant={'recipe': 'aqt', 'default': 'w8a8'})
  modes.run('train', config, str(place / 'aqt'))
  config.export.format = 'packed'
  modes.run('export', config, str(place / 'aqt'))
  floats = config_of(quant={'recipe': 'none'})
  modes.run('train', floats, str(place / 'float'))
  floats.lora.update(rank=2, targets=('query', 'value'))
  floats.checkpoint.path = str(place / 'float')
  modes.run('train', floats, str(place / 'lora'))
  return place


def baseline(place):
  return json.loads((place / 'results.json').read_text())['baseline']


def packed_of(made):
  return made / 'aqt' / 'export' / 'model.packed.safetensors'


@pytest.mark.parametrize('name', ['aqt', 'float', 'lora'])
def test_a_run_is_evaluated_by_its_own_config(made, name, call_main, tmp_path):
  path = f'--config.checkpoint.path={made / name}'
  if name == 'lora':  # its checkpoint holds no kernels
    path = f'--config.checkpoint.path={made}/lora/adapters/adapter.safetensors'
  trained = baseline(made / name)
  done = call_main('--mode=eval', f'--workdir={tmp_path}', path)
  assert done.returncode == 0, done.stderr
  assert f'config    that of {"adapter" if name == "lora" else "step 3"}' in (
    done.stdout
  )
  found = baseline(tmp_path)
  for field in ('loss', 'top1', 'weight_bits', 'num_examples', 'split'):
    assert found[field] == trained[field]


def test_a_workdir_brings_its_run_and_flags_count_on_top(made, call_main):
  place = made / 'aqt'
  done = call_main(
    '--mode=eval', f'--workdir={place}', '--config.eval.num_examples=20'
  )
  assert done.returncode == 0, done.stderr
  assert f'config    that of {place}' in done.stdout
  assert baseline(place)['num_examples'] == 20


def test_a_training_goes_on_without_a_page(made, call_main, tmp_path):
  place = tmp_path / 'float'
  shutil.copytree(made / 'float', place)
  done = call_main(f'--workdir={place}', '--config.train.steps=4')
  assert done.returncode == 0, done.stderr
  lines = (place / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['step'] == 4
  # The best checkpoint may be of an earlier training: the last one goes on.
  stored = json.loads((place / 'config.json').read_text())
  stored['train']['steps'] = 5
  (place / 'config.json').write_text(json.dumps(stored))
  done = call_main(f'--workdir={place}')
  assert done.returncode == 0, done.stderr
  lines = (place / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['step'] == 5


@pytest.mark.parametrize('mode', ['ptq', 'sensitivity', 'export', 'sites'])
def test_other_modes_take_a_float_run(made, mode, call_main, tmp_path):
  flags = {
    'ptq': ("--config.ptq.rows=('fp32',)", '--config.ptq.rounds=2'),
    'sensitivity': ('--config.ptq.sensitivity_examples=8',
                    '--config.ptq.choices=("a8",)'),
    'export': ('--config.export.layout=timm',),
    'sites': (),
  }  # fmt: skip
  done = call_main(
    f'--mode={mode}', f'--workdir={tmp_path}',
    f'--config.checkpoint.path={made / "float"}', *flags[mode],
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'width 16, depth 1' in done.stdout or mode == 'sites'


def test_adapters_are_merged_by_their_own_config(made, call_main):
  done = call_main('--mode=merge_lora', f'--workdir={made / "lora"}')
  assert done.returncode == 0, done.stderr
  assert (made / 'lora' / 'merged').is_dir()


def test_a_packed_file_is_enough(made, call_main, tmp_path):
  rng = np.random.default_rng(0)
  for name in ('a', 'b'):
    pixels = rng.integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f'{name}.png')
  path = f'--config.checkpoint.path={packed_of(made)}'
  done = call_main(
    '--mode=predict', f'--workdir={tmp_path / "named"}', path,
    f'--config.eval.images={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / 'named' / 'predictions.jsonl').read_text().splitlines()
  assert len(lines) == 2
  done = call_main('--mode=eval', f'--workdir={tmp_path / "eval"}', path)
  assert done.returncode == 0, done.stderr
  assert baseline(tmp_path / 'eval')['weight_bits'] == 8
  # Of files that do not say it, the tensors tell what the model is.
  header, arrays = tensors.read_header(packed_of(made), 'qvit_jax'), {}
  arrays, _ = tensors.read_described(packed_of(made), 'qvit_jax')
  old = tmp_path / 'old.safetensors'
  tensors.save_described(arrays, old, 'qvit_jax', header | {'config': None})
  done = call_main(
    '--mode=eval', f'--workdir={tmp_path / "old"}',
    f'--config.checkpoint.path={old}', '--config.data.source=digits',
    '--config.eval.num_examples=50',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert baseline(tmp_path / 'old')['loss'] == pytest.approx(
    baseline(tmp_path / 'eval')['loss'], abs=0.5
  )


def test_what_a_page_says_otherwise_is_printed(made, capsys, tmp_path):
  config = config_of(quant={'recipe': 'aqt', 'default': 'w8a8'})
  config.checkpoint.path = str(made / 'aqt')
  modes.run('eval', config, str(tmp_path))
  assert 'config    ' not in capsys.readouterr().out
  config.data.mean = (0.1, 0.1, 0.1)
  modes.run('eval', config, str(tmp_path))
  lines = capsys.readouterr().out.splitlines()
  (line,) = [line for line in lines if line.startswith('config    ')]
  assert line.startswith('config    data.mean=[0.1, 0.1, 0.1], in step 3 of ')


@pytest.mark.parametrize(
  ('flags', 'parts'),
  [
    (['--mode=eval', '--workdir={made}/none'],
     ['no config was given', 'holds no run', '--config.checkpoint.path=']),
    (['--workdir={made}/none'], ['holds no run', 'set --config= to one of']),
    (['--mode=eval', '--workdir={made}/x',
      '--config.checkpoint.path={made}/none'], ['none']),
    (['--mode=eval', '--workdir={made}/x', '--config.model.depth=2',
      '--config.checkpoint.path={made}/aqt/export/model.packed.safetensors'],
     ['depth is 1 there, 2 here', 'leave --config and model.* out']),
    (['--mode=eval', '--workdir={made}/x', '--config.model.depth=2',
      '--config.checkpoint.path={made}/aqt'], ['depth is 1 there, 2 here']),
    (['--mode=evil', '--workdir={made}/aqt'], ['evil']),
    (['--mode=eval', '--workdir={made}/aqt', '--config.eval.top=1'],
     ['nearest field']),
  ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(flags, parts, made, call_main):
  done = call_main(*(flag.replace('{made}', str(made)) for flag in flags))
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  for part in parts:
    assert part in done.stderr


def test_a_run_of_a_newer_version_is_one_line(made):
  stored = resolve.to_json(config_of()) | {'future': {'field': 1}}
  with pytest.raises(resolve.ConfigError, match='future.field, which this one'):
    own_config.page_of(stored, 'runs/new')


def test_runs_are_compared_on_one_page(made, call_main, tmp_path):
  paths = (
    made / 'float', made / 'aqt', packed_of(made),
    made / 'lora' / 'adapters' / 'adapter.safetensors',
  )  # fmt: skip
  runs = ', '.join(f"'{path}'" for path in paths)
  done = call_main(
    '--mode=compare', f'--workdir={tmp_path}', f'--config.compare.runs=({runs})'
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'compare.json').read_text())
  assert [row['run'] for row in found['rows']] == list(map(str, paths))
  first, *others = found['rows']
  assert first['paired'] is None
  assert first['top1'] == baseline(made / 'float')['top1']
  assert first['loss'] == pytest.approx(baseline(made / 'float')['loss'])
  for row in others:
    moved = row['paired']['gained'] - row['paired']['lost']
    assert moved / 50 == pytest.approx(row['top1'] - first['top1'])
    low, high = row['top1_interval']
    assert low <= row['top1'] <= high
    assert row['latency_ms']['median'] > 0
  differing = {one['field']: one['values'] for one in found['differences']}
  assert differing['quant.recipe'] == ['none', 'aqt', 'ptq', 'none']
  assert 'model.width' not in differing
  assert [curve['run'] for curve in found['curves']] == [
    str(made / 'float'), str(made / 'aqt')
  ]  # fmt: skip
  page = (tmp_path / 'compare.html').read_text()
  for row in found['rows']:
    assert f'<th class="text">{row["run"]}</th>' in page
    assert f'{100 * row["top1"]:.2f}' in page
  assert '<svg' in page
  assert '<script' not in page
  assert 'http' not in page.replace('http-equiv', '')
  for bad in ('()', f"('{made}/aqt',)", f"('{made}/aqt', '{made}/aqt')"):
    done = call_main(
      '--mode=compare', f'--workdir={tmp_path}', f'--config.compare.runs={bad}'
    )
    assert done.returncode == 2
    assert 'two different runs or more' in done.stderr
  done = call_main(
    '--mode=compare', f'--workdir={tmp_path}',
    f"--config.compare.runs=('{made}/aqt', '{made}/none')",
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
