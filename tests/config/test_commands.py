"""Every command that a page of text shows is accepted, mode and all."""

import pathlib
import re
import shlex
import sys

import pytest

from configs import common
from qvit_jax.api import cli
from qvit_jax.config import resolve
from qvit_jax.errors import ConfigError
from qvit_jax.modes import MODES, runner

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
  ROOT / 'README.md',
  *sorted((ROOT / 'docs').glob('*.md')),
  *sorted((ROOT / 'configs').glob('*.py')),
]


def commands(text):
  """Yields the arguments of each `python main.py` of a text."""
  text = re.sub(r'\\\n', ' ', text)
  # In prose a command goes on over lines until its backtick.
  prose = re.findall(r'`(python main\.py [^`]+)`', text)
  lines = re.findall(r'^ *(python main\.py [^`\n]+)$', text, re.M)
  for line in [*prose, *lines]:
    argv = shlex.split(line.replace('\n', ' '))[1:]
    # Words in capitals stand for names that the reader puts there.
    if '--help' in argv or re.search(r'NAME\.py|\.\.\.| \[', line):
      continue
    yield [re.sub(r'recipe=RECIPE$', 'recipe=lsq', a) for a in argv]


def with_page(argv):
  """Returns a command that relies on a run with a page in place of it."""
  if any(a.startswith('--config=') for a in argv):
    return argv
  assert any(a.startswith('--mode=') for a in argv), argv
  added = ['--config=configs/vit_ti_digits_w4a4.py']
  takes_float = {'--mode=ptq', '--mode=sensitivity', '--mode=merge_lora'}
  if '.safetensors' in ' '.join(argv):
    added.append('--config.quant.recipe=ptq')
  elif takes_float & {*argv}:
    added.append('--config.quant.recipe=none')
  if '--mode=merge_lora' in argv:
    added += ['--config.lora.rank=4', "--config.lora.targets=('all',)"]
  return [*argv, *added]


def resolved(argv, monkeypatch):
  argv = with_page(argv)
  monkeypatch.setattr(sys, 'argv', argv)
  monkeypatch.chdir(ROOT)
  config, page, overrides, flags, _ = cli._parse(argv)
  context = runner.context_of(MODES[flags.mode], config)
  return resolve.resolve(config, context, overrides=overrides, page=page)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_the_commands_shown_are_accepted(path, monkeypatch):
  found = list(commands(path.read_text()))
  assert found or path.name not in ('README.md', 'results.md')
  for argv in found:
    resolved(argv, monkeypatch)


def test_a_command_with_a_field_that_is_gone_is_caught(monkeypatch):
  text = (
    '  python main.py --config=configs/vit_folder.py --config.quant.steps=x\n'
  )
  (argv,) = commands(text)
  with pytest.raises(ConfigError, match='is now quant.act_granularity'):
    resolved(argv, monkeypatch)


@pytest.mark.parametrize(
  'flags',
  [
    # What a page sets for its recipe or its adapters, and flags switch off.
    ('vit_ti_digits_w4a4.py', '--config.quant.recipe=none'),
    ('vit_l_cifar100_qvit.py', '--config.quant.recipe=none'),
    ('vit_l_cifar100_qvit.py', '--config.quant.recipe=aqt'),
    ('vit_l_cifar100_qlora.py', '--config.lora.rank=0',
     '--config.lora.targets=()'),
    ('vit_b_tiny_imagenet_lora.py', '--config.train.steps=10'),
    ('scaling_law.py', '--config.optim.name=sgd'),
    ('vit_cifar100_finetune.py:B/16', '--config.quant.recipe=qvit'),
  ],
)  # fmt: skip
def test_flags_may_switch_off_what_a_page_sets(flags, monkeypatch):
  page, *rest = flags
  resolved(['main.py', f'--config=configs/{page}', *rest], monkeypatch)


def test_a_page_with_the_old_name_of_a_field_is_told_the_new_one():
  config = common.get_config()
  config.train.steps = 1
  config.quant.steps = 'per_position'
  context = runner.context_of(MODES['train'], config)
  with pytest.raises(ConfigError) as error:
    resolve.resolve(config, context)
  assert str(error.value) == (
    "the config sets quant.steps='per_position', which is now "
    "quant.act_granularity; set quant.act_granularity='per_position' instead"
  )


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ('vit_cifar100_finetune.py:B', "names no patch; write it as 'B/16'"),
    ('vit_folder.py:B/16', 'takes no argument; leave :B/16 out'),
  ],
)
def test_a_wrong_argument_of_a_page_is_one_line(given, message, monkeypatch):
  with pytest.raises(ConfigError) as error:
    resolved(['main.py', f'--config=configs/{given}'], monkeypatch)
  assert message in str(error.value)
  assert given in str(error.value)
  assert '\n' not in str(error.value)
