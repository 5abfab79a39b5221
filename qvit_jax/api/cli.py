"""Train, quantize and deploy image classifiers in JAX.

  PROGRAM --config=configs/NAME.py --workdir=DIR [--mode=MODE]
          [--config.section.field=value ...]

Without --config it is that of the run in DIR, or of --config.checkpoint.path=.

Modes:
MODES

--help SECTION and --help section.field explain the fields of a config, and
configs/common.py lists them all. --debug prints the traceback of an error.
Exit codes: 0 done, 2 wrong input, 75 stopped by a signal after saving, or since
another process of the run was killed (run the same command again).
"""

import copy
import ctypes
import errno
import importlib
import importlib.util
import inspect
import logging as py_logging
import os
import pathlib
import re
import shlex
import signal
import sys
import textwrap

from qvit_jax.arithmetic import host

COMMAND = 'qvit'  # of an installed package
_HELP = ('--help', '-h', '-help', '--helpfull')
_STOPPED = 75  # EX_TEMPFAIL: batch systems requeue such a job
# Of glibc's malloc.h: bytes that may lie free at the heap's end, blocks that
# are mapped by themselves, heaps.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def _parse(argv: list[str]):
  """Returns (config, the page without overrides, their names, flags, lines).

  Lines say whose config it is, where no page was given.
  """
  from absl import flags
  from ml_collections import config_flags

  from qvit_jax.config import resolve
  from qvit_jax.errors import ConfigError
  from qvit_jax.modes import MODES

  lines: list[str] = []
  if _given(argv, 'config') is None:
    page, lines, argv = _own_page(argv)
  else:
    page = _load(*_config_path(argv))
  overrides = [
    found.group(1)
    for argument in argv
    if (found := re.match(r'--?(?:no)?config\.([^=]+)', argument))
  ]
  for name in overrides:
    resolve.check_name(name, page)
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', '', 'Workdir.', flag_values=values)
  flags.DEFINE_enum('mode', 'train', list(MODES), 'Mode.', flag_values=values)
  flags.DEFINE_bool('debug', False, 'Tracebacks.', flag_values=values)
  rest = [a for a in _joined(argv) if not re.match('--?config=', a)]
  sys.argv = rest  # the next line looks there for fields that are set
  config_flags.DEFINE_config_dict(
    'config', copy.deepcopy(page), flag_values=values, lock_config=True
  )
  try:
    rest = values(rest)
  except (flags.Error, TypeError, ValueError, AttributeError) as error:
    text = ' '.join(str(error).split())
    raise ConfigError(f'{text}; see {_program()} --help') from error
  if rest[1:]:
    raise ConfigError(
      f'{rest[1]!r} is no flag; flags start with --, see {_program()} --help'
    )
  return values.config, page, overrides, values, lines


def _given(argv: list[str], flag: str) -> str | None:
  """Returns what the last flag of a name is set to; None without one."""
  found, rest = None, iter(argv)
  for argument in rest:
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name == flag:
      found = value if equals else next(rest, '')
  return found


def _own_page(argv: list[str]):
  """Returns (page, lines about it, arguments) of what the flags name."""
  from qvit_jax.experiment import own_config
  from qvit_jax.modes import MODES

  mode = _given(argv, 'mode') or 'train'
  own = own_config.find(
    mode if mode in MODES else 'eval',
    _given(argv, 'workdir') or '',
    _given(argv, 'config.checkpoint.path') or '',
    _pages(),
  )
  # Of flags that are given twice the last one counts.
  added = [f'--config.{name}={value}' for name, value in own.flags.items()]
  return own.page, own.lines, [*argv, *added]


def _program() -> str:
  """Returns how this was started, as a person types it."""
  name = pathlib.Path(sys.argv[0]).name
  return name if name == COMMAND else 'python main.py'


def _configs() -> pathlib.Path:
  """Returns the folder of config files: that of a checkout, or ours.

  Pages import `configs`; an installed package has it within.
  """
  try:
    importlib.import_module('configs.common')
  except ImportError:
    sys.modules['configs'] = importlib.import_module('qvit_jax.configs')
  here = pathlib.Path('configs')
  if (here / 'common.py').is_file():
    return here
  return pathlib.Path(importlib.import_module('configs').__path__[0])


def _pages() -> str:
  """Returns the config files that are here, for messages."""
  files = sorted(_configs().glob('*_*.py'))
  return ', '.join(f'configs/{file.name}' for file in files)


def _joined(argv: list[str]) -> list[str]:
  """Returns the arguments with '--config PATH' as '--config=PATH'."""
  joined, rest = [], iter(argv)
  for argument in rest:
    if argument in ('--config', '-config'):
      argument = f'--config={next(rest, "")}'
    joined.append(argument)
  return joined


def _config_path(argv: list[str]) -> tuple[str, str | None]:
  """Returns the file that --config names, and what stands behind its colon."""
  from qvit_jax.config import resolve
  from qvit_jax.errors import ConfigError

  path, colon, argument = (_given(argv, 'config') or '').partition(':')
  path, place = resolve.expand(path), _configs()
  if not pathlib.Path(path).is_file() and path.startswith('configs/'):
    path = str(place / path.removeprefix('configs/'))
  if not pathlib.Path(path).is_file():
    raise ConfigError(
      f'--config={path} is no file; set --config= to one of {_pages()} or to '
      'your own'
    )
  return path, argument if colon else None


def _load(path: str, argument: str | None):
  """Returns get_config() of a config file, or get_config(argument)."""
  from qvit_jax.errors import ConfigError

  spec = importlib.util.spec_from_file_location('qvit_config', path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'--config={path} is no Python file; give a .py file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    takes = bool(inspect.signature(module.get_config).parameters)
    if argument is not None and not takes:
      raise ConfigError(
        f'--config={path}:{argument}: get_config() of this page takes no '
        f'argument; leave :{argument} out'
      )
    given = () if argument is None else (argument,)
    config = module.get_config(*given)
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:  # noqa: BLE001 - user code
    given, advice = path, 'mend it, configs/common.py shows how'
    if argument is not None:
      given = f'{path}:{argument}'
      advice = f'give what get_config() of {path} takes behind the colon'
    raise ConfigError(
      f'--config={given} cannot be read: {type(error).__name__}: '
      f'{" ".join(str(error).split())}; {advice}'
    ) from error
  if not hasattr(config, 'to_dict'):
    raise ConfigError(
      f'get_config() of --config={path} returns {type(config).__name__}, not a '
      'ConfigDict; start from configs.common.get_config()'
    )
  return config


def _help(argv: list[str]) -> str:
  """Returns what --help prints, by itself or with a section or a field."""
  from qvit_jax.modes import MODES

  topics = [a.removeprefix('--help=') for a in argv[1:] if _is_topic(a)]
  if topics:
    _configs()  # so that it can be imported
    from configs import common
    from qvit_jax.config import listing, resolve

    values = resolve.flatten(common.get_config())
    ignored = {
      field: [name for name, m in MODES.items() if m.ignores_field(field)]
      for field in resolve.FIELDS
    }
    return '\n'.join(
      listing.describe(topic, ignored, values) for topic in topics
    )
  lines = [
    line
    for mode in MODES.values()
    for line in textwrap.wrap(
      f'{mode.name:13}{mode.help}',
      80,
      initial_indent='  ',
      subsequent_indent=' ' * 15,
    )
  ]
  text = __doc__.strip().replace('MODES', '\n'.join(lines))
  return text.replace('PROGRAM', _program())


def _is_topic(argument: str) -> bool:
  return argument.startswith('--help=') or not argument.startswith('-')


def main(argv: list[str]) -> int:
  """Runs the command line; returns the exit code."""
  from qvit_jax.errors import Preempted, QvitError
  from qvit_jax.training import processes

  command = shlex.join([*_program().split(), *argv[1:]])
  code, line = 1, ''  # what the other processes of this run print, if it fails
  try:
    if any(a in _HELP or a.startswith('--help=') for a in argv):
      print(_help(argv))
    else:
      _run(argv)
    code = 0
  except BrokenPipeError:  # the reader of our output left, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    line = 'stopped: the reader of the output left'
  except Preempted as stop:
    print(f'{stop}. Go on with: {command}', flush=True)
    code = _STOPPED
  except KeyboardInterrupt:
    print(f'stopped; go on with: {command}', flush=True)
    code, line = _STOPPED, 'stopped by a signal; run the same command again'
  except Exception as error:
    line = _line(error)
    expected = isinstance(error, QvitError) or _is_refusal(error)
    if not expected or '--debug' in argv:
      raise
    _silence()
    print(line, file=sys.stderr, flush=True)
    code = 2
  finally:
    processes.leave(code, line)
  return code


def _run(argv: list[str]) -> None:
  """Does what the command line says."""
  from absl import logging

  config, page, overrides, values, lines = _parse(argv)
  logging.set_verbosity(logging.ERROR)  # TFDS and orbax narrate through it
  from qvit_jax import modes

  modes.run(
    values.mode, config, values.workdir,
    overrides=overrides, page=page, lines=lines,
  )  # fmt: skip


def _line(error: Exception) -> str:
  """Returns the one line that is printed for an error."""
  from qvit_jax.store import files

  if _is_refusal(error):
    text = files.cannot_write(error.filename or 'the workdir', error)
    return f'ConfigError: {text}'
  return f'{type(error).__name__}: {error}'


def _is_refusal(error: Exception) -> bool:
  """Returns whether the operating system refuses to write."""
  refusals = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
  return isinstance(error, OSError) and error.errno in refusals


def _silence() -> None:
  """Keeps threads of orbax that fail later from burying the one line."""
  from absl import logging

  logging.set_verbosity(logging.FATAL)
  logging.get_absl_logger().setLevel('CRITICAL')
  py_logging.getLogger('asyncio').setLevel('CRITICAL')


def _keep_memory() -> None:
  """Lets the process keep the memory of arrays that it has freed.

  glibc gives every large block back to the system, which zeroes the next one
  page by page: as long as small convolutions take on a CPU. One heap, since
  those of threads cannot hold large blocks. Other allocators stay as they are.
  """
  if sys.platform != 'linux':
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _widen_vectors() -> None:
  """Lets XLA use the whole vectors of a CPU that has them.

  It prefers half of AVX-512 by itself, with which a MobileNetV2 takes longer on
  some CPUs (docs/results.md). Whoever sets XLA_FLAGS decides.
  """
  if host.has('avx512f'):
    os.environ.setdefault('XLA_FLAGS', '--xla_cpu_prefer_vector_width=512')


def _interrupt(number, frame):
  # Remembered for the training loop's `StopFlag`: an exception that is raised
  # inside a callback of the garbage collector is printed and forgotten.
  _interrupt.received = signal.Signals(number).name
  signal.default_int_handler(number, frame)


def run() -> None:
  """Is the program: sets the process up, runs the command line, exits."""
  _keep_memory()  # before there are threads
  _widen_vectors()
  # TensorFlow only writes TensorBoard files here: no chatter, no oneDNN.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  # Before and after the training loop, which has handlers of its own. SIGINT
  # too: a shell that starts us in the background tells us to ignore it.
  for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, _interrupt)
  sys.exit(main(sys.argv))
