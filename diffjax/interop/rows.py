"""Tables that map the tensors of an original library to our parameters, and what reads and writes by them.

A table has a row for each layer, not for each tensor: `Row("transformer_blocks.{i}.attn1.to_q",
"blocks/attention/query")`. The kind of the row says which tensors a layer has there and here, and how their
axes are laid out. Parameters of blocks in a row are stacked here (see `diffjax.nn.repeat`): where a name has
an `{i}`, it stands for as many of their layers as ours has copies.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffjax.errors import UserError
from diffjax.interop.store import Store


class Row(NamedTuple):
    """One layer of theirs and of ours.

    Attributes:
      theirs: the name of their layer, without ".weight" or ".bias"; "{i}" stands for the number of the copy.
      ours: the path of our layer below the parameters' root; of the parameter itself for kind "raw".
      kind: one of `KINDS`.
      chunk: where our layer is a part of theirs: which, and of how many, along the axis of the outputs.
      order: where theirs has the same equal parts along the axis of the outputs in another order: the number
        of their part for each of ours.
      window: for kind "patch", the side of a patch.
      first: the number of the first copy.
      equal: where theirs has this many copies, all equal, of our one: "{i}" stands for their numbers.
    """

    theirs: str
    ours: str
    kind: str = "dense"
    chunk: tuple[int, int] = (0, 1)
    order: tuple[int, ...] = ()
    window: int = 0
    first: int = 0
    equal: int = 0


class _Leaf(NamedTuple):
    """A tensor of a layer: its name there, its name here, and which of their axes each of ours is."""

    theirs: str
    ours: str
    axes: tuple[int, ...] | None


_FLOATS = ("F16", "BF16", "F32", "F64")  # others are quantised, and mean nothing without their scales
_BIAS = _Leaf(".bias", "bias", (0,))
_LINEAR = _Leaf(".weight", "kernel", (1, 0))
_WINDOWS = _Leaf(".weight", "kernel", (2, 3, 1, 0))
KINDS: dict[str, tuple[_Leaf, ...]] = {
    "dense": (_LINEAR, _BIAS),
    # A 1x1 convolution there, a linear layer here.
    "pointwise": (_LINEAR, _BIAS),
    "conv": (_WINDOWS, _BIAS),
    # A convolution of whole patches there, a linear layer of their pixels (row, column, channel) here.
    "patch": (_WINDOWS, _BIAS),
    "norm": (_Leaf(".weight", "scale", (0,)), _BIAS),
    # One that only applies what it has gathered.
    "batch_norm": (
        _Leaf(".weight", "scale", (0,)),
        _BIAS,
        _Leaf(".running_mean", "mean", (0,)),
        _Leaf(".running_var", "var", (0,)),
    ),
    "embed": (_Leaf(".weight", "embedding", (0, 1)),),
    # A parameter with a name and the same axes.
    "raw": (_Leaf("", "", None),),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter of ours comes from, and how.

    Attributes:
      row: the row of the table.
      leaf: which tensor of the layer.
      shape: our shape of one copy.
      copies: the number of copies that are stacked; 0: the parameter is not a stack.
    """

    row: Row
    leaf: _Leaf
    shape: tuple[int, ...]
    copies: int = 0

    def names(self) -> list[str]:
        """Their tensors: one for each copy, of ours or of theirs."""
        name = self.row.theirs + self.leaf.theirs
        numbers = range(max(self.copies, self.row.equal, 1))
        return [name.replace("{i}", str(self.row.first + i)) for i in numbers]

    def their_shape(self) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        shape = self._unfolded(self.shape)
        axes = self._axes()
        theirs = [shape[axes.index(axis)] for axis in range(len(axes))]
        if theirs:
            theirs[0] *= self.row.chunk[1]
        return (*theirs, 1, 1) if self.row.kind == "pointwise" and len(theirs) == 2 else tuple(theirs)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our copy, from their tensor."""
        which, parts = self.row.chunk
        if parts > 1:
            tensor = np.split(tensor, parts)[which]
        if self.row.order:
            pieces = np.split(tensor, len(self.row.order))
            tensor = np.concatenate([pieces[i] for i in self.row.order])
        return tensor.reshape(tensor.shape[: len(self._axes())]).transpose(self._axes()).reshape(self.shape)

    def to_theirs(self, copy: np.ndarray) -> np.ndarray:
        """Their tensor, or our chunk of it, from our copy."""
        axes = self._axes()
        tensor = copy.reshape(self._unfolded(self.shape)).transpose([axes.index(i) for i in range(len(axes))])
        if self.row.order:
            pieces = np.split(tensor, len(self.row.order))
            tensor = np.concatenate([pieces[self.row.order.index(i)] for i in range(len(pieces))])
        return tensor[..., None, None] if self.row.kind == "pointwise" and tensor.ndim == 2 else tensor

    def read(self, store: Store, index: tuple[slice, ...]) -> np.ndarray:
        """The part of our parameter that `index` cuts out; no more of the file is read than it takes."""
        if not self.copies:
            return self._read_copy(store, self.names()[0], index)
        names = self.names()[index[0]]
        return np.stack([self._read_copy(store, name, index[1:]) for name in names])

    def _read_copy(self, store: Store, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if self.row.order or self.row.kind == "patch":
            return self.to_ours(store.read(name))[index]
        axes = self._axes()
        bounds = [index[axes.index(axis)].indices(self.shape[axes.index(axis)]) for axis in range(len(axes))]
        offsets = [0] * len(axes)
        if axes:
            which, parts = self.row.chunk
            offsets[0] = which * (self.their_shape()[0] // parts)
        cut = [slice(start + by, stop + by) for (start, stop, _), by in zip(bounds, offsets, strict=True)]
        cut += [slice(None)] * (len(store.shape(name)) - len(cut))  # a linear layer may be a 1x1 convolution
        tensor = store.read(name, tuple(cut))
        return tensor.reshape(tensor.shape[: len(axes)]).transpose(axes)

    def _axes(self) -> tuple[int, ...]:
        if self.leaf.axes is None:
            return tuple(range(len(self.shape)))
        return self.leaf.axes

    def _unfolded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` with an axis for each of theirs."""
        if self.row.kind == "patch" and len(shape) == 2:
            return (self.row.window, self.row.window, shape[0] // self.row.window**2, shape[1])
        return shape


def sources(rows: Iterable[Row], shapes: Any) -> dict[str, Source]:
    """Where each parameter comes from.

    Args:
      rows: the table of the network.
      shapes: the tree of its parameters, of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      a source for the path of each parameter, such as "blocks/attention/query/kernel".

    Raises:
      ValueError: the table does not cover a parameter, covers it twice, or has a row without parameters.
    """
    flat = flatten_dict(shapes, sep="/")
    found: dict[str, Source] = {}
    for row in rows:
        leaves = [(f"{row.ours}/{leaf.ours}".rstrip("/"), leaf) for leaf in KINDS[row.kind]]
        leaves = [(path, leaf) for path, leaf in leaves if path in flat]
        if not leaves:
            raise ValueError(f"{row} stands for no parameter of the network")
        for path, leaf in leaves:
            if path in found:
                raise ValueError(f"{path} has two rows: {found[path].row} and {row}")
            shape = tuple(flat[path].shape)
            stacked = "{i}" in row.theirs and not row.equal
            found[path] = Source(row, leaf, shape[stacked:], shape[0] if stacked else 0)
    if missing := sorted(flat.keys() - found.keys()):
        raise ValueError(f"the table has no row for {', '.join(missing)}")
    return found


def check(
    store: Store, table: Mapping[str, Source], ignored: Callable[[str], bool] = lambda name: False
) -> None:
    """Compare a folder with what the network needs.

    Args:
      store: the folder.
      table: the sources of the network's parameters.
      ignored: which names of theirs may be there though nothing needs them.

    Raises:
      UserError: tensors are missing, unexpected, of another shape or no floats; their names are listed.
    """
    there = set(store.names())
    needed = {name: source for source in table.values() for name in source.names()}
    wrong = []
    for name in sorted(there & needed.keys()):
        shape, expected = store.shape(name), needed[name].their_shape()
        flat = needed[name].row.kind in ("dense", "pointwise")
        if (_squeezed(shape) != _squeezed(expected)) if flat else (shape != expected):
            wrong.append(f"{name} has shape {shape}, expected {expected}")
        elif store.dtype(name) not in _FLOATS:
            wrong.append(f"{name} is {store.dtype(name)}, expected one of {', '.join(_FLOATS)}")
    unexpected = (name for name in there - needed.keys() if not ignored(name))
    report = [
        _listed("missing", sorted(needed.keys() - there)),
        _listed("unexpected", sorted(unexpected)),
        _listed("mis-shaped", wrong),
    ]
    if any(report):
        lines = "\n".join(line for line in report if line)
        raise UserError(f"{store.folder}: its tensors are not those that the network needs.\n{lines}")


def read_params(
    store: Store, table: Mapping[str, Source], *, shardings: Any = None, dtype: Any = np.float32
) -> Any:
    """The parameters, each device's part read on its own: no host ever holds the whole of a divided model.

    Args:
      store: the folder, which `check` has passed.
      table: the sources.
      shardings: a tree like the parameters, of placements; None: all on this process's first device.
      dtype: of the parameters.
    """
    places = {} if shardings is None else flatten_dict(shardings, sep="/")
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat = {}
    for path, source in table.items():
        shape = (source.copies, *source.shape) if source.copies else source.shape

        def part(index: tuple[slice, ...], source: Source = source) -> np.ndarray:
            return np.ascontiguousarray(source.read(store, index).astype(dtype))

        flat[path] = jax.make_array_from_callback(shape, places.get(path, default), part)
    return unflatten_dict(flat, sep="/")


def to_tensors(params: Any, table: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """The tensors of the original library, by its names."""
    flat = flatten_dict(params, sep="/")
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for path, source in table.items():
        array = np.asarray(flat[path])
        names = source.names()
        copies = array if source.copies else [array] * len(names)
        for name, copy in zip(names, copies, strict=True):
            pieces.setdefault(name, {})[source.row.chunk[0]] = source.to_theirs(copy)
    return {
        name: np.concatenate([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in pieces.items()
    }


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    # The linear layers of old checkpoints are 1x1 convolutions.
    return shape[:2] if shape[2:] == (1, 1) else shape


def _listed(what: str, names: Collection[str], most: int = 20) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(list(names)[:most])}{more}"
