"""Which times are drawn in training.

Every sampler is the inverse of a distribution function, applied to uniform numbers. Those may be stratified,
and the times may be shifted towards the noise or moved to the grid of a discrete process.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

TimeSampler = Callable[[jax.Array, int], jax.Array]
"""`(key, batch) -> t [batch]` in (0, 1]; in (0, 1) but for discrete grids."""

EDGE = 1e-6
"""Continuous times keep this distance from 0 and 1: at an exact end the log-SNR is infinite, and what some
networks predict says nothing that their input does not.
"""


def inside(t: jax.Array) -> jax.Array:
    """Times kept away from both ends, by `EDGE`."""
    return jnp.clip(t, EDGE, 1.0 - EDGE)


def shift_time(t: jax.Array, shift: float | jax.Array) -> jax.Array:
    """`shift t / (1 + (shift - 1) t)`: on the straight path, sigma / alpha is multiplied by `shift`.

    Stable Diffusion 3 (Esser et al., 2024), at 1024 px: 3. FLUX: `exp(dynamic_mu(tokens))`.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def dynamic_mu(
    tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base: float = 0.5, maximum: float = 1.15
) -> float:
    """The logarithm of FLUX's shift for a sequence of `tokens` image tokens.

    Linear in their number: `base` at `base_tokens`, `maximum` at `max_tokens`, and beyond both.
    """
    return base + (maximum - base) * (tokens - base_tokens) / (max_tokens - base_tokens)


def from_inverse_cdf(
    inverse: Callable[[jax.Array], jax.Array], *, stratified: bool = False, shift: float = 1.0, grid: int = 0
) -> TimeSampler:
    """The sampler of any distribution on [0, 1].

    Args:
      inverse: its quantile function, elementwise on [0, 1). It may fall; what it gives beyond [0, 1] is cut.
      stratified: draw one uniform number in each of `batch` equal intervals, by one random offset for all
        (Kingma et al., 2021). Each is uniform on its own; together they lower the variance of the loss.
      shift: see `shift_time`.
      grid: T of a discrete process, whose times are i / T for i in 1 … T; or 0 for continuous times.
    """
    if not shift > 0.0:
        raise ValueError(f"shift is {shift}; expected more than 0")
    if grid < 0:
        raise ValueError(f"grid is {grid}; expected 0, or a number of steps")

    def draw(key: jax.Array, batch: int) -> jax.Array:
        if stratified:
            u = (jnp.arange(batch) / batch + jax.random.uniform(key)) % 1.0
        else:
            u = jax.random.uniform(key, (batch,))
        t = inside(shift_time(inverse(u), shift))
        return jnp.ceil(t * grid) / grid if grid else t

    return draw


def uniform(
    *, low: float = 0.0, high: float = 1.0, shift: float = 1.0, grid: int = 0, stratified: bool = False
) -> TimeSampler:
    """Uniform times between `low` and `high`, for a discrete process on its grid: `i / T`, i in 1 … T.

    Args:
      low: the smallest time; the smallest of a grid is the next larger one.
      high: the largest time.
      shift: see `shift_time`.
      grid: T, as in DDPM's 1000 (Ho et al., 2020), or 0.
      stratified: see `from_inverse_cdf`.
    """
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"low is {low} and high is {high}; expected 0 <= low < high <= 1")
    return from_inverse_cdf(lambda u: low + (high - low) * u, stratified=stratified, shift=shift, grid=grid)


def stratified(*, low: float = 0.0, high: float = 1.0, shift: float = 1.0, grid: int = 0) -> TimeSampler:
    """Uniform times, one in each of `batch` equal intervals (low discrepancy; Kingma et al., 2021)."""
    return uniform(low=low, high=high, shift=shift, grid=grid, stratified=True)


def logit_normal(
    *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, grid: int = 0, stratified: bool = False
) -> TimeSampler:
    """Times whose logit is N(mean, std^2): more of the middle of the path (Esser et al., 2024).

    JiT (Li and He, 2025) counts time from the noise, so that its (-0.8, 0.8) is mean 0.8 and std 0.8 here.
    """
    if not std > 0.0:
        raise ValueError(f"std is {std}; expected more than 0")
    return from_inverse_cdf(
        lambda u: jax.nn.sigmoid(mean + std * ndtri(u)), stratified=stratified, shift=shift, grid=grid
    )


def mode(*, scale: float = 1.29, shift: float = 1.0, grid: int = 0, stratified: bool = False) -> TimeSampler:
    """`t = 1 - u - scale (cos(pi u / 2)^2 - 1 + u)` of uniform u (Esser et al., 2024).

    Args:
      scale: above 0 for more of the middle, below 0 for more of the ends, 0 for uniform times. Within
        [-1, 2 / (pi - 2)] t falls with u.
      shift: see `shift_time`.
      grid: see `from_inverse_cdf`.
      stratified: see `from_inverse_cdf`.
    """
    if not -1.0 <= scale <= 2.0 / (math.pi - 2.0):
        raise ValueError(f"scale is {scale}; expected a number from -1 to 1.75")
    return from_inverse_cdf(
        lambda u: 1.0 - u - scale * (u - jnp.sin(math.pi * u / 2.0) ** 2),
        stratified=stratified,
        shift=shift,
        grid=grid,
    )


def cosmap(*, shift: float = 1.0, grid: int = 0, stratified: bool = False) -> TimeSampler:
    """`t = 1 - 1 / (tan(pi u / 2) + 1)` of uniform u (Esser et al., 2024).

    The log-SNRs of the straight path are then distributed as those of the cosine schedule.
    """

    def inverse(u: jax.Array) -> jax.Array:
        sin, cos = jnp.sin(math.pi * u / 2.0), jnp.sin(math.pi * (1.0 - u) / 2.0)
        return sin / (sin + cos)

    return from_inverse_cdf(inverse, stratified=stratified, shift=shift, grid=grid)


def log_normal_sigma(
    *, mean: float = -1.2, std: float = 1.2, sigma_max: float = 80.0, stratified: bool = False
) -> TimeSampler:
    """Times of the `edm` schedule whose sigma = sigma_max t has `ln sigma ~ N(mean, std^2)`.

    EDM (Karras et al., 2022): (-1.2, 1.2). EDM2: (-0.4, 1). What lies above sigma_max becomes sigma_max.
    """
    if not std > 0.0 or not sigma_max > 0.0:
        raise ValueError(f"std is {std} and sigma_max is {sigma_max}; expected more than 0")
    centre = mean - math.log(sigma_max)
    return from_inverse_cdf(lambda u: jnp.exp(centre + std * ndtri(u)), stratified=stratified)


TIMESTEPS: dict[str, Callable[..., TimeSampler]] = {
    "uniform": uniform,
    "stratified": stratified,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "log_normal_sigma": log_normal_sigma,
}
