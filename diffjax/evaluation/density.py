"""How well a denoiser knows held-out pictures: bits per dimension, and its error at fixed noise levels."""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.likelihood import Divergence, bits_per_dim, hutchinson, log_likelihood
from diffjax.diffusion.schedules import Schedule, corrupt, logsnr, time_at
from diffjax.diffusion.solvers.base import evaluate
from diffjax.errors import UserError

_HUTCHINSON = hutchinson()

Measure = Callable[[dict[str, jax.Array], jax.Array], jax.Array]
"""`(batch, a key for each example) -> [..., batch]`."""


def bits_per_dimension(
    denoise: Denoiser,
    schedule: Schedule,
    images: jax.Array,
    *,
    keys: jax.Array,
    times: np.ndarray,
    divergence: Divergence = _HUTCHINSON,
) -> jax.Array:
    """Bits per dimension of 8-bit pictures under the probability-flow ODE, `[batch]`.

    Uniform noise of one grey level's width makes the pictures continuous (Theis et al., 2016); with it, the
    mean is an upper bound of the discrete model's code length.

    Args:
      denoise: the denoiser, without guidance.
      schedule: the noise schedule.
      images: uint8 `[batch, h, w, c]`.
      keys: a key for each example.
      times: of the ODE's steps, as in `diffusion.likelihood.log_likelihood`.
      divergence: the trace, or an estimate of it.
    """
    grey = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), images.shape[1:]))(keys)
    x0 = (images.astype(jnp.float32) + grey - 0.5) / 127.5 - 1.0
    nats = log_likelihood(denoise, schedule, x0, keys=keys, times=times, divergence=divergence)
    return bits_per_dim(nats, math.prod(images.shape[1:]))


def denoising_error(
    denoise: Denoiser, schedule: Schedule, x0: jax.Array, *, keys: jax.Array, levels: Sequence[float]
) -> jax.Array:
    """The mean squared error of the estimated data at fixed log-SNR, `[levels, batch]`.

    That of the noise is `exp(level)` times as large. Weights and the drawing of times do not enter, so that
    stages of different objectives can be compared where they diffuse the same data.

    Args:
      denoise: the denoiser, without guidance.
      schedule: the noise schedule.
      x0: data as the stage diffuses it, `[batch, …]`.
      keys: a key for each example; the same noise is used at all levels.
      levels: log-SNR.

    Raises:
      UserError: a level is beyond the schedule's ends.
    """
    times = level_times(schedule, levels)
    eps = noise.normal_like(keys, x0)

    def at(t: jax.Array) -> jax.Array:
        x = corrupt(schedule, x0, eps, jnp.broadcast_to(t, x0.shape[:1]))
        return jnp.mean((evaluate(denoise, x, t).x0 - x0) ** 2, axis=tuple(range(1, x0.ndim)))

    return jax.lax.map(at, times)


def level_times(schedule: Schedule, levels: Sequence[float]) -> jax.Array:
    """The times at which a schedule has these log-SNR, `[levels]`.

    Raises:
      UserError: it has one of them nowhere.
    """
    with jax.ensure_compile_time_eval():
        wanted = jnp.asarray(levels, jnp.float32)
        times = time_at(schedule, wanted)
        off = np.asarray(jnp.abs(logsnr(schedule(times)) - wanted))
        ends = [float(end) for end in logsnr(schedule(jnp.array([1.0, 0.0])))]
    for level, distance in zip(levels, off, strict=True):
        if not distance < 0.1:
            raise UserError(
                f"log-SNR {level:g} is beyond the schedule, which goes from {ends[0]:.3g} to {ends[1]:.3g}; "
                "choose levels within."
            )
    return times


def over_examples(measure: Measure, batches: Iterable[dict[str, np.ndarray]], *, seed: int = 0) -> np.ndarray:
    """A measure of every example, `[..., n]`, whose draws depend on the seed and the example's number alone.

    Args:
      measure: compiled or not; it sees batches of one size only, the last being filled up with copies.
      batches: arrays that begin with the axis of examples, none larger than the first.
      seed: of all keys.
    """
    found: list[np.ndarray] = []
    done = size = 0
    root = jax.random.key(seed)
    for batch in batches:
        count = len(next(iter(batch.values())))
        size = size or count
        rows = np.minimum(np.arange(size), count - 1)
        keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(done + rows)
        filled = {name: jnp.asarray(array[rows]) for name, array in batch.items()}
        found.append(np.asarray(measure(filled, keys))[..., :count])
        done += count
    return np.concatenate(found, axis=-1)
