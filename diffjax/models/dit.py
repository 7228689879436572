"""The diffusion transformer (DiT; Peebles and Xie, 2023) and its descendants PixArt-alpha and JiT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.attention import NORMS
from diffjax.nn.conditioning import Cond, TextProjection
from diffjax.nn.embeddings import LevelLabelEmbedding, NoiseLevelEmbedding, sincos_positions_2d
from diffjax.nn.layers import Dtype, dense, param, zeros
from diffjax.nn.mlp import Mlp
from diffjax.nn.patches import patchify, unpatchify
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat
from diffjax.nn.rotary import Rotary, rotary
from diffjax.nn.transformer import (
    CONDITIONINGS,
    INITS,
    Modulation,
    ModulationTable,
    TransformerBlock,
    modulate,
)

POSITIONS = ("sincos", "rotary", "sincos+rotary")
TEXTS = ("", "pooled", "caption", "tokens")


class DiT(nn.Module):
    """A transformer over the patches of an image or of latents, told a noise level, classes, text or sizes.

    The vectors of all conditions are added up for what modulates the blocks, and stay apart where they are
    tokens. A low-resolution image, if there is one, is concatenated to the channels, and its noise level is
    one more condition.

    Attributes:
      patch: side of a patch in pixels.
      embed: width of the tokens; divisible by `heads` and by 4.
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: width of the MLPs over `embed`.
      conditioning: how conditions reach the blocks: one of `nn.transformer.CONDITIONINGS`.
      classes: number of classes; a negative label is none of them. 0: no labels.
      text: "pooled": tokens and a vector, with learned ones where there is no text; "caption": tokens alone,
        through two layers (PixArt-alpha), zeros where there is no text; "tokens": likewise, but as they are;
        "": no text.
      cross_attention: whether blocks attend to the text tokens, if there is text.
      sizes: whether the target's height, width and ratio, from `cond.size`, are conditions (PixArt-alpha at
        1024 pixels); `embed` must be divisible by 3.
      positions: "sincos" (added to the tokens), "rotary" (in attention, of row and column), "sincos+rotary".
      base_size: patches along a side at which sincos positions are one apart; more or fewer patches spread
        over the same range. 0: one apart at any size.
      interpolation_scale: divides sincos positions where `base_size` is given.
      bottleneck: width of a first, narrow patch embedding (JiT; Li and He, 2025); 0: a single one.
      registers: number of learned tokens besides those of the image (Darcet et al., 2024).
      class_tokens: number of tokens of the class embedding plus learned positions (JiT); 0: none.
      class_tokens_from: the first block that sees them.
      norm: "layer" or "rms".
      norm_eps: of the norms before attention and before the MLP.
      qk_norm: norm of queries and keys: "rms", "layer", or "" for none.
      qkv_bias: whether queries, keys and values have a bias.
      activation: of the MLPs.
      gated: whether the MLPs are gated (SwiGLU with activation "silu").
      embed_per_block: whether each block has embeddings of level and label of its own, as diffusers' DiT has.
      level_shift: of the sinusoids of the noise level; see `nn.embeddings.sinusoidal`.
      initializer: initializers: one of `nn.transformer.INITS`; "xavier" as published.
      in_channels: channels of the image; 0: as many as come.
      text_embed: width of the text's tokens; 0: as wide as they come.
      out_channels: channels of the prediction, twice those of the image if the variance is learned.
      time_input: what the noise level is; see `nn.embeddings.to_thousand`.
      dtype: compute dtype; parameters and output are float32.
      remat: what is kept for the backward pass; see `nn.repeat.REMAT`.
      scan: whether the blocks are one loop.
    """

    patch: int = 2
    embed: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    conditioning: str = "adaln_zero"
    classes: int = 0
    text: str = "pooled"
    cross_attention: bool = True
    sizes: bool = False
    positions: str = "sincos"
    base_size: int = 0
    interpolation_scale: float = 1.0
    bottleneck: int = 0
    registers: int = 0
    class_tokens: int = 0
    class_tokens_from: int = 0
    norm: str = "layer"
    norm_eps: tuple[float, float] = (1e-6, 1e-6)
    qk_norm: str = ""
    qkv_bias: bool = True
    activation: str = "gelu_tanh"
    gated: bool = False
    embed_per_block: bool = False
    level_shift: float = 0.0
    initializer: str = "lecun"
    in_channels: int = 0
    text_embed: int = 0
    out_channels: int = 3
    time_input: str = "logsnr"
    dtype: Dtype = jnp.float32
    remat: str = ""
    scan: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, level: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, channels]`; `patch` divides height and width.
          level: their noise level, `[batch]`.
          cond: the conditions.
          deterministic: unused; there is no dropout.

        Returns:
          `[batch, height, width, out_channels]`, float32.
        """
        self._check(x, cond)
        height, width = x.shape[1:3]
        conditions, context, mask = self._conditions(level, cond)
        vector = sum(conditions[1:], conditions[0])
        first = vector[0] if self.embed_per_block else vector  # the first block's serves the last layer too
        if self.conditioning == "adaln_single":
            of_blocks = jnp.stack(
                Modulation(self.embed, 6, dtype=self.dtype, name="modulation")(vector), axis=1
            )
        else:
            of_blocks = vector
        if self.conditioning == "cross_attention":
            tokens = jnp.stack(conditions, axis=1)
            if context is not None and mask is not None:
                mask = jnp.concatenate([jnp.ones(tokens.shape[:2], bool), mask], axis=1)
            context = tokens if context is None else jnp.concatenate([tokens, context], axis=1)

        if cond.low_res is not None:
            x = jnp.concatenate([x, cond.low_res.astype(x.dtype)], axis=-1)
        h = self._embed_patches(patchify(x, self.patch), height // self.patch, width // self.patch)
        patches = h.shape[1]
        if self.conditioning == "in_context":
            h = jnp.concatenate([jnp.stack(conditions, axis=1), h], axis=1)
        if self.registers:
            h = self._prepend(h, self._learned("registers", self.registers))

        def run(h: jax.Array, name: str, start: int, stop: int) -> jax.Array:
            turns = self._rotary(height // self.patch, width // self.patch, h.shape[1] - patches)
            block = self._block(cross_attention=context is not None, name=name)
            how = {"scan": self.scan, "remat": self.remat}
            if self.embed_per_block:
                return repeat(
                    block, stop - start, h, context, mask, turns, each=of_blocks[start:stop], **how
                )[0]
            return repeat(block, stop - start, h, context, mask, turns, of_blocks, **how)[0]

        start = self.class_tokens_from if self.class_tokens else 0
        h = run(h, "early_blocks", 0, start)
        if self.class_tokens:
            positions = self._learned("class_positions", self.class_tokens)
            h = self._prepend(h, positions + conditions[1][:, None])
        h = run(h, "blocks", start, self.depth)
        return unpatchify(self._predict(h[:, -patches:], first), self.patch, height, width)

    def _conditions(
        self, level: jax.Array, cond: Cond
    ) -> tuple[list[jax.Array], jax.Array | None, jax.Array | None]:
        """A vector of each condition, `[batch, embed]`; text tokens `[batch, words, any]` and their mask.

        First that of the noise level, then of the class; `[depth, batch, embed]` if `embed_per_block`.
        """
        embedding = LevelLabelEmbedding
        if self.embed_per_block:
            embedding = nn.vmap(
                LevelLabelEmbedding,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
        shared = {"time_input": self.time_input, "dtype": self.dtype}
        conditions = embedding(
            self.embed,
            self.classes,
            shift=self.level_shift,
            kernel_init=INITS[self.initializer].level,
            name="embedding",
            **shared,
        )(level, cond.label)
        if cond.low_res is not None:
            conditions.append(NoiseLevelEmbedding(self.embed, name="aug_level", **shared)(cond.aug_level))
        tokens, mask = cond.text, cond.mask
        if self.text == "pooled":
            tokens, mask, pooled = TextProjection(self.embed, dtype=self.dtype, name="text")(cond)
            conditions.append(pooled)
        elif self.text and tokens is not None:
            tokens, mask = self._tokens(tokens, mask)
        if self.sizes:
            conditions.append(self._sizes(cond.size))
        return conditions, *((tokens, mask) if self.text and self.cross_attention else (None, None))

    def _tokens(self, tokens: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Text tokens without a vector, and their mask; visible zeros where there is no text."""
        tokens = tokens.astype(self.dtype)
        if self.text == "caption":
            tokens = Mlp(
                self.embed,
                features=self.embed,
                kernel_init=INITS[self.initializer].level,
                dtype=self.dtype,
                name="text",
            )(tokens)
        if mask is None:
            return tokens, None
        has_text = mask.any(axis=-1, keepdims=True)
        return jnp.where(has_text[..., None], tokens, 0.0), mask | ~has_text

    def _sizes(self, size: jax.Array) -> jax.Array:
        """Height, width and ratio of what is aimed at, embedded: `[batch, 6] -> [batch, embed]`."""

        def embed(values: jax.Array, name: str) -> jax.Array:  # [batch, any] -> [batch, any * embed / 3]
            module = NoiseLevelEmbedding(
                self.embed // 3,
                time_input="timestep",
                kernel_init=INITS[self.initializer].level,
                dtype=self.dtype,
                name=name,
            )
            return module(values.reshape(-1)).reshape(values.shape[0], -1)

        target = size[:, 4:6].astype(jnp.float32)
        parts = [embed(target, "resolution"), embed(target[:, :1] / target[:, 1:], "aspect_ratio")]
        return jnp.concatenate(parts, axis=-1)

    def _embed_patches(self, h: jax.Array, rows: int, columns: int) -> jax.Array:
        """`[batch, patches, patch * patch * channels] -> [batch, patches, embed]`."""
        linear = INITS[self.initializer].linear
        if self.bottleneck:
            h = dense(
                self.bottleneck,
                axes=("patch", "features"),
                use_bias=False,
                kernel_init=linear,
                dtype=self.dtype,
                name="patch_narrow",
            )(h)
        axes = ("features" if self.bottleneck else "patch", "embed")
        h = dense(self.embed, axes=axes, kernel_init=linear, dtype=self.dtype, name="patch_in")(h)
        if "sincos" in self.positions:
            base, scale = self.base_size, self.interpolation_scale
            step = (base / rows / scale, base / columns / scale) if base else 1.0
            h = h + sincos_positions_2d(rows, columns, self.embed, step=step, column_first=True).astype(
                h.dtype
            )
        return constrain(h, "batch", "length", "embed")

    def _rotary(self, rows: int, columns: int, others: int) -> Rotary | None:
        """Angles of `others`, which are not turned, and of the patches after them."""
        if "rotary" not in self.positions:
            return None
        grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
        positions = np.concatenate([np.zeros((others, 2)), grid.reshape(-1, 2)])
        return rotary(jnp.asarray(positions, jnp.float32), (self.embed // self.heads // 2,) * 2)

    def _learned(self, name: str, count: int) -> jax.Array:
        """`count` learned tokens, `[count, embed]`."""
        table = param(self, name, nn.initializers.normal(0.02), (count, self.embed), ("one", "embed"))
        return table.astype(self.dtype)

    def _prepend(self, h: jax.Array, tokens: jax.Array) -> jax.Array:
        """`tokens`, `[count, embed]` or one row of them an example, before `h`."""
        tokens = jnp.broadcast_to(tokens, (h.shape[0], *tokens.shape[-2:]))
        return constrain(jnp.concatenate([tokens, h], axis=1), "batch", "length", "embed")

    def _block(self, *, cross_attention: bool, name: str) -> TransformerBlock:
        return TransformerBlock(
            self.heads,
            self.mlp_ratio,
            self.conditioning,
            cross_attention,
            self.norm,
            self.norm_eps,
            self.qk_norm,
            self.qkv_bias,
            self.activation,
            self.gated,
            self.initializer,
            self.dtype,
            name=name,
        )

    def _predict(self, h: jax.Array, vector: jax.Array) -> jax.Array:
        """The last layer: `[batch, patches, embed] -> [batch, patches, patch * patch * out_channels]`."""
        modulated = CONDITIONINGS[self.conditioning] > 0
        affine = self.norm == "rms" or not modulated
        h = NORMS[self.norm](epsilon=1e-6, affine=affine, dtype=self.dtype, name="final_norm")(h)
        if self.conditioning == "adaln_single":
            table = ModulationTable(name="final_modulation")
            h = modulate(h, *table(jnp.stack([vector, vector], axis=1)))
        elif modulated:
            h = modulate(h, *Modulation(self.embed, 2, dtype=self.dtype, name="final_modulation")(vector))
        features = self.patch**2 * self.out_channels
        out = dense(features, axes=("embed", "patch"), kernel_init=zeros, name="patch_out")
        return out(h.astype(jnp.float32))

    def _check(self, x: jax.Array, cond: Cond) -> None:
        """Refuse attributes that name nothing or contradict each other, and conditions that are missing."""
        for name, known in {
            "conditioning": CONDITIONINGS,
            "positions": POSITIONS,
            "text": TEXTS,
            "norm": NORMS,
            "initializer": INITS,
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(map(repr, known))}")
        if "rotary" in self.positions and self.embed % (4 * self.heads):
            raise ValueError(
                f"heads of width {self.embed}/{self.heads}; rotary positions need a multiple of 4"
            )
        if self.embed_per_block and (self.conditioning != "adaln_zero" or self.class_tokens):
            raise ValueError(
                "embed_per_block goes with conditioning 'adaln_zero' and without class_tokens only"
            )
        if self.text == "tokens" and self.conditioning == "cross_attention":
            raise ValueError("text 'tokens' stand beside no others; conditioning 'cross_attention' adds some")
        if self.class_tokens and not (self.classes and 0 <= self.class_tokens_from < self.depth):
            raise ValueError(
                f"class_tokens need classes, and class_tokens_from below depth {self.depth}; there are "
                f"{self.classes} classes, and it is {self.class_tokens_from}"
            )
        if self.in_channels and x.shape[-1] != self.in_channels:
            raise ValueError(f"images have {x.shape[-1]} channels; expected {self.in_channels}")
        needed = {"label": self.classes, "text": self.text, "size": self.sizes}
        missing = [f"cond.{name}" for name, asked in needed.items() if asked and getattr(cond, name) is None]
        if missing:
            raise ValueError(f"this network is conditioned on {' and '.join(missing)}")
