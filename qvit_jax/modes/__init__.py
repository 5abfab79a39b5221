"""What `--mode` may be: one record and one file each.

The table loads no JAX, so that `--help` and a mistyped flag are answered at
once; the file of a mode is imported when it runs.
"""

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

# Sections that one mode alone reads.
_OF_ONE = {'compare': 'compare'}


@dataclasses.dataclass(frozen=True)
class Mode:
  """A mode of the command line.

  Attributes:
    name: What `--mode` says.
    help: One or two lines.
    run: 'module:function' in this folder; called with (config, workdir).
    ignores: Sections and fields of a config that it does not read.
    ignores_training: The same where it trains at `ptq.qat_specs`.
    ignores_measuring: The same where it compares an exported program with the
      model.
    counts: Fields that it reads whatever their conditions say.
    trains: Whether it takes training steps of the config's own.
    takes_bits: Whether it runs a model under `quant.recipe`.
    takes_packed: Whether it reads the file of a packed model.
    takes_engine: Whether `eval.engine` may be another one than JAX.
    needs_whole: Whether it cannot use adapters.
    needs_adapters: Whether it is about adapters alone.
    processes: 'one' or 'many'.
  """

  name: str
  help: str
  run: str
  ignores: tuple[str, ...] = ()
  ignores_training: tuple[str, ...] = ()
  ignores_measuring: tuple[str, ...] = ()
  counts: tuple[str, ...] = ()
  trains: bool = False
  takes_bits: bool = True
  takes_packed: bool = False
  takes_engine: bool = False
  needs_whole: bool = False
  needs_adapters: bool = False
  processes: str = 'many'

  def ignores_field(self, name: str) -> bool:
    """Returns whether a field has no effect in this mode."""
    if name in self.counts:
      return False
    section = name.partition('.')[0]
    if section in _OF_ONE:
      return self.name != _OF_ONE[section]
    return name in self.ignores or section in self.ignores


# Fields of `quant` that count in training alone.
_TRAINING = ('quant.calibration_path', 'quant.freeze', 'quant.dampen',
             'quant.dgd', 'quant.backward_bits')  # fmt: skip
# What happens to models and images, and how often, in training alone.
_AUGMENTED = (
  'model.dropout', 'model.attention_dropout', 'model.embedding_dropout',
  'model.head_dropout', 'model.stochastic_depth', 'model.remat', 'data.pad',
  'data.flip', 'data.erase', 'data.mixup', 'data.cutmix', 'data.crop',
  'data.jitter', 'data.randaugment', 'eval.every', 'checkpoint.every',
)  # fmt: skip
# Fields that count in --mode=predict alone.
_PREDICT = ('eval.images', 'eval.top_k')
# The same of --mode=benchmark.
_BENCHMARK = ('eval.rivals',)

_TABLE = (
  Mode(
    'train',
    '(default) train, or go on where DIR stopped; evaluate; save',
    'train:train',
    ignores=('export', 'ptq', *_PREDICT, *_BENCHMARK),
    counts=('ptq.range',),  # a start from quant.calibration_path chooses by it
    trains=True,
  ),
  Mode(
    'eval',
    "evaluate a checkpoint (DIR's best, or --config.checkpoint.path=)",
    'eval:evaluate',
    ignores=('optim', 'train', 'export', 'log', 'ptq', *_TRAINING,
             *_AUGMENTED, *_PREDICT, *_BENCHMARK),
    takes_packed=True,
    takes_engine=True,
  ),
  Mode(
    'ptq',
    'quantize a trained float model, a table of methods and bits',
    'ptq:ptq',
    ignores=('optim', 'train', 'export', 'log', 'mesh', *_AUGMENTED,
             *_PREDICT, *_BENCHMARK),
    # The runs of a curve set bits themselves.
    ignores_training=('export', 'quant.default', 'quant.attention', *_PREDICT,
                      *_BENCHMARK),
    counts=('quant.rules',),
    takes_bits=False,
    needs_whole=True,
    processes='one',
  ),
  Mode(
    'sensitivity',
    'quantize each product alone; rank them, choose bits for each',
    'sensitivity:sensitivity',
    ignores=('optim', 'train', 'export', 'log', 'mesh', 'ptq.rows',
             'ptq.calibration_examples', 'ptq.calibration_path', 'ptq.range',
             'ptq.scales', 'ptq.tune_steps', 'ptq.latency_batch',
             'ptq.rounds', 'ptq.engines', 'ptq.qat_runs', 'ptq.qat_specs',
             'ptq.qat_seeds', 'eval', *_AUGMENTED),
    counts=('quant.rules', 'ptq.choices', 'ptq.sensitivity_examples',
            'ptq.budget_mb', 'ptq.budget_gbops'),
    takes_bits=False,
    needs_whole=True,
    processes='one',
  ),
  Mode(
    'sites',
    'print every quantizable product with its bits; needs no workdir',
    'sites:sites',
    ignores=('optim', 'train', 'weights', 'data', 'eval', 'checkpoint', 'mesh',
             'log', 'seed', 'export', 'ptq', *_TRAINING, *_AUGMENTED),
  ),
  Mode(
    'merge_lora',
    'fold the adapters of a run with lora.rank into its kernels',
    'merge_lora:merge_lora',
    ignores=('optim', 'train', 'log', 'export', 'quant.dampen', *_PREDICT,
             *_BENCHMARK),
    needs_adapters=True,
    processes='one',
  ),
  # It times the first updates of stage 'all', from random weights; a packed
  # file, and other engines, in inference alone.
  Mode(
    'benchmark',
    'time the model beside its float twin, and a packed file in other runtimes',
    'benchmark:benchmark',
    ignores=('weights', 'checkpoint', 'log', 'export', 'ptq',
             'quant.calibration_path', 'quant.freeze', 'train.stages',
             'train.patience', 'train.reestimate_batches', *_PREDICT),
    counts=('checkpoint.path',),  # of a packed file
    trains=True,
    takes_packed=True,
    takes_engine=True,
  ),
  Mode(
    'predict',
    'name the likeliest classes of the images in a folder',
    'predict:predict',
    ignores=('optim', 'train', 'log', 'seed', 'export', 'ptq', 'data.source',
             'data.name', 'data.dir', 'data.train_split', 'data.eval_split',
             'data.holdout', 'data.bad_files', 'data.resident_mib',
             'eval.num_examples', *_TRAINING, *_AUGMENTED, *_BENCHMARK),
    takes_packed=True,
    takes_engine=True,
    processes='one',
  ),
  Mode(
    'compare',
    'put several runs or files side by side on one page (compare.runs)',
    'compare:compare',
    ignores=('model', 'quant', 'lora', 'weights', 'data', 'optim', 'train',
             'eval', 'checkpoint', 'mesh', 'log', 'seed', 'export', 'ptq'),
    takes_bits=False,
    processes='one',
  ),
  Mode(
    'export',
    'write the weights in the layout of timm, transformers or others, '
    'packed into integers, or as a program for runtimes',
    'export:export',
    ignores=('optim', 'train', 'data', 'eval', 'mesh', 'log', 'seed', 'ptq',
             *_TRAINING, *_AUGMENTED),
    ignores_measuring=('optim', 'train', 'mesh', 'log', 'ptq', *_TRAINING,
                       *_AUGMENTED, *_PREDICT, *_BENCHMARK),
    takes_packed=True,
    needs_whole=True,
    processes='one',
  ),
)  # fmt: skip
MODES: dict[str, Mode] = {mode.name: mode for mode in _TABLE}


def run(
  mode: str,
  config: Any,
  workdir: str,
  *,
  overrides: Iterable[str] = (),
  page: Any = None,
  lines: Iterable[str] = (),
) -> None:
  """Resolves the config and does what the mode says.

  Args:
    mode: A key of MODES.
    config: A config with the fields of configs/common.py.
    workdir: Where to write; may be '' for `sites`.
    overrides: Fields that the command line sets.
    page: The config before they were set.
    lines: Whose config it is, where that is not on a page.

  Raises:
    QvitError: The user's input is wrong.
    Preempted: A signal stopped the run after saving.
  """
  runner = importlib.import_module('qvit_jax.modes.runner')
  runner.run(
    MODES[mode], config, workdir, overrides=overrides, page=page, lines=lines
  )
