"""What the configuration says of data reaches the source that it names."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from diffjax.config import stage_config
from diffjax.data.source import BadExample
from diffjax.errors import UserError
from diffjax.experiment.inputs import build_source


def png(size, alpha=255):
    file = io.BytesIO()
    Image.new("RGBA", size, (200, 0, 0, alpha)).save(file, "PNG")
    return file.getvalue()


def gif():
    file = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


PICTURES = {"clear": png((9, 9), 0), "moving": gif(), "small": png((4, 4))}


def write_folder(folder):
    for name, data in PICTURES.items():
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text(name)


def write_webdataset(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in PICTURES.items():
            for extension, content in (("pic.png", data), ("words", name.encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_parquet(folder):
    pq.write_table(
        pa.table({"pic.png": list(PICTURES.values()), "words": list(PICTURES)}), folder / "a.parquet"
    )


def write_array_record(folder):
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for name, data in PICTURES.items():
        message = tf_example_pb2.Example()
        message.features.feature["pic.png"].bytes_list.value.append(data)
        message.features.feature["words"].bytes_list.value.append(name.encode())
        writer.write(message.SerializeToString())
    writer.close()


WRITERS = {
    "folder": write_folder,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "array_record": write_array_record,
}


@pytest.mark.parametrize("name", WRITERS)
def test_settings_reach_the_source(name, tmp_path):
    (tmp_path / "data").mkdir()
    WRITERS[name](tmp_path / "data")
    data = stage_config().data
    data.update(source=name, resolution=4, folder=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    data.split = "train"
    if name != "folder":
        with pytest.raises(UserError, match="picture"):
            build_source(data)
        data.image, data.caption = "pic.png", "words"
    data.background = (1, 2, 3)
    source = build_source(data)
    assert source.captions == ["clear", "moving", "small"]
    assert source[0].image[0, 0].tolist() == [1, 2, 3]
    assert source[1].image[0, 0].tolist() == [255, 0, 0]
    assert source[2].image[0, 0].tolist() == [200, 0, 0]
    assert len(source.stamps) == 3

    data.animated, data.limits.min_side = "reject", 5
    source = build_source(data)
    bad = dict(source.rejected)
    for i in range(len(source)):
        try:
            assert source[i].caption == "clear"
        except BadExample as error:
            bad[error.key] = error.reason
    assert sorted(bad.values()) == [
        "the picture is animated, or has several pages",
        "the picture is too small",
    ]
    data.folder = ""
    with pytest.raises(UserError, match=r"data\.folder"):
        build_source(data)
