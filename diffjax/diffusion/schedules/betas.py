"""Discrete-time processes: DDPM's betas on their grid of T steps, and between the steps.

Step i of T lies at t = i / T exactly: t = 0 is the clean image, and the paper's `alpha_bar_i` (in code that
counts from zero, entry i - 1) belongs to t = i / T. In between, alpha^2 and sigma^2 are linear in t.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion.schedules.base import Coeffs, Schedule


def ddpm(
    *,
    betas: str | Sequence[float] = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    num_steps: int = 1000,
    zero_terminal_snr: bool = False,
    least_signal: float = 0.0,
) -> Schedule:
    """The discrete process of DDPM (Ho et al., 2020), `alpha_i^2 = prod_{j <= i} (1 - beta_j)`.

    Args:
      betas: "linear" (DDPM, DiT), "scaled_linear" (Stable Diffusion: the square root is linear, from 0.00085
        to 0.012), or "cosine" (Nichol and Dhariwal, 2021; beta_start and beta_end do not count); or all of
        them, `num_steps` numbers.
      beta_start: the first beta.
      beta_end: the last.
      num_steps: T.
      zero_terminal_snr: rescale alpha so that nothing of the signal is left at t = 1 (Lin et al., 2024).
        There eps and x_T are the same, so v or x0 must be predicted.
      least_signal: alpha^2 at t = 1 is at least this; for solvers in sigma / alpha (diffusers: 2^-24).
    """
    if isinstance(betas, str) and betas not in BETAS:
        raise ValueError(f"betas is {betas!r}; expected one of {', '.join(BETAS)}")
    if not isinstance(betas, str) and len(betas) != num_steps:
        raise ValueError(f"betas are {len(betas)} numbers; expected num_steps of them, {num_steps}")
    if not 0.0 <= least_signal < 1.0:
        raise ValueError(f"least_signal is {least_signal}; expected a number in [0, 1)")
    if not 0.0 < beta_start <= beta_end < 1.0 or num_steps < 1:
        raise ValueError(
            "expected 0 < beta_start <= beta_end < 1 and num_steps >= 1, not "
            f"{beta_start}, {beta_end}, {num_steps}"
        )
    values = (
        np.asarray(betas) if not isinstance(betas, str) else BETAS[betas](beta_start, beta_end, num_steps)
    )
    values = rescale_zero_terminal_snr(values) if zero_terminal_snr else values
    if least_signal:
        values = np.append(values[:-1], min(values[-1], 1.0 - least_signal / np.prod(1.0 - values[:-1])))
    return from_betas(values)


def from_betas(betas: np.ndarray) -> Schedule:
    """The process of any betas, `[T]`, each in (0, 1]; only the last may be 1."""
    betas = np.asarray(betas, np.float64)
    valid = (betas > 0.0) & (betas < 1.0)
    if betas.ndim != 1 or not betas.size or not valid[:-1].all() or not 0.0 < betas[-1] <= 1.0:
        raise ValueError("betas must be a list of numbers in (0, 1), of which the last may be 1")
    with np.errstate(divide="ignore"):
        log_signal = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    signal, noise = np.exp(log_signal), -np.expm1(log_signal)  # both sides exact, in float64
    count = len(betas)

    def schedule(t: jax.Array) -> Coeffs:
        t = jnp.asarray(t)
        # Counted from the nearer end, so that neither loses precision.
        early, position, rest = t < 0.5, _snapped(t * count, 1.0), _snapped((1.0 - t) * count, count)
        left = jnp.where(early, jnp.ceil(position) - 1, count - 1 - jnp.floor(rest)).astype(int)
        left = jnp.clip(left, 0, count - 1)
        after = jnp.where(early, position - left, 1.0 - (rest - (count - 1 - left)))
        before = jnp.where(early, 1.0 - after, rest - (count - 1 - left))

        def between(table: np.ndarray) -> jax.Array:
            values = jnp.asarray(table, t.dtype)
            return before * values[left] + after * values[left + 1]

        alpha, sigma = jnp.sqrt(between(signal)), jnp.sqrt(between(noise))
        speed = count * jnp.asarray(np.diff(noise), t.dtype)[left]  # of sigma^2
        return Coeffs(alpha, sigma, -speed / (2.0 * alpha), speed / (2.0 * sigma))

    return schedule


def _snapped(position: jax.Array, size: float) -> jax.Array:
    """A whole number where the rounding of a time of `size` alone keeps it from being one."""
    whole = jnp.round(position)
    close = jnp.abs(position - whole) < jnp.finfo(position.dtype).eps * jnp.maximum(whole, size)
    return jnp.where(close, position + jax.lax.stop_gradient(whole - position), position)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose alpha ends in zero and begins as before (Lin et al., 2024, algorithm 1)."""
    alphas = np.exp(0.5 * np.cumsum(np.log1p(-np.asarray(betas, np.float64))))
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return 1.0 - alphas**2 / np.concatenate([[1.0], alphas[:-1] ** 2])


def _linear(start: float, end: float, count: int) -> np.ndarray:
    return np.linspace(start, end, count)


def _scaled_linear(start: float, end: float, count: int) -> np.ndarray:
    return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2


def _cosine(start: float, end: float, count: int) -> np.ndarray:
    signal = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2.0) ** 2
    return np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)


BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
}

SCHEDULES: dict[str, Callable[..., Schedule]] = {"ddpm": ddpm}
