"""How uncertain the denoiser is at each noise level: learned beside it, to balance the levels of the loss."""

import flax.linen as nn
import jax

from diffjax.nn.embeddings import sinusoidal
from diffjax.nn.layers import dense


class Uncertainty(nn.Module):
    """u of the loss `L exp(-u) + u` (Karras et al., 2024: EDM2): one layer on sinusoids of the log-SNR.

    It begins at 0, where the loss is what it is without.
    """

    sinusoids: int = 128

    @nn.compact
    def __call__(self, logsnr: jax.Array) -> jax.Array:
        """`logsnr [batch] -> u [batch]`."""
        features = sinusoidal((logsnr + 20.0) * 25.0, self.sinusoids)
        return dense(1, axes=("embed", "one"), kernel_init=nn.initializers.zeros, name="out")(features)[:, 0]
