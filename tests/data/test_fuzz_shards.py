"""Mutated shards: what is read of them is right or refused; native readers run in a process of their own."""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import png
from tensorflow_datasets.proto import tf_example_pb2

from diffjax.data.captions import read_table
from diffjax.data.source import BadExample
from diffjax.data.tar import Damage, list_members
from diffjax.data.webdataset import load_webdataset
from diffjax.errors import UserError

MEMORY = 16 * 2**20


def archive(file_format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=file_format) as tar:
        for i in range(4):
            texts = {
                "png": png(i),
                "txt": b"word",
                "json": json.dumps({"caption": "x"}).encode(),
                "cls": b"1",
            }
            for extension, data in texts.items():
                info = tarfile.TarInfo(f"{'d' * (60 * i)}/\u00e9{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


ARCHIVES = [archive(tarfile.PAX_FORMAT), archive(tarfile.GNU_FORMAT)]


@st.composite
def archives(draw):
    """An archive with changes in its headers, whose check sums are mostly made right again."""
    data = bytearray(draw(st.sampled_from(ARCHIVES)))
    for _ in range(draw(st.integers(1, 4))):
        block = 512 * draw(st.integers(0, max(0, len(data) // 512 - 1)))
        kind = draw(st.integers(0, 6))
        if kind <= 3:
            # The name, the size, the type, or anywhere.
            at = block + draw(st.sampled_from([0, 124, 156, draw(st.integers(0, 511))]))
            some = draw(
                st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"7" * 11, b"x", b"L", b"g"]))
            )
            data[at : at + len(some)] = some
            if draw(st.integers(0, 3)):
                total = 256 + sum(data[block : block + 148]) + sum(data[block + 156 : block + 512])
                data[block + 148 : block + 156] = b"%06o\0 " % total
        elif kind == 4:
            del data[block : block + 512 * draw(st.integers(1, 3))]
        elif kind == 5:
            data[block:block] = data[block : block + 512 * draw(st.integers(1, 3))]
        else:
            del data[block + draw(st.integers(0, 511)) :]
    return bytes(data)


def use_archive(data):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.tar"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            try:
                for member in list_members(path):
                    assert 0 <= member.offset <= member.offset + member.size <= len(data)
            except (Damage, UserError):
                pass
            assert tracemalloc.get_traced_memory()[1] < MEMORY
        finally:
            tracemalloc.stop()
        try:
            source = load_webdataset(path.parent / "cache", folder=path.parent, resolution=4)
        except UserError:
            return
        assert len(set(source.keys)) == len(source) > 0
        for i in range(len(source)):
            try:
                assert source[i].image.shape == (4, 4, 3)
            except BadExample:
                continue
        assert {entry.name for entry in path.parent.iterdir()} == {"a.tar", "cache"}


FAST = settings(
    max_examples=200, derandomize=True, deadline=5000, database=None, suppress_health_check=list(HealthCheck)
)


@FAST
@given(archives())
def test_mutated_archives(data):
    use_archive(data)


@pytest.mark.slow
@settings(FAST, max_examples=5000)
@given(archives())
def test_five_thousand_mutated_archives(data):
    use_archive(data)


@FAST
@given(
    st.sampled_from(["metadata.jsonl", "metadata.csv"]),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [b"file_name,text", b'{"file_name": "a", "text": "b"}', b"a,b", b'a,"b', b"\0", b"x" * 2**18]
            ),
        ),
        max_size=8,
    ),
)
def test_tables(name, lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(b"\n".join(lines))
        try:
            captions, rejected = read_table(path)
        except UserError:
            return
        for file, caption in captions.items():
            assert not file.startswith("/")
            assert ".." not in file.split("/")
            assert "\0" not in caption
        assert all(reason for _, reason in rejected)


# Reads shards that it mutates itself; the last thing it says is how that went.
NATIVE = """
import random, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
kind, work, count = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
from diffjax.data.array_records import load_array_record
from diffjax.data.parquet import load_parquet
from diffjax.data.source import BadExample
from diffjax.errors import UserError
load = {"parquet": load_parquet, "array_record": load_array_record}[kind]
good = (work / f"good.{kind}").read_bytes()
folder = work / "mutated"
folder.mkdir(exist_ok=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))
outcomes = {"refused": 0, "read": 0, "memory": 0}
for number in range(count):
    draw = random.Random(number)
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        last = draw.random() < 0.5  # where Parquet has its footer
        at = len(data) - 1 - draw.randrange(min(len(data), 600)) if last else draw.randrange(len(data))
        data[at] = draw.choice([draw.randrange(256), data[at] ^ 1 << draw.randrange(8), 0, 255])
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
            data = data or bytearray(b"x")
    (folder / f"a.{kind}").write_bytes(data)
    try:
        source = load(work / "cache" / str(number), folder=folder, resolution=4)
        for i in range(len(source)):
            try:
                source[i]
            except BadExample:
                pass
        outcomes["read"] += 1
    except UserError:
        outcomes["refused"] += 1
    except MemoryError:
        outcomes["memory"] += 1
# Not getrusage, which counts the process that started this one as well.
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(*outcomes.values(), peak // 1024)
"""


def write_good(folder, kind):
    if kind == "array_record":
        writer = ArrayRecordWriter(str(folder / "good.array_record"), "group_size:2")
        for i in range(9):
            message = tf_example_pb2.Example()
            message.features.feature["image"].bytes_list.value.append(png(i))
            message.features.feature["caption"].bytes_list.value.append(b"word")
            message.features.feature["label"].int64_list.value.append(i)
            writer.write(message.SerializeToString())
        writer.close()
        return
    images = pa.array([{"bytes": png(i), "path": "x"} for i in range(9)])
    table = pa.table({"image": images, "text": ["word"] * 9, "label": list(range(9))})
    pq.write_table(table, folder / "good.parquet", row_group_size=4)


def run_native(tmp_path, kind, count):
    write_good(tmp_path, kind)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", NATIVE, str(root), kind, str(tmp_path), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    refused, read, memory, peak = map(int, result.stdout.split()[-4:])
    assert (refused + read, memory) == (count, 0)
    assert min(refused, read) > count // 20
    assert peak < 1024  # MiB


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_native_readers(tmp_path, kind):
    run_native(tmp_path, kind, 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_native_readers_three_thousand_times(tmp_path, kind):
    run_native(tmp_path, kind, 3000)
