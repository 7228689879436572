"""How probable a model finds an image: by the probability-flow ODE, or by the variational bound."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion import noise
from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.grids import check_times
from diffjax.diffusion.learned_variance import Decoder, discretized_gaussian_nll, gaussian_kl, vlb_term
from diffjax.diffusion.schedules import Coeffs, Schedule, corrupt, time_at
from diffjax.diffusion.solvers.base import evaluate
from diffjax.diffusion.solvers.runge_kutta import TABLEAUS

Divergence = Callable[[jax.Array, jax.Array], jax.Array]
"""`(keys, x) -> probes [number, *x.shape]`: the divergence is the sum over them of `probe . J probe`."""


def exact() -> Divergence:
    """The trace itself, one directional derivative for each dimension of an image: for small images."""

    def probes(keys: jax.Array, x: jax.Array) -> jax.Array:
        basis = jnp.eye(math.prod(x.shape[1:]), dtype=x.dtype)
        return jnp.broadcast_to(basis.reshape(-1, 1, *x.shape[1:]), (len(basis), *x.shape))

    return probes


def hutchinson(*, num_probes: int = 1, gaussian: bool = False) -> Divergence:
    """Hutchinson's unbiased estimate (Grathwohl et al., 2019), with the same probes along the trajectory.

    Args:
      num_probes: directional derivatives per evaluation; each example has probes of its own.
      gaussian: whether they are normal rather than signs, whose variance is lower.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}; expected at least 1")

    def probes(keys: jax.Array, x: jax.Array) -> jax.Array:
        normal = jnp.stack([noise.normal_like(keys, x, draw=k) for k in range(num_probes)])
        return (normal if gaussian else jnp.where(normal < 0.0, -1.0, 1.0)) / math.sqrt(num_probes)

    return probes


DIVERGENCES: dict[str, Callable[..., Divergence]] = {"exact": exact, "hutchinson": hutchinson}

_EXACT = exact()


def log_likelihood(
    denoise: Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    keys: jax.Array,
    times: np.ndarray | jax.Array,
    divergence: Divergence = _EXACT,
    method: str = "rk4",
    variable: str = "angle",
) -> jax.Array:
    """`log p(x0)` in nats, `[batch]`, of what the probability-flow ODE generates (Song et al., 2021).

    `log p(x at s) = log p(x at t) + integral of the divergence from s to t`, by a Runge-Kutta method. In
    "angle" it is solved for `y = x / r` in the angle u, where `alpha = r cos(u)`, `sigma = r sin(u)`: then
    `dy/du = cos(u) eps - sin(u) x0`, which is finite at exact ends too, for every schedule. In "time" it is
    the velocity of x, as in flow matching.

    Args:
      denoise: the denoiser.
      schedule: the noise schedule.
      x0: images, `[batch, …]`. A density is of continuous data: add uniform noise to 8-bit images first.
      keys: a key for each example, for the probes.
      times: the times of a sampler, decreasing, `[num_steps + 1]`; they are run through backwards. The last
        is t = 0, or a little more where the denoiser is singular there; at the first x must be pure noise.
      divergence: the trace, or an estimate of it.
      method: a name of `solvers.runge_kutta.TABLEAUS`.
      variable: "angle" or "time".
    """
    if method not in TABLEAUS or variable not in ("angle", "time"):
        raise ValueError(
            f"method is {method!r}, variable {variable!r}; expected one of {', '.join(TABLEAUS)}, and "
            "'angle' or 'time'"
        )
    if not isinstance(times, jax.core.Tracer):
        check_times(np.asarray(times, np.float32))
    times = jnp.asarray(times, jnp.float32)[::-1]
    probes, inner = divergence(keys, x0), tuple(range(1, x0.ndim))
    tableau = TABLEAUS[method]
    nodes = jnp.asarray(tableau.nodes)
    rows = jnp.asarray([[*row, *[0.0] * (len(nodes) - len(row))] for row in tableau.stages])

    def scaled(t: jax.Array) -> tuple[Coeffs, jax.Array]:
        """The coefficients relative to the size that is taken out of x, and that size."""
        coeffs = schedule(t)
        size = jnp.hypot(coeffs.alpha, coeffs.sigma) if variable == "angle" else jnp.ones_like(t)
        return jax.tree.map(lambda part: part / size, coeffs), size

    if variable == "angle":
        ends = jnp.arctan2(schedule(times).sigma, schedule(times).alpha)
        between = ends[:-1, None] + jnp.diff(ends)[:, None] * nodes
        stages = time_at(schedule, -2.0 * jnp.log(jnp.tan(between)))
        stages = jnp.where(nodes == 0.0, times[:-1, None], jnp.where(nodes == 1.0, times[1:, None], stages))
    else:
        ends, stages = times, times[:-1, None] + jnp.diff(times)[:, None] * nodes

    def slopes(y: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        now, size = scaled(t)

        def speed(y: jax.Array) -> jax.Array:
            estimate = evaluate(denoise, size * y, t)
            if variable == "angle":
                return now.alpha * estimate.eps - now.sigma * estimate.x0
            return now.d_alpha * estimate.x0 + now.d_sigma * estimate.eps

        along = jax.vmap(lambda probe: jax.jvp(speed, (y,), (probe,)), out_axes=(None, 0))
        slope, slope_along = along(probes)
        return slope, jnp.sum(probes * slope_along, axis=(0, *range(2, probes.ndim)))

    def step(state, now):
        y, total = state
        stage_times, width = now

        def stage(known, now):
            number, row, t = now
            slope, trace = slopes(y + width * jnp.tensordot(row, known, axes=1), t)
            return known.at[number].set(slope), trace

        blank = jnp.zeros((len(nodes), *y.shape))
        known, traces = jax.lax.scan(stage, blank, (jnp.arange(len(nodes)), rows, stage_times))
        weights = width * jnp.asarray(tableau.weights)
        return (y + jnp.tensordot(weights, known, axes=1), total + weights @ traces), None

    (first, _), (last, _) = scaled(times[0]), scaled(times[-1])
    start = (first.alpha * x0, jnp.zeros(x0.shape[0]))
    (y, total), _ = jax.lax.scan(step, start, (stages, jnp.diff(ends)))
    prior = jax.scipy.stats.norm.logpdf(y, scale=last.sigma).sum(axis=inner)
    return prior + total + math.prod(x0.shape[1:]) * jnp.log(first.alpha)


def bits_per_dim(log_likelihood: jax.Array, size: int) -> jax.Array:
    """`-log2 p / size + log2(127.5)`: nats for data in [-1, 1] as bits per dimension of 8-bit images.

    Args:
      log_likelihood: in nats, of a whole image.
      size: the number of dimensions, height x width x channels.
    """
    return -log_likelihood / (size * math.log(2.0)) + math.log2(127.5)


class Bound(NamedTuple):
    """A bound in bits per dimension, `[batch]`: `total = prior + sum(terms)`, terms `[num_steps, batch]`."""

    total: jax.Array
    prior: jax.Array
    terms: jax.Array


def variational_bound(
    denoise: Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    keys: jax.Array,
    num_steps: int = 1000,
    decoder: Decoder = discretized_gaussian_nll,
) -> Bound:
    """The bound of a chain of `num_steps` equal steps, with one draw for each (Ho et al., 2020, eq. 5).

    Args:
      denoise: the denoiser; where its estimates have a fraction, that is the variance.
      schedule: the noise schedule; sampling starts from its sigma(1).
      x0: images, `[batch, …]`: the values of 8-bit images in [-1, 1], unless the decoder is another.
      keys: a key for each example.
      num_steps: the steps, one evaluation each.
      decoder: `discretized_gaussian_nll`, or `gaussian_nll` for continuous data, with which the bound is one
        on the density (`log2(127.5)` is to be added, as in `bits_per_dim`).
    """

    def term(_: None, step: jax.Array) -> tuple[None, jax.Array]:
        t, s = step / num_steps, (step - 1.0) / num_steps
        draws = jax.vmap(lambda key: jax.random.fold_in(key, step.astype(int)))(keys)
        x = corrupt(schedule, x0, noise.normal_like(draws, x0), jnp.broadcast_to(t, x0.shape[:1]))
        return None, vlb_term(evaluate(denoise, x, t), schedule, x0, x, t, s, decoder=decoder)

    _, terms = jax.lax.scan(term, None, jnp.arange(1.0, num_steps + 1.0))
    last = schedule(jnp.ones(()))
    spread = 2.0 * jnp.log(last.sigma)
    prior = gaussian_kl(last.alpha * x0, spread, 0.0, spread)
    prior = jnp.mean(prior, axis=tuple(range(1, x0.ndim))) / math.log(2.0)
    return Bound(prior + jnp.sum(terms, axis=0), prior, terms)
