"""Reads PyTorch's zip-format .pth and .bin without PyTorch.

A pickle is a program. Here its instructions are read one by one by an
interpreter that knows only those that a dict of tensors needs: it looks up no
name, imports nothing and calls nothing, so there is nothing to exploit.
"""

import dataclasses
import functools
import math
import pathlib
import pickletools
from typing import Any

import numpy as np

from qvit_jax.store.entries import CONVERT, DTYPES, Entry, check_shape, refuse
from qvit_jax.weights import zip_file

_MAX_PICKLE = 16 * 2**20
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
# Where training scripts keep the state dict among other things.
_WRAPPERS = ('state_dict', 'model', 'model_state_dict', 'teacher', 'module')


@dataclasses.dataclass(frozen=True)
class _Global:
  name: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class _Storage:
  dtype: np.dtype
  key: str
  size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


_MARK = object()


def read(path: pathlib.Path) -> tuple[dict[str, Entry], list[str]]:
  """Returns the file's tensors, unread, and notes. Raises WeightsError."""
  infos = zip_file.members(path)
  if any('/code/' in name or name.endswith('constants.pkl') for name in infos):
    refuse(path, 'it is a TorchScript archive, which holds code', CONVERT)
  pickles = [name for name in infos if name.split('/')[1:] == ['data.pkl']]
  if len(pickles) != 1:
    refuse(path, 'it is a zip archive without FOLDER/data.pkl', CONVERT)
  root = pickles[0].partition('/')[0]
  if any(not zip_file.is_stored(info) for info in infos.values()):
    refuse(path, 'its members are compressed, which PyTorch never does')
  order = infos.get(f'{root}/byteorder')
  if order and zip_file.content(path, order).strip() != b'little':
    refuse(path, 'it was written on a big-endian machine', CONVERT)
  if infos[pickles[0]].file_size > _MAX_PICKLE:
    refuse(path, f'its pickle is over {_MAX_PICKLE:,} bytes long')
  value = _interpret(path, zip_file.content(path, infos[pickles[0]]))
  tensors, notes = _find_tensors(path, value)
  # Tensors that share a storage mostly follow each other.
  content = functools.lru_cache(maxsize=1)(
    lambda name: zip_file.content(path, infos[name])
  )
  entries = {
    name: _entry(path, name, tensor, infos.get(f'{root}/data/{key}'), content)
    for name, tensor in tensors.items()
    for key in (tensor.storage.key,)
  }
  return entries, notes


def _find_tensors(path, value) -> tuple[dict[str, _Tensor], list[str]]:
  """Returns the state dict, at the top or under one of the usual names."""
  if not isinstance(value, dict):
    refuse(path, 'it holds no dict of tensors', CONVERT)
  found = {}
  for wrapper in (None, *_WRAPPERS):
    inner = value if wrapper is None else value.get(wrapper)
    tensors = inner.items() if isinstance(inner, dict) else ()
    tensors = {
      k: v for k, v in tensors if isinstance(v, _Tensor) and isinstance(k, str)
    }
    if tensors:
      found[wrapper] = tensors
  if found:
    wrapper = max(found, key=lambda key: len(found[key]))
    inner = value if wrapper is None else value[wrapper]
    left = [k for k in inner if k not in found[wrapper]]
    left += [k for k in value if k != wrapper] if wrapper else []
    notes = [f'read from its entry {wrapper!r}'] if wrapper else []
    if left:
      notes.append(f'not read: {", ".join(str(k)[:30] for k in left)[:200]}')
    return found[wrapper], notes
  keys = ', '.join(str(k)[:30] for k in list(value)[:8])
  refuse(
    path,
    f'no tensors at the top or under {", ".join(_WRAPPERS)}; it has {keys}',
    CONVERT,
  )


def _entry(path, name, tensor: _Tensor, info, content) -> Entry:
  storage, dtype = tensor.storage, tensor.storage.dtype
  if info is None:
    refuse(path, f'the data of {name!r} is missing')
  if storage.size * dtype.itemsize != info.file_size:
    refuse(
      path,
      f'the storage of {name!r} claims {storage.size:,} numbers, its member '
      f'has {info.file_size:,} bytes',
    )
  check_shape(path, name, tensor.shape, dtype)
  count = math.prod(tensor.shape)
  last = tensor.offset + sum(
    (n - 1) * stride
    for n, stride in zip(tensor.shape, tensor.strides, strict=True)
  )
  # `count` bounds what is copied: a stride of 0 could ask for any size.
  if count and (last >= storage.size or count > storage.size):
    refuse(path, f'tensor {name!r} reaches beyond its storage')

  def load():
    flat = np.frombuffer(content(info.filename), dtype)[tensor.offset :]
    if not count:
      return np.zeros(tensor.shape, dtype)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
    return np.ascontiguousarray(view)

  return Entry(tensor.shape, dtype, load)


def _interpret(path, data: bytes) -> Any:
  """Returns what a pickle describes, out of dicts, tuples and tensors."""
  try:
    return _Machine(path).run(data)
  except (ValueError, IndexError, KeyError, TypeError, AttributeError,
          RecursionError) as error:  # fmt: skip
    refuse(path, f'its pickle is damaged ({str(error)[:80]})', CONVERT)


class _Machine:
  """The stack and memo of a pickle, and the few instructions allowed."""

  def __init__(self, path):
    self.path, self.stack, self.memo = path, [], {}

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

  def _top(self, kind):
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
    item = self.stack.pop()
    self._top(list).append(item)

  def _appends(self, unused):
    items = self._since_mark()
    self._top(list).extend(items)

  def _setitem(self, unused):
    key, value = self.stack[-2:]
    del self.stack[-2:]
    self._set(self._top(dict), [key, value])

  def _setitems(self, unused):
    items = self._since_mark()
    self._set(self._top(dict), items)

  def _set(self, target: dict, items: list[Any]):
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Hashing a nested tuple could take for ever.
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
    if (module, name) not in _NAMES:
      refuse(
        self.path,
        f'its pickle asks for {module[:60]}.{name[:60]}, which is '
        'no tensor; nothing was executed',
        CONVERT,
      )
    self.stack.append(_Global((module, name)))

  def _binpersid(self, unused):
    kind, storage, key, _, size = self.stack.pop()
    if kind != 'storage' or not key.isascii() or not key.isdigit():
      raise ValueError('no storage')
    dtype = DTYPES[_STORAGES[storage.name[1].removesuffix('Storage')]]
    if type(size) is not int or size < 0:
      raise ValueError('a storage of no size')
    self.stack.append(_Storage(dtype, key, size))

  def _reduce(self, unused):
    arguments, function = self.stack.pop(), self.stack.pop()
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
      raise TypeError('a call of something else')
    if function.name == _DICT and arguments == ():
      self.stack.append({})
    elif function.name == _PARAMETER:
      if not isinstance(arguments[0], _Tensor):
        raise TypeError('a parameter of something else')
      self.stack.append(arguments[0])
    elif function.name == _TENSOR:
      storage, offset, shape, strides, _, _, *more = arguments
      if any(
        more
      ):  # a conjugated or negated view: the bytes are not the values
        raise ValueError('a view with a flag')
      numbers = (offset, *shape, *strides)
      if (
        not isinstance(storage, _Storage)
        or not all(type(n) is int and 0 <= n < 2**40 for n in numbers)
        or len(shape) != len(strides)
      ):
        raise ValueError('a tensor of no size')
      self.stack.append(_Tensor(storage, offset, tuple(shape), tuple(strides)))
    else:
      raise TypeError('a call of something else')

  def _build(self, unused):
    self.stack.pop()  # attributes of an OrderedDict: versions of modules
    self._top(dict)


_CONSTANTS = {
    'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple,
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
}  # fmt: skip
_LITERALS = {
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
    'SHORT_BINUNICODE', 'BINBYTES', 'SHORT_BINBYTES',
}  # fmt: skip
