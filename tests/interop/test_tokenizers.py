"""Folders of tokenizers that mean harm: nothing of them is run, waited for, or read from elsewhere."""

import json
import os
import shutil

import pytest
from networks import GOLDEN

from diffjax.errors import UserError
from diffjax.interop.text import _read_bert_tokenizer, read_tokenizer
from diffjax.text.pretrained import Tokenizer

TEXT = GOLDEN / "text"


def tokenizer(tmp_path, name="tokenizer_t5", file="tokenizer_config.json", **changes):
    """A copy of a tokenizer's folder, with other settings."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(TEXT / name, folder, dirs_exist_ok=True)
    path = folder / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.parametrize("config_too", [False, True])
@pytest.mark.parametrize(
    "kind", ["T5Tokenizer", "CLIPTokenizerFast", "Mine", "PreTrainedTokenizerFast", 7, None]
)
@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["evil.Mine", "evil.Mine"]}, ["evil.Mine", None], "evil", None]
)
def test_no_mapping_to_a_program_runs_it(tmp_path, auto_map, kind, config_too):
    (tmp_path / "tokenizer").mkdir()
    program = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n"
    for name in ("evil.py", "tokenization.py", "__init__.py", "sitecustomize.py"):
        (tmp_path / "tokenizer" / name).write_text(program)
    mapping = {"auto_map": auto_map}
    if config_too:
        (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "mine", **mapping}))
        mapping = {}
    folder = tokenizer(tmp_path, tokenizer_class=kind, **mapping)
    if config_too and kind in ("T5Tokenizer", "CLIPTokenizerFast"):
        read_tokenizer(folder)  # what is beside a tokenizer that is known is not looked at
    else:
        with pytest.raises(
            UserError, match=r"auto_map|tokenizer_class is .*; expected CLIPTokenizer or T5Tok"
        ):
            read_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"extra_ids": 10**30}, "extra_ids is '1000.*; expected 0 to 1000"),
        ("special_tokens_map.json", {"extra_ids": 10**30}, "extra_ids"),
        ("tokenizer_config.json", {"extra_ids": [1]}, "extra_ids"),
        ("tokenizer_config.json", {"gguf_file": "/etc/passwd"}, "gguf_file"),
        ("special_tokens_map.json", {"gguf_file": "x"}, "gguf_file"),
        ("tokenizer_config.json", {"pad_token": 7}, "holds no tokenizer that can be read"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": 3}}, "holds no tokenizer that can be read"),
        ("tokenizer.json", {"added_tokens": None}, "holds no tokenizer that can be read"),
    ],
)  # fmt: skip
def test_settings_of_a_tokenizer_that_mean_harm(tmp_path, file, changes, message):
    with pytest.raises(UserError, match=message):
        read_tokenizer(tokenizer(tmp_path, file=file, **changes))


def test_files_of_a_tokenizer_that_are_none(tmp_path):
    folder = tokenizer(tmp_path)
    tokens = folder / "tokenizer.json"
    with open(tokens, "r+b") as file:
        file.truncate(2**36)
    with pytest.raises(UserError, match=r"tokenizer.json: is larger than 32 MiB"):
        read_tokenizer(folder)
    tokens.write_text('{"added_tokens": ' + "[" * 10**6)
    with pytest.raises(UserError, match="holds no tokenizer that can be read"):
        read_tokenizer(folder)
    tokens.unlink()
    with pytest.raises(UserError, match=r"holds no tokens; expected tokenizer.json, or spiece.model; get"):
        read_tokenizer(folder)
    os.mkfifo(tokens)
    with pytest.raises(UserError, match=r"tokenizer.json: is no regular file"):
        read_tokenizer(folder)
    tokens.unlink()
    tokens.symlink_to(TEXT / "tokenizer_t5" / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json: is a link out of the checkpoint"):
        read_tokenizer(folder)


def test_tokens_are_read_from_the_folder_alone(tmp_path):
    other = shutil.copytree(TEXT / "tokenizer_clip", tmp_path / "other")
    vocab = json.loads((other / "vocab.json").read_text())
    (other / "vocab.json").write_text(json.dumps(vocab | {"stolen</w>": len(vocab)}))
    files = {"vocab_file": str(other / "vocab.json"), "merges_file": str(other / "merges.txt")}
    folder = tokenizer(tmp_path, "tokenizer_clip", **files)
    assert read_tokenizer(folder).get_vocab() == vocab
    (folder / "vocab.json").unlink()
    with pytest.raises(
        UserError, match=r"holds no tokens; expected tokenizer.json, or merges.txt and vocab.json"
    ):
        read_tokenizer(folder)


def test_an_expression_that_takes_for_ever_is_not_used(tmp_path):
    slow = {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": "x"}
    folder = tokenizer(tmp_path, file="tokenizer.json", normalizer=slow)
    assert read_tokenizer(folder)("a" * 60 + "b")["input_ids"]  # with it, longer than there are stars
    with pytest.raises(UserError, match="has a regular expression; expected the tokenizer of a BERT"):
        _read_bert_tokenizer(folder / "tokenizer.json", 99)


def test_a_tokenizer_with_no_word_for_something_is_refused(tmp_path):
    folder = tokenizer(tmp_path, "tokenizer_clip")
    (folder / "vocab.json").write_text('{"a": 0, "a</w>": 1}')
    (folder / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"the tokenizer cannot read a caption \(.*not found in the vocab"):
        Tokenizer(read_tokenizer(folder), 10**4)


@pytest.mark.parametrize("length", ["16", True, float("nan"), 0, [16], -1])
def test_a_length_of_a_tokenizer_that_is_none(tmp_path, length):
    with pytest.raises(UserError, match=r"model_max_length is .*; expected a number|is not JSON"):
        Tokenizer(read_tokenizer(tokenizer(tmp_path, model_max_length=length)), 10**4)
