"""The pickles in PyTorch's files, followed without Python's machinery for pickles.

A pickle is a program, and Python's own reader lets it call any function. Here it is not run: of its
instructions those are followed that build dictionaries, lists, tuples, texts and numbers, and the functions
that it may name are known by their names and never imported. Anything else is refused.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_MOST_STEPS = 10**6  # a tensor takes about 40
_MOST_TEXT = 2**16
_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Refused(Exception):
    """What no file of tensors does."""


class _Name(NamedTuple):
    """A function or class that the file names."""

    name: str


class Storage(NamedTuple):
    """Numbers that tensors share: `size` of them, which the file keeps under `key`."""

    key: str
    dtype: Any
    size: int


class Tensor(NamedTuple):
    """What of a storage is a tensor; `start` and `strides` count numbers."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Program:
    """One pickle, of which only what builds tensors is followed.

    Attributes:
      storages: those that it named, by their keys.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        """Follow the program up to its end, and leave the file behind it."""
        for _ in range(_MOST_STEPS):
            opcode = _OPCODES.get(file.read(1).decode("latin-1"))
            name = opcode.name if opcode else "what is no instruction"
            if name == "STOP":
                return self._stack.pop()
            if opcode is None or (name not in _STEPS and name not in _VALUES):
                raise Refused(f"its pickle asks for {name}")
            argument = _argument(opcode, file)
            if name in _STEPS:
                _STEPS[name](self, argument)
            elif isinstance(argument, str) and len(argument) > _MOST_TEXT:
                break
            else:
                self._stack.append(argument)
        raise Refused("its pickle is too long")

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self._stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """Take the last `count` values."""
        taken = tuple(self._stack.pop() for _ in range(count))
        return taken[::-1]

    def marked(self) -> list[Any]:
        """Take all values since the last mark."""
        mark = self._marks.pop()
        values, self._stack[mark:] = self._stack[mark:], []
        return values

    def mark(self, _: Any) -> None:
        """Remember this place."""
        self._marks.append(len(self._stack))

    def put(self, index: int | None) -> None:
        """Remember the last value."""
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        """Put a remembered value on top."""
        self.push(self._memo[index])

    def set_items(self, pairs: list[Any]) -> None:
        """Put keys and values into the dictionary on top."""
        target = of(dict, self._stack[-1])
        target.update(zip(map(text, pairs[::2]), pairs[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        """Append to the list on top."""
        of(list, self._stack[-1]).extend(values)

    def name(self, name: str) -> None:
        """A function or class."""
        kind = name.rpartition(".")[2]
        if name not in _CALLS and not (name == f"torch.{kind}" and kind in _DTYPES):
            raise Refused(f"its pickle names {name:.80}")
        self.push(_Name(name))

    def reduce(self, _: Any) -> None:
        """The call of a function: one of those that are known."""
        function, arguments = self.pop(2)
        self.push(_CALLS[of(_Name, function).name](*arguments))

    def build(self, _: Any) -> None:
        """Attributes: state dicts have `_metadata`, which is not needed."""
        target, _ = self.pop(2)
        self.push(of(dict, target))

    def storage(self, _: Any) -> None:
        """A storage, by what `torch.save` says of it; views are of years before."""
        kind, names, key, _, count, *view = self.pop(1)[0]
        if kind != "storage" or any(view) or type(count) is not int or count < 0:
            raise Refused("a tensor's storage is something else")
        dtype = _DTYPES[of(_Name, names).name.removeprefix("torch.")]
        found = self.storages.setdefault(text(key), Storage(key, dtype, count))
        if found != Storage(key, dtype, count):
            raise Refused(f"storage {key:.20} is there twice")
        self.push(found)


def _argument(opcode: Any, file: io.BytesIO) -> Any:
    """What follows an instruction; of names that pickletools would look for backslashes in, two lines."""
    if opcode.name == "GLOBAL":
        return ".".join(file.readline()[:-1].decode("ascii") for _ in range(2))
    return opcode.arg.reader(file) if opcode.arg else None


def of(kind: type, value: Any) -> Any:
    """`value`, which must be of a kind.

    Raises:
      Refused: it is of another.
    """
    if type(value) is not kind:
        raise Refused(f"it has {type(value).__name__} where {kind.__name__} should be")
    return value


def text(value: Any) -> str:
    """`value`, which must be a text."""
    return of(str, value)


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(of(Storage, storage), start, of(tuple, shape), of(tuple, strides))


# The functions that are known.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: of(Tensor, tensor),
}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "NONE"}
_STEPS: dict[str, Callable[[Program, Any], None]] = {
    "PROTO": lambda run, _: None,
    "NEWTRUE": lambda run, _: run.push(True),
    "NEWFALSE": lambda run, _: run.push(False),
    "EMPTY_DICT": lambda run, _: run.push({}),
    "EMPTY_LIST": lambda run, _: run.push([]),
    "EMPTY_TUPLE": lambda run, _: run.push(()),
    "MARK": Program.mark,
    "TUPLE": lambda run, _: run.push(tuple(run.marked())),
    "TUPLE1": lambda run, _: run.push(run.pop(1)),
    "TUPLE2": lambda run, _: run.push(run.pop(2)),
    "TUPLE3": lambda run, _: run.push(run.pop(3)),
    "APPEND": lambda run, _: run.append(list(run.pop(1))),
    "APPENDS": lambda run, _: run.append(run.marked()),
    "SETITEM": lambda run, _: run.set_items(list(run.pop(2))),
    "SETITEMS": lambda run, _: run.set_items(run.marked()),
    "BINPUT": Program.put,
    "LONG_BINPUT": Program.put,
    "BINGET": Program.get,
    "LONG_BINGET": Program.get,
    "GLOBAL": Program.name,
    "REDUCE": Program.reduce,
    "BUILD": Program.build,
    "BINPERSID": Program.storage,
}
