"""What every frozen text encoder offers, whatever network stands behind it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class TextStates(NamedTuple):
    """Encoded captions.

    Attributes:
      states: token states, `[batch, length, embed]`, zero where `mask` is False.
      mask: `[batch, length]` bool, True at real tokens.
      pooled: one vector per caption, `[batch, embed]`, float32.
    """

    states: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


class TextEncoder(Protocol):
    """A frozen text encoder with its tokenizer.

    Attributes:
      name: short and fit for a file name.
      fingerprint: hex digest of all that the output depends on: weights, tokenizer and the way of encoding.
      embed: width of the token states and of the pooled vector.
      max_length: the most tokens that the network can read.
    """

    name: str
    fingerprint: str
    embed: int
    max_length: int

    def encode(self, captions: Sequence[str], *, length: int) -> TextStates:
        """Encode captions, each cut or padded to exactly `length` tokens.

        Args:
          captions: any strings, the empty one included.
          length: at most `max_length`.

        Returns:
          float32 arrays whose batch has the order of `captions`.
        """
        ...

    def truncated(self, captions: Sequence[str], length: int) -> list[int]:
        """Indices of the captions that `encode` would cut to fit `length` tokens."""
        ...
