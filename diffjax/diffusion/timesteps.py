"""Which times are drawn in training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

TimeSampler = Callable[[jax.Array, int], jax.Array]
"""`(key, batch) -> t [batch]` in [0, 1]."""


def uniform() -> TimeSampler:
    """Independent uniform times."""
    return lambda key, batch: jax.random.uniform(key, (batch,))


def stratified() -> TimeSampler:
    """Uniform times, one in each of `batch` equal intervals (low discrepancy; Kingma et al., 2021).

    Each time is uniform on its own; together they cover [0, 1] evenly, which lowers the variance of the loss.
    """

    def draw(key: jax.Array, batch: int) -> jax.Array:
        return (jnp.arange(batch) / batch + jax.random.uniform(key)) % 1.0

    return draw


def logit_normal(*, mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """Times whose logit is normal (Esser et al., 2024): more of the middle of the path."""
    return lambda key, batch: jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))


TIMESTEPS: dict[str, Callable[..., TimeSampler]] = {
    "uniform": uniform,
    "stratified": stratified,
    "logit_normal": logit_normal,
}
