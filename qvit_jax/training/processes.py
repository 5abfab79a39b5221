"""Several processes as one run: how they join, stop and end together.

A process that fails or is killed leaves the others waiting in a collective for
ever, or has them aborted by JAX's coordination service with pages of C++. So a
thread of each process, which runs while the main one waits, tells the first
process that this one lives and asks it whether the run is over; if so it says
why in one line and ends the process.

They talk through the key-value store of that service, whose client is private
to JAX (`jax._src.distributed`) and used here alone: what is public waits for
every process, which is just what hangs. So is what finds out about SLURM and
Open MPI: the address of the first process has to be known (`_relay`).

JAX is imported where it is needed, since main.py asks here even for --help.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from qvit_jax.errors import ConfigError

# A process that is not heard of for so long is given up. JAX's own limit, at
# half of which it already aborts, has to be longer, and both so short that all
# processes are gone within a minute.
_SILENCE_SECONDS = 20
_JAX_SILENCE_SECONDS = 60
START_SECONDS = 300
# How often a process that waits for others says so.
_TELL_SECONDS = 30
# How long the first process, which hosts the service, waits until all have read
# how the run ended, and all for the slowest one at a good end.
_READ_SECONDS = 10
_LAST_SECONDS = 3600
_DIRECTORY = 'qvit_jax'

# A process joins once and leaves once.
_joined = threading.Event()
_left = threading.Event()
_ending = threading.Lock()


def several() -> bool:
  """Returns whether this process was started as one of several."""
  names = ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
  return any(os.environ.get(name, '') not in ('', '1') for name in names)


def join(seconds: int = START_SECONDS) -> None:
  """Joins the other processes of a run that was started as several.

  SLURM and Open MPI are recognised by JAX itself; elsewhere
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

  Args:
    seconds: How long they are waited for; every half minute a line says so.

  Raises:
    ConfigError: These are not what they should be.
  """
  if several() and not _joined.is_set():
    _join(
      seconds,
      f'ConfigError: the other processes did not start within {seconds} s; '
      'start the same command in each of them, with the same '
      'JAX_COORDINATOR_ADDRESS and its own JAX_PROCESS_ID, or set '
      '--config.mesh.timeout= to more',
      2,
    )


def _join(seconds: int, line: str, code: int) -> None:
  import jax

  own = _own_process()
  waiting = (
    f'waiting for the other processes: this is {own.get("process_id")} of '
    f'{own.get("num_processes")}, the first is at '
    f'{own.get("coordinator_address")}'
  )
  if own.get('process_id'):
    own['coordinator_address'] = _relay(own['coordinator_address'])
  # Its handler of SIGTERM would replace ours, and it knows no other signal.
  jax.config.update('jax_enable_preemption_service', False)

  def wait():
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
      if _joined.wait(min(left, _TELL_SECONDS)):
        return
      if line and left > _TELL_SECONDS:
        print(f'{waiting} (up to {seconds} s)', flush=True)
    _end(code, line)

  threading.Thread(target=wait, daemon=True).start()
  jax.distributed.initialize(
    **own,
    initialization_timeout=2 * max(seconds, START_SECONDS),  # ends in an abort
    heartbeat_timeout_seconds=_JAX_SILENCE_SECONDS,
  )
  _joined.set()
  threading.Thread(target=_watch, daemon=True).start()


def _own_process() -> dict[str, Any]:
  """Returns what the environment says, as `jax.distributed` wants it."""
  from jax._src import clusters

  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  address, *numbers = (os.environ.get(name, '') for name in names)
  if not numbers[0]:
    fields = ('coordinator_address', 'num_processes', 'process_id',
              'local_device_ids')  # fmt: skip
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      *(None for _ in fields), None, START_SECONDS
    )
    return dict(zip(fields, found, strict=True))
  count, own, port = (
    int(text) if text.isdecimal() else -1
    for text in (*numbers, address.rpartition(':')[2])
  )
  if not (address.rpartition(':')[0] and port > 0 and 0 <= own < count):
    raise ConfigError(
      f'JAX_COORDINATOR_ADDRESS={address!r}, JAX_NUM_PROCESSES={numbers[0]!r}, '
      f'JAX_PROCESS_ID={numbers[1]!r}: several processes need HOST:PORT of the '
      'first one, their number, and 0, 1, ... below it; set all three'
    )
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': own,
  }


def _relay(address: str) -> str:
  """Returns an address of this process that leads on to the first process.

  Where JAX's connection to the first process breaks it aborts before any Python
  can run. The connection that breaks is this one, and we are who notices.
  """
  host, _, port = address.rpartition(':')
  listener = socket.create_server(('127.0.0.1', 0))

  def accept():
    while True:
      inner, _ = listener.accept()
      try:
        outer = socket.create_connection((host.strip('[]'), int(port)))
      except OSError:  # the first process has not started: JAX tries again
        inner.close()
        continue
      for pump in (send, receive):
        ends = inner, outer
        threading.Thread(target=pump, args=ends, daemon=True).start()

  def send(inner, outer):
    with contextlib.suppress(OSError):
      while data := inner.recv(2**16):
        outer.sendall(data)
    inner.close()
    with contextlib.suppress(OSError):
      outer.shutdown(socket.SHUT_RDWR)

  def receive(inner, outer):
    inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    outer.settimeout(_SILENCE_SECONDS)
    with contextlib.suppress(OSError):
      while data := hear(outer):
        inner.sendall(data)
    if inner.fileno() >= 0 and not _left.is_set():
      _end(*_lost(0))
    with contextlib.suppress(OSError):
      inner.shutdown(socket.SHUT_RDWR)

  def hear(outer):
    while True:
      try:
        return outer.recv(2**16)
      except TimeoutError:  # what `_watch` asks is answered every second
        if _joined.is_set():
          return b''

  threading.Thread(target=accept, daemon=True).start()
  return f'127.0.0.1:{listener.getsockname()[1]}'


@contextlib.contextmanager
def blaming_others() -> Iterator[None]:
  """Context in which an error of a collective waits for its cause.

  It comes at once where another process is killed; which one, and what to do,
  is known when that one was silent for too long.
  """
  try:
    yield
  except Exception as error:
    if _joined.is_set() and _is_of_a_collective(error):
      time.sleep(_SILENCE_SECONDS + 10)  # `_watch` ends the process meanwhile
    raise


def _is_of_a_collective(error: BaseException | None) -> bool:
  import jax

  if error is None:
    return False
  here = isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in str(error)
  return here or _is_of_a_collective(error.__cause__)


def stop_agreed(update: int, wanted: bool, ahead: int) -> bool:
  """Returns True on all processes after the same update, once one wants it.

  Args:
    update: A number that grows by `ahead` from call to call.
    wanted: Whether this process has been asked to stop.
    ahead: How many updates a process may have started that another has not
      finished. The wish is for so many updates later: who comes to that one
      knows that the first update after the wish is done everywhere, so that the
      wish, which was published before it started, is there to be read.
  """
  found = _read('stop')
  if wanted and not found:
    _write_once('stop/after', str(update + ahead))
  return str(update) in found.values()


def leave(code: int, line: str = '') -> None:
  """Ends this process' part in the run; call it last.

  At a good end, or a stop of all, it waits for the others. With a `line` it
  tells them that this process ends alone and why, and does not return, since
  threads and destructors would wait for the others.

  Args:
    code: What this process exits with.
    line: What the others print.
  """
  if not several() or not (_joined.is_set() or line):
    return
  if line:
    if sys.exc_info()[1] is not None:  # on its way to the interpreter
      traceback.print_exc()
    sys.stdout.flush()
    if not _joined.is_set():  # they wait for this one
      with contextlib.suppress(ConfigError):
        _join(_SILENCE_SECONDS, '', code)
    if _joined.is_set():
      own = _state().process_id
      first = line.splitlines()[0]
      _tell(code if code == 75 else 2, f'{first} (process {own})')
    _end(code, is_told=_joined.is_set())
  with blaming_others():
    _state().client.wait_at_barrier(f'{_DIRECTORY}/end', _LAST_SECONDS * 1000)
  _left.set()


def _watch() -> None:
  """Ends this process when another one has ended the run."""
  import jax

  own, count = _state().process_id, _state().num_processes
  heard = {str(i): ('', time.monotonic()) for i in range(count)}
  while not _left.wait(1):
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _write(f'alive/{own}', str(time.monotonic()))
      beats, now = _read('alive') if own == 0 else {}, time.monotonic()
      for name in heard if own == 0 else ():
        beat = beats.get(name, '')
        if beat != heard[name][0]:
          heard[name] = beat, now
        elif now - heard[name][1] > _SILENCE_SECONDS:
          _write(f'read/{name}', 'no')
          _tell(*_lost(int(name)))
      for text in _read('end').values():
        end = json.loads(text)
        _end(end['code'], end['line'], is_told=True)


def _lost(process: int) -> tuple[int, str]:
  """Returns (exit code, line) where a process ended without a word."""
  return 75, (
    f'stopped: process {process} was killed or does not answer; run the same '
    'command again in every process, training goes on from the last checkpoint'
  )


def _tell(code: int, line: str) -> None:
  """Ends the run for all processes, unless another one has done so."""
  _write_once('end/why', json.dumps({'line': line, 'code': code}))


def _end(code: int, line: str = '', *, is_told: bool = False) -> None:
  """Prints a line and ends this process.

  Args:
    code: What it exits with.
    line: What it prints, if anything.
    is_told: Whether the first process is there and the others are told why.
  """
  _ending.acquire()  # and never released: one thread ends the process
  _left.set()
  if line:
    os.write(sys.stderr.fileno(), f'{line}\n'.encode())
  if is_told:
    _wait_for_readers()
  os._exit(code)


def _wait_for_readers() -> None:
  """Keeps the first process, in which the others read, until they have."""
  import jax

  until = time.monotonic() + _READ_SECONDS
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _write(f'read/{_state().process_id}', 'yes')
    while _state().process_id == 0 and time.monotonic() < until:
      if len(_read('read')) == _state().num_processes:
        break
      time.sleep(0.1)


def _state():
  from jax._src import distributed

  return distributed.global_state


def _read(directory: str) -> dict[str, str]:
  """Returns what was written below a name, by the last part of its names."""
  found = _state().client.key_value_dir_get(f'{_DIRECTORY}/{directory}/')
  return {name.rpartition('/')[2]: text for name, text in found}


def _write(name: str, text: str) -> None:
  _state().client.key_value_set(
    f'{_DIRECTORY}/{name}', text, allow_overwrite=True
  )


def _write_once(name: str, text: str) -> None:
  """Writes what no process has written before."""
  import jax

  with contextlib.suppress(jax.errors.JaxRuntimeError):  # it exists
    _state().client.key_value_set(f'{_DIRECTORY}/{name}', text)
