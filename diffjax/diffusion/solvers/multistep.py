"""DPM-Solver++ and DPM-Solver, multistep, for the probability-flow ODE and for the reverse SDE."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from diffjax.diffusion import noise
from diffjax.diffusion.solvers.base import Solver, evaluate, half_logsnr
from diffjax.diffusion.solvers.history import (
    History,
    check_order,
    combine,
    exponential_moments,
    extend,
    lagrange_weights,
    new_history,
    usable_order,
)

_FEW_STEPS = 15  # below which the last steps fall back to lower orders


def exponential(
    order: int,
    moments: Callable[[jax.Array], Sequence[Sequence[jax.Array]]],
    *,
    of: str = "x0",
    eta: float = 0.0,
    inflate: float = 1.0,
    lower_order_final: bool = True,
) -> Solver:
    """A multistep exponential integrator in lambda.

    The last step to sigma = 0 is always of first order, and so is one that is far longer than the one before.
    A step of first order is `alpha_s x0 + exp(-eta h) sigma_s eps + sigma_s sqrt(1 - exp(-2 eta h)) z`.

    Args:
      order: how many estimates a step uses.
      moments: `h -> rows`, the moments of a step of each order up to `order`.
      of: what the polynomial runs through, "x0" or "eps" (which asks for eta = 0).
      eta: how much of the noise is drawn anew; 1 is the reverse SDE.
      inflate: the standard deviation of that noise.
      lower_order_final: whether the last two of fewer than 15 steps are of lower order.
    """

    def init(x: jax.Array, times: jax.Array) -> History:
        return new_history(x, times, order - 1, lower=lower_order_final and len(times) - 1 < _FEW_STEPS)

    def step(denoise, schedule, x, t, s, keys, history):
        estimate, now, then = evaluate(denoise, x, t), schedule(t), schedule(s)
        level = half_logsnr(now)
        h = half_logsnr(then) - level
        m0, gain, pace = estimate.x0, then.alpha, (1.0 + eta) * h
        if of == "eps":
            m0, gain, pace = estimate.eps, then.sigma, -h
        nodes = [(old - level) / h for old in history.levels]
        rows = [lagrange_weights((0.0, *nodes[:i]), row)[1:] for i, row in enumerate(moments(pace))]
        change = combine(rows, usable_order(history, order, then, level, h), history.values, m0)
        kept = jnp.exp(-eta * h) if eta else 1.0
        x = then.alpha * estimate.x0 + kept * then.sigma * estimate.eps + gain * change
        if eta:
            drawn = then.sigma * jnp.sqrt(-jnp.expm1(-2.0 * eta * h))
            x = x + inflate * drawn * noise.normal_like(keys, x)
        return x, extend(history, level, m0)

    return Solver(init, step, order=None if eta else min(order, 2))


def dpm_multistep(
    *,
    order: int = 2,
    variant: str = "midpoint",
    of: str = "x0",
    eta: float = 0.0,
    inflate: float = 1.0,
    lower_order_final: bool = True,
) -> Solver:
    """DPM-Solver++ (Lu et al., 2022b), multistep: one evaluation a step, and the steps before.

    With `h = lambda_s - lambda_t`, and D1, D2 the divided differences of the latest estimates in units of h,

        x_s = sigma_s / sigma_t x_t + alpha_s (E0 x0 + E1 D1 + E2 D2 / 2),
        E0 = 1 - exp(-h), E1 = 1 - E0 / h, E2 = 1 - 2 E1 / h.

    The half of E2 is the authors' and everyone's; the whole would be Adams-Bashforth's (see `unipc`).

    Args:
      order: how many estimates a step uses, 1 to 3.
      variant: of second-order steps: "midpoint" has E0 / 2 for E1, "heun" has E1.
      of: what is interpolated: "x0" (DPM-Solver++) or "eps" (DPM-Solver).
      eta: how much of the noise is drawn anew at each step: 0 for the ODE, 1 for the reverse SDE.
      inflate: the standard deviation of that noise.
      lower_order_final: whether the last two of fewer than 15 steps are of lower order; one that ends at
        sigma = 0, or is far longer than the one before, is of first order in any case.
    """
    check_order(order, 3)
    if variant not in ("midpoint", "heun"):
        raise ValueError(f"variant is {variant!r}; expected 'midpoint' or 'heun'")
    if of not in ("x0", "eps") or (of == "eps" and eta):
        raise ValueError(f"of is {of!r} and eta {eta}; expected 'x0', or 'eps' with eta 0")
    if not eta >= 0.0:
        raise ValueError(f"eta is {eta}; expected at least 0")

    def moments(h: jax.Array) -> list[list[jax.Array]]:
        e0, e1, e2 = exponential_moments(h, 3)
        return [[e0], [e0, 0.5 * e0 if variant == "midpoint" else e1], [e0, e1, 0.5 * e2]][:order]

    return exponential(order, moments, of=of, eta=eta, inflate=inflate, lower_order_final=lower_order_final)


def dpmpp_2m(*, variant: str = "midpoint", lower_order_final: bool = True) -> Solver:
    """DPM-Solver++(2M), the usual choice for guided sampling in 15 to 25 steps; see `dpm_multistep`."""
    return dpm_multistep(variant=variant, lower_order_final=lower_order_final)


def dpmpp_3m(*, variant: str = "midpoint", lower_order_final: bool = True) -> Solver:
    """DPM-Solver++(3M), for unguided sampling; see `dpm_multistep`."""
    return dpm_multistep(order=3, variant=variant, lower_order_final=lower_order_final)


def dpmpp_2m_sde(*, variant: str = "midpoint", eta: float = 1.0, inflate: float = 1.0) -> Solver:
    """DPM-Solver++(2M) for the reverse SDE, as in k-diffusion; see `dpm_multistep`."""
    return dpm_multistep(variant=variant, eta=eta, inflate=inflate, lower_order_final=False)


def dpmpp_3m_sde(*, variant: str = "heun", eta: float = 1.0, inflate: float = 1.0) -> Solver:
    """DPM-Solver++(3M) for the reverse SDE, as in k-diffusion; see `dpm_multistep`."""
    return dpm_multistep(order=3, variant=variant, eta=eta, inflate=inflate, lower_order_final=False)


SOLVERS: dict[str, Callable[..., Solver]] = {
    "dpm_multistep": dpm_multistep,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}
