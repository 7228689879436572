"""What every frozen text encoder offers, whatever network stands behind it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Widths(NamedTuple):
    """Widths of a text encoder's states and pooled vector, and what is assumed of them; 0: no text."""

    embed: int = 0
    pooled: int = 0
    note: str = ""


def assumed_widths(encoder: str, network: str) -> Widths:
    """What widths the text has, without loading an encoder.

    Args:
      encoder: "minilm" or "public", as in a configuration; of the latter T5-XXL is assumed.
      network: "mmdit" and "flux" are told, beside T5's states, what CLIPs have pooled.
    """
    if encoder == "minilm":
        return Widths(384, 384)
    pooled = {"mmdit": 2048, "flux": 768}.get(network, 4096)
    return Widths(
        4096, pooled, f"text is assumed to be T5-XXL's, 4096 wide, with a pooled vector of {pooled}."
    )


# Far more than the tokens of any encoder need; a caption of a megabyte shall not take longer than a page.
MAX_CHARACTERS = 10_000


class TextStates(NamedTuple):
    """Encoded captions.

    Attributes:
      states: token states, `[batch, length, embed]`, zero where `mask` is False.
      mask: `[batch, length]` bool, True at the tokens that a network may see: the real ones and, where the
        public models see it too, the padding.
      pooled: one vector per caption, `[batch, any]`, float32.
    """

    states: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


class TextEncoder(Protocol):
    """A frozen text encoder with its tokenizer.

    Attributes:
      name: short and fit for a file name.
      embed: width of the token states.
      max_length: the most tokens that the network can read.
    """

    name: str
    embed: int
    max_length: int

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the output depends on: weights, tokenizer and the way of encoding."""
        ...

    def encode(self, captions: Sequence[str], *, length: int) -> TextStates:
        """Encode captions, each cut or padded to exactly `length` tokens.

        Args:
          captions: any strings, the empty one included.
          length: at most `max_length`.

        Returns:
          float32 arrays whose batch has the order of `captions`.
        """
        ...

    def tokens(self, captions: Sequence[str], *, length: int) -> dict[str, np.ndarray]:
        """What the network reads of captions, at least one: arrays `[batch, …]`."""
        ...

    def states(self, tokens: Mapping[str, Any], *, length: int) -> TextStates:
        """What `encode` gives, on the devices where `tokens` are, each with its part of the batch."""
        ...

    def truncated(self, captions: Sequence[str], length: int) -> list[int]:
        """Indices of the captions that `encode` would cut to fit `length` tokens."""
        ...


def readable(caption: str) -> str:
    """What is read of a caption: its first 10,000 characters, with lone halves of surrogate pairs replaced.

    Python strings may hold them, but no UTF-8 has them, and tokenizers refuse them.
    """
    return caption[:MAX_CHARACTERS].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
