"""What --mode=benchmark writes; no time is judged."""

import json
import time

import pytest

from qvit_jax import modes
from qvit_jax.evaluation import timing


def test_spread_gives_median_and_outer_deciles():
  spread = timing.spread([float(x) for x in range(1, 12)])
  assert spread == {'median': 6.0, 'p10': 2.0, 'p90': 10.0}


def test_ratio_is_formed_round_by_round():
  ratio = timing.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])
  assert ratio['median'] == 2.0
  assert ratio['p90'] == pytest.approx(2.8)


def test_candidates_take_turns():
  calls = []

  def call(name):
    calls.append(name)
    time.sleep(0.03 if name == 'b' else 0)

  timing.interleave(
    {name: (lambda name=name: call(name)) for name in 'ab'}, rounds=3
  )
  # Warmed up, looked at, then three rounds; a short one is warmed in each.
  assert ''.join(calls) == 'ab' * 2 + 'aab' * 3


@pytest.mark.slow
def test_benchmark_measures_the_model_beside_its_twins(
  digits_config, tmp_path, capsys
):
  digits_config.quant.recipe = 'lsq'
  modes.run('benchmark', digits_config, str(tmp_path))
  result = json.loads((tmp_path / 'benchmark.json').read_text())
  for part in ('train', 'inference'):
    assert set(result[part]['candidates']) == {'model', 'float', 'aqt'}
    for candidate in result[part]['candidates'].values():
      assert candidate['milliseconds']['median'] > 0
      assert candidate['compile_seconds'] > 0
      assert candidate['memory_bytes']['peak'] > 0
      assert candidate['share_of_bf16_peak'] is None  # a CPU's is not known
    samples = result[part]['samples_seconds']
    ratio = result[part]['ratios']['model_to_float']
    assert ratio == timing.ratio(samples['model'], samples['float'])
    assert len(samples['model']) == result['rounds'] == 15
  rate = result['train']['candidates']['model']['images_per_second']
  batch = digits_config.train.batch_size
  milliseconds = result['train']['candidates']['model']['milliseconds']
  assert rate == pytest.approx(1e3 * batch / milliseconds['median'])
  assert result['size_bytes']['model'] < result['size_bytes']['float']
  printed = capsys.readouterr().out
  assert 'train model_to_float' in printed and 'train aqt_to_float' in printed


def test_benchmark_of_a_float_model_has_no_twin(digits_config, tmp_path):
  modes.run('benchmark', digits_config, str(tmp_path))
  result = json.loads((tmp_path / 'benchmark.json').read_text())
  assert set(result['train']['candidates']) == {'model'}
  assert set(result['train']['ratios']) == {'data_rate'}


def test_benchmark_of_a_probe_says_what_kept_features_save(
  digits_config, tmp_path, capsys
):
  digits_config.train.trainable = ('params/head',)
  modes.run('benchmark', digits_config, str(tmp_path))
  result = json.loads((tmp_path / 'benchmark.json').read_text())['train']
  assert set(result['candidates']) == {'model', 'recomputed'}
  samples = result['samples_seconds']
  assert result['ratios']['recomputed_to_model'] == timing.ratio(
    samples['recomputed'], samples['model']
  )
  losses = result['first_losses']
  assert losses['model'] == pytest.approx(losses['recomputed'], rel=1e-6)
  printed = capsys.readouterr().out
  assert 'train recomputed_to_model: ' in printed
  assert f'model {losses["model"]:.6f}, recomputed' in printed
  rates = [
    result['candidates'][name]['model_flops_per_second']
    / result['candidates'][name]['images_per_second']
    for name in ('model', 'recomputed')
  ]
  macs = 4 * 48 * 16 + 5 * 16 * 16 * 4 + 2 * 5 * 5 * 16 + 5 * 16 * 32 * 2
  assert rates == pytest.approx([160 * 6, 160 * 6 + 2 * macs])
