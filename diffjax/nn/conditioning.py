"""What a network is told besides the noisy image, and how text enters it."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.layers import Dtype, dense, layer_norm, param


class Cond(NamedTuple):
    """The conditions of one batch; a pytree.

    An example whose `mask` is False everywhere carries no text: it is the null condition of classifier-free
    guidance, whatever stands in `text` and `pooled`.

    Attributes:
      text: token states of a frozen encoder, `[batch, length, text_embed]`.
      mask: `[batch, length]` bool, True at real tokens.
      pooled: one vector per caption, `[batch, text_embed]`.
      low_res: for a super-resolution stage, the (noised) low-resolution image, upsampled to the
        stage's own resolution, `[batch, height, width, channels]` in [-1, 1]; None in a base stage.
      aug_level: the noise level of `low_res` as log-SNR, `[batch]`; None in a base stage.
    """

    text: jax.Array
    mask: jax.Array
    pooled: jax.Array
    low_res: jax.Array | None = None
    aug_level: jax.Array | None = None


def drop_text(cond: Cond, drop: jax.Array) -> Cond:
    """Turn the examples where `drop` (`[batch]` bool) is True into the null condition."""
    return cond._replace(mask=cond.mask & ~drop[:, None])


def null_text(cond: Cond) -> Cond:
    """The null condition of a whole batch: same shapes, same low-resolution images, no text."""
    return cond._replace(mask=jnp.zeros_like(cond.mask))


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

        vector = dense(self.features, dtype=self.dtype, name="pooled_in")(self._normalised(cond.pooled))
        vector = dense(self.features, axes=("mlp", "embed"), dtype=self.dtype, name="pooled_out")(
            nn.silu(vector)
        )
        vector = jnp.where(has_text[:, None], vector, null_vector.astype(vector.dtype))
        return tokens, mask, vector

    def _normalised(self, x: jax.Array) -> jax.Array:
        # Encoders differ in scale: a sentence embedding of unit length has tiny entries.
        return nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(x)
