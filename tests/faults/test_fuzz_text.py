"""Prompts, captions and their tables in any characters: read, or refused with one short error."""

import functools
import string

import numpy as np
from fuzzing import EDITS, check_error, edited, fuzzed
from hypothesis import strategies as st
from text_folders import pipeline

from diffjax.config import cascade_config
from diffjax.data.captions import read_table
from diffjax.errors import UserError
from diffjax.interop.text import load_minilm, open_text_encoder
from diffjax.sample import read_prompts

# All planes of Unicode, halves of pairs, and what terminals, tokenizers and files take for something else.
PIECES = st.one_of(
    st.text(st.characters(codec=None), max_size=40),
    st.text(string.printable, max_size=40),
    st.sampled_from(["\0", "\ud800", "\udfff", "\u202e", "\u200d", "\ufeff", "\x1b[2J", "\r\n", "\u2028"]),
    st.sampled_from(["ﷺ", "é" * 50, "e" + "\u0301" * 500, "مرحبا", "東京", "👩\u200d👩\u200d👧", "'" * 99]),
    st.sampled_from(["<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "<extra_id_0>", "[SEP]", "[MASK]"]),
    st.sampled_from(["{}", "%s", "a " * 3000, "x" * 30_000]),
)
TEXTS = st.lists(PIECES, max_size=4).map("".join)


@functools.cache
def encoders(folder):
    """All ways that parts are put together, and the encoder that is not public; networks are not run."""
    found = [load_minilm()]
    for kind in ("sd3", "flux", "if"):
        (folder / kind).mkdir()
        found.append(open_text_encoder(pipeline(folder / kind, kind), kind))
    return found


@fuzzed(st.lists(TEXTS, min_size=1, max_size=3), few=60, many=2000)
def test_texts_to_tokens(texts, folder):
    for encoder in encoders(folder):
        length = min(encoder.max_length, 40)
        tokens = encoder.tokens(texts, length=length)
        for name, array in tokens.items():
            assert array.shape[0] == len(texts)
            if name.endswith("ids"):
                assert array.dtype == np.int32
                assert (array >= 0).all()
        assert set(encoder.truncated(texts, length)) <= set(range(len(texts)))


def test_a_megabyte_of_anything(tmp_path):
    texts = [
        piece * (2**20 // len(piece)) for piece in ("a", "a ", "\0", "\ud800", "é", "e\u0301", "東", "👍")
    ]
    for encoder in encoders(tmp_path):
        encoder.tokens(texts, length=min(encoder.max_length, 40))
        assert encoder.truncated(texts, min(encoder.max_length, 40)) == list(range(len(texts)))


TABLES = {
    "metadata.jsonl": b'{"file_name": "a.png", "text": "red"}\n{"file_name": "b/c.png", "text": "blue"}\n',
    "metadata.csv": b'file_name,text\na.png,"red, ""and"" more"\nb/c.png,blue\n',
}
BYTES = TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
ROWS = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.sampled_from([b"\xff", b'"', b",", b"\n", b"\r", b"\0", b"[" * 9999, b"x" * 2**21]),
        BYTES.map(lambda text: b'{"file_name": "d.png", "text": "%s"}' % text),
        BYTES.map(lambda text: b'{"file_name": "%s", "text": ""}' % text),
        st.sampled_from([b"../../etc/passwd", b"/etc/passwd"]).map(
            b'{"file_name": "%s", "text": "x"}'.__mod__
        ),
        st.sampled_from([b'{"file_name": 7, "text": "x"}', b'{"file_name": "e.png", "text": [1]}']),
    ),
    max_size=4,
)


@fuzzed(st.tuples(st.sampled_from(sorted(TABLES)), ROWS, EDITS | st.just([])), many=5000)
def test_tables_of_captions(made, folder):
    name, rows, edits = made
    (folder / name).write_bytes(edited(TABLES[name] + b"\n".join(rows), edits))
    try:
        captions, rejected = read_table(folder / name)
        for file, text in captions.items():
            assert not file.startswith("/")
            assert ".." not in file.split("/")
            text.encode()  # no halves of characters, which nothing after could write
        for place, reason in rejected:
            assert len(reason) < 300
            (place + reason).encode()
    except UserError as error:
        check_error(error)


@fuzzed(st.tuples(st.lists(TEXTS, max_size=4), st.binary(max_size=60), st.booleans()))
def test_prompts(made, folder):
    texts, content, from_file = made
    config = cascade_config()
    if from_file:
        (folder / "prompts.txt").write_bytes("\n".join(texts).encode("utf-8", "surrogatepass") + content)
        config.prompts_file = str(folder / "prompts.txt")
    else:
        config.prompts = ";".join(texts)
    try:
        assert all(prompt.strip() for prompt in read_prompts(config))
    except UserError as error:
        check_error(error)
