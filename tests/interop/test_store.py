"""Folders of safetensors, also those that somebody made badly or with ill intent."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.errors import UserError
from diffjax.interop import store as store_module
from diffjax.interop.store import Store, write_store
from diffjax.untrusted import read_json

STEM = "diffusion_pytorch_model"
TENSORS = {name: np.arange(6, dtype=np.float32).reshape(2, 3) + i for i, name in enumerate("abc")}


def values(folder, **options):
    with Store(folder, **options) as store:
        return {name: store.read(name) for name in store.names()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize("stem", [STEM, "model"])
@pytest.mark.parametrize("max_bytes", [10**9, 50, 1])
def test_what_is_written_is_read(tmp_path, stem, max_bytes):
    write_store(tmp_path / "new", TENSORS, stem=stem, max_bytes=max_bytes)
    assert_same(values(tmp_path / "new"), TENSORS)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    count = {10**9: 1, 50: 2, 1: 3}[max_bytes]
    if count == 1:
        assert files == [f"{stem}.safetensors"]
    else:
        shards = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert files == [*shards, f"{stem}.safetensors.index.json"]
        index = json.loads((tmp_path / "new" / files[-1]).read_text())
        assert index["metadata"]["total_size"] == 72
        assert sorted(index["weight_map"]) == ["a", "b", "c"]


@pytest.mark.parametrize("first", [1, 10**9])
def test_what_is_written_again_leaves_nothing_of_the_old(tmp_path, first):
    write_store(tmp_path, {"old": np.ones(3)} | TENSORS, max_bytes=first)
    (tmp_path / "README.md").write_text("mine")
    write_store(tmp_path, TENSORS, max_bytes=10**9 + 1 - first)
    assert_same(values(tmp_path), TENSORS)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fails_at):
    write_store(tmp_path / "old", TENSORS, config={"x": 1})
    calls = []

    def save(tensors, path, metadata):
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(store_module, "save_file", save)
    new = {name: -tensor for name, tensor in TENSORS.items()}
    for folder in ("old", "new"):
        calls.clear()
        with pytest.raises(UserError, match=r"cannot be written \(.*No space left"):
            write_store(tmp_path / folder, new, max_bytes=50, config={"x": 2})
    assert list((tmp_path / "new").iterdir()) == []
    assert_same(values(tmp_path / "old"), TENSORS)
    assert read_json(tmp_path / "old" / "config.json") == {"x": 1}
    assert len(list((tmp_path / "old").iterdir())) == 2


def test_a_move_that_is_cut_short_leaves_no_configuration(tmp_path, monkeypatch):
    write_store(tmp_path, TENSORS, config={"x": 1})

    def replace(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="cannot be written"):
        write_store(tmp_path, TENSORS, config={"x": 2})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "index"),
    [
        (f"{STEM}.safetensors", ""),
        ("model.safetensors", ""),
        (f"{STEM}.fp16.safetensors", ""),
        ("model.bf16.safetensors", ""),
        (f"{STEM}.fp16-00001-of-00001.safetensors", f"{STEM}.safetensors.index.fp16.json"),
        ("model-00001-of-00001.fp16.safetensors", "model.safetensors.index.fp16.json"),
    ],
)
def test_the_names_of_files(tmp_path, file, index):
    save_file(TENSORS, tmp_path / file)
    if index:
        (tmp_path / index).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, file)}))
    assert_same(values(tmp_path), TENSORS)


def test_half_precision_is_read_only_where_there_is_no_other(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / f"{STEM}.fp16.safetensors")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_same(values(tmp_path), TENSORS)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64, np.int64])
def test_dtypes_and_parts(tmp_path, dtype):
    tensor = (np.arange(24).reshape(2, 3, 4) / 4).astype(dtype)
    save_file({"a": tensor, "scalar": np.asarray(3, dtype)}, tmp_path / "model.safetensors")
    with Store(tmp_path) as store:
        assert store.shape("a") == (2, 3, 4)
        assert store.shape("scalar") == ()
        part = store.read("a", (slice(1, 2), slice(None), slice(1, 4)))
        assert part.dtype == dtype
        np.testing.assert_array_equal(part, tensor[1:2, :, 1:4])
        assert store.read("scalar") == 3


def test_aliases(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert values(tmp_path, aliases={"a": "x", "b": "y.z"}).keys() == {"x", "y.z", "c"}
    with pytest.raises(UserError, match=r"model.safetensors: tensor b is there twice, as a of model.safet"):
        Store(tmp_path, {"a": "x", "b": "x"})


def test_the_files_are_closed(tmp_path):
    write_store(tmp_path, TENSORS, max_bytes=1)

    def opened():
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    with Store(tmp_path) as store:
        copies = {name: store.read(name) for name in store.names()}
        assert opened() >= 3
    assert opened() == 0
    assert_same(copies, TENSORS)  # they outlive their file


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


DAMAGED = {
    "empty": b"",
    "truncated": header(a=F32) + bytes(15),
    "longer": header(a=F32) + bytes(17),
    "lying shape": header(a=F32 | {"shape": [2, 1000]}) + bytes(16),
    "huge shape": header(a=F32 | {"shape": [2**40, 2**40]}) + bytes(16),
    "beyond the end": header(a=F32 | {"data_offsets": [0, 2**40]}) + bytes(16),
    "overlapping": header(a=F32, b=F32) + bytes(16),
    "unknown dtype": header(a=F32 | {"dtype": "Q3"}) + bytes(16),
    "huge header": (2**60).to_bytes(8, "little") + b"{}",
    "no header": bytes(8),
    "not JSON": (4).to_bytes(8, "little") + b"hi:)",
    "a page": b"<html>Access denied</html>",
    "whitespace": header(a=F32 | {"more": " " * 9 * 2**20}) + bytes(16),
    "too many tensors": header(
        **{str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    ),
    "negative shape": header(a=F32 | {"shape": [-2, -2]}) + bytes(16),
    "not a number": header(a=F32 | {"shape": [float("nan")]}) + bytes(16),
    "many sides": header(a=F32 | {"shape": [1] * 70 + [4]}) + bytes(16),
    "huge beside zero": header(a=F32 | {"shape": [0, 2**62], "data_offsets": [0, 0]}),
    "two of a name": header(a=F32).replace(b"}}", b"}, \"a\": {\"dtype\": \"F32\", \"shape\": [4], "
                                           b"\"data_offsets\": [16, 32]}}") + bytes(32),
    "metadata that is no text": header(__metadata__={"a": 1}, a=F32) + bytes(16),
    "deep": (10**6).to_bytes(8, "little") + b'{"a":' * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read as safetensors \(.*get it again"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../other.safetensors"}}, "names the file '../other.safetensors'; expected"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names the file '/etc/passwd'"),
        ({"weight_map": {"a": "weights.bin"}}, "names the file 'weights.bin'"),
        ({"weight_map": {"a": 3}}, "names the file '3'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not there"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(tmp_path, index, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        Store(folder)


def test_a_pickle_is_refused_with_advice(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r"only pytorch_model.bin, a pickle.*safe_serialization=True"):
        Store(tmp_path)
    with pytest.raises(UserError, match=r"holds no weights; expected diffusion_pytorch_model.safetensors or"):
        Store(tmp_path / "..")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_numbers_of_a_kind_that_numpy_has_not_are_refused_when_they_are_read(tmp_path, dtype):
    size = 4 if dtype == "F4" else 8
    content = header(a={"dtype": dtype, "shape": [8], "data_offsets": [0, size]}) + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(content)
    with Store(tmp_path) as store:
        assert (store.shape("a"), store.dtype("a")) == ((8,), dtype)
        with pytest.raises(UserError, match=rf"model.safetensors: tensor a, {dtype} \(8,\), cannot be read"):
            store.read("a")


def test_links_of_shards(tmp_path):
    folder = tmp_path / "model"
    write_store(tmp_path / "other", TENSORS)
    folder.mkdir()
    link = folder / f"{STEM}.safetensors"
    link.symlink_to(tmp_path / "other" / link.name)
    with pytest.raises(UserError, match="is a link out of the checkpoint"):
        Store(folder)
    cache = tmp_path / "models--someone--dit"
    (cache / "blobs").mkdir(parents=True)
    (tmp_path / "other" / link.name).rename(cache / "blobs" / "0123")
    snapshot = cache / "snapshots" / "abcd" / "transformer"
    snapshot.mkdir(parents=True)
    (snapshot / link.name).symlink_to("../../../blobs/0123")
    assert_same(values(snapshot), TENSORS)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds no weights"):
        Store(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(UserError, match=r"names model.safetensors, which is not there"):
        Store(tmp_path)
