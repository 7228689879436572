"""Files of safetensors whose headers lie: refused with one error, or read, and never more than there is."""

import json

import numpy as np
from fuzzing import EDITS, SCALARS, VALUES, check_error, edited, fuzzed
from hypothesis import strategies as st
from safetensors.numpy import save

from diffjax.errors import UserError
from diffjax.interop.store import Store

TENSORS = {name: np.arange(6, dtype=np.float32).reshape(2, 3) + i for i, name in enumerate("abc")}
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "F6_E2M3",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "Q3",
]
SIDES = st.one_of(st.integers(0, 5), st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 1.5, None]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES) | SCALARS,
        "shape": st.lists(SIDES, max_size=4) | st.integers(0, 99).map(lambda n: [1] * n) | VALUES,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, 32, 2**62, -8]), max_size=3) | VALUES,
    },
    optional={"more": VALUES},
)
# Those that fit, so that the others are looked at.
FITTING = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=20)), min_size=1, max_size=4
)
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "C64": 8}


def packed(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def fitting(entries) -> bytes:
    header, end = {}, 0
    for i, (dtype, shape) in enumerate(entries):
        first, end = end, end + int(np.prod(shape)) * BYTES.get(dtype, 1)
        header[str(i)] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    return packed(json.dumps(header).encode(), bytes(end))


def reads(content: bytes, folder) -> None:
    """Opens a file and reads everything; no error but ours, and no more bytes than the file has."""
    (folder / "model.safetensors").write_bytes(content)
    try:
        with Store(folder) as store:
            total = 0
            for name in store.names():
                try:
                    shape, dtype = store.shape(name), store.dtype(name)
                    tensor = store.read(name)
                    assert (tensor.shape, bool(dtype)) == (shape, True)
                    total += tensor.nbytes
                    store.read(name, tuple(slice(0, 1) for _ in shape))
                except UserError as error:
                    check_error(error, "model.safetensors")
            assert total <= len(content)
    except UserError as error:
        check_error(error, "model.safetensors")


@fuzzed(EDITS)
def test_bytes_that_were_changed(edits, folder):
    reads(edited(save(TENSORS, {"format": "pt"}), edits), folder)


@fuzzed(st.tuples(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | VALUES, max_size=4),
                  st.integers(0, 64)))  # fmt: skip
def test_headers_that_were_made_up(made, folder):
    header, size = made
    reads(packed(json.dumps(header).encode(), bytes(size)), folder)


@fuzzed(FITTING)
def test_headers_that_fit_their_data(entries, folder):
    reads(fitting(entries), folder)


@fuzzed(st.tuples(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 220)))
def test_any_bytes(made, folder):
    text, length = made
    reads(packed(text, length=length), folder)
