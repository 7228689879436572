"""Time grids: at which times a sampler evaluates the network.

A grid is a function `(schedule, num_steps) -> times`: `num_steps + 1` decreasing times as a NumPy array, made
before anything is compiled, so that a bad one is refused at once.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion.predictions import Prediction, determinant
from diffjax.diffusion.schedules import Schedule, logsnr, time_at
from diffjax.diffusion.solvers.base import Solver
from diffjax.diffusion.timesteps import EDGE, shift_time

TimeGrid = Callable[[Schedule, int], np.ndarray]


def uniform(*, start: float = 1.0, end: float = 0.0, last_step: float = 0.0) -> TimeGrid:
    """Equally spaced times.

    Args:
      start: the first time.
      end: the last.
      last_step: the size of the last step, if it is not to be that of the others (SiT's SDE: 0.04).
    """
    _require(
        1.0 >= start > end + last_step >= end >= 0.0,
        "expected 1 >= start > end + last_step >= end >= 0, not "
        f"start {start}, end {end}, last_step {last_step}",
    )
    if not last_step:
        return lambda schedule, num_steps: np.linspace(start, end, _positive(num_steps) + 1)
    return lambda schedule, num_steps: np.append(
        np.linspace(start, end + last_step, _positive(num_steps)), end
    )


def quadratic(*, start: float = 1.0, end: float = 0.0) -> TimeGrid:
    """Times whose square roots are equally spaced: finer towards the data (Song et al., 2021, DDIM)."""
    inner = uniform(start=start**0.5, end=end**0.5)
    return lambda schedule, num_steps: inner(schedule, num_steps) ** 2


def shifted(*, shift: float = 3.0, last: float = 0.0) -> TimeGrid:
    """`shift t / (1 + (shift - 1) t)` of equally spaced times (Esser et al., 2024).

    FLUX's dynamic shift is `exp(mu)`, with mu from `diffjax.diffusion.timesteps.dynamic_mu`.

    Args:
      shift: above 1 for more steps near t = 1.
      last: the time, before it is shifted, from which the last step goes to 0; by default the equally spaced
        one. diffusers shifts 1e-3 once too often: `last = shift_time(1e-3, shift)` is what it does.
    """
    _require(shift > 0.0 and 0.0 <= last < 1.0, f"expected shift > 0 and 0 <= last < 1, not {shift}, {last}")

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        return np.asarray(shift_time(uniform(last_step=last)(schedule, num_steps), shift))

    return grid


def trailing(*, train_steps: int = 1000) -> TimeGrid:
    """Every (T / num_steps)-th step of a discrete process counted from the last, then the clean image.

    The spacing that Lin et al. (2024) advise: it begins at t = 1.
    """

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        stride = train_steps / _positive(num_steps)
        return np.append(np.round(np.arange(train_steps, 0, -stride)[:num_steps]) / train_steps, 0.0)

    return grid


def leading(*, train_steps: int = 1000, offset: int = 0, last: int = 0, spare: int = 0) -> TimeGrid:
    """Every (T // num_steps)-th step of a discrete process counted from the first (DDPM's and DDIM's own).

    Args:
      train_steps: T.
      offset: added to the step numbers (Stable Diffusion: 1).
      last: the step at which sampling ends: 0 is the clean image, 1 the least noisy step.
      spare: how many of the least noisy steps are left out (diffusers' multistep solvers: 1).
    """

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        _require(
            0 < num_steps <= train_steps - offset - spare,
            f"num_steps is {num_steps}; the process has {train_steps}",
        )
        stride = train_steps // (num_steps + spare)
        steps = np.arange(spare, num_steps + spare)[::-1] * stride + offset + 1
        return check_times(np.append(steps, last) / train_steps)

    return grid


def linspace(*, train_steps: int = 1000, rounded: bool = False, spare: int = 0) -> TimeGrid:
    """Equally spaced from the last step of a discrete process to its first, then the clean image.

    Args:
      train_steps: T.
      rounded: whether only whole steps are visited.
      spare: how many of the least noisy are left out (diffusers' multistep solvers: 1, rounded).
    """

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        # Rounded from the other end, as those whose steps count from zero do.
        steps = np.linspace(train_steps, 1.0, _positive(num_steps) + spare)[:num_steps]
        return np.append(np.round(steps - 1.0) + 1.0 if rounded else steps, 0.0) / train_steps

    return grid


def karras(
    *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, to_zero: bool = True
) -> TimeGrid:
    """`sigma^(1 / rho)` equally spaced (Karras et al., 2022, equation 5), where sigma is sigma / alpha.

    Args:
      sigma_min: the least noise.
      sigma_max: the noise that sampling starts from.
      rho: 1 is uniform; larger is finer towards the data.
      to_zero: whether a last step goes to t = 0.
    """
    _require_range(sigma_min, sigma_max)
    return lambda schedule, num_steps: _from_sigmas(
        schedule, lambda count: _rho_spaced(sigma_max, sigma_min, count, rho), num_steps, to_zero
    )


def exponential(
    *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 1.0, to_zero: bool = True
) -> TimeGrid:
    """log(sigma / alpha) equally spaced between two noise levels; arguments as of `karras`.

    A rho other than 1 is k-diffusion's "polyexponential": the steps' places are raised to that power.
    """
    _require_range(sigma_min, sigma_max)

    def sigmas(count: int) -> np.ndarray:
        return sigma_min * (sigma_max / sigma_min) ** (np.linspace(1.0, 0.0, count) ** rho)

    return lambda schedule, num_steps: _from_sigmas(schedule, sigmas, num_steps, to_zero)


def restart(
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    restart_min: float = 0.3,
    restart_max: float = 10.0,
    restart_steps: int = 5,
    repeats: int = 2,
) -> TimeGrid:
    """The `karras` grid that, once below `restart_min`, goes back to `restart_max` (Xu et al., 2023).

    It rises, so it needs a solver for such grids: "restart".

    Args:
      sigma_min: the least noise, as of `karras`.
      sigma_max: the noise that sampling starts from.
      rho: as of `karras`.
      restart_min: the noise level sigma / alpha from which a restart goes back; the grid's next one is taken.
      restart_max: the level to which noise is added.
      restart_steps: the number of steps down again.
      repeats: the number of restarts.
    """
    _require(
        sigma_min <= restart_min < restart_max <= sigma_max and restart_steps >= 1 and repeats >= 0,
        "expected sigma_min <= restart_min < restart_max <= sigma_max and at least one step, not "
        f"{sigma_min}, {restart_min}, {restart_max}, {sigma_max}, {restart_steps}",
    )

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        main = _rho_spaced(sigma_max, sigma_min, _positive(num_steps), rho)
        until = int(np.argmin(np.where(main >= restart_min, main, np.inf))) + 1
        again = _rho_spaced(restart_max, main[until - 1], restart_steps + 1, rho)
        sigmas = np.concatenate([main[:until], np.tile(again, repeats), main[until:], [0.0]])
        return check_times(times_at_sigmas(schedule, sigmas), rising=True)

    return grid


def _rho_spaced(start: float, end: float, count: int, rho: float) -> np.ndarray:
    return np.linspace(start ** (1.0 / rho), end ** (1.0 / rho), count) ** rho


def uniform_logsnr(*, limit: float = 12.0) -> TimeGrid:
    """Equally spaced in log-SNR (Lu et al., 2022), over the times that training visits.

    Args:
      limit: where the range reaches beyond +-limit, it is cut.
    """

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        low, high = (float(np.clip(level, -limit, limit)) for level in _levels(schedule, [1.0 - EDGE, EDGE]))
        return check_times(_times_at(schedule, np.linspace(low, high, _positive(num_steps) + 1)))

    return grid


def explicit(*, times: Sequence[float]) -> TimeGrid:
    """A list of times of one's own, whatever the number of steps."""
    return lambda schedule, num_steps: check_times(np.asarray(times, np.float64))


def explicit_sigmas(*, sigmas: Sequence[float]) -> TimeGrid:
    """A list of noise levels sigma / alpha of one's own; a last zero is t = 0."""

    def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
        return check_times(times_at_sigmas(schedule, np.asarray(sigmas, np.float64)))

    return grid


TIME_GRIDS: dict[str, Callable[..., TimeGrid]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "shifted": shifted,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "restart": restart,
    "uniform_logsnr": uniform_logsnr,
    "explicit": explicit,
    "explicit_sigmas": explicit_sigmas,
}


def times_at_sigmas(schedule: Schedule, sigmas: np.ndarray) -> np.ndarray:
    """The times at which a schedule has the given sigma / alpha; zero is t = 0."""
    with np.errstate(divide="ignore"):
        times = _times_at(schedule, -2.0 * np.log(sigmas))
    return np.where(np.asarray(sigmas) == 0.0, 0.0, times)


def check_times(times: np.ndarray, *, rising: bool = False) -> np.ndarray:
    """Return a time grid if it is one.

    Args:
      times: the times.
      rising: whether steps up are allowed (restarts) or the grid runs from data to noise (inversion).

    Raises:
      ValueError: the times do not lie in [0, 1], or do not decrease.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2 or not np.isfinite(times).all():
        raise ValueError(f"a time grid needs at least two finite times, not {times}")
    if times.min() < 0.0 or times.max() > 1.0:
        raise ValueError(f"times must lie in [0, 1], not [{times.min():g}, {times.max():g}]")
    steps = np.diff(times)
    if (steps == 0.0).any() or (not rising and (steps > 0.0).any()):
        at = int(np.argmax(steps == 0.0 if rising else steps >= 0.0))
        raise ValueError(f"times must decrease, but {times[at]:g} is followed by {times[at + 1]:g}")
    return times


def check_grid(times: np.ndarray, schedule: Schedule, prediction: Prediction, solver: Solver) -> np.ndarray:
    """Return a time grid if a solver can go through it with a network of this prediction.

    Raises:
      ValueError: the times are no grid, or at one of those at which the network is evaluated its prediction
        says nothing of the data or of the noise.
    """
    times = check_times(times, rising=solver.rises)
    evaluated = times if solver.at_end else times[:-1]
    with jax.ensure_compile_time_eval():
        coeffs = schedule(jnp.asarray(evaluated, jnp.float32))
        sizes = np.abs(np.asarray(determinant(prediction(coeffs), coeffs)))
    bad = ~np.isfinite(sizes) | (sizes == 0.0)
    if bad.any():
        raise ValueError(
            f"the prediction is singular at t = {evaluated[bad][0]:g}, where the time grid evaluates it: it "
            "does not determine the data there. Predict v or velocity, or keep the grid away from that end."
        )
    return times


def _levels(schedule: Schedule, times: Sequence[float]) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(logsnr(schedule(jnp.asarray(times, jnp.float32))))


def _times_at(schedule: Schedule, levels: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(time_at(schedule, jnp.asarray(levels, jnp.float32)), np.float64)


def _from_sigmas(
    schedule: Schedule, sigmas: Callable[[int], np.ndarray], num_steps: int, to_zero: bool
) -> np.ndarray:
    wanted = sigmas(_positive(num_steps) + (not to_zero))
    most = float(np.exp(-0.5 * _levels(schedule, [1.0])[0]))
    _require(
        wanted[0] <= most * (1.0 + 1e-5),
        f"sigma_max is {wanted[0]:g}; the noise level sigma / alpha of this schedule reaches {most:g} only",
    )
    times = times_at_sigmas(schedule, wanted)
    return check_times(np.append(times, 0.0) if to_zero else times)


def _positive(num_steps: int) -> int:
    _require(num_steps >= 1, f"num_steps is {num_steps}; expected at least 1")
    return num_steps


def _require_range(sigma_min: float, sigma_max: float) -> None:
    _require(
        0.0 < sigma_min < sigma_max, f"sigma_min {sigma_min} must be above 0 and below sigma_max {sigma_max}"
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
