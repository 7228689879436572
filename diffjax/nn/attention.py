"""Multi-head attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.nn.layers import Dtype, Initializer, dense, lecun


class Attention(nn.Module):
    """Multi-head attention, over the tokens themselves or over a context.

    Attributes:
      heads: number of heads; the width of the tokens must be divisible by it.
      dtype: compute dtype; the softmax is taken in float32.
      out_init: initializer of the output projection (zeros make a new block the identity).
    """

    heads: int
    dtype: Dtype = None
    out_init: Initializer = lecun

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attend from `x` to `x`, or to `context`.

        Args:
          x: `[batch, length, embed]`.
          context: `[batch, keys, any]`; `x` itself when None.
          mask: `[batch, keys]` bool, False where a key must not be seen; at least one True per row.

        Returns:
          `[batch, length, embed]`.
        """
        embed = x.shape[-1]
        if embed % self.heads:
            raise ValueError(f"width {embed} is not divisible by {self.heads} heads")
        context = x if context is None else context

        def project(source: jax.Array, name: str) -> jax.Array:
            y = dense(embed, axes=("embed", "heads"), dtype=self.dtype, name=name)(source)
            return y.reshape(*y.shape[:-1], self.heads, embed // self.heads)

        query, key, value = project(x, "query"), project(context, "key"), project(context, "value")
        scale = (embed // self.heads) ** -0.5
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:-1], embed)
        return dense(embed, axes=("heads", "embed"), kernel_init=self.out_init, dtype=self.dtype, name="out")(
            y
        )
