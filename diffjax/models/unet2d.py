"""The U-Net of public checkpoints: Stable Diffusion, DeepFloyd IF, ADM and DDPM.

They are one network. Its levels differ in their attention, and its down- and upsampling is done by strided
convolutions or by residual blocks:

============================  ==============  ==========  ===============  ===================================
network                       `attention`     `resample`  `modulation`     what it is told
============================  ==============  ==========  ===============  ===================================
DDPM (Ho et al., 2020)        `self`          `conv`      `add`            the noise level
ADM (Dhariwal & Nichol 2021)  `self`          `block`     `scale_shift`    a class
Stable Diffusion (Rombach     `transformer`   `conv`      `add`            text
et al., 2022), 2, XL                                                       XL: pooled text and sizes, too
DeepFloyd IF (2023)           `joint`         `block`     `scale_shift`    text, as tokens and pooled; from
                                                                           II on the noise of `cond.low_res`
============================  ==============  ==========  ===============  ===================================

Not to be confused with Imagen's own U-Nets in `diffjax.models.unet`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.conditioning import Cond, TextPooling
from diffjax.nn.embeddings import LabelEmbedding, NoiseLevelEmbedding, sinusoidal
from diffjax.nn.layers import Dtype, conv, dense, group_norm, zeros
from diffjax.nn.map_attention import MapAttention, SpatialTransformer
from diffjax.nn.mlp import ACTIVATIONS, Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import once
from diffjax.nn.resblock import FEATURE_MAP, Downsample, NearestUpsample, ResBlock

ATTENTIONS = ("", "self", "joint", "transformer")
MODULATIONS = ("add", "scale_shift")


class UNet2D(nn.Module):
    """A U-Net that concatenates a skip for every residual block.

    What has an entry for each level begins with the highest resolution, on the way up, too.

    Attributes:
      in_channels: channels of the images, with those of `cond.low_res` and whatever else is concatenated.
      out_channels: channels of the prediction.
      channels: width of each level.
      blocks: residual blocks of each level on the way down; there is one more on the way up.
      attention: of each level, after every block: "" none; "self"; "joint": to the feature map and the text;
        "transformer": transformer layers that attend to the map and the text.
      up_attention: the same on the way up; empty: as on the way down.
      heads: attention heads of each level.
      depth: transformer layers of each level; a tuple of one for each block where they differ; empty: 1.
      up_depth: the same on the way up; empty: as on the way down.
      text_only: which levels never attend to the feature map; empty: none.
      resample: what follows each level's blocks, but the last's, and halves the resolution: "conv", a strided
        convolution, or "block", a residual block.
      up_resample: what follows each level's blocks, but the first's, on the way up; empty: as `resample`.
      down_padding: of the strided convolutions: 1, or 0 for one row and column at the lower right (DDPM).
      middle_blocks: residual blocks between the ways down and up: 0, 1 or 2.
      middle_attention: between two of them.
      middle_depth: its transformer layers.
      middle_text_only: as `text_only`, of "joint" attention.
      middle_groups: of the norm of "self" attention in the middle; None: `groups`; 0: there is none.
      middle_divisor: of the sums of skip and branch in the middle.
      divisor: of those in the other residual blocks.
      modulation: how blocks are told the conditioning vector; see `ResBlock`.
      activation: of the residual blocks and the embeddings.
      vector_activation: of the conditioning vector, once.
      block_activation: of the conditioning vector in each residual block; None: `activation`.
      groups: of the norms.
      epsilon: of the norms.
      embed: width of the conditioning vector; 0: four times that of the first level.
      sinusoids: of the noise level; 0: as many as the first level is wide.
      time_input: what the noise level is; see `to_thousand`.
      sine_first: the sinusoids of noise levels and sizes begin with sines.
      shift: of those sinusoids; see `sinusoidal`.
      aug_level: told `cond.aug_level`.
      classes: told `cond.label`, one of so many; no class is no vector.
      pooled_embed: told `cond.pooled`; its width, with that of the embedded sizes.
      size_embed: told `cond.size`, too; the width of each number's embedding.
      guidance_embed: told `cond.guidance`, where it is given (Luo et al., 2023: LCM); sinusoids.
      text_embed: width of `cond.text`; 0: it is not used.
      context: width to which text is projected first; 0: it is not.
      text_groups: of a norm of the text in "joint" attention; 0: there is none.
      pooling_heads: told a vector pooled from `cond.text`; heads of the pooling.
      use_mask: whether attention heeds `cond.mask`; the originals sample without.
      linear_projection: the projections around transformer layers are linear layers in public checkpoints
        rather than 1x1 convolutions; here there is no difference.
      dropout: rate inside the residual blocks.
      scan: roll the loop over transformer layers.
      remat: see `diffjax.nn.repeat.REMAT`.
      dtype: compute dtype; parameters and output are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    attention: tuple[str, ...] = ("", "self", "", "")
    up_attention: tuple[str, ...] = ()
    heads: tuple[int, ...] = (1, 1, 1, 1)
    depth: tuple[int | tuple[int, ...], ...] = ()
    up_depth: tuple[int | tuple[int, ...], ...] = ()
    text_only: tuple[bool, ...] = ()
    resample: tuple[str, ...] = ("conv", "conv", "conv", "conv")
    up_resample: tuple[str, ...] = ()
    down_padding: int = 1
    middle_blocks: int = 2
    middle_attention: str = "self"
    middle_depth: int = 1
    middle_text_only: bool = False
    middle_groups: int | None = None
    middle_divisor: float = 1.0
    divisor: float = 1.0
    modulation: str = "add"
    activation: str = "silu"
    vector_activation: str = "identity"
    block_activation: str | None = None
    groups: int = 32
    epsilon: float = 1e-5
    embed: int = 0
    sinusoids: int = 0
    time_input: str = "timestep"
    sine_first: bool = False
    shift: int = 0
    aug_level: bool = False
    classes: int = 0
    pooled_embed: int = 0
    size_embed: int = 0
    guidance_embed: int = 0
    text_embed: int = 0
    context: int = 0
    text_groups: int = 0
    pooling_heads: int = 0
    use_mask: bool = False
    linear_projection: bool = False
    dropout: float = 0.0
    scan: bool = True
    remat: str = ""
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, level: jax.Array, cond: Cond, *, deterministic: bool = True
    ) -> jax.Array:
        """Predict.

        Args:
          x: noisy images, `[batch, height, width, channels]`.
          level: their noise level, `[batch]`.
          cond: the conditions; `cond.low_res`, where it is given, is concatenated to the channels.
          deterministic: False in training; draws from the `dropout` rng if `dropout` is not zero.

        Returns:
          `[batch, height, width, out_channels]`, float32.
        """
        self._check_levels()
        count = len(self.channels)
        if cond.low_res is not None:
            x = jnp.concatenate([x, cond.low_res.astype(x.dtype)], axis=-1)
        self._check_images(x, 2 ** (count - 1))
        vector, text = self._vector(level, cond), self._text(cond)
        mask = cond.mask if self.use_mask else None
        rate = 0.0 if deterministic else self.dropout

        def transform(h: jax.Array, width: int, name: str, resample: str = "") -> jax.Array:
            block = ResBlock(
                width,
                rate,
                self.modulation,
                resample,
                self.activation,
                self.groups,
                self.epsilon,
                dtype=self.dtype,
                vector_activation=self.block_activation,
                divisor=self.middle_divisor if name.startswith("middle") else self.divisor,
                name=name,
            )
            return once(block, h, vector, remat=self.remat)

        def attend(h: jax.Array, kind: str, i: int, name: str, **attributes: Any) -> jax.Array:
            common = {"groups": self.groups, "dtype": self.dtype, "name": f"{name}_attention"} | attributes
            if kind == "transformer":
                loop: dict[str, Any] = {"scan": self.scan, "remat": self.remat}
                return SpatialTransformer(self.heads[i], **loop, **common)(h, text, mask)
            common.pop("depth")
            if kind == "joint":
                common |= {"text_groups": self.text_groups}
                return once(MapAttention(self.heads[i], **common), h, text, mask, remat=self.remat)
            attention = MapAttention(self.heads[i], **common | {"epsilon": self.epsilon})
            return once(attention, h, remat=self.remat) if kind else h

        h = conv(self.channels[0], dtype=self.dtype, name="in")(x)
        skips = [constrain(h, *FEATURE_MAP)]
        kinds, depths, only = self.attention, self.depths(), self.text_only or (False,) * count
        for i, width in enumerate(self.channels):
            for j in range(self.blocks[i]):
                h = transform(h, width, f"down_{i}_{j}")
                h = attend(h, kinds[i], i, f"down_{i}_{j}", depth=depths[i][j], text_only=only[i])
                skips.append(h)
            if i < count - 1:
                if self.resample[i] == "block":
                    h = transform(h, width, f"down_{i}", "down")
                else:
                    padding = self.down_padding or ((0, 1), (0, 1))
                    h = Downsample(width, padding=padding, dtype=self.dtype, name=f"down_{i}")(h)
                skips.append(h)

        for j in range(self.middle_blocks):
            h = transform(h, self.channels[-1], f"middle_{j}")
            if j == 0 and self.middle_attention:
                own: dict[str, Any] = {"depth": self.middle_depth}
                if self.middle_attention == "joint":
                    own["text_only"] = self.middle_text_only
                if self.middle_attention == "self":
                    groups = self.groups if self.middle_groups is None else self.middle_groups
                    own |= {"groups": groups, "divisor": self.middle_divisor}
                h = attend(h, self.middle_attention, count - 1, "middle", **own)

        kinds, depths = self.up_attention or self.attention, self.depths(up=True)
        for i in reversed(range(count)):
            for j in range(self.blocks[i] + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = transform(h, self.channels[i], f"up_{i}_{j}")
                h = attend(h, kinds[i], i, f"up_{i}_{j}", depth=depths[i][j], text_only=only[i])
            if i:
                if (self.up_resample or self.resample)[i] == "block":
                    h = transform(h, self.channels[i], f"up_{i}", "up")
                else:
                    h = NearestUpsample(self.channels[i], dtype=self.dtype, name=f"up_{i}")(h)

        h = ACTIVATIONS[self.activation](group_norm(self.groups, epsilon=self.epsilon, name="norm_out")(h))
        h = conv(self.out_channels, kernel_init=zeros, dtype=jnp.float32, name="out")(h)
        return constrain(h, *FEATURE_MAP)

    def depths(self, *, up: bool = False) -> list[tuple[int, ...]]:
        """The transformer layers after each block of each level, on the way down or up."""
        given = (self.up_depth if up else ()) or self.depth or (1,) * len(self.channels)
        return [
            (each,) * (blocks + up) if isinstance(each, int) else each
            for each, blocks in zip(given, self.blocks, strict=True)
        ]

    def _vector(self, level: jax.Array, cond: Cond) -> jax.Array:
        """What all residual blocks are told, `[batch, embed]`."""
        embed = self.embed or 4 * self.channels[0]
        features = self.sinusoids or self.channels[0]
        order: dict[str, Any] = {"sine_first": self.sine_first, "shift": self.shift}

        def embedded(name: str) -> NoiseLevelEmbedding:
            return NoiseLevelEmbedding(
                embed,
                features,
                self.time_input,
                activation=self.activation,
                dtype=self.dtype,
                name=name,
                **order,
            )

        added = None
        if self.guidance_embed and cond.guidance is not None:
            scale = sinusoidal(1000.0 * (cond.guidance - 1.0), self.guidance_embed, sine_first=True, shift=1)
            added = dense(features, use_bias=False, dtype=self.dtype, name="guidance")(scale)
        vector = embedded("noise_level")(level, added)
        if self.aug_level:
            vector = vector + embedded("aug_level")(_given(cond, "aug_level"))
        if self.classes:
            label = LabelEmbedding(self.classes, embed, self.dtype, null=False, name="label")
            vector = vector + label(_given(cond, "label"))
        if self.pooling_heads:
            text = TextPooling(embed, self.pooling_heads, dtype=self.dtype, name="text_pooling")
            vector = vector + text(_given(cond, "text"))
        if self.pooled_embed:
            pooled = _given(cond, "pooled").astype(jnp.float32)
            if self.size_embed:
                size = _given(cond, "size")
                sizes = sinusoidal(size.reshape(-1), self.size_embed, **order)
                pooled = jnp.concatenate([pooled, sizes.reshape(len(size), -1)], axis=-1)
            vector = vector + Mlp(embed, "silu", features=embed, dtype=self.dtype, name="pooled")(pooled)
        return ACTIVATIONS[self.vector_activation](vector)

    def _text(self, cond: Cond) -> jax.Array | None:
        """The tokens that feature maps attend to, `[batch, length, any]`."""
        if not self.text_embed:
            return None
        text = _given(cond, "text")
        return dense(self.context, dtype=self.dtype, name="text")(text) if self.context else text

    def _check_levels(self) -> None:
        """Refuse attributes that contradict each other."""
        count = len(self.channels)
        optional = ("up_attention", "depth", "up_depth", "text_only", "up_resample")
        for name in ("blocks", "attention", "heads", "resample", *optional):
            given = getattr(self, name)
            if len(given) != count and (given or name not in optional):
                raise ValueError(
                    f"{name} has {len(given)} entries, {given}; expected one for each of {count} levels"
                )
        for given, depths, more in ((self.depth, self.depths(), 0), (self.up_depth, self.depths(up=True), 1)):
            if [len(each) for each in depths] != [blocks + more for blocks in self.blocks]:
                raise ValueError(f"depths {given} do not fit {self.blocks} blocks")
        kinds = {*self.attention, *self.up_attention, self.middle_attention}
        if not kinds <= {*ATTENTIONS}:
            raise ValueError(f"attention {kinds}; expected some of {ATTENTIONS}")
        if not self.text_embed and kinds & {"joint", "transformer"}:
            raise ValueError("attention to text needs text_embed, the width of cond.text")
        if self.modulation not in MODULATIONS or not {*self.resample, *self.up_resample} <= {"conv", "block"}:
            raise ValueError(f"modulation {self.modulation!r} or resample {self.resample} is not known")

    def _check_images(self, x: jax.Array, stride: int) -> None:
        """Refuse images that do not fit the network."""
        _, height, width, channels = x.shape
        if height % stride or width % stride:
            raise ValueError(f"images of {height}x{width}; this network needs multiples of {stride}")
        if channels != self.in_channels:
            raise ValueError(
                f"{channels} channels, with those of cond.low_res; in_channels is {self.in_channels}"
            )


def _given(cond: Cond, name: str) -> jax.Array:
    value = getattr(cond, name)
    if value is None:
        raise ValueError(f"this network is told cond.{name}, which is None")
    return value
