"""Guidance: functions that make one denoiser out of others.

`guided` joins a `Pair` (how the positive and the negative are evaluated), one of `GUIDANCES` (how they are
combined) and a scale: a number, an array `[batch]` or one that broadcasts against x, or a function of t that
gives one. A negative prompt is a null condition that encodes it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from diffjax.diffusion.denoiser import Denoiser
from diffjax.diffusion.guidance_rules import Guidance, moved
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import Schedule, expand
from diffjax.diffusion.solvers.base import Solver

Condition = TypeVar("Condition")
Scale = float | jax.Array | Callable[[jax.Array], jax.Array]


class Pair(NamedTuple):
    """What guidance leads to and what it leads away from, as `(x, t) -> (positive, negative)`."""

    both: Callable[[jax.Array, jax.Array], tuple[Estimate, Estimate]]
    positive: Denoiser


def one_batch(denoiser_of: Callable[[Condition], Denoiser], cond: Condition, null_cond: Condition) -> Pair:
    """Both passes of one network as one batch of twice the size.

    Args:
      denoiser_of: binds a condition, a pytree of arrays `[batch, …]`, to the network.
      cond: the condition.
      null_cond: the null condition, of the same structure and shapes.
    """
    every = _batched(denoiser_of, (cond, null_cond))

    def both(x: jax.Array, t: jax.Array) -> tuple[Estimate, Estimate]:
        positive, negative = every(x, t)
        return positive, negative

    return Pair(both, denoiser_of(cond))


def in_turn(positive: Denoiser, negative: Denoiser) -> Pair:
    """One pass after the other: less memory, and two networks may be used.

    With a smaller or less trained network as the negative it is autoguidance (Karras et al., 2024).
    """
    return Pair(lambda x, t: (positive(x, t), negative(x, t)), positive)


def guided(
    pair: Pair,
    guidance: Guidance,
    schedule: Schedule,
    guidance_scale: Scale,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:
    """The guided denoiser.

    A scale of 1 is off and 0 is the negative, as in Imagen and diffusers; the w of Ho and Salimans (2022) is
    `guidance_scale - 1`. A Python number at which it is off leaves out the negative pass; a traced scale can
    change without compiling anew.

    Args:
      pair: the two denoisers.
      guidance: how they are combined.
      schedule: the noise schedule.
      guidance_scale: see above and the top of this file.
      interval: the times between which there is guidance (Kynkäänniemi et al., 2024); outside, the positive
        alone is evaluated.
    """
    low, high = interval
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"interval is {interval}; expected (low, high) with 0 <= low < high <= 1")
    if isinstance(guidance_scale, int | float) and guidance_scale == guidance.off_at:
        return pair.positive

    def everywhere(x: jax.Array, t: jax.Array) -> tuple[Estimate, Estimate]:
        positive, negative = pair.both(x, t)
        return positive, guidance.rule(positive, negative, expand(schedule(t), x), wide(guidance_scale, x, t))

    def within(x: jax.Array, t: jax.Array) -> Estimate:
        inside = (low <= t) & (t <= high)

        def some(x: jax.Array, t: jax.Array) -> Estimate:
            # The times of a batch may differ.
            return jax.tree.map(lambda p, g: jnp.where(wide(inside, x, t), g, p), *everywhere(x, t))

        return jax.lax.cond(inside.any(), some, pair.positive, x, t)

    return within if (low, high) != (0.0, 1.0) else lambda x, t: everywhere(x, t)[1]


def linear_in_time(*, low: float = 1.0, high: float = 2.0) -> Scale:
    """A scale that rises linearly from `low` at the noise to `high` at the data (Wang et al., 2024)."""
    return lambda t: low + (high - low) * (1.0 - t)


def cosine_in_time(*, low: float = 1.0, high: float = 2.0, power: float = 1.0) -> Scale:
    """`low + (high - low) (1 - cos(pi (1 - t)^power)) / 2` (Wang et al., 2024).

    A power above 1 lets the scale rise late (MDT uses 4; Gao et al., 2023).
    """
    if not power > 0.0:
        raise ValueError(f"power is {power}; expected more than 0")
    return lambda t: low + (high - low) * jnp.sin(0.5 * jnp.pi * (1.0 - t) ** power) ** 2


SCALES: dict[str, Callable[..., Scale]] = {"linear": linear_in_time, "cosine": cosine_in_time}


def over_frames(low: float, high: float, frames: int) -> jax.Array:
    """A scale that rises linearly over the frames of videos `[batch, frames, height, width, channels]`.

    Stable Video Diffusion (Blattmann et al., 2023) goes from 1 to 3.
    """
    return jnp.linspace(low, high, frames).reshape(1, frames, 1, 1, 1)


def several(
    denoiser_of: Callable[[Condition], Denoiser],
    null_cond: Condition,
    conds: Sequence[Condition],
    scales: Sequence[Scale],
    *,
    chained: bool = False,
) -> Denoiser:
    """Several conditions with a scale each: `null + sum_k scale_k (cond_k - null)` (Liu et al., 2022).

    Args:
      denoiser_of: binds a condition to the network.
      null_cond: the null condition.
      conds: the conditions, of its structure and shapes; all passes run as one batch.
      scales: a scale for each.
      chained: whether to compare each with the one before it: the image, then the image with the text, in
        InstructPix2Pix (Brooks et al., 2023).
    """
    if not conds or len(conds) != len(scales):
        raise ValueError(f"{len(conds)} conds, {len(scales)} scales; expected a scale for each")
    every = _batched(denoiser_of, (null_cond, *conds))

    def denoise(x: jax.Array, t: jax.Array) -> Estimate:
        null, *others = every(x, t)
        bases = [null, *others[:-1]] if chained else [null] * len(others)
        x0, eps = null.x0, null.eps
        for scale, cond, base in zip(scales, others, bases, strict=True):
            by = wide(scale, x, t)
            x0, eps = x0 + by * (cond.x0 - base.x0), eps + by * (cond.eps - base.eps)
        return Estimate(x0, eps, others[-1].fraction)

    return denoise


def with_momentum(
    solver: Solver, pair: Pair, denoiser_of: Callable[[Pair], Denoiser], *, momentum: float = -0.5
) -> Solver:
    """A solver that guides along a running sum of differences, `d <- positive - negative + momentum d` (APG).

    d is a difference of x0, remembered from step to step. The sampler's own denoiser is not used.

    Args:
      solver: the solver; of several evaluations in a step, the first is remembered.
      pair: the two denoisers.
      denoiser_of: makes the denoiser: `lambda pair: guided(pair, apg(), schedule, 4.0)`; without an interval.
      momentum: of the former d; negative in the paper.
    """

    def init(x: jax.Array, times: jax.Array) -> Any:
        return solver.init(x, times), jnp.zeros_like(x)

    def step(denoise, schedule, x, t, s, keys, carry):
        inner, former = carry
        sums: list[jax.Array] = []

        def both(x: jax.Array, t: jax.Array) -> tuple[Estimate, Estimate]:
            positive, negative = pair.both(x, t)
            coeffs = expand(schedule(t), x)
            # Moving the negative, rather than the difference, serves every rule.
            negative = moved(negative, coeffs, -momentum * former / coeffs.sigma)
            sums.append(positive.x0 - negative.x0)
            return positive, negative

        x, inner = solver.step(denoiser_of(Pair(both, pair.positive)), schedule, x, t, s, keys, inner)
        return x, (inner, sums[0] if sums else former)

    return solver._replace(init=init, step=step)


def modulate(pooled: jax.Array, positive: jax.Array, negative: jax.Array, w: float | jax.Array) -> jax.Array:
    """Modulation guidance: `pooled + w (positive - negative)`, of the pooled embeddings that modulate layers.

    It takes no second pass.
    """
    return pooled + w * (positive - negative)


def wide(scale: Scale, x: jax.Array, t: jax.Array) -> jax.Array:
    """A scale as an array that broadcasts against x."""
    scale = jnp.asarray(scale(t) if callable(scale) else scale)
    return scale.reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim == 1 else scale


def _batched(
    denoiser_of: Callable[[Condition], Denoiser], conds: Sequence[Condition]
) -> Callable[[jax.Array, jax.Array], list[Estimate]]:
    """Evaluate all conditions as one batch."""
    denoise = denoiser_of(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conds))

    def every(x: jax.Array, t: jax.Array) -> list[Estimate]:
        joint = denoise(*(jnp.concatenate([a] * len(conds)) for a in (x, t)))
        parts = jax.tree.map(lambda e: e.reshape(len(conds), *x.shape), joint)
        return [jax.tree.map(lambda e, i=i: e[i], parts) for i in range(len(conds))]

    return every
