"""Vision transformers whose features are compared: DINOv2 (Oquab et al., 2023) and CLIP's image towers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.attention import Attention
from diffjax.nn.layers import dense, layer_norm, ones, param, zeros
from diffjax.nn.mlp import Mlp
from diffjax.nn.patches import patchify
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat


class _Block(nn.Module):
    """Self-attention and a feed-forward layer, after a norm each; see `VisionTransformer`."""

    heads: int
    mlp: int
    activation: str
    gated: bool
    scaled: bool
    norm_eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, tokens, embed] -> [n, tokens, embed]`."""

        def scale(y: jax.Array, name: str) -> jax.Array:
            return y * param(self, name, ones, y.shape[-1:], ("embed",)) if self.scaled else y

        y = layer_norm(epsilon=self.norm_eps, name="attention_norm")(x)
        x = x + scale(Attention(self.heads, name="attention")(y), "attention_scale")
        y = layer_norm(epsilon=self.norm_eps, name="mlp_norm")(x)
        x = x + scale(Mlp(self.mlp, self.activation, self.gated, name="mlp")(y), "mlp_scale")
        return constrain(x, "batch", "length", "embed")


class VisionTransformer(nn.Module):
    """Pictures to the normed state of the class token.

    Attributes:
      embed: width of the tokens.
      layers: number of blocks.
      heads: attention heads.
      mlp: hidden width of the feed-forward layers.
      side: of the pictures that it was trained with, in pixels; it takes others, given their positions.
      patch: side of a patch.
      registers: tokens that belong to no patch (Darcet et al., 2023).
      activation: of the feed-forward layers.
      gated: whether these are gated.
      scaled: whether what a layer adds is multiplied by a vector (Touvron et al., 2021: LayerScale).
      first_norm: whether there is a norm before the first block.
      patch_bias: whether the patches' projection has one.
      batched: whether the parameters that are tokens have a first axis of 1, as DINOv2's have.
      norm_eps: epsilon of the norms.
      projection: width of the output's projection; 0: there is none.
    """

    embed: int
    layers: int
    heads: int
    mlp: int
    side: int = 224
    patch: int = 14
    registers: int = 0
    activation: str = "gelu"
    gated: bool = False
    scaled: bool = True
    first_norm: bool = False
    patch_bias: bool = True
    batched: bool = True
    norm_eps: float = 1e-6
    projection: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, side, side, 3]`, normalised as the network was trained, to `[n, projection or embed]`."""

        def tokens(name: str, count: int, shape: tuple[int, ...]) -> jax.Array:
            own = param(self, name, zeros, shape, (*(None for _ in shape[1:]), "embed"))
            return jnp.broadcast_to(own.reshape(1, count, self.embed), (len(x), count, self.embed))

        axes, lead = ("patch", "embed"), (1,) if self.batched else ()
        x = dense(self.embed, axes=axes, use_bias=self.patch_bias, name="patches")(patchify(x, self.patch))
        x = jnp.concatenate([tokens("class", 1, (*lead, *lead, self.embed)), x], axis=1)
        x = x + tokens("positions", x.shape[1], (*lead, x.shape[1], self.embed))
        if self.registers:
            more = tokens("registers", self.registers, (*lead, self.registers, self.embed))
            x = jnp.concatenate([x[:, :1], more, x[:, 1:]], axis=1)
        if self.first_norm:
            x = layer_norm(epsilon=self.norm_eps, name="first_norm")(x)
        block = _Block(
            self.heads, self.mlp, self.activation, self.gated, self.scaled, self.norm_eps, name="blocks"
        )
        x, _ = repeat(block, self.layers, constrain(x, "batch", "length", "embed"))
        x = layer_norm(epsilon=self.norm_eps, name="norm")(x[:, 0])
        return dense(self.projection, use_bias=False, name="projection")(x) if self.projection else x


def resized_positions(positions: np.ndarray, side: int, *, offset: float, antialias: bool) -> np.ndarray:
    """Positions of a grid of patches, for a grid of another size.

    Args:
      positions: `[1, 1 + old * old, embed]`, that of the class token first.
      side: of the new grid, in patches.
      offset: DINOv2's networks without registers scale by `(side + 0.1) / old`, the others by `side / old`.
      antialias: theirs with registers widen the kernel when they shrink the grid.

    Returns:
      `[1, 1 + side * side, embed]`; the original itself where its size is right.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if side == old:
        return positions
    weights = _bicubic(old, side, old / (side + offset), antialias)
    grid = positions[0, 1:].astype(np.float64).reshape(old, old, -1)
    grid = np.einsum("io,jp,ope->ije", weights, weights, grid, optimize=True).reshape(1, side * side, -1)
    return np.concatenate([positions[:, :1], grid.astype(positions.dtype)], axis=1)


def _bicubic(old: int, new: int, step: float, antialias: bool) -> np.ndarray:
    """Weights `[new, old]` of PyTorch's bicubic interpolation, whose steps are `step` old places long."""
    # Its kernel is another with antialias, as Pillow's, which weighs only places that there are.
    a, width = (-0.5, max(step, 1.0)) if antialias else (-0.75, 1.0)
    centres = (np.arange(new) + 0.5) * step - 0.5
    beyond = 0 if antialias else 4
    places = np.arange(-beyond, old + beyond)
    d = np.abs(centres[:, None] - places) / width
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    kernel = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    weights = np.zeros((new, old))
    np.add.at(weights.T, np.clip(places, 0, old - 1), kernel.T)  # beyond the border, the last is repeated
    return weights / weights.sum(axis=1, keepdims=True)
