"""Several text encoders as one, as SDXL, SD3 and FLUX put them together."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.text.encoder import TextStates
from diffjax.text.pretrained import PretrainedText


class ComposedText:
    """What compositions share: each part encodes the captions at its own length, and the results are joined.

    Attributes:
      name: see `TextEncoder`.
      embed: width of the token states.
      max_length: the most tokens, all parts together, that it gives.
      length: how many the pipeline has it give.
    """

    def __init__(
        self, name: str, parts: Sequence[PretrainedText], *, embed: int, max_length: int, length: int
    ):
        self.name, self.embed, self.max_length, self.length = name, embed, max_length, length
        self._parts = tuple(parts)
        self._join = jax.jit(functools.partial(self._joined, xp=jnp), static_argnums=1)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that the output depends on; the first time, it reads all weights."""
        parts = " ".join(part.fingerprint for part in self._parts)
        return hashlib.sha256(f"{type(self).__name__} 1: {self.embed} {parts}".encode()).hexdigest()

    def encode(self, captions: Sequence[str], *, length: int) -> TextStates:
        """Encode captions to exactly `length` tokens."""
        lengths = self._checked_lengths(length)
        parts = [part.encode(captions, length=own) for part, own in zip(self._parts, lengths, strict=True)]
        return self._joined(parts, length)

    def tokens(self, captions: Sequence[str], *, length: int) -> dict[str, np.ndarray]:
        """What each part reads of captions, at least one: arrays `[batch, its length]`."""
        lengths = self._checked_lengths(length)
        parts = [part.tokens(captions, length=own) for part, own in zip(self._parts, lengths, strict=True)]
        return {f"{i}/{name}": array for i, part in enumerate(parts) for name, array in part.items()}

    def states(self, tokens: Mapping[str, jax.Array], *, length: int) -> TextStates:
        """What `encode` gives, on the devices where `tokens` are."""
        parts = []
        for i, (part, own) in enumerate(zip(self._parts, self._checked_lengths(length), strict=True)):
            mine = {name: tokens[f"{i}/{name}"] for name in ("ids", "mask")}
            parts.append(part.states(mine, length=own))
        return self._join(parts, length)

    def truncated(self, captions: Sequence[str], length: int) -> list[int]:
        """Indices of the captions that a part of it would cut."""
        lengths = self._checked_lengths(length)
        cut = [part.truncated(captions, own) for part, own in zip(self._parts, lengths, strict=True)]
        return sorted({index for indices in cut for index in indices})

    def _checked_lengths(self, length: int) -> list[int]:
        if length > self.max_length:
            raise UserError(f"A text length of {length} tokens was asked for; {self.name} takes up to "
                            f"{self.max_length}.")  # fmt: skip
        return self._lengths(length)

    def _lengths(self, length: int) -> list[int]:
        """The length of each part."""
        raise NotImplementedError

    def _joined(self, parts: list[TextStates], length: int, xp: Any = np) -> TextStates:
        """What the parts gave, as one; `length` tokens. With `xp` numpy or jax.numpy."""
        raise NotImplementedError


class SDXLText(ComposedText):
    """States of all parts, one beside the other; the pooled vector of the last (Podell et al., 2023)."""

    def __init__(self, *clips: PretrainedText, name: str = "sdxl"):
        length = min(clip.max_length for clip in clips)
        super().__init__(
            name, clips, embed=sum(clip.embed for clip in clips), max_length=length, length=length
        )

    def _lengths(self, length: int) -> list[int]:
        return [length] * len(self._parts)

    def _joined(self, parts: list[TextStates], length: int, xp: Any = np) -> TextStates:
        states = xp.concatenate([part.states for part in parts], axis=-1)
        return TextStates(states, parts[-1].mask, parts[-1].pooled)


class SD3Text(ComposedText):
    """Two CLIPs side by side, widened with zeros, before the tokens of T5 (Esser et al., 2024).

    A length is that of both sequences, and of it T5 has what CLIP leaves. Without T5, zeros stand for its
    states, and without a difference: networks see them.
    """

    def __init__(
        self,
        clips: Sequence[PretrainedText],
        t5: PretrainedText | None,
        *,
        embed: int = 4096,
        t5_length: int = 256,
        name: str = "sd3",
    ):
        """Compose.

        Args:
          clips: their pooled vectors are concatenated too.
          t5: may be left away, to save memory.
          embed: width of the token states where there is no T5.
          t5_length: how many tokens the pipeline gives T5.
          name: short and fit for a file name.
        """
        embed = embed if t5 is None else t5.embed
        self._clip_length = min(clip.max_length for clip in clips)
        if sum(clip.embed for clip in clips) > embed:
            raise UserError(f"the states of both CLIPs do not fit the width {embed} of T5's.")
        super().__init__(
            name,
            (*clips, *([] if t5 is None else [t5])),
            embed=embed,
            max_length=self._clip_length + (512 if t5 is None else t5.max_length),
            length=self._clip_length + t5_length,
        )
        self._num_clips = len(clips)

    def _lengths(self, length: int) -> list[int]:
        if length <= self._clip_length:
            raise UserError(f"A text length of {length} tokens was asked for, but the first "
                            f"{self._clip_length} of {self.name} are CLIP's; expected more.")  # fmt: skip
        lengths = [self._clip_length] * self._num_clips + [length - self._clip_length]
        return lengths[: len(self._parts)]

    def _joined(self, parts: list[TextStates], length: int, xp: Any = np) -> TextStates:
        clips, t5 = parts[: self._num_clips], parts[self._num_clips :]
        beside = xp.concatenate([clip.states for clip in clips], axis=-1)
        count, _, width = beside.shape
        wide = xp.pad(beside, ((0, 0), (0, 0), (0, self.embed - width)))
        rest = (count, length - self._clip_length, self.embed)
        states = xp.concatenate([wide, t5[0].states if t5 else xp.zeros(rest, np.float32)], axis=1)
        pooled = xp.concatenate([clip.pooled for clip in clips], axis=-1)
        return TextStates(states, xp.ones(states.shape[:2], bool), pooled)


class FluxText(ComposedText):
    """T5's states, with the pooled vector of a CLIP (Black Forest Labs, 2024)."""

    def __init__(self, clip: PretrainedText, t5: PretrainedText, *, name: str = "flux"):
        super().__init__(name, (clip, t5), embed=t5.embed, max_length=t5.max_length, length=t5.length)

    def _lengths(self, length: int) -> list[int]:
        return [self._parts[0].max_length, length]

    def _joined(self, parts: list[TextStates], length: int, xp: Any = np) -> TextStates:
        return parts[1]._replace(pooled=parts[0].pooled)
