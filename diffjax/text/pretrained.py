"""Public text encoders: a network, its parameters and its tokenizer as one `TextEncoder`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.text.clip import ClipText
from diffjax.text.encoder import MAX_CHARACTERS, TextStates, readable
from diffjax.text.t5 import T5Encoder

# The length up to which T5 was trained, and the longest that pipelines give it.
_T5_LENGTH = 512
# Captions of one call of a network at most: the products of T5-XXL's attention take 0.5 GB with 512 tokens.
_BATCH = 8
# Part of all fingerprints: to be changed whenever the same weights would give other numbers.
_RECIPE = f"pretrained 1: {MAX_CHARACTERS} characters"

Run = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Tokenizer:
    """A tokenizer of transformers that cuts and pads as the pipelines of diffusers have it do."""

    def __init__(self, tokenizer: Any, vocab: int, *, lower: bool = False):
        """Check a tokenizer.

        Args:
          tokenizer: of transformers.
          vocab: size of the vocabulary of the network that it is for.
          lower: whether captions are stripped and in lower case, as PixArt and DeepFloyd IF want them.

        Raises:
          UserError: it does not fit the network, or cannot be used as the pipelines use it.
        """
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= vocab:
            raise UserError(f"the tokenizer has token {highest}, but its network a vocabulary of {vocab}.")
        if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
            raise UserError("the tokenizer does not pad on the right, as those of public pipelines do.")
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
            raise UserError(f"the tokenizer's model_max_length is {str(longest)!r:.80}; expected a number.")
        self.max_length = int(min(longest, 2**31))
        self.min_length = max(tokenizer.num_special_tokens_to_add(), 1)
        self.lower = lower
        self._tokenizer = tokenizer
        self.encode(["a photo", ""], self.min_length + 1)

    def encode(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Captions, at least one, to ids and a mask of real tokens, `[batch, length]` int32 and bool."""
        tokens = self._read(
            captions,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="np",
        )
        return tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(bool)

    def counts(self, captions: Sequence[str]) -> list[int]:
        """How many tokens captions, at least one, have, the special ones included, when nothing is cut."""
        return [len(ids) for ids in self._read(captions, verbose=False)["input_ids"]]

    def _read(self, captions: Sequence[str], **options: Any) -> Any:
        texts = [readable(caption) for caption in captions]
        if self.lower:
            texts = [text.lower().strip() for text in texts]
        try:
            return self._tokenizer(texts, **options)
        except Exception as error:  # a tokenizer whose vocabulary has no token for the unknown, for one
            raise UserError(f"the tokenizer cannot read a caption ({str(error)[:200]}).") from error


class PretrainedText:
    """One network with its tokenizer, as a `TextEncoder`; see `t5_text` and `clip_text`.

    Attributes:
      name: see `TextEncoder`.
      embed: width of the token states.
      max_length: the most tokens that it takes.
      length: how many tokens the pipeline gives it.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        params: Any,
        tokenizer: Tokenizer,
        *,
        embed: int,
        max_length: int,
        length: int,
        show_padding: bool,
        files: Sequence[Path],
        recipe: str,
    ):
        """Make an encoder.

        Args:
          name: short and fit for a file name.
          run: parameters, ids `[batch, length]` and mask to token states and pooled vectors, float32.
          params: of the network; where they lie, it runs.
          tokenizer: its tokenizer.
          embed: width of the token states.
          max_length: the most tokens that it takes.
          length: how many tokens the pipeline gives it.
          show_padding: whether networks see the states of padding too.
          files: all that the output depends on: weights, configuration, tokenizer.
          recipe: what else it depends on.
        """
        self.name, self.embed, self.max_length, self.length = name, embed, max_length, length
        self._params, self._tokenizer, self._show_padding = params, tokenizer, show_padding
        self._files, self._recipe = files, f"{_RECIPE}, lower={tokenizer.lower}, {show_padding=}, {recipe}"
        placement = jax.tree.leaves(params)[0].sharding
        if isinstance(placement, NamedSharding):  # every host is to have all of the output
            self._run = jax.jit(run, out_shardings=NamedSharding(placement.mesh, PartitionSpec()))
        else:
            self._run = jax.jit(run)

        def live(params: Any, ids: jax.Array, mask: jax.Array) -> TextStates:
            states, pooled = run(params, ids, mask)
            seen = jnp.ones_like(mask) if show_padding else mask
            return TextStates(states * seen[..., None], seen, pooled)

        self._live = jax.jit(live)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that the output depends on; the first time, it reads all weights."""
        digest = hashlib.sha256(self._recipe.encode())
        for path in self._files:
            with open(path, "rb") as file:
                digest.update(f"{path.name} ".encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def encode(self, captions: Sequence[str], *, length: int) -> TextStates:
        """Encode captions, each cut or padded to exactly `length` tokens, the special ones included."""
        self._check(length)
        ids, mask = self._tokenizer.encode(captions or [""], length)
        size = min(_BATCH, 1 << (len(ids) - 1).bit_length())  # few sizes, for each is compiled
        filled = np.arange(-(-len(ids) // size) * size) % len(ids)
        outputs = []
        # GPUs and TPUs would otherwise multiply float32 with fewer bits.
        with jax.default_matmul_precision("highest"):
            for rows in np.split(filled, len(filled) // size):
                outputs.append(jax.device_get(self._run(self._params, ids[rows], mask[rows])))
        count = len(captions)
        states, pooled = (np.concatenate(parts)[:count] for parts in zip(*outputs, strict=True))
        if self._show_padding:
            mask = np.ones_like(mask)
        return TextStates(states * mask[:count, :, None], mask[:count], pooled)

    def tokens(self, captions: Sequence[str], *, length: int) -> dict[str, np.ndarray]:
        """`ids` `[batch, length]` int32, and `mask`, True at real tokens."""
        self._check(length)
        ids, mask = self._tokenizer.encode(captions, length)
        return {"ids": ids, "mask": mask}

    def states(self, tokens: Mapping[str, jax.Array], *, length: int) -> TextStates:
        """What `encode` gives, on the devices where `tokens` are; `length` is theirs."""
        with jax.default_matmul_precision("highest"):
            return self._live(self._params, tokens["ids"], tokens["mask"])

    def truncated(self, captions: Sequence[str], length: int) -> list[int]:
        """Indices of the captions that `encode` would cut to fit `length` tokens."""
        self._check(length)
        if not captions:
            return []
        counts = self._tokenizer.counts(captions)
        return [
            index
            for index, caption in enumerate(captions)
            if len(caption) > MAX_CHARACTERS or counts[index] > length
        ]

    def _check(self, length: int) -> None:
        least = self._tokenizer.min_length
        if not least <= length <= self.max_length:
            raise UserError(
                f"A text length of {length} tokens was asked for; {self.name} takes {least} to "
                f"{self.max_length}."
            )


def t5_text(
    module: T5Encoder,
    params: Any,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    *,
    name: str = "t5",
    length: int = _T5_LENGTH,
    attend_padding: bool = False,
    show_padding: bool = False,
) -> PretrainedText:
    """T5 as a text encoder; its pooled vector is the mean of the states of real tokens.

    Args:
      module: the network.
      params: its parameters.
      tokenizer: its tokenizer.
      files: what they were read from.
      name: short and fit for a file name.
      length: how many tokens the pipeline gives it.
      attend_padding: whether T5 itself sees padding, as for SD3 and FLUX, but not PixArt and DeepFloyd IF.
      show_padding: whether networks see the states of padding, as those of all but PixArt.
    """

    def run(params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        states: Any = module.apply({"params": params}, ids, None if attend_padding else mask)
        total = jnp.sum(states * mask[..., None], axis=1)
        return states, total / jnp.sum(mask, axis=1, keepdims=True)

    return PretrainedText(
        name,
        run,
        params,
        tokenizer,
        embed=module.embed,
        max_length=_T5_LENGTH,
        length=length,
        show_padding=show_padding,
        files=files,
        recipe=f"T5, {attend_padding=}, {_dtypes(module, params)}",
    )


def clip_text(
    module: ClipText,
    params: Any,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    *,
    name: str = "clip",
    skip: int = 0,
    normed: bool = True,
) -> PretrainedText:
    """CLIP as a text encoder; networks see the states of padding, which CLIP always computes.

    Args:
      module: the network.
      params: its parameters.
      tokenizer: its tokenizer.
      files: what they were read from.
      name: short and fit for a file name.
      skip: how many of the last blocks the states leave out.
      normed: whether the final norm is applied to them, as Stable Diffusion 1 and 2 have it.
    """
    if not 0 <= skip <= module.layers:
        raise UserError(f"clip_skip leaves out {skip} of {module.layers} blocks; expected fewer.")

    def run(params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        out: Any = module.apply({"params": params}, ids, skip=skip)
        return out.normed if normed else out.states, out.pooled

    length = min(module.positions, tokenizer.max_length)
    return PretrainedText(
        name,
        run,
        params,
        tokenizer,
        embed=module.embed,
        max_length=length,
        length=length,
        show_padding=True,
        files=files,
        recipe=f"CLIP, {skip=}, {normed=}, {_dtypes(module, params)}",
    )


def _dtypes(module: Any, params: Any) -> str:
    return f"{jnp.dtype(module.dtype)} of {jax.tree.leaves(params)[0].dtype}"
