"""Attention: one function, whatever network asks, with interchangeable kernels; and the module around it."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from diffjax.errors import UserError
from diffjax.nn.kernels import attend
from diffjax.nn.layers import Dtype, Initializer, apply_together, dense, layer_norm, lecun, rms_norm
from diffjax.nn.placement import constrain, num_parts
from diffjax.nn.rotary import Rotary, rotate

NORMS: dict[str, Callable[..., nn.Module]] = {"rms": rms_norm, "layer": layer_norm}


def heads_of(
    source: jax.Array,
    names: Sequence[str],
    heads: int,
    head_dim: int,
    *,
    use_bias: bool = True,
    norm: str = "",
    norm_eps: float = 1e-6,
    rotary: Rotary | None = None,
    kernel_init: Initializer = lecun,
    dtype: Dtype = None,
) -> list[jax.Array]:
    """Project tokens to queries, keys and values; inside a compact method, which owns the layers.

    Args:
      source: `[batch, length, any]`.
      names: of the linear layers; a norm's is `{name}_norm`. Values, whose names end in "value", are neither
        normed nor turned.
      heads: number of heads.
      head_dim: width of each.
      use_bias: whether the linear layers have one.
      norm: "rms" or "layer": of each head (Dehghani et al., 2023: QK norm); "" is none.
      norm_eps: of that norm.
      rotary: turns each head by its token's position (Su et al., 2021).
      kernel_init: of the linear layers.
      dtype: compute dtype.

    Returns:
      `[batch, length, heads, head_dim]` for each name.
    """
    layers = [
        dense(
            heads * head_dim,
            axes=("embed", "heads"),
            use_bias=use_bias,
            kernel_init=kernel_init,
            dtype=dtype,
            name=name,
        )
        for name in names
    ]

    def finish(name: str, y: jax.Array) -> jax.Array:
        y = constrain(_split(y, heads), "batch", "length", "heads", "head_dim")
        if name.endswith("value"):
            return y
        if norm:
            y = NORMS[norm](epsilon=norm_eps, axis="head_dim", dtype=dtype, name=f"{name}_norm")(y)
        return y if rotary is None else rotate(y, rotary)

    return [finish(name, y) for name, y in zip(names, apply_together(layers, source), strict=True)]


def _split(y: jax.Array, heads: int) -> jax.Array:
    """`[batch, length, heads * head_dim]` to `[batch, length, heads, head_dim]`.

    Raises:
      UserError: on this mesh, the heads do not divide over their devices.
    """
    parts = num_parts("heads")
    if heads % parts:
        near = f"{heads - heads % parts} or {heads + parts - heads % parts}" if heads > parts else f"{parts}"
        raise UserError(f"{heads} heads of attention do not divide over {parts} devices; {near} would.")
    return y.reshape(*y.shape[:-1], heads, y.shape[-1] // heads)


class Attention(nn.Module):
    """Multi-head attention, over the tokens themselves or over a context.

    Attributes:
      heads: number of heads.
      head_dim: width of a head; None: the width of the tokens, which must then be divisible, over `heads`.
      use_bias: whether queries, keys and values have a bias.
      out_bias: whether the output projection has one.
      qk_norm: norm of each head of queries and keys: "rms", "layer", or "" for none.
      scale: of the products of queries and keys; None: `head_dim ** -0.5`.
      kernel_init: initializer of the input projections.
      out_init: initializer of the output projection (zeros make a new block the identity).
      dtype: compute dtype; the softmax is taken in float32.
    """

    heads: int
    head_dim: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    qk_norm: str = ""
    scale: float | None = None
    kernel_init: Initializer = lecun
    out_init: Initializer = lecun
    dtype: Dtype = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        bias: jax.Array | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
    ) -> jax.Array:
        """Attend from `x` to `x`, or to `context`.

        Args:
          x: `[batch, length, embed]`.
          context: `[batch, keys, any]`; `x` itself when None.
          mask: `[batch, keys]` bool, False where a key must not be seen; at least one True per row.
          bias: added to the products, broadcastable to `[batch, heads, length, keys]`.
          causal: no token sees a later one.
          rotary: positions, of `x` attending to itself.

        Returns:
          `[batch, length, embed]`.
        """
        embed = x.shape[-1]
        if self.head_dim is None and embed % self.heads:
            raise ValueError(f"width {embed} is not divisible by {self.heads} heads")
        head_dim = self.head_dim or embed // self.heads

        def project(source: jax.Array, *names: str) -> list[jax.Array]:
            return heads_of(
                source,
                names,
                self.heads,
                head_dim,
                use_bias=self.use_bias,
                norm=self.qk_norm,
                rotary=rotary,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
            )

        if context is None:
            query, key, value = project(x, "query", "key", "value")
        else:
            (query,), (key, value) = project(x, "query"), project(context, "key", "value")
        y = attend(query, key, value, mask=mask, bias=bias, causal=causal, scale=self.scale)
        y = y.reshape(*x.shape[:-1], self.heads * head_dim)
        return dense(
            embed,
            axes=("heads", "embed"),
            use_bias=self.out_bias,
            kernel_init=self.out_init,
            dtype=self.dtype,
            name="out",
        )(y)
