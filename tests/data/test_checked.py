"""Every picture is decoded once; findings are kept, and believed only if whole and of the same data."""

import numpy as np
import pytest

from diffjax.data import checked
from diffjax.data.checked import Survivors, check_pictures, fingerprint
from diffjax.data.duplicates import dhash
from diffjax.data.source import BadExample, Example

COUNT = 10


class Pictures:
    """Random pictures, of which some cannot be used."""

    name, resolution, classes = "random", 8, ("a", "b")

    def __init__(self, bad=(3, 7), count=COUNT):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        self.images[5] = self.images[2]
        self.keys = [f"{i}.png" for i in range(count)]
        self.captions = self.concepts = self.styles = [f"caption {i}" for i in range(count)]
        self.labels = [i % 2 for i in range(count)]
        self.bad, self.read = set(bad), []

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        self.read.append(i)
        if i in self.bad:
            raise BadExample(self.keys[i], "the file is truncated")
        return Example(self.images[i], self.captions[i], self.keys[i], "", "")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(checked, "SHARD", 4)


def run(source, folder, **options):
    return check_pictures(source, folder, **{"num_threads": 2, "log": lambda line: None} | options)


def assert_equal(found, other):
    for one, another in zip(found[:4], other[:4], strict=True):
        np.testing.assert_array_equal(one, another)


def test_every_picture_is_decoded_once(tmp_path):
    source, said = Pictures(), []
    found = run(source, tmp_path, log=said.append)
    assert sorted(source.read) == list(range(COUNT))
    assert np.flatnonzero(found.reasons).tolist() == [3, 7]
    assert found.reasons[3] == "the file is truncated"
    good = [i for i in range(COUNT) if i not in source.bad]
    assert found.hashes[good].tolist() == [dhash(source.images[i]) for i in good]
    same = (found.digests[:, None] == found.digests).all(axis=-1)[np.ix_(good, good)]
    assert {(good[i], good[j]) for i, j in np.argwhere(same) if i < j} == {(2, 5)}
    assert said == [f"Checking 10 pictures of random, once; what is found is kept in {tmp_path}."]

    again = Pictures()
    known = run(again, tmp_path)
    assert_equal(known, found)
    assert (found.decoded, known.decoded, again.read) == (10, 0, [])


def test_parts_are_those_of_the_whole(tmp_path):
    whole = run(Pictures(), tmp_path / "whole")
    sources = [Pictures(), Pictures(), Pictures()]
    for part in range(2):
        run(sources[part], tmp_path / "parts", part=(part, 2))
    assert [sorted(source.read) for source in sources] == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7], []]
    assert_equal(run(sources[2], tmp_path / "parts"), whole)
    assert sources[2].read == []


def test_what_was_bad_is_looked_at_again_where_that_is_asked_for(tmp_path):
    run(Pictures(), tmp_path)
    mended = Pictures(bad=(7,))
    assert np.flatnonzero(run(mended, tmp_path).reasons).tolist() == [3, 7]
    found = run(mended, tmp_path, again=True)
    assert mended.read == [3, 7]
    assert_equal(found, run(Pictures(bad=(7,)), tmp_path / "new"))
    assert_equal(run(Pictures(), tmp_path), found)  # and is kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_complete_shards(tmp_path, error):
    class Interrupted(Pictures):
        def __getitem__(self, i):
            if i == 9:
                raise error
            return super().__getitem__(i)

    with pytest.raises(error):
        run(Interrupted(), tmp_path)
    source = Pictures()
    assert_equal(run(source, tmp_path), run(Pictures(), tmp_path / "new"))
    assert sorted(source.read) == [8, 9]
    assert not list(tmp_path.glob(".*"))


def test_a_request_to_stop_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(checked, "SHARD", 128)

    def stop():
        raise InterruptedError

    source = Pictures(count=1000)
    with pytest.raises(InterruptedError):
        run(source, tmp_path, check=stop)
    assert 64 <= len(source.read) <= 128


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another"])
def test_a_damaged_shard_is_made_anew(tmp_path, damage):
    whole = run(Pictures(), tmp_path)
    paths = sorted(tmp_path.iterdir())
    data = bytearray(paths[0].read_bytes())
    if damage == "flipped":
        data[data.index(b"\x00t\x00h\x00e") if b"\x00t\x00h\x00e" in data else 200] ^= 1
    paths[0].write_bytes({"truncated": data[:-40], "empty": b""}.get(damage, data))
    if damage == "another":
        np.savez(paths[0], **{name: getattr(whole, name)[:3] for name in whole._fields[:4]})
    source = Pictures()
    assert_equal(run(source, tmp_path), whole)
    assert 2 <= len(source.read) <= 4


@pytest.mark.parametrize("change", ["key", "stamp", "settings", "resolution", "name"])
def test_other_data_are_checked_anew(tmp_path, change):
    def stamped():
        source = Pictures(bad=())
        source.stamps = [(i, 1000) for i in range(COUNT)]
        return source

    run(stamped(), tmp_path)
    known = stamped()
    run(known, tmp_path)
    assert known.read == []
    source = stamped()
    expected = list(range(COUNT))
    if change in ("key", "stamp"):
        changed = {"key": source.keys, "stamp": source.stamps}[change]
        changed[5] = ("changed", 7)[0] if change == "key" else (5, 1001)
        expected = [4, 5, 6, 7]  # its shard alone
    elif change != "settings":
        setattr(source, change, {"resolution": 16, "name": "other"}[change])
    run(source, tmp_path, settings="x" if change == "settings" else "")
    assert sorted(source.read) == expected


def test_sizes_are_kept_where_a_source_tells_them(tmp_path):
    assert not run(Pictures(), tmp_path).sizes.any()
    source = Pictures()
    source.size = lambda i: (100 + i, 50)
    expected = [(0, 0) if i in source.bad else (100 + i, 50) for i in range(COUNT)]
    for _ in range(2):
        np.testing.assert_array_equal(run(source, tmp_path / "sizes").sizes, expected)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    found = run(Pictures(), tmp_path / "file" / "checked", log=said.append)
    assert np.flatnonzero(found.reasons).tolist() == [3, 7]
    assert sum("warning: cannot keep" in line for line in said) == 3


def test_survivors_are_a_source_of_their_own():
    source = Pictures()
    left = checked.without(source, np.isin(np.arange(COUNT), [3, 7]))
    assert isinstance(left, Survivors)
    assert (len(left), left.resolution, left.classes) == (8, 8, ("a", "b"))
    for i, key in enumerate(left.keys):
        assert left[i].key == key
        assert left.captions[i] == f"caption {key.removesuffix('.png')}" == left[i].caption
        assert left.labels[i] == int(key.removesuffix(".png")) % 2
    assert checked.without(source, np.zeros(COUNT, bool)) is source


def test_a_fingerprint_is_that_of_keys_captions_and_resolution():
    def changed(**values):
        source = Pictures()
        for name, value in values.items():
            setattr(source, name, value)
        return fingerprint(source)

    keys, captions = Pictures().keys, Pictures().captions
    prints = [
        fingerprint(Pictures()),
        changed(resolution=16),
        changed(keys=[*keys[:-1], "other"]),
        changed(keys=keys[::-1]),
        changed(captions=[*captions[:-1], "\ud800"]),
        changed(captions=captions[::-1]),
        changed(keys=keys[:-1]),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(Pictures(bad=())) == prints[0]
