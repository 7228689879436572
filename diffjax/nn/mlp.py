"""The feed-forward layer of a transformer block."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from diffjax.nn.layers import Dtype, Initializer, dense, lecun


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x sigmoid(1.702 x)`, as the first CLIP has it."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}


class Mlp(nn.Module):
    """Two linear layers with an activation between, gated or not (Shazeer, 2020: GEGLU, SwiGLU).

    Attributes:
      hidden: width between the layers.
      activation: one of `ACTIVATIONS`.
      gated: whether the activation of a third layer, `gate`, multiplies what `in` gives.
      use_bias: whether the layers have biases.
      features: width of the output; None: that of the input.
      kernel_init: initializer of the layers.
      dtype: compute dtype.
    """

    hidden: int
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    features: int | None = None
    kernel_init: Initializer = lecun
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., embed] -> [..., features]`."""

        def layer(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
            return dense(
                features,
                axes=axes,
                use_bias=self.use_bias,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                name=name,
            )

        act = ACTIVATIONS[self.activation]
        h = layer(self.hidden, ("embed", "mlp"), "in")(x)
        h = act(layer(self.hidden, ("embed", "mlp"), "gate")(x)) * h if self.gated else act(h)
        return layer(self.features or x.shape[-1], ("mlp", "embed"), "out")(h)
