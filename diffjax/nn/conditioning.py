"""What a network is told besides the noisy image, and how text enters it."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.attention import heads_of
from diffjax.nn.kernels import attend
from diffjax.nn.layers import Dtype, dense, layer_norm, param


class Cond(NamedTuple):
    """The conditions of one batch; a pytree. What a network does not ask for stays None.

    An example whose `mask` is False everywhere carries no text, and one whose `label` is `NO_LABEL` no class:
    it is the null condition of classifier-free guidance, whatever stands in `text` and `pooled`. Networks
    that were trained with the encoding of the empty string as their null condition are given that instead.

    Attributes:
      text: token states of a frozen encoder, `[batch, length, text_embed]`.
      mask: `[batch, length]` bool, True at real tokens.
      pooled: one vector per caption, `[batch, pooled_embed]`.
      low_res: for a super-resolution stage, the (noised) low-resolution image, upsampled to the
        stage's own resolution, `[batch, height, width, channels]` in [-1, 1]; None in a base stage.
      aug_level: the noise level of `low_res`, told as the network is told its own, `[batch]`; None in a base
        stage.
      label: the class, `[batch]` int32.
      size: original height and width, top and left of the crop, target height and width in pixels,
        `[batch, 6]` (SDXL's micro-conditioning).
      guidance: the guidance scale that a distilled network takes as an input, `[batch]` (FLUX.1 dev).
    """

    text: jax.Array | None = None
    mask: jax.Array | None = None
    pooled: jax.Array | None = None
    low_res: jax.Array | None = None
    aug_level: jax.Array | None = None
    label: jax.Array | None = None
    size: jax.Array | None = None
    guidance: jax.Array | None = None


NO_LABEL = -1


def drop_cond(cond: Cond, drop: jax.Array) -> Cond:
    """Turn the examples where `drop` (`[batch]` bool) is True into the null condition."""
    if cond.mask is not None:
        cond = cond._replace(mask=cond.mask & ~drop[:, None])
    if cond.label is not None:
        cond = cond._replace(label=jnp.where(drop, NO_LABEL, cond.label))
    return cond


def null_cond(cond: Cond) -> Cond:
    """The null condition of a whole batch: same shapes, same low-resolution images, no text and no class."""
    if cond.mask is not None:
        cond = cond._replace(mask=jnp.zeros_like(cond.mask))
    if cond.label is not None:
        cond = cond._replace(label=jnp.full_like(cond.label, NO_LABEL))
    return cond


class TextProjection(nn.Module):
    """Brings a frozen encoder's output to a network's width.

    A learned null token and a learned null vector stand for dropped text, so a batch may mix captioned and
    uncaptioned examples and no row of an attention mask is ever empty.
    """

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, cond: Cond) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project the text.

        Returns:
          tokens `[batch, 1 + length, features]`, their mask `[batch, 1 + length]` (the null token is
          visible exactly where there is no text), and a vector `[batch, features]`.
        """
        if cond.text is None or cond.mask is None or cond.pooled is None:
            raise ValueError("this network is conditioned on text: cond.text, cond.mask and cond.pooled")
        has_text = cond.mask.any(axis=-1)
        tokens = dense(self.features, dtype=self.dtype, name="tokens")(cond.text)
        tokens = layer_norm(dtype=self.dtype, name="token_norm")(tokens)
        normal = nn.initializers.normal(0.02)
        null_token = param(self, "null_token", normal, (1, 1, self.features), ("one", "one", "embed"))
        null_vector = param(self, "null_vector", normal, (1, self.features), ("one", "embed"))

        batch = tokens.shape[0]
        null_token = jnp.broadcast_to(null_token, (batch, 1, self.features)).astype(tokens.dtype)
        tokens = jnp.concatenate([null_token, tokens], axis=1)
        mask = jnp.concatenate([~has_text[:, None], cond.mask], axis=1)

        vector = self._normalised(cond.pooled)
        vector = dense(self.features, axes=("embed", "mlp"), dtype=self.dtype, name="pooled_in")(vector)
        vector = dense(self.features, axes=("mlp", "embed"), dtype=self.dtype, name="pooled_out")(
            nn.silu(vector)
        )
        vector = jnp.where(has_text[:, None], vector, null_vector.astype(vector.dtype))
        return tokens, mask, vector

    def _normalised(self, x: jax.Array) -> jax.Array:
        # Encoders differ in scale: a sentence embedding of unit length has tiny entries.
        return nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(x)


class TextPooling(nn.Module):
    """Token states to one vector by attention, asked by their mean (DeepFloyd IF; as CLIP pools images).

    Attributes:
      features: width of the vector.
      heads: of the attention.
      dtype: compute dtype.
    """

    features: int
    heads: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """`[batch, length, text_embed] -> [batch, features]`; padding counts, as it does in the original."""
        x = layer_norm(epsilon=1e-5, dtype=self.dtype, name="norm_in")(text)
        embed = x.shape[-1]
        place = param(self, "position", nn.initializers.normal(embed**-0.5), (1, embed), ("one", "embed"))
        mean = x.mean(axis=1, keepdims=True) + place.astype(x.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        sizes = (self.heads, embed // self.heads)
        (query,) = heads_of(mean, ["query"], *sizes, dtype=self.dtype)
        key, value = heads_of(x, ["key", "value"], *sizes, dtype=self.dtype)
        pooled = attend(query, key, value).reshape(-1, embed)
        pooled = dense(self.features, axes=("heads", "embed"), dtype=self.dtype, name="out")(pooled)
        return layer_norm(epsilon=1e-5, dtype=self.dtype, name="norm_out")(pooled)
