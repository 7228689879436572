import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import png, reds

from diffjax.data.parquet import RowGroups, load_parquet
from diffjax.data.source import BadExample
from diffjax.errors import UserError


def write(path, columns, metadata=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)
    return path.parent


def load(folder, **options):
    return load_parquet(folder / "cache", **{"folder": folder, "resolution": 4} | options)


def structs(*files):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array(
        [None if f is None else f if isinstance(f, dict) else {"bytes": f, "path": "x"} for f in files], kind
    )


def test_as_the_library_datasets_writes_it(tmp_path):
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(names)}
    for shard in range(2):
        columns = {
            "image": structs(*(png(10 * (4 * shard + i)) for i in range(4))),
            "text": [f"caption {shard} {i}" for i in range(4)],
            "label": [0, 1, 1, 0],
        }
        write(tmp_path / f"data/train-{shard:05d}-of-00002.parquet", columns, metadata, row_group_size=3)
    write(tmp_path / "data/test-00000-of-00001.parquet", {**columns, "label": [-1] * 4}, metadata)
    source = load(tmp_path / "data")
    assert reds(source) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert source.captions == [f"caption {shard} {i}" for shard in range(2) for i in range(4)]
    assert (source.labels, source.classes) == ([0, 1, 1, 0] * 2, ["cat", "dog"])
    assert source.keys[3:5] == ["train-00000-of-00002/1/0", "train-00001-of-00002/0/0"]
    assert [reds(source)[i] for i in (7, 0, 5)] == [70, 0, 50]
    test = load(tmp_path / "data", split="test")
    assert (test.labels, test.classes, len(test)) == ([], ["cat", "dog"], 4)


def test_other_columns(tmp_path):
    columns = {
        "jpg": pa.array([png(1), png(2)], pa.large_binary()),
        "other": [png(3), png(4)],
        "caption": [["one", "two"], []],
        "title": ["x", None],
    }
    folder = write(tmp_path / "a.parquet", columns)
    source = load(folder)
    assert list(zip(source.keys, source.captions, reds(source), strict=True)) == [
        ("a/0/0/0", "one", 1),
        ("a/0/0/1", "two", 1),
        ("a/0/1", "", 2),
    ]
    source = load(folder, image="other", caption="title")
    assert (source.captions, reds(source)) == (["x", ""], [3, 4])
    for options in ({"image": "gone"}, {"caption": "gone"}):
        with pytest.raises(UserError, match=r"no column 'gone'.*'jpg', 'other', 'caption', 'title'"):
            load(folder, **options)
    with pytest.raises(UserError, match="'title' has no bytes of pictures, but string"):
        load(folder, image="title")
    with pytest.raises(UserError, match="no column"):
        load(write(tmp_path / "b" / "a.parquet", {"x": [1]}))


def test_rows_that_are_bad(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(200))
    path = {"bytes": None, "path": str(tmp_path / "secret.png")}
    files = [png(1), path, None, b"", b"<html>", png(6), png(7), png(8)]
    texts = ["fine", "path", "none", "empty", "html", "x" * 2**20, "a\0b", None]
    folder = write(tmp_path / "a.parquet", {"image": structs(*files), "text": texts}, row_group_size=4)
    source = load(folder)
    assert source.captions == ["fine", "path", "none", "empty", "html", ""]
    assert source.rejected == [
        ("a/1/1", "the caption has more than 65536 bytes"),
        ("a/1/2", "the caption is not text"),
    ]
    no_picture = "there are no bytes of a picture, at most a path"
    for i, reason in (
        (1, no_picture),
        (2, no_picture),
        (3, "the file is empty"),
        (4, "the file is a web page"),
    ):
        with pytest.raises(BadExample, match=reason) as error:
            source[i]
        assert error.value.reason.startswith(reason)
    assert (source[0].image[0, 0, 0], source[5].image[0, 0, 0]) == (1, 8)


def test_files_that_are_damaged(tmp_path):
    folder = write(tmp_path / "a.parquet", {"image": [png(i) for i in range(9)], "text": ["x"] * 9})
    data = (tmp_path / "a.parquet").read_bytes()
    source = load(folder)
    for part in (b"", b"<html>", data[:100], data[:-20], b"PAR1" + data[-30:]):
        (tmp_path / "a.parquet").write_bytes(part)
        with pytest.raises(UserError, match=r"Cannot read .*a\.parquet"):
            load(folder)
    with pytest.raises(BadExample, match="cannot be read"):
        source[0]
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(BadExample, match="No such file"):
        source[0]
    with pytest.raises(UserError, match="no files"):
        load(folder)


def test_row_groups_are_kept_up_to_a_size(tmp_path, monkeypatch):
    files = [bytes([i]) * 1000 for i in range(12)]
    write(
        tmp_path / "a.parquet", {"image": files}, row_group_size=3, compression="none", use_dictionary=False
    )
    loaded = []
    groups = RowGroups([tmp_path / "a.parquet"], max_bytes=7000)  # two of the four groups
    load_group = groups._load
    monkeypatch.setattr(
        groups, "_load", lambda shard, group: loaded.append(group) or load_group(shard, group)
    )
    for i in (0, 1, 5, 0, 7, 2, 3, 11):
        assert groups.read(0, i // 3, i % 3) == files[i]
        assert groups._bytes == sum(column.nbytes for column in groups._kept.values()) <= 7000
    assert loaded == [0, 1, 2, 1, 3]
    tiny = RowGroups([tmp_path / "a.parquet"], max_bytes=1)
    assert [tiny.read(0, i // 3, i % 3) for i in range(12)] == files


def test_without_pyarrow_the_extra_is_named(tmp_path):
    write(tmp_path / "a.parquet", {"image": [png(1)]})
    script = (
        "import sys\nsys.modules['pyarrow'] = None\n"
        "from diffjax.data.parquet import load_parquet\n"
        "try: load_parquet(sys.argv[1], folder=sys.argv[1], resolution=4)\n"
        "except Exception as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    )
    assert "diffjax[parquet]" in result.stdout
