"""Train, quantize and evaluate vision transformers in JAX.

  python main.py --config=configs/NAME.py --workdir=DIR [--mode=MODE]
                 [--config.section.field=value ...]

Modes:
  train        (default) train, or go on where DIR stopped; evaluate; save
  eval         evaluate a checkpoint (DIR's best, or --config.checkpoint.path=)
  ptq          quantize a trained float model, a table of methods and bits
  sensitivity  quantize each product alone; rank them, choose bits for each
  sites        print every quantizable product with its bits; needs no workdir
  merge_lora   fold the adapters of a run with lora.rank into its kernels
  benchmark    time the model beside its float twin
  predict      name the likeliest classes of the images in a folder
  export       write the weights in the layout of timm, transformers or others,
               or packed into integers

Every field of a config is explained in configs/common.py. --debug prints the
traceback of an error. Exit codes: 0 done, 2 wrong input, 75 stopped by a
signal after saving (run the same command again).
"""

import errno
import importlib.util
import logging as py_logging
import os
import pathlib
import re
import shlex
import signal
import sys

_MODES = (
    'train', 'eval', 'sites', 'benchmark', 'export', 'ptq', 'sensitivity',
    'predict',
    'merge_lora',
)  # fmt: skip
_STOPPED = 75  # EX_TEMPFAIL: batch systems requeue such a job


def _parse(argv: list[str]):
  """Returns (config, names of overridden fields, flags)."""
  from absl import flags
  from ml_collections import config_flags

  from qvit_jax.config import resolve as config_lib
  from qvit_jax.errors import ConfigError

  defaults = _load(_config_path(argv))
  overrides = [
    found.group(1)
    for argument in argv
    if (found := re.match(r'--?(?:no)?config\.([^=]+)', argument))
  ]
  for name in overrides:
    if name not in config_lib.flatten(defaults):
      raise ConfigError(
        f'--config.{name} is unknown; the nearest field is '
        f'--config.{config_lib.nearest(name, defaults)} (all are in '
        'configs/common.py)'
      )
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', None, 'Config file.', flag_values=values, lock_config=True
  )
  flags.DEFINE_string('workdir', '', 'Workdir.', flag_values=values)
  flags.DEFINE_enum('mode', 'train', _MODES, 'Mode.', flag_values=values)
  flags.DEFINE_bool('debug', False, 'Tracebacks.', flag_values=values)
  sys.argv = argv  # config_flags looks for its overrides there
  try:
    rest = values(argv)
  except (flags.Error, TypeError, ValueError, AttributeError) as error:
    text = ' '.join(str(error).split())
    raise ConfigError(f'{text}; see python main.py --help') from error
  if rest[1:]:
    raise ConfigError(
      f'{rest[1]!r} is no flag; flags start with --, see python main.py --help'
    )
  return values.config, overrides, values


def _config_path(argv: list[str]) -> str:
  """Returns the file that --config names."""
  from qvit_jax.errors import ConfigError

  path = ''
  for argument, following in zip(argv, [*argv[1:], ''], strict=True):
    if argument in ('--config', '-config'):
      path = following
    elif re.match('--?config=', argument):
      path = argument.partition('=')[2]
  path = path.partition(':')[0]  # a config file may take an argument
  if not pathlib.Path(path).is_file():
    given = f'--config={path} is no file' if path else 'no config was given'
    here = ', '.join(
      f'configs/{file.name}'
      for file in sorted(pathlib.Path('configs').glob('*_*.py'))
    )
    raise ConfigError(f'{given}; set --config= to one of {here} or to your own')
  return path


def _load(path: str):
  """Returns get_config() of a config file."""
  from qvit_jax.errors import ConfigError

  spec = importlib.util.spec_from_file_location('qvit_config', path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'--config={path} is no Python file; give a .py file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (Exception, SystemExit) as error:  # noqa: BLE001 - user code
    raise ConfigError(
      f'--config={path} cannot be read: {type(error).__name__}: '
      f'{" ".join(str(error).split())}; mend it, configs/common.py shows how'
    ) from error
  if not hasattr(config, 'to_dict'):
    raise ConfigError(
      f'get_config() of --config={path} returns {type(config).__name__}, not a '
      'ConfigDict; start from configs.common.get_config()'
    )
  return config


def main(argv: list[str]) -> int:
  """Runs the command line; returns the exit code."""
  if {'--help', '-h', '-help', '--helpfull'} & set(argv):
    print(__doc__.strip())
    return 0
  from absl import logging

  from qvit_jax.errors import Preempted, QvitError
  from qvit_jax.store import files

  command = shlex.join(['python', *argv])
  try:
    config, overrides, values = _parse(argv)
    logging.set_verbosity(logging.ERROR)  # TFDS and orbax narrate through it
    # Late, so that --help and a mistyped field answer without loading JAX.
    from qvit_jax import modes

    modes.run(values.mode, config, values.workdir, overrides=overrides)
    return 0
  except BrokenPipeError:  # the reader of our output left, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except Preempted as stop:
    print(f'{stop}. Go on with: {command}', flush=True)
    return _STOPPED
  except KeyboardInterrupt:
    print(f'stopped; go on with: {command}', flush=True)
    return _STOPPED
  except QvitError as error:
    if '--debug' in argv:
      raise
    # Threads of orbax that fail later would bury the one line.
    logging.set_verbosity(logging.FATAL)
    logging.get_absl_logger().setLevel('CRITICAL')
    py_logging.getLogger('asyncio').setLevel('CRITICAL')
    print(f'{type(error).__name__}: {error}', file=sys.stderr, flush=True)
    return 2
  except OSError as error:
    refusals = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    if '--debug' in argv or error.errno not in refusals:
      raise
    text = files.cannot_write(error.filename or 'the workdir', error)
    print(f'ConfigError: {text}', file=sys.stderr, flush=True)
    return 2


def _interrupt(number, frame):
  # Remembered for the training loop's `StopFlag`: an exception that is raised
  # inside a callback of the garbage collector is printed and forgotten.
  _interrupt.received = signal.Signals(number).name
  signal.default_int_handler(number, frame)


if __name__ == '__main__':
  # TensorFlow only writes TensorBoard files here: no chatter, no oneDNN.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  # Before and after the training loop, which has handlers of its own. SIGINT
  # too: a shell that starts us in the background tells us to ignore it.
  for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, _interrupt)
  sys.exit(main(sys.argv))
