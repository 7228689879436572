"""The cache of encoded captions: what it saves, what it notices, what it survives."""

import errno
import mmap
import multiprocessing
import os
import pickle

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.text import cache
from diffjax.text.cache import embed_captions
from diffjax.text.encoder import TextStates

EMBED = 4


class Counting:
    """An encoder of one token per word that notes what it is asked for."""

    name = "counting"
    embed = EMBED
    max_length = 64

    def __init__(self, fingerprint="ab" * 32, offset=0.0):
        self.fingerprint = fingerprint
        self.offset = offset
        self.calls = []

    def encode(self, captions, *, length):
        self.calls.append(list(captions))
        states = np.zeros((len(captions), length, EMBED), np.float32)
        mask = np.zeros((len(captions), length), bool)
        for row, caption in enumerate(captions):
            words = caption.split(" ")[:length]
            mask[row, : len(words)] = True
            states[row, : len(words)] = [
                [len(word) + self.offset + 0.1 * k for k in range(4)] for word in words
            ]
        return TextStates(states, mask, states.sum(axis=1))

    def truncated(self, captions, length):
        return [row for row, caption in enumerate(captions) if len(caption.split(" ")) > length]


@pytest.fixture
def embed(tmp_path):
    lines = []

    def call(encoder, captions, length=6):
        return embed_captions(encoder, captions, length=length, cache_dir=tmp_path / "text", log=lines.append)

    call.folder, call.lines = tmp_path / "text", lines
    return call


CAPTIONS = ["a cat", "the red bird sings", "", "dog"]


def assert_right(table, captions, encoder, length=6):
    expected = type(encoder)(offset=encoder.offset).encode(captions, length=length)
    found = table.rows(captions)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.states, expected.states.astype(np.float16))
    np.testing.assert_array_equal(found.pooled, expected.pooled)
    assert (found.states.dtype, found.mask.dtype, found.pooled.dtype) == (np.float16, bool, np.float32)
    for row, caption in enumerate(captions):
        for one, many in zip(table.lookup(caption), found, strict=True):
            np.testing.assert_array_equal(one, many[row])


def test_hits_do_not_call_the_encoder(embed):
    encoder = Counting()
    assert_right(embed(encoder, CAPTIONS), CAPTIONS, encoder)
    table = embed(encoder, list(reversed(CAPTIONS)))
    assert encoder.calls == [CAPTIONS]
    assert_right(table, ["dog", "a cat", "dog"], encoder)
    assert len(embed.lines) == 1
    assert "4 captions" in embed.lines[0]


def test_only_what_is_missing_is_encoded_once(embed):
    encoder = Counting()
    embed(encoder, ["a cat"])
    table = embed(encoder, ["new one", "a cat", "new one", "dog"])
    assert encoder.calls == [["a cat"], ["new one", "dog"]]
    assert len(table) == 3
    assert_right(embed(encoder, []), ["dog", "a cat", "new one"], encoder)


def test_many_captions_are_encoded_in_chunks(embed, monkeypatch):
    monkeypatch.setattr(cache, "_CHUNK", 3)
    encoder = Counting()
    captions = [f"{'x' * n} y" for n in range(8)]
    assert_right(embed(encoder, captions), captions, encoder)
    assert [len(call) for call in encoder.calls] == [3, 3, 2]


def test_processes_that_encode_together_agree_on_what_is_missing(tmp_path):
    """One that knows a caption encodes it once more, for another that does not; one of them writes."""
    options = {"length": 6, "cache_dir": tmp_path}
    others = Counting()
    table = embed_captions(others, CAPTIONS, **options, write=False)
    assert_right(table, CAPTIONS, others)
    assert list(tmp_path.iterdir()) == []
    encoder = Counting()
    embed_captions(encoder, CAPTIONS[:2], **options)
    asked = []
    everything = lambda missing: (asked.append(missing.tolist()), np.ones_like(missing))[1]  # noqa: E731
    table = embed_captions(encoder, CAPTIONS, **options, agree=everything)
    assert asked == [[False, False, True, True]]
    assert encoder.calls == [CAPTIONS[:2], CAPTIONS]
    assert table.captions == CAPTIONS
    assert_right(table, CAPTIONS, encoder)


def test_an_interruption_loses_one_shard_at_most(embed, monkeypatch):
    monkeypatch.setattr(cache, "_CHUNK", 2)
    monkeypatch.setattr(cache, "_SHARD_BYTES", 1)

    class Interrupted(Counting):
        def encode(self, captions, *, length):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().encode(captions, length=length)

    captions = [f"{'x' * n} y" for n in range(7)]
    with pytest.raises(KeyboardInterrupt):
        embed(Interrupted(), captions)
    assert len(list(embed.folder.glob("*/*.safetensors"))) == 2
    encoder = Counting()
    assert_right(embed(encoder, captions), captions, encoder)
    assert encoder.calls == [captions[4:6], captions[6:]]
    assert len(list(embed.folder.glob("*/*"))) == 4


def test_states_are_mapped_not_read(embed, monkeypatch):
    monkeypatch.setattr(cache, "_SHARD_BYTES", 2**16)
    captions = [f"{'x y z ' * 2}{n}" for n in range(4000)]
    expected = embed(Counting(), captions)
    for table in (expected, embed(Counting(), captions)):
        assert len(table) == 4000
        held = [shard.states for shard in table._shards]
        assert sum(states.nbytes for states in held) == 4000 * 6 * EMBED * 2
        for states in held:
            while isinstance(states.base, np.ndarray):
                states = states.base
            assert isinstance(states.base, mmap.mmap)
        assert_right(table, captions[::371], Counting())


def test_few_captions_share_a_file(embed):
    encoder = Counting()
    for n in range(5):
        embed(encoder, [f"caption {n}"])
    assert len(list(embed.folder.glob("*/*"))) == 1
    assert_right(embed(encoder, []), [f"caption {n}" for n in range(5)], encoder)
    assert [len(call) for call in encoder.calls] == [1] * 5


def test_keyed_by_encoder_and_length(embed):
    first, second = Counting(), Counting(fingerprint="cd" * 32, offset=1.0)
    embed(first, CAPTIONS)
    assert_right(embed(second, CAPTIONS), CAPTIONS, second)
    assert_right(embed(first, CAPTIONS, length=2), CAPTIONS, first, length=2)
    assert_right(embed(first, CAPTIONS), CAPTIONS, first)
    assert [len(first.calls), len(second.calls)] == [2, 1]


def test_fingerprints_that_share_a_file_name(embed):
    # The name holds 16 digits of the fingerprint; the file holds all of them.
    first, second = Counting("ab" * 32), Counting("ab" * 8 + "cd" * 24, offset=1.0)
    embed(first, CAPTIONS)
    assert_right(embed(second, CAPTIONS), CAPTIONS, second)


def flip(content, where):
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: flip(content, len(content) - 1),
        lambda content: flip(content, len(content) - 40),
        lambda content: flip(content, 200),
        lambda content: b"\xff" * len(content),
    ],
)
def test_damage_is_noticed_and_mended(embed, damage):
    encoder = Counting()
    embed(encoder, CAPTIONS)
    (path,) = embed.folder.glob("*/*")
    path.write_bytes(damage(path.read_bytes()))
    embed.lines.clear()
    assert_right(embed(encoder, CAPTIONS), CAPTIONS, encoder)
    assert len(encoder.calls) == 2
    assert str(path) in embed.lines[0]
    assert "damaged" in embed.lines[0]
    embed(encoder, CAPTIONS)
    assert len(encoder.calls) == 2


def test_every_flipped_byte_is_noticed(embed):
    encoder = Counting()
    embed(encoder, ["a cat"])
    (path,) = embed.folder.glob("*/*")
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(flip(content, where))
        assert_right(embed(encoder, ["a cat"]), ["a cat"], encoder)


def test_strange_captions_survive_the_disk(embed):
    encoder = Counting()
    captions = ["\ud83d\ude00", "😀", "\ud800", "nul\0", "\u2028\n\r", "\u202eשלום", "x" * 50_000]
    embed(encoder, captions)
    assert_right(embed(encoder, captions), captions, encoder)
    assert len(encoder.calls) == 1


def test_no_pickle_and_no_leftovers(embed):
    embed(Counting(), CAPTIONS)
    (path,) = embed.folder.glob("*/*")
    assert path.suffix == ".safetensors"


def test_a_table_can_be_sent_to_a_worker(embed):
    encoder = Counting()
    assert_right(pickle.loads(pickle.dumps(embed(encoder, CAPTIONS))), CAPTIONS, encoder)


def test_unknown_caption(embed):
    with pytest.raises(KeyError, match="zebra"):
        embed(Counting(), CAPTIONS).lookup("zebra")


def test_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/text: .*Not a directory"):
        embed_captions(Counting(), CAPTIONS, length=6, cache_dir=tmp_path / "file" / "text")


def test_full_disk(embed, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"counting-.*No space left on device"):
        embed(Counting(), CAPTIONS)
    assert list(embed.folder.glob("*/*")) == []


def test_states_that_float16_cannot_hold(embed):
    with pytest.raises(ValueError, match="float16"):
        embed(Counting(offset=1e6), CAPTIONS)


def write_often(folder, which):
    for count in range(30):
        encoder = Counting()
        captions = [f"{which} caption number {n}" for n in range(count + 1)]
        table = embed_captions(encoder, captions, length=6, cache_dir=folder, log=refuse_damage)
        assert_right(table, captions, encoder)


def refuse_damage(line):
    assert "damaged" not in line


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_often, args=(tmp_path, which)) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    # What both have added lies in one file as soon as something is added again.
    table = embed_captions(Counting(), ["one more"], length=6, cache_dir=tmp_path, log=refuse_damage)
    (path,) = tmp_path.glob("*/*")
    assert path.stat().st_size < 2**16  # nothing is there twice
    captions = [f"{which} caption number {n}" for which in range(2) for n in range(30)]
    found = [caption for caption in captions if caption in table]
    assert len(found) >= 30
    assert_right(table, [*found, "one more"], Counting())
