import io
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import program
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffjax.data import captions
from diffjax.data.loader import make_loader
from diffjax.data.source import BadExample
from diffjax.data.tfds import load_tfds
from diffjax.errors import UserError

COUNT = 6
CAPTIONS = [["one"], [], ["two", " three\n"], ["caf\u00e9"], [], ["x", "y", "z"]]


def file_of(red, size=(12, 10)):
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, "PNG")
    file.seek(0)
    return file


class Pets(tfds.core.GeneratorBasedBuilder):
    """Pictures whose red is ten times their number; picture `i` has the class `i % 2`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "title": tfds.features.Text(),
            "lines": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(True), "test": self._generate_examples(False)}

    def _generate_examples(self, labelled):
        for i in range(COUNT):
            yield (
                i,
                {
                    "image": file_of(10 * i),
                    "mask": io.BytesIO(b"not to be decoded"),
                    "label": i % 2 if labelled else -1,
                    "captions": [{"text": text, "id": n} for n, text in enumerate(CAPTIONS[i])],
                    "title": f"title {i}",
                    "lines": [f"line {i}", "other"],
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the data set `pets`, written without TensorFlow; not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    Pets(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


@pytest.fixture(autouse=True)
def _offline(request, monkeypatch):
    """Nobody may look for a server."""
    request.getfixturevalue("prepared")

    def connect(*arguments):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture
def load(prepared, tmp_path):
    def call(dataset="pets", **options):
        return load_tfds(tmp_path, **{"dataset": dataset, "resolution": 4, "data_dir": prepared} | options)

    return call


def numbers(source):
    """Which of the pictures that were written each element shows."""
    return [int(source[i].image[0, 0, 0]) // 10 for i in range(len(source))]


def test_an_element_is_a_picture_with_one_of_its_captions(load):
    source = load()
    written = [(i, text.strip()) for i, texts in enumerate(CAPTIONS) for text in texts or [""]]
    assert sorted(zip(numbers(source), source.captions, strict=True)) == sorted(written)
    assert source.classes == ["cat", "dog"]
    assert source.labels == [i % 2 for i in numbers(source)]
    assert source.concepts == [source.classes[label] for label in source.labels]
    assert source.styles == [""] * len(source)
    assert len(set(source.keys)) == len(source) == 9
    example = source[3]
    assert example[1:] == (source.captions[3], source.keys[3], source.concepts[3], "")
    assert (example.image.shape, example.image.dtype) == ((4, 4, 3), np.uint8)
    assert source.name == "pets-1.0.0-train"
    with pytest.raises(IndexError):
        source[9]


@pytest.mark.parametrize(
    ("caption", "texts"),
    [("title", lambda i: [f"title {i}"]), ("lines", lambda i: [f"line {i}", "other"])],
)
def test_other_captions(load, caption, texts):
    source = load(caption=caption)
    expected = sorted((i, text) for i in range(COUNT) for text in texts(i))
    assert sorted(zip(numbers(source), source.captions, strict=True)) == expected


def test_class_names_stand_for_captions(load, prepared, tmp_path):
    shutil.copytree(prepared / "pets", tmp_path / "d" / "pets")
    features = tmp_path / "d/pets/1.0.0/features.json"
    known = json.loads(features.read_text())
    for name in ("captions", "lines"):
        del known["featuresDict"]["features"][name]
    features.write_text(json.dumps(known))
    source = load(data_dir=tmp_path / "d")
    assert source.captions == source.concepts == [["cat", "dog"][i % 2] for i in numbers(source)]
    assert sorted(numbers(source)) == list(range(COUNT))
    unlabelled = load(data_dir=tmp_path / "d", split="test")
    assert (unlabelled.captions, unlabelled.labels) == ([""] * COUNT, [])
    assert load(data_dir=tmp_path / "d", label="title").captions == [""] * COUNT


def test_splits(load):
    test = load(split="test")
    assert (test.labels, test.classes, test.concepts) == ([], ["cat", "dog"], test.captions)
    first, rest = load(split="train[:50%]", caption="title"), load(split="train[50%:]", caption="title")
    assert sorted(numbers(first) + numbers(rest)) == list(range(COUNT))
    assert len(first) == len(rest) == COUNT // 2
    assert first.name == "pets-1.0.0-train-50"
    for split in ("validation", "train["):
        with pytest.raises(UserError, match="Cannot open the split"):
            load(split=split)


def test_the_texts_are_read_once(load, prepared, tmp_path):
    lines = []
    first = load(log=lines.append)
    assert len(lines) == 1
    again = load(log=lines.append)
    assert len(lines) == 1
    for field in ("captions", "labels", "keys", "concepts"):
        assert getattr(again, field) == getattr(first, field)
    load(caption="title", log=lines.append)
    load(split="test", log=lines.append)
    assert len(lines) == 3
    for index in (tmp_path / "tfds").iterdir():
        index.write_text('[[["a"], 0]]' if len(lines) == 3 else "{")
    assert load(log=lines.append).captions == first.captions
    assert len(lines) == 4
    (tmp_path / "file").touch()  # a cache that cannot be written does no harm
    source = load_tfds(tmp_path / "file", dataset="pets", resolution=4, data_dir=prepared)
    assert source.captions == first.captions


def test_versions_and_variants(load, prepared, tmp_path):
    for place in (
        "pets/1.0.0",
        "pets/1.10.0",
        "pets/1.9.0",
        "wild/2014/1.0.0",
        "wild/2017/1.0.0",
        "one/x/1.0.0",
    ):
        shutil.copytree(prepared / "pets/1.0.0", tmp_path / "d" / place)
        info = tmp_path / "d" / place / "dataset_info.json"
        info.write_text(info.read_text().replace('"1.0.0"', f'"{place.split("/")[-1]}"'))
    (tmp_path / "d/pets/2.0.0.incomplete").mkdir()
    (tmp_path / "d/pets/3.0.0").mkdir()

    def name(dataset):
        return load(dataset, data_dir=tmp_path / "d").name

    assert name("pets") == "pets-1.10.0-train"
    assert name("pets:1.9.0") == "pets-1.9.0-train"
    assert load("wild/2017", data_dir=tmp_path / "d").labels
    assert load("one", data_dir=tmp_path / "d").labels
    assert load("one/x:1.0.0", data_dir=tmp_path / "d").labels
    with pytest.raises(UserError, match="choose one of: wild/2014, wild/2017"):
        name("wild")
    with pytest.raises(UserError, match=r"pets:4\.0\.0 is not prepared"):
        name("pets:4.0.0")


@pytest.mark.parametrize(
    "dataset", ["cifar10", "no_such_dataset", "coco_captions/2014", "imagenet2012:5.1.0"]
)
def test_what_is_not_prepared_is_never_downloaded(load, prepared, dataset):
    with pytest.raises(UserError) as error:
        load(dataset)
    assert f"{dataset} is not prepared in {prepared} (there are: " in str(error.value)
    assert "pets)" in str(error.value)
    command = f"tfds build {dataset} --data_dir={prepared} --file_format=array_record"
    assert str(error.value).endswith(command)


@pytest.mark.parametrize(
    "dataset", ["", "../pets", "pets/..", "a b", "huggingface:mnist", "pets:latest", "/pets"]
)
def test_names_that_are_none(load, dataset):
    with pytest.raises(UserError, match="is written name"):
        load(dataset)


def test_the_folder_of_the_environment(load, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert load(data_dir=None).labels
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"not prepared in {tmp_path}/tensorflow_datasets"):
        load(data_dir=None)


def test_features_that_are_missing(load):
    for option in (
        {"image": "title"},
        {"image": "photo"},
        {"caption": "label"},
        {"caption": "captions/words"},
    ):
        with pytest.raises(
            UserError, match=r"there is no (picture|caption) .*: captions, image, label, lines"
        ):
            load(**option)
    with pytest.raises(UserError, match="resolution"):
        load(resolution=0)


def test_a_folder_that_is_damaged(load, prepared, tmp_path):
    def broken(name, text):
        shutil.copytree(prepared / "pets", tmp_path / name / "pets")
        for file in (tmp_path / name / "pets/1.0.0").glob(name):
            file.write_text(text(file.read_text())) if text else file.unlink()
        return tmp_path / name

    other = broken("dataset_info.json", lambda text: text.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"no ArrayRecord files.*\n?.*tfds build pets"):
        load(data_dir=other)
    with pytest.raises(UserError, match="Cannot open"):
        load(data_dir=broken("dataset_info.*", lambda text: text[:50]))
    for name in ("features.json", "pets-train*"):
        with pytest.raises(UserError, match=r"Cannot (open|read)"):
            load(data_dir=broken(name, None))


def test_a_picture_that_cannot_be_decoded(load):
    source = load(image="mask", caption="title")
    with pytest.raises(BadExample, match=r"train/2: pets-1\.0\.0-train: not a PNG") as error:
        source[2]
    assert error.value.key == source.keys[2] == "train/2"


def test_a_caption_that_is_refused_does_not_stop_the_others(load, monkeypatch):
    monkeypatch.setattr(captions, "MAX_TEXT", 4)
    source = load()
    assert sorted(source.captions) == ["", "", "one", "x", "y", "z"]
    assert len(source.rejected) == 2  # of six bytes with a space and a line's end, and of five
    for key, reason in source.rejected:
        assert key.startswith("train/")
        assert "the caption has more than" in reason


def test_batches(load):
    source = load()
    for batch in make_loader(source, batch_size=3, seed=0, num_epochs=1):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            np.testing.assert_array_equal(image, source[index].image)


def test_tensorflow_is_not_imported(prepared, tmp_path):
    script = (
        "import sys\nfrom diffjax.data.tfds import load_tfds\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"load_tfds({str(tmp_path)!r}, dataset='pets', data_dir={str(prepared)!r}, resolution=4)[0]\n"
        "assert not {'tensorflow', 'jax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=program.ROOT, env=program.environment(), check=True)
