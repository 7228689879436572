"""PyTorch's files: read as PyTorch reads them, and nothing in them is run."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzzing import EDITS, check_error, edited, fuzzed

from diffjax.errors import UserError
from diffjax.interop.pth import PthStore, read_pth

GOLDEN = Path(__file__).parents[1] / "golden" / "features"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {
    "protocol_version": PROTOCOL,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


class Named:
    """Pickled as the name of a function or class of a module that is not here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Called:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Kept:
    """Pickled as something that the file keeps elsewhere."""

    def __init__(self, *what):
        self.what = what


class Pickler(pickle._Pickler):  # the one in Python, whose steps can be replaced
    """Writes what torch would."""

    def save(self, value, *rest):
        if isinstance(value, Named):
            self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Called):
            self.save(value.function)
            self.save(tuple(value.arguments))
            self.write(b"R")
        elif isinstance(value, Kept):
            self.save(tuple(value.what))
            self.write(b"Q")
        else:
            super().save(value, *rest)


def pickled(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


FLOATS = Named("torch", "FloatStorage")
REBUILD = Named("torch._utils", "_rebuild_tensor_v2")


def tensor(key="0", count=6, start=0, shape=(2, 3), strides=(3, 1), kind=FLOATS, of="storage"):
    return Called(REBUILD, Kept(of, kind, key, "cpu", count), start, shape, strides, False, {})


def archive(tree, *, data=None, compression=zipfile.ZIP_STORED, order=b"little"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written:
        written.writestr("x/data.pkl", tree if isinstance(tree, bytes) else pickled(tree))
        written.writestr("x/byteorder", order)
        written.writestr("x/data/0", np.arange(6, dtype=np.float32).tobytes() if data is None else data)
    return file.getvalue()


def legacy(tree, *, magic=MAGIC, system=None, count=6, keys=("0",)):
    parts = [magic, PROTOCOL, system or SYSTEM, tree, list(keys)]
    numbers = np.arange(6, dtype=np.float32).tobytes()
    return b"".join(map(pickled, parts)) + count.to_bytes(8, "little") + numbers


def read(folder, content):
    path = folder / "x.pth"
    path.write_bytes(content)
    return read_pth(path)


@pytest.mark.parametrize("write", [archive, legacy])
def test_tensors_are_read_in_both_formats(tmp_path, write):
    tree = {
        "a": tensor(),
        "b": tensor(start=1, shape=(2,), strides=(3,)),
        "c": tensor(shape=(), strides=(), start=5),
        "d": tensor(shape=(3, 2), strides=(1, 3)),
        "e": tensor(shape=(0, 4), strides=(4, 1)),
        "f": Called(Named("torch._utils", "_rebuild_parameter"), tensor(), True, {}),
    }
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = read(tmp_path, write(tree))
    expected = {
        "a": numbers,
        "b": numbers[:, 1],
        "c": numbers[1, 2],
        "d": numbers.T,
        "e": np.empty((0, 4)),
        "f": numbers,
    }
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert found["a"].dtype == np.float32


def test_files_of_torch_and_of_a_package_are_read():
    # What is in them: test_features.py compares what networks do with it.
    store = PthStore(GOLDEN / "dinov2_s.pth")
    assert store.shape("pos_embed") == (1, 26, 24)
    assert store.dtype("pos_embed") == "F32"
    assert store.read("pos_embed", (slice(None), slice(2, 4), slice(None))).shape == (1, 2, 24)
    assert store.read("norm.weight").std() > 0.1
    store.close()
    assert list(store.names()) == []


REFUSED = {
    "a function": (Called(Named("os", "system"), "true"), "names os.system"),
    "a function of builtins": (Called(Named("builtins", "eval"), "1"), r"names builtins\.eval"),
    "torch's own reader": (Called(Named("torch", "load"), "x"), r"names torch\.load"),
    "a storage of another module": (tensor(kind=Named("evil", "FloatStorage")), r"names evil\.FloatStorage"),
    "a call of what is none": (Called(Kept("storage", FLOATS, "0", "cpu", 6)), "Storage where _Name"),
    "no dictionary": (tensor(), "something else than tensors"),
    "a dictionary of more": ({"a": 1, "b": tensor()}, "something else than tensors"),
    "names that are no texts": ({1: tensor()}, "int where str"),
    "an end beyond the storage": ({"a": tensor(start=1)}, "beyond its storage"),
    "strides beyond the storage": ({"a": tensor(strides=(4, 1))}, "beyond its storage"),
    "strides backwards": ({"a": tensor(start=5, strides=(-3, -1))}, "no proper shape"),
    "more than the storage": (
        {"a": tensor(shape=(10**6, 10**6), strides=(0, 0))},
        "beyond its storage",
    ),
    "endless dimensions": ({"a": tensor(shape=(1,) * 40, strides=(0,) * 40)}, "no proper shape"),
    "texts for sizes": ({"a": tensor(shape=("2", 3))}, "no proper shape"),
    "more numbers than there are": ({"a": tensor(count=7)}, "damaged|not where"),
    "two sizes of a storage": ({"a": tensor(), "b": tensor(count=5)}, "is there twice"),
    "something else elsewhere": ({"a": tensor(of="module")}, "is something else"),
}


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("what", REFUSED)
def test_what_no_file_of_tensors_does_is_refused(tmp_path, what, write):
    tree, expected = REFUSED[what]
    with pytest.raises(UserError, match=expected):
        read(tmp_path, write(tree))


def test_other_files_are_refused(tmp_path):
    tree = {"a": tensor()}
    with pytest.raises(UserError, match="compressed"):
        read(tmp_path, archive(tree, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="big-endian"):
        read(tmp_path, archive(tree, order=b"big"))
    with pytest.raises(UserError, match="does not begin"):
        read(tmp_path, legacy(tree, magic=1))
    with pytest.raises(UserError, match="little-endian"):
        read(tmp_path, legacy(tree, system={"little_endian": False}))
    with pytest.raises(UserError, match="not where it should be"):
        read(tmp_path, legacy(tree, count=5))
    for content in (b"", b"PK", b"\x80", b"version https://git-lfs", bytes(100), legacy(tree)[:-1]):
        with pytest.raises(UserError, match="get it again"):
            read(tmp_path, content)
    with pytest.raises(UserError, match="cannot be read"):
        read_pth(tmp_path / "none.pth")


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_is_run(tmp_path, write, protocol):
    target = tmp_path / "ran"
    harm = pickle.dumps({"a": Harm(str(target))}, protocol)
    content = archive(harm) if write is archive else legacy({}).replace(pickled({}), harm)
    with pytest.raises(UserError, match=r"names posix\.mkdir|asks for [A-Z_]+"):
        read(tmp_path, content)
    assert not target.exists()
    pickle.loads(harm)  # it would have
    assert target.exists()


def test_a_bomb_of_tuples_does_not_explode(tmp_path):
    # Each holds the one before twice: hashed as a key, or written out, the last would take years.
    bomb = b"\x80\x02" + b"}" + b")" + b"q\x01h\x01\x86" * 60 + b"K\x01s."
    with pytest.raises(UserError, match="tuple where str"):
        read(tmp_path, archive(bomb))


@fuzzed(EDITS, few=150)
def test_damaged_files_are_refused_or_read(edits, folder):
    for content in (
        legacy({"a": tensor()}),
        archive({"a": tensor()}),
        (GOLDEN / "dinov2_s.pth").read_bytes(),
    ):
        try:
            for array in read(folder, edited(content, edits)).values():
                assert array.size < 10**6
                array.tobytes()
        except UserError as error:
            check_error(error)
