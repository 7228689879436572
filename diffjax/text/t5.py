"""The encoder of T5 (Raffel et al., 2020), in the versions 1.0 and 1.1, up to XXL."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.attention import Attention
from diffjax.nn.layers import Dtype, embedding, param, rms_norm
from diffjax.nn.mlp import Mlp
from diffjax.nn.placement import constrain
from diffjax.nn.repeat import repeat


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Which of T5's buckets the position of each key relative to each query falls into.

    Half of the buckets are for keys that come later. Half of either half have a distance each; the others
    grow logarithmically up to `max_distance`, and the last holds all that is farther away.

    Args:
      length: number of tokens.
      buckets: number of buckets, at least 4.
      max_distance: greater than a quarter of `buckets`.

    Returns:
      `[length, length]` int32, queries first.
    """
    half, exact = buckets // 2, buckets // 4
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # In the precision of the original, which decides on which side of a boundary a distance falls.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class T5Block(nn.Module):
    """Self-attention without scaling of its products and a feed-forward layer, after an RMS norm each."""

    heads: int
    head_dim: int
    mlp: int
    activation: str
    gated: bool
    norm_eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """`x [batch, length, embed], bias [1, heads, length, length], mask [batch, length] -> like x`."""

        def norm(name: str) -> Callable[[jax.Array], jax.Array]:
            return rms_norm(epsilon=self.norm_eps, dtype=self.dtype, name=name)

        attention = Attention(
            self.heads,
            self.head_dim,
            use_bias=False,
            out_bias=False,
            scale=1.0,
            dtype=self.dtype,
            name="attention",
        )
        x = x + attention(norm("attention_norm")(x), mask=mask, bias=bias)
        mlp = Mlp(self.mlp, self.activation, self.gated, use_bias=False, dtype=self.dtype, name="mlp")
        return constrain(x + mlp(norm("mlp_norm")(x)), "batch", "length", "embed")


class T5Encoder(nn.Module):
    """Token ids to states; positions enter as a bias of the attention that all layers share.

    Attributes:
      vocab: size of the vocabulary.
      embed: width of the token states.
      layers: number of blocks.
      heads: attention heads.
      head_dim: width of each.
      mlp: hidden width of the feed-forward layers.
      activation: theirs; "relu" in version 1.0, "gelu_tanh" in 1.1.
      gated: whether they are gated, as in version 1.1.
      buckets: number of relative positions that are told apart.
      max_distance: from which on positions are not.
      norm_eps: epsilon of the norms.
      dtype: compute dtype; the residual stream is float32, since it outgrows float16 in the largest.
      remat: see `nn.repeat.REMAT`.
      scan: whether the loop over the blocks is rolled.
    """

    vocab: int = 32128
    embed: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp: int = 10240
    activation: str = "gelu_tanh"
    gated: bool = True
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    remat: str = ""
    scan: bool = True

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encode tokens.

        Args:
          ids: `[batch, length]` token ids.
          mask: `[batch, length]` bool, False where no token may look, at least one True per row; None: all
            tokens are seen, padding too, as SD3 and FLUX have it.

        Returns:
          `[batch, length, embed]`, float32; at padding as well.
        """
        x = embedding(self.vocab, self.embed, name="tokens")(ids)
        table = param(
            self, "positions", nn.initializers.normal(0.02), (self.buckets, self.heads), ("vocab", "heads")
        )
        buckets = relative_buckets(ids.shape[1], self.buckets, self.max_distance)
        bias = table[buckets].transpose(2, 0, 1)[None]  # [1, heads, length, length]
        block = T5Block(
            self.heads,
            self.head_dim,
            self.mlp,
            self.activation,
            self.gated,
            self.norm_eps,
            self.dtype,
            name="blocks",
        )
        x, _ = repeat(
            block,
            self.layers,
            constrain(x.astype(jnp.float32), "batch", "length", "embed"),
            bias,
            mask,
            scan=self.scan,
            remat=self.remat,
        )
        return rms_norm(epsilon=self.norm_eps, name="norm")(x)
