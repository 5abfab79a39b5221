"""Reads pickles of tensors without executing them.

A pickle is a program. Here its instructions are read one by one by an
interpreter that knows only those that a dict of tensors needs: it looks up no
name, imports nothing and calls nothing, so there is nothing to exploit. Where a
pickle asks for anything but tensors and dicts, a placeholder that has only a
name takes the place of the object, and what is done to it is stepped over.
"""

import dataclasses
import pickletools
from typing import Any

import numpy as np

from qvit_jax.store.entries import CONVERT, DTYPES, refuse

_STORAGES = {
    'Double': 'float64', 'Float': 'float32', 'Half': 'float16',
    'BFloat16': 'bfloat16', 'Long': 'int64', 'Int': 'int32', 'Short': 'int16',
    'Char': 'int8', 'Byte': 'uint8', 'Bool': 'bool',
}  # fmt: skip
_DICT = ('collections', 'OrderedDict')
_TENSOR = ('torch._utils', '_rebuild_tensor_v2')
_PARAMETER = ('torch._utils', '_rebuild_parameter')
_NAMES = {_DICT, _TENSOR, _PARAMETER} | {
  ('torch', f'{name}Storage') for name in _STORAGES
}


@dataclasses.dataclass(frozen=True)
class _Global:
  name: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Opaque:
  """Stands for an object that was not made; what is done to it is dropped."""

  name: str  # of the class or function that would have made it


@dataclasses.dataclass(frozen=True)
class Storage:
  """The numbers of one or more tensors."""

  dtype: np.dtype
  key: str
  size: int  # elements


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor, unread: where its numbers lie in its storage."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


_MARK = object()


def interpret(path, data: bytes) -> tuple[Any, list[str]]:
  """Returns what a pickle describes, and what it asks for beside.

  Args:
    path: For messages.
    data: The pickle.

  Returns:
    The value, out of dicts, lists, tuples, numbers, text, `Tensor` and
    `Opaque`, and the names behind the latter.

  Raises:
    WeightsError: It is damaged, or uses what is not known here.
  """
  machine = _Machine(path)
  try:
    return machine.run(data), list(machine.stepped)
  except (ValueError, IndexError, KeyError, TypeError, AttributeError,
          RecursionError) as error:  # fmt: skip
    refuse(path, f'its pickle is damaged ({str(error)[:80]})', CONVERT)


class _Machine:
  """The stack and memo of a pickle, and the few instructions allowed."""

  def __init__(self, path):
    self.path, self.stack, self.memo = path, [], {}
    self.stepped: dict[str, None] = {}  # names in their order

  def run(self, data: bytes) -> Any:
    """Returns what the pickle leaves on the stack."""
    for code, argument, _ in pickletools.genops(data):
      if code.name == 'STOP':
        return self.stack.pop()
      if code.name in _CONSTANTS:
        self.stack.append(_CONSTANTS[code.name]())
      elif code.name in _LITERALS:
        self.stack.append(argument)
      else:
        step = getattr(self, f'_{code.name.lower()}', None)
        if step is None:
          refuse(self.path, f'its pickle uses {code.name}', CONVERT)
        step(argument)
    raise ValueError('no end')

  def _top(self, kind: type | tuple[type, ...]):
    if not isinstance(self.stack[-1], kind):
      raise TypeError(f'a {type(self.stack[-1]).__name__} at the wrong place')
    return self.stack[-1]

  def _since_mark(self) -> list[Any]:
    items = []
    while (item := self.stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  def _proto(self, version):
    pass

  def _frame(self, size):
    pass

  def _mark(self, unused):
    self.stack.append(_MARK)

  def _binput(self, index):
    self.memo[index] = self.stack[-1]

  _long_binput = _binput

  def _memoize(self, unused):
    self.memo[len(self.memo)] = self.stack[-1]

  def _binget(self, index):
    self.stack.append(self.memo[index])

  _long_binget = _binget

  def _tuple(self, unused):
    self.stack.append(tuple(self._since_mark()))

  def _tuple1(self, unused):
    self.stack[-1:] = [tuple(self.stack[-1:])]

  def _tuple2(self, unused):
    self.stack[-2:] = [tuple(self.stack[-2:])]

  def _tuple3(self, unused):
    self.stack[-3:] = [tuple(self.stack[-3:])]

  def _append(self, unused):
    self._extend([self.stack.pop()])

  def _appends(self, unused):
    self._extend(self._since_mark())

  def _extend(self, items: list[Any]):
    target = self._top((list, Opaque))
    if isinstance(target, list):
      target.extend(items)

  def _setitem(self, unused):
    pair = self.stack[-2:]
    del self.stack[-2:]
    self._set(pair)

  def _setitems(self, unused):
    self._set(self._since_mark())

  def _set(self, items: list[Any]):
    target = self._top((dict, Opaque))
    if isinstance(target, Opaque):
      return
    for key, value in zip(items[::2], items[1::2], strict=True):
      if isinstance(key, Opaque):
        continue  # its name is among those stepped over
      if isinstance(key, tuple):  # hashing a nested one could take for ever
        self.stepped['a tuple as a name'] = None
        continue
      if not isinstance(key, (str, int, float, bytes, type(None))):
        raise TypeError('a key that is no name')
      if key in target:
        refuse(self.path, f'the name {str(key)[:60]!r} stands in it twice')
      target[key] = value

  def _global(self, name):
    self._look_up(*name.split(' ', 1))

  def _stack_global(self, unused):
    module, name = self.stack[-2:]
    del self.stack[-2:]
    self._look_up(module, name)

  def _look_up(self, module, name):
    if not isinstance(module, str) or not isinstance(name, str):
      raise TypeError('a name that is no text')
    if (module, name) in _NAMES:
      self.stack.append(_Global((module, name)))
    else:
      self._step_over(f'{module[:60]}.{name[:60]}')

  def _step_over(self, name: str):
    self.stepped[name] = None
    self.stack.append(Opaque(name))

  def _empty_set(self, unused):
    self._step_over('set')

  def _frozenset(self, unused):
    self._since_mark()
    self._step_over('frozenset')

  def _additems(self, unused):
    self._since_mark()
    self._top(Opaque)

  def _pop(self, unused):
    self.stack.pop()

  def _pop_mark(self, unused):
    self._since_mark()

  def _newobj(self, unused):
    self._reduce(unused)  # cls.__new__(cls, *arguments)

  def _newobj_ex(self, unused):
    self.stack.pop()  # named arguments
    self._top(tuple)
    if not isinstance(self.stack[-2], Opaque):
      raise TypeError('a call of something else')
    self.stack.pop()

  def _binpersid(self, unused):
    kind, storage, key, _, size = self.stack.pop()
    if isinstance(storage, Opaque):  # of numbers that NumPy does not have
      self.stack.append(storage)
      return
    if kind != 'storage' or not key.isascii() or not key.isdigit():
      raise ValueError('no storage')
    dtype = DTYPES[_STORAGES[storage.name[1].removesuffix('Storage')]]
    if type(size) is not int or size < 0:
      raise ValueError('a storage of no size')
    self.stack.append(Storage(dtype, key, size))

  def _reduce(self, unused):
    arguments, function = self.stack.pop(), self.stack.pop()
    if isinstance(function, Opaque):
      self.stack.append(function)
      return
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
      raise TypeError('a call of something else')
    if function.name == _DICT and arguments == ():
      self.stack.append({})
    elif function.name == _PARAMETER:
      if not isinstance(arguments[0], (Tensor, Opaque)):
        raise TypeError('a parameter of something else')
      self.stack.append(arguments[0])
    elif function.name == _TENSOR:
      storage, offset, shape, strides, _, _, *more = arguments
      if isinstance(storage, Opaque):
        self.stack.append(storage)
        return
      if any(
        more
      ):  # a conjugated or negated view: the bytes are not the values
        raise ValueError('a view with a flag')
      numbers = (offset, *shape, *strides)
      if (
        not isinstance(storage, Storage)
        or not all(type(n) is int and 0 <= n < 2**40 for n in numbers)
        or len(shape) != len(strides)
      ):
        raise ValueError('a tensor of no size')
      self.stack.append(Tensor(storage, offset, tuple(shape), tuple(strides)))
    else:
      raise TypeError('a call of something else')

  def _build(self, unused):
    self.stack.pop()  # attributes, in an OrderedDict versions of modules
    self._top((dict, Opaque))


_CONSTANTS = {
    'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple,
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
}  # fmt: skip
_LITERALS = {
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
    'BINUNICODE8', 'SHORT_BINUNICODE', 'BINBYTES', 'BINBYTES8',
    'SHORT_BINBYTES', 'BYTEARRAY8', 'LONG4',
}  # fmt: skip
