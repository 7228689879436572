"""The transformer block of images, with each of the ways in which DiT and its descendants condition it."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import NORMS, Attention
from diffjax.nn.layers import Dtype, Initializer, dense, lecun, param, zeros
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.rotary import Rotary

CONDITIONINGS = {"adaln_zero": 6, "adaln": 4, "adaln_single": 6, "in_context": 0, "cross_attention": 0}
"""How conditions reach a block, and how many vectors modulate it.

Peebles and Xie (2023) compare four ways: a shift and a scale of what each layer reads, with a gate of what
it adds (`adaln_zero`) or without (`adaln`); or conditions as tokens, among those of the image (`in_context`)
or attended to by a layer of their own (`cross_attention`). `adaln_single` (PixArt-alpha, Chen et al., 2023)
computes the vectors once for all blocks, and each block adds a table of its own to them.
"""


class Inits(NamedTuple):
    """Initializers: of linear layers, of queries, keys and values, and of embeddings of noise levels."""

    linear: Initializer = lecun
    qkv: Initializer = lecun
    level: Initializer = lecun


INITS = {
    "lecun": Inits(),
    # As DiT was published, where queries, keys and values are one layer of three times the width.
    "xavier": Inits(
        nn.initializers.xavier_uniform(),
        nn.initializers.variance_scaling(0.5, "fan_avg", "uniform"),
        nn.initializers.normal(0.02),
    ),
}
"""Initializers by name; whatever it is, gates and output layers start at zero."""


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift`; `x` is `[batch, length, embed]`, the others `[batch, embed]`."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """A conditioning vector to `count` vectors of width `features`; zero-initialised (adaLN-Zero)."""

    features: int
    count: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, vector: jax.Array) -> list[jax.Array]:
        """`[batch, any] -> count x [batch, features]`."""
        layer = dense(
            self.features * self.count,
            axes=("embed", "mlp"),
            kernel_init=zeros,
            dtype=self.dtype,
            name="dense",
        )
        # Tensor parallelism divides the layer, which is the largest of the block, but not its few results.
        out = constrain(layer(nn.silu(vector)), "batch", "embed")
        return jnp.split(out, self.count, axis=-1)


class ModulationTable(nn.Module):
    """Vectors that all blocks share, plus a table of this block alone (adaLN-single); zero at first."""

    @nn.compact
    def __call__(self, vectors: jax.Array) -> list[jax.Array]:
        """`[batch, count, features] -> count x [batch, features]`."""
        table = param(self, "table", zeros, vectors.shape[1:], ("one", "embed"))
        return [
            vector[:, 0] for vector in jnp.split(vectors + table.astype(vectors.dtype), len(table), axis=1)
        ]


class TransformerBlock(nn.Module):
    """Self-attention, if asked for cross-attention, and an MLP over normed tokens (Peebles and Xie, 2023).

    Attributes:
      heads: attention heads.
      mlp_ratio: width of the MLP over the width of the tokens.
      conditioning: see `CONDITIONINGS`.
      cross_attention: whether there is cross-attention, whose output projection starts at zero.
      norm: "layer" or "rms". Only RMS norms, and norms that nothing modulates, have parameters.
      norm_eps: of the norms before attention and before the MLP.
      qk_norm: norm of queries and keys: "rms", "layer", or "" for none.
      qkv_bias: whether queries, keys and values have a bias.
      activation: of the MLP.
      gated: whether the MLP is gated.
      initializer: see `INITS`.
      dtype: compute dtype; the norms' statistics are taken in float32.
    """

    heads: int
    mlp_ratio: float = 4.0
    conditioning: str = "adaln_zero"
    cross_attention: bool = False
    norm: str = "layer"
    norm_eps: tuple[float, float] = (1e-6, 1e-6)
    qk_norm: str = ""
    qkv_bias: bool = True
    activation: str = "gelu_tanh"
    gated: bool = False
    initializer: str = "lecun"
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        rotary: Rotary | None = None,
        vector: jax.Array | None = None,
    ) -> jax.Array:
        """Transform tokens.

        Args:
          x: `[batch, length, embed]`.
          context: tokens to cross-attend to, `[batch, keys, any]`, or None.
          context_mask: `[batch, keys]` bool, or None.
          rotary: positions for self-attention, or None.
          vector: what modulates the block: `[batch, any]`; `[batch, 6, embed]` if "adaln_single".

        Returns:
          `[batch, length, embed]`.
        """
        embed, inits = x.shape[-1], INITS[self.initializer]
        modulation = self._modulation(embed, vector)
        half = len(modulation) // 2

        def attend(y: jax.Array, *context: jax.Array | None, name: str) -> jax.Array:
            layer = Attention(
                self.heads,
                use_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
                kernel_init=inits.linear if context else inits.qkv,
                out_init=zeros if context else inits.linear,
                dtype=self.dtype,
                name=name,
            )
            return layer(y, *context, rotary=None if context else rotary)

        y, gate = self._read(x, modulation[:half], "attention", self.norm_eps[0])
        x = x + gate * attend(y, name="attention")
        if self.cross_attention:
            # PixArt's cross-attention reads tokens as they are.
            y = x if self.conditioning == "adaln_single" else self._read(x, [], "cross", 1e-6)[0]
            x = x + attend(y, context, context_mask, name="cross_attention")
        y, gate = self._read(x, modulation[half:], "mlp", self.norm_eps[1])
        mlp = Mlp(
            mlp_width(embed, self.mlp_ratio),
            self.activation,
            self.gated,
            kernel_init=inits.linear,
            dtype=self.dtype,
            name="mlp",
        )
        return constrain(x + gate * mlp(y), "batch", "length", "embed")

    def _modulation(self, embed: int, vector: jax.Array | None) -> list[jax.Array]:
        """The vectors of attention and those of the MLP: shift, scale and gate of each, or fewer."""
        if self.conditioning == "adaln_single":
            return ModulationTable(name="modulation")(vector)
        count = CONDITIONINGS[self.conditioning]
        return Modulation(embed, count, dtype=self.dtype, name="modulation")(vector) if count else []

    def _read(
        self, x: jax.Array, modulation: list[jax.Array], name: str, epsilon: float
    ) -> tuple[jax.Array, jax.Array | float]:
        """What a layer reads, and the gate of what it adds."""
        affine = self.norm == "rms" or not CONDITIONINGS[self.conditioning]
        y = NORMS[self.norm](epsilon=epsilon, affine=affine, dtype=self.dtype, name=f"norm_{name}")(x)
        y = modulate(y, *modulation[:2]) if modulation else y
        return y, modulation[2][:, None] if len(modulation) == 3 else 1.0


def mlp_width(embed: int, ratio: float) -> int:
    """`ratio` times `embed`, rounded down; a ratio such as 8/3 is not exact."""
    return int(round(embed * ratio, 6))
