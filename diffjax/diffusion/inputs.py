"""How a network is shown `x_t` and told the noise level: `(coeffs, t) -> (scale of x, time input)`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.diffusion.schedules import Coeffs, logsnr

Inputs = Callable[[Coeffs, jax.Array], tuple[jax.Array, jax.Array]]
"""`(coeffs, t) -> (the factor by which x_t is multiplied, what the network is told)`, all `[batch]`."""


def logsnr_input(*, limit: float = 20.0) -> Inputs:
    """`x_t` as it is, and the log-SNR, which belongs to no schedule in particular (Kingma et al., 2021).

    Args:
      limit: the log-SNR is clipped to [-limit, limit], because schedules with exact ends have infinite ones.
    """
    return lambda coeffs, t: (jnp.ones_like(t), jnp.clip(logsnr(coeffs), -limit, limit))


def edm_input(*, sigma_data: float = 0.5) -> Inputs:
    """`x_t` scaled to unit variance, and `ln(sigma / alpha) / 4` (Karras et al., 2022: c_in and c_noise)."""

    def inputs(coeffs: Coeffs, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = 1.0 / jnp.hypot(coeffs.sigma, coeffs.alpha * sigma_data)
        return scale, -jnp.clip(logsnr(coeffs), -40.0, 40.0) / 8.0

    return inputs


def timestep_input(*, num_steps: int = 1000, rounded: bool = False) -> Inputs:
    """`x_t` as it is, and the number of the step, `t T - 1` in [0, T - 1] (DDPM, Stable Diffusion, DiT).

    Args:
      num_steps: T.
      rounded: whether between two steps the nearest one's is told (some of diffusers' samplers).
    """

    def inputs(coeffs: Coeffs, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = t * num_steps - 1.0
        return jnp.ones_like(t), jnp.round(number) if rounded else number

    return inputs


def time_input(*, scale: float = 1000.0) -> Inputs:
    """`x_t` as it is, and the time multiplied by `scale` (Stable Diffusion 3, FLUX: 1000; SiT, with 1, counts
    the other way).
    """
    return lambda coeffs, t: (jnp.ones_like(t), t * scale)


INPUTS: dict[str, Callable[..., Inputs]] = {
    "logsnr": logsnr_input,
    "edm": edm_input,
    "timestep": timestep_input,
    "time": time_input,
}
