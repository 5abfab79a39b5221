"""The README's commands, one after the other, in an empty folder."""

import re

import pytest

from qvit_jax.api import cli
from tests.config.test_commands import ROOT, commands

# What needs the network, data of one's own, or hours.
LEFT_OUT = re.compile(r'hf://|DIR|IMAGES|FILE|runs/tuned|runs/mine|scaling_law|'
                      r'vit_l_|vgg11|mobilenet')  # fmt: skip
# Enough to have a checkpoint, and every row once.
SHORT = {
  'train': ['--config.train.steps=20', '--config.eval.every=20',
            '--config.eval.num_examples=60'],
  'ptq': ['--config.ptq.rounds=2', '--config.ptq.calibration_examples=32'],
  'sensitivity': ['--config.ptq.sensitivity_examples=16'],
}  # fmt: skip


@pytest.mark.slow
def test_commands_of_the_readme_end_well_and_name_a_config_once(
  tmp_path, monkeypatch, capsys
):
  for name in ('configs', 'qvit_jax'):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.argv', ['main.py'])
  seen, count = set(), 0
  text = (ROOT / 'README.md').read_text()
  # The first one goes on behind the install on a line of its own.
  first = re.search(r'^python main\.py [^\n]+$', text, re.MULTILINE)[0]
  for argv in [first.split()[1:], *commands(text)]:
    if LEFT_OUT.search(' '.join(argv)):
      continue
    flags = dict(arg.lstrip('-').partition('=')[::2] for arg in argv[1:])
    mode, workdir = flags.get('mode', 'train'), flags.get('workdir')
    # Only the first command of a run names a config.
    assert ('config' in flags) == (mode == 'train'), argv
    if ' '.join(argv) in seen:
      continue
    seen.add(' '.join(argv))
    more = SHORT.get(mode, [])
    if mode == 'ptq' and 'w4a4' not in ' '.join(argv) and (
      'tune' not in ' '.join(argv)
    ):  # fmt: skip
      more = [*more, "--config.ptq.rows=('fp32','int8_static','w4a4')"]
    code = cli.main([*argv, *more])
    said = capsys.readouterr()
    assert code == 0, (argv, said.err)
    assert workdir is None or (tmp_path / workdir).is_dir()
    count += 1
  assert count > 15
