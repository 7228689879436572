import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pictures import png, reds
from tensorflow_datasets.proto import tf_example_pb2

from diffjax.data.array_records import load_array_record
from diffjax.data.loader import make_loader
from diffjax.data.source import BadExample
from diffjax.errors import UserError


def example(**features):
    """A message `tf.train.Example`; names with `__` for `/`."""
    message = tf_example_pb2.Example()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = message.features.feature[name.replace("__", "/")]
        if all(isinstance(value, int) for value in values):
            feature.int64_list.value.extend(values)
        else:
            feature.bytes_list.value.extend(v.encode() if isinstance(v, str) else v for v in values)
    return message.SerializeToString()


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path.parent


def load(folder, **options):
    return load_array_record(folder / "cache", **{"folder": folder, "resolution": 4} | options)


def test_shards_are_one_source(tmp_path):
    for shard in range(2):
        records = [example(image=png(10 * i + shard), caption=f"c{shard}{i}", label=i % 2) for i in range(3)]
        write(tmp_path / f"train.{shard}.array_record", *records)
    source = load(tmp_path)
    assert source.captions == ["c00", "c01", "c02", "c10", "c11", "c12"]
    assert reds(source) == [0, 10, 20, 1, 11, 21]
    assert (source.labels, source.classes) == ([0, 1, 0] * 2, ["0", "1"])
    assert source.keys[4] == "train.1/1"
    assert (source.name, len(source), source.rejected) == (f"{tmp_path.name}-train", 6, [])
    batches = list(make_loader(source, batch_size=2, seed=0, num_epochs=1))
    for batch in batches:
        for index, image in zip(batch["index"], batch["image"], strict=True):
            np.testing.assert_array_equal(image, source[index].image)
    assert sorted(int(i) for batch in batches for i in batch["index"]) == list(range(6))


def test_names_of_features(tmp_path):
    record = example(image__encoded=png(5), captions__text=["one", "two "], other=png(6), title="t")
    folder = write(tmp_path / "a.array_record", record)
    assert load(folder).captions == ["one", "two"]
    assert reds(load(folder)) == [5, 5]
    source = load(folder, image="other", caption="title")
    assert (source.captions, reds(source), source.keys) == (["t"], [6], ["a/0"])
    with pytest.raises(UserError, match=r"no pictures.*there is no picture in the record"):
        load(folder, image="gone")


def test_records_that_are_bad(tmp_path):
    records = [
        example(image=png(1), text="fine"),
        b"\xff\xff\xff no message",
        example(text="alone"),
        example(image=[3], text="a number"),
        example(image=png(4), text="x" * 2**20),
        example(image=png(5), text="a\0b"),
        example(image=b"<html>", text="html"),
        b"",
        example(image=png(8), text=b"caf\xe9", label=2**60),
    ]
    source = load(write(tmp_path / "a.array_record", *records))
    assert source.captions == ["fine", "html", "caf\ufffd"]
    assert (source.labels, source.classes) == ([], [])
    assert source.rejected == [
        ("a/1", "the record cannot be read"),
        ("a/2", "there is no picture in the record"),
        ("a/3", "there is no picture in the record"),
        ("a/4", "the caption has more than 65536 bytes"),
        ("a/5", "the caption is not text"),
        ("a/7", "there is no picture in the record"),
    ]
    with pytest.raises(BadExample, match="web page"):
        source[1]


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:100], lambda d: b"<html>" * 99, lambda d: d[:-100]]
)
def test_files_that_are_damaged(tmp_path, damage):
    folder = write(tmp_path / "a.array_record", *(example(image=png(i)) for i in range(9)))
    path = tmp_path / "a.array_record"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"Cannot read .*a\.array_record"):
        load(folder)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no files"):
        load(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        load(tmp_path / "gone")
    with pytest.raises(UserError, match="resolution"):
        load(tmp_path, resolution=0)
