"""Blocks of two streams, image and text, that attend to each other (Esser et al., 2024: MMDiT)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import Attention, heads_of
from diffjax.nn.conditioning import Cond
from diffjax.nn.embeddings import NoiseLevelEmbedding
from diffjax.nn.kernels import attend
from diffjax.nn.layers import Dtype, dense, layer_norm, zeros
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.rotary import Rotary, rotate
from diffjax.nn.transformer import Modulation, modulate

Streams = tuple[jax.Array, jax.Array]


class JointAttention(nn.Module):
    """One attention over the tokens of two streams, each with projections of its own.

    Attributes:
      heads: number of heads.
      head_dim: width of each.
      qk_norm: norm of each head of queries and keys: "rms", "layer", or "" for none.
      last: whether nothing is asked of the text any more; its queries have parameters all the same.
      dtype: compute dtype; the softmax is taken in float32.
    """

    heads: int
    head_dim: int
    qk_norm: str = ""
    last: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array, rotary: Rotary | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attend.

        Args:
          x: tokens of the image, `[batch, length, embed]`.
          context: tokens of the text, `[batch, words, embed]`.
          rotary: positions of text and image, in this order, `[words + length, head_dim / 2]`.

        Returns:
          what is to be added to either stream, of their shapes; None for the text if this is the last.
        """
        words = context.shape[1]

        def project(source: jax.Array, prefix: str = "") -> list[jax.Array]:
            names = [prefix + name for name in ("query", "key", "value")]
            return heads_of(source, names, self.heads, self.head_dim, norm=self.qk_norm, dtype=self.dtype)

        parts = zip(project(context, "context_"), project(x), strict=True)
        query, key, value = (jnp.concatenate(pair, axis=1) for pair in parts)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if self.last:
            query, words = query[:, words:], 0
        y = attend(query, key, value)
        y = y.reshape(*y.shape[:2], -1)
        out = self._out(y[:, words:], x.shape[-1], "out")
        return out, None if self.last else self._out(y[:, :words], context.shape[-1], "context_out")

    def _out(self, y: jax.Array, features: int, name: str) -> jax.Array:
        return dense(features, axes=("heads", "embed"), dtype=self.dtype, name=name)(y)


class JointBlock(nn.Module):
    """A block of MMDiT: joint attention and an MLP for each stream, shifted, scaled and gated (adaLN-Zero).

    Attributes:
      heads: attention heads.
      head_dim: width of each; the tokens have the width of all together.
      qk_norm: norm of each head of queries and keys: "rms", "layer", or "" for none.
      dual: whether the image attends to itself besides, as in the first blocks of SD3.5 medium (MMDiT-X).
      last: whether the text leaves as it came, because nobody reads it any more.
      dtype: compute dtype.
    """

    heads: int
    head_dim: int
    qk_norm: str = ""
    dual: bool = False
    last: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(self, streams: Streams, vector: jax.Array, rotary: Rotary | None = None) -> Streams:
        """Transform both streams.

        Args:
          streams: tokens of the image, `[batch, length, embed]`, and of the text, `[batch, words, embed]`.
          vector: what modulates the block, `[batch, any]`.
          rotary: positions of text and image, in this order, or None.
        """
        x, context = streams
        sizes: dict[str, Any] = {"heads": self.heads, "head_dim": self.head_dim, "qk_norm": self.qk_norm}
        of_x = self._modulation(9 if self.dual else 6, vector, x, "modulation")
        of_context = self._modulation(2 if self.last else 6, vector, context, "context_modulation")

        normed = norm(x, self.dtype)
        y, context_y = JointAttention(**sizes, last=self.last, dtype=self.dtype, name="attention")(
            modulate(normed, *of_x[:2]), modulate(norm(context, self.dtype), *of_context[:2]), rotary
        )
        x = x + of_x[2][:, None] * y
        if self.dual:
            alone = Attention(**sizes, dtype=self.dtype, name="dual_attention")
            x = x + of_x[8][:, None] * alone(modulate(normed, *of_x[6:8]))
        x = self._feed(x, *of_x[3:6], name="mlp")
        if context_y is not None:
            context = context + of_context[2][:, None] * context_y
            context = self._feed(context, *of_context[3:6], name="context_mlp")
        return x, context

    def _modulation(self, count: int, vector: jax.Array, x: jax.Array, name: str) -> list[jax.Array]:
        return Modulation(x.shape[-1], count, dtype=self.dtype, name=name)(vector)

    def _feed(
        self, x: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array, *, name: str
    ) -> jax.Array:
        y = modulate(norm(x, self.dtype), shift, scale)
        x = x + gate[:, None] * Mlp(4 * x.shape[-1], dtype=self.dtype, name=name)(y)
        return constrain(x, "batch", "length", "embed")


class VectorEmbedding(nn.Module):
    """The vector that modulates all blocks: noise level and pooled text, and guidance scale if it is told.

    Attributes:
      features: width of the vector.
      time_input: what number the noise level is; see `diffjax.nn.embeddings.to_thousand`.
      dtype: compute dtype.
    """

    features: int
    time_input: str = "timestep"
    dtype: Dtype = None

    @nn.compact
    def __call__(self, level: jax.Array, pooled: jax.Array, guidance: jax.Array | None = None) -> jax.Array:
        """`[batch]`, `[batch, any]`, `[batch]` or None -> `[batch, features]`."""

        def embed(value: jax.Array, time_input: str, name: str) -> jax.Array:
            init = nn.initializers.normal(0.02)
            module = NoiseLevelEmbedding(
                self.features, time_input=time_input, kernel_init=init, dtype=self.dtype, name=name
            )
            return module(value)

        vector = embed(level, self.time_input, "noise_level")
        if guidance is not None:
            vector = vector + embed(1000.0 * guidance, "timestep", "guidance")
        text = Mlp(self.features, "silu", features=self.features, dtype=self.dtype, name="pooled")
        return vector + text(pooled)


class Output(nn.Module):
    """Tokens to pixels of their patches, in float32; zero-initialised.

    Attributes:
      features: pixels times channels.
      dtype: compute dtype of the modulation.
    """

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, vector: jax.Array) -> jax.Array:
        """`[batch, length, embed]`, `[batch, any]` -> `[batch, length, features]`."""
        shift, scale = Modulation(x.shape[-1], 2, dtype=self.dtype, name="modulation")(vector)
        x = modulate(norm(x, self.dtype), shift, scale).astype(jnp.float32)
        return dense(
            self.features, axes=("embed", "patch"), kernel_init=zeros, dtype=jnp.float32, name="dense"
        )(x)


def norm(x: jax.Array, dtype: Dtype) -> jax.Array:
    """A layer norm of the last axis without parameters."""
    return layer_norm(affine=False, dtype=dtype)(x)


def text_of(cond: Cond, text_embed: int, pooled_embed: int) -> Streams:
    """The text of `cond`, all of it: a mask is not looked at, as in the public models.

    Returns:
      `[batch, words, text_embed]` and `[batch, pooled_embed]`.

    Raises:
      ValueError: there is none, or of another width.
    """
    if cond.text is None or cond.pooled is None:
        raise ValueError("this network is conditioned on text: cond.text and cond.pooled")
    widths = (cond.text.shape[-1], cond.pooled.shape[-1])
    if widths != (text_embed, pooled_embed):
        raise ValueError(f"text and pooled text are {widths} wide; expected {(text_embed, pooled_embed)}")
    return cond.text, cond.pooled
