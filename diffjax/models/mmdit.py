"""MMDiT, the transformer of Stable Diffusion 3 and 3.5 (Esser et al., 2024)."""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Cond
from diffjax.nn.embeddings import sincos_positions_2d
from diffjax.nn.joint import JointBlock, Output, VectorEmbedding, text_of
from diffjax.nn.layers import Dtype, dense, param
from diffjax.nn.patches import patchify, unpatchify
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat

SIZES: dict[str, dict[str, Any]] = {
    # Stable Diffusion 3 medium, "2 B", and its successors.
    "sd3_medium": {"depth": 24, "heads": 24},
    "sd35_medium": {
        "depth": 24,
        "heads": 24,
        "max_size": 384,
        "qk_norm": "rms",
        "dual_attention": tuple(range(13)),
    },
    "sd35_large": {"depth": 38, "heads": 38, "qk_norm": "rms"},
    # To train anew: as SD3 medium, with the norms without which bfloat16 diverges at high resolution.
    "2b": {"depth": 24, "heads": 24, "qk_norm": "rms"},
}
"""Attributes of published sizes."""


class Stack(NamedTuple):
    """Blocks in a row that are alike.

    Attributes:
      first: the number of the first of them.
      length: how many they are.
      dual: whether their images attend to themselves besides.
      last: whether nobody reads the text that leaves them.
    """

    first: int
    length: int
    dual: bool
    last: bool

    @property
    def name(self) -> str:
        """Of the module."""
        return f"blocks_{self.first}"


def stacks(depth: int, dual_attention: tuple[int, ...]) -> list[Stack]:
    """Divide the blocks into runs of the same kind; the last is always on its own."""
    found: list[Stack] = []
    for (dual, last), run in itertools.groupby((i in dual_attention, i == depth - 1) for i in range(depth)):
        found.append(Stack(sum(stack.length for stack in found), len(list(run)), dual, last))
    return found


class MMDiT(nn.Module):
    """A transformer over two streams, patches of a latent image and words, which attend to each other.

    All tokens of the text count: the null condition is the encoding of an empty caption, not a mask.
    Attributes that SD3's autoencoder and encoders decide have their values as defaults.

    Attributes:
      depth: number of blocks.
      heads: attention heads.
      head_dim: width of each; the tokens are `heads * head_dim` wide.
      patch: side of a patch.
      in_channels: channels of the image.
      out_channels: channels of the prediction.
      text_embed: width of the text's tokens.
      pooled_embed: width of the pooled text.
      max_size: rows and columns of the table of positions, in patches: the largest image there can be.
      base_size: side of the image, in pixels, whose neighbouring patches lie one apart in that table when it
        is not read from a checkpoint; `max_size` patches span as much as those of this image.
      qk_norm: norm of each head of queries and keys: "rms" (SD3.5), "layer", or "" for none.
      dual_attention: numbers of the blocks in which the image attends to itself besides (SD3.5 medium).
      time_input: what number the noise level is; see `diffjax.nn.embeddings.to_thousand`.
      dtype: compute dtype; parameters and output are float32.
      remat: what is kept for the backward pass; see `diffjax.nn.repeat.REMAT`.
      scan: whether alike blocks are one loop.
    """

    depth: int = 24
    heads: int = 24
    head_dim: int = 64
    patch: int = 2
    in_channels: int = 16
    out_channels: int = 16
    text_embed: int = 4096
    pooled_embed: int = 2048
    max_size: int = 192
    base_size: int = 128
    qk_norm: str = ""
    dual_attention: tuple[int, ...] = ()
    time_input: str = "timestep"
    dtype: Dtype = jnp.float32
    remat: str = ""
    scan: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, level: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, in_channels]`; of any ratio.
          level: their noise level, `[batch]`; SD3 is told 1000 times the time.
          cond: with text and pooled text.
          deterministic: there is no dropout; ignored.

        Returns:
          `[batch, height, width, out_channels]`, float32.
        """
        del deterministic
        height, width, channels = x.shape[1:]
        if channels != self.in_channels:
            raise ValueError(f"images have {channels} channels; expected {self.in_channels}")
        text, pooled = text_of(cond, self.text_embed, self.pooled_embed)
        embed = self.heads * self.head_dim
        vector = VectorEmbedding(embed, self.time_input, dtype=self.dtype, name="vector")(level, pooled)
        context = dense(embed, axes=("features", "embed"), dtype=self.dtype, name="context_in")(text)

        tokens = patchify(x, self.patch)
        h = dense(embed, axes=("patch", "embed"), dtype=self.dtype, name="patch_in")(tokens)
        h = (h + self._positions(height // self.patch, width // self.patch)).astype(h.dtype)
        streams = (constrain(h, "batch", "length", "embed"), constrain(context, "batch", "length", "embed"))
        for stack in stacks(self.depth, self.dual_attention):
            block = JointBlock(
                self.heads,
                self.head_dim,
                self.qk_norm,
                dual=stack.dual,
                last=stack.last,
                dtype=self.dtype,
                name=stack.name,
            )
            streams, _ = repeat(block, stack.length, streams, vector, scan=self.scan, remat=self.remat)
        out = Output(self.patch**2 * self.out_channels, dtype=self.dtype, name="out")(streams[0], vector)
        return unpatchify(out, self.patch, height, width)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """The middle of the table of positions, `[1, rows * columns, embed]`, float32.

        It is a parameter because checkpoints contain it, but never learned.
        """
        size, embed = self.max_size, self.heads * self.head_dim
        if max(rows, columns) > size:
            raise ValueError(f"images of {rows} x {columns} patches; there are positions for {size} x {size}")

        def sincos(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            step = self.base_size // self.patch / size
            line = sincos_positions_2d(size, 1, embed, step=step)[:, : embed // 2]
            halves = line[None], line[:, None]  # of the column, then of the row
            full = [jnp.broadcast_to(half, (size, size, embed // 2)) for half in halves]
            return jnp.concatenate(full, axis=-1).astype(dtype).reshape(shape)

        table = param(self, "positions", sincos, (1, size * size, embed), ("one", "patch", "embed"))
        grid = jax.lax.stop_gradient(table).reshape(1, size, size, embed)
        top, left = (size - rows) // 2, (size - columns) // 2
        return grid[:, top : top + rows, left : left + columns].reshape(1, rows * columns, embed)
