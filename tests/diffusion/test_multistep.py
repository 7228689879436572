"""Against exact flows, and against the trajectories of diffusers and k-diffusion (make_multistep.py)."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import mixture_denoiser

from diffjax.diffusion import grids
from diffjax.diffusion import noise as noise_module
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.schedules import (
    Coeffs,
    betas,
    cosine,
    edm,
    expand,
    linear_flow,
    trigonometric,
    vp,
    widen,
)
from diffjax.diffusion.solvers import adams, multistep, unipc
from diffjax.diffusion.solvers.history import exponential_moments, lagrange_weights

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "multistep.npz"))
SOLVERS = {**multistep.SOLVERS, **adams.SOLVERS, **unipc.SOLVERS}
VARIANTS = {
    "dpm_multistep_1": multistep.dpm_multistep(order=1),
    "dpm_multistep_heun": multistep.dpm_multistep(variant="heun"),
    "dpm_multistep_eps": multistep.dpm_multistep(of="eps"),
    "plms_runge_kutta": adams.plms(start="runge_kutta"),
    "unipc_1": unipc.unipc(order=1, variant="bh1"),
    "unipc_3": unipc.unipc(order=3, lower_order_final=False),
    "unipc_uncorrected": unipc.unipc(corrector=False, lower_order_final=False),
    **{name: make() for name, make in SOLVERS.items()},
}
DETERMINISTIC = {name: solver for name, solver in VARIANTS.items() if solver.order is not None}
STOCHASTIC = {name: solver for name, solver in VARIANTS.items() if solver.order is None}
SCHEDULES = {"cosine": cosine(), "flow": linear_flow(), "vp": vp()}
MEAN, STD = 0.3, 0.5
LONGEST = 160

each = functools.partial(pytest.mark.parametrize, "solver")


def compiled(solver, schedule_of, denoiser_of):
    """`(x, times, setting) -> x at every time`, compiled once for all numbers of steps up to LONGEST."""

    @jax.jit
    def steps(x, carry, times, count, setting):
        schedule = schedule_of(setting)
        denoise = denoiser_of(setting, schedule)

        def body(i, state):
            x, carry, path = state
            x, carry = solver.step(denoise, schedule, x, times[i], times[i + 1], i, carry)
            return x, carry, path.at[i].set(x)

        return jax.lax.fori_loop(0, count, body, (x, carry, jnp.zeros((LONGEST, *x.shape), x.dtype)))[2]

    def run(x, times, setting=()):
        times = jnp.asarray(times, x.dtype)
        count = len(times) - 1
        padded = jnp.concatenate([times, jnp.zeros(LONGEST + 1 - len(times), x.dtype)])
        return steps(x, solver.init(x, times), padded, count, setting)[:count]

    return run


def mixture_flow(schedule, weights, means, std, x, t, s):
    """The exact flow: in one dimension it keeps the quantiles. By bisection."""

    def quantile(x, t):
        alpha, sigma, *_ = schedule(jnp.asarray(t))
        spread = jnp.sqrt(2.0 * (alpha**2 * std**2 + sigma**2))
        parts = jax.scipy.special.erfc((alpha * means - x[..., None]) / spread)
        return (0.5 * weights * parts).sum(-1)

    sought = quantile(x, t)

    def halve(_, bounds):
        middle = 0.5 * (bounds[0] + bounds[1])
        below = quantile(middle, s) < sought
        return jnp.where(below, middle, bounds[0]), jnp.where(below, bounds[1], middle)

    return jax.lax.fori_loop(0, 60, halve, (jnp.full_like(x, -20.0), jnp.full_like(x, 20.0)))[0]


DATA = {"gaussian": ([0.5, 0.5], [MEAN, MEAN], STD), "mixture": ([0.4, 0.6], [-0.8, 0.7], STD)}


def one_of_the_schedules(setting):
    def schedule(t):
        every = zip(*(schedule(t) for schedule in SCHEDULES.values()), strict=True)
        return Coeffs(*(jnp.stack(values)[setting[0]] for values in every))

    return schedule


@functools.cache
def exact_ends():
    """x at t = 0.9, and x at t = 0.1 for each schedule and each kind of data."""
    x = jnp.linspace(-2.0, 2.0, 9)[None]
    flow = jax.jit(lambda *args: mixture_flow(one_of_the_schedules(args), *args[1], x, 0.9, 0.1))
    data = [(jnp.asarray(weights), jnp.asarray(means), std) for weights, means, std in DATA.values()]
    settings = list(itertools.product(range(len(SCHEDULES)), data))
    return x, [(setting, flow(*setting)) for setting in settings]


@each(DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
def test_a_solver_converges_to_the_exact_flow_at_its_order(solver):
    """A solver of first-order start may converge faster at first, where the start's share is small."""
    with jax.enable_x64(True):
        x, ends = exact_ends()
        run = compiled(solver, one_of_the_schedules, lambda s, schedule: mixture_denoiser(schedule, *s[1]))
        errors = []
        for count in (LONGEST // 4, LONGEST // 2, LONGEST):
            times = np.linspace(0.9, 0.1, count + 1)
            errors.append([float(jnp.abs(run(x, times, setting)[-1] - end).mean()) for setting, end in ends])
        errors = np.square(errors).mean(axis=1) ** 0.5
        rates = np.log2(errors[:-1] / errors[1:])
        assert (rates > solver.order - 0.2).all(), (errors, rates)
        assert rates[-1] < solver.order + (1.0 if solver.order > 1 else 0.2), (errors, rates)
        assert errors[-1] < {1: 0.02, 2: 5e-4, 3: 2e-5}[solver.order]


@pytest.fixture
def replace_noise(monkeypatch):
    """Noise of each step's own; `compiled` passes the number of the step for the keys."""

    def replace(noise):
        monkeypatch.setattr(noise_module, "normal_like", lambda keys, x, draw=0: jnp.asarray(noise)[keys])

    return replace


@each(STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_a_stochastic_solver_returns_the_datas_distribution(solver, replace_noise):
    """160 steps. The standard error of a mean is 0.008, of a standard deviation 0.008 of it."""
    random = np.random.default_rng(0)
    replace_noise(random.normal(size=(160, 8192, 1)).astype(np.float32))
    run = compiled(solver, lambda _: cosine(), lambda setting, schedule: mixture_denoiser(schedule, *setting))
    x, times = random.normal(size=(8192, 1)), grids.uniform_logsnr()(cosine(), 160)
    for weights, means, std in DATA.values():
        setting = jnp.asarray(weights), jnp.asarray(means), std
        found = np.asarray(run(jnp.asarray(x, jnp.float32), times, setting)[-1])[:, 0]
        drawn = random.choice(means, p=weights, size=200_000) + std * random.normal(size=200_000)
        np.testing.assert_allclose(found.mean(), drawn.mean(), atol=0.02)
        np.testing.assert_allclose(found.std() / drawn.std(), 1.0, atol=0.02)
        shares = np.linspace(0.01, 0.99, 99)
        distance = np.abs(np.quantile(found, shares) - np.quantile(drawn, shares)).mean()
        assert distance < 0.02  # Wasserstein's


def eps_of(x, alpha, sigma):
    """What the golden trajectories' network says."""
    scale = jnp.sqrt(alpha**2 + sigma**2)
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) + 0.1 * jnp.tanh(2.0 * x / scale)


def golden_denoiser(setting, schedule):
    def denoise(x, t):
        alpha, sigma, *_ = expand(schedule(t), x)
        eps = eps_of(x, alpha, sigma)
        return Estimate((x - sigma * eps) / alpha, eps)

    return denoise


def of_diffusers(family, settings):
    """The solver of the golden cases of that name."""
    if family == "lms":
        return adams.lms(order=int(settings))
    if family == "plms":
        return adams.plms(start=settings)
    if family == "deis":
        return adams.deis(order=int(settings))
    order, variant, *corrector = settings.split("-")
    if family.startswith("unipc"):
        return unipc.unipc(
            order=int(order),
            variant=variant,
            corrector=corrector == ["True"],
            lower_order_final=family != "unipc-full",
        )
    of = "eps" if family == "dpm" else "x0"
    return multistep.dpm_multistep(order=int(order), variant=variant, of=of, eta=float(family == "sde"))


SCALED_LINEAR = betas.ddpm(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
SIGMA_MIN = ("dpm", "dpmpp-min", "unipc-min", "unipc-full", "deis")  # end at the least noisy step
CASES = [name.removesuffix("/path") for name in GOLDEN if name.endswith("/path")]
FAMILIES = sorted({tuple(name.split("/")[1:3]) for name in CASES})


def diffusers_times(family, spacing, timesteps, count):
    """Step number i of diffusers, counted from zero, is t = (i + 1) / 1000."""
    if spacing == "trailing":
        return grids.trailing()(SCALED_LINEAR, count)
    if family == "lms":
        return grids.linspace()(SCALED_LINEAR, count)
    if family == "plms":
        return grids.leading(offset=1, last=1)(SCALED_LINEAR, count)
    last = 1 / 1000 if family in SIGMA_MIN else 0.0
    return np.append((timesteps + 1.0) / 1000, last)


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=["-".join(family) for family in FAMILIES])
def test_trajectories_agree_with_diffusers(family, settings, replace_noise):
    replace_noise(GOLDEN["noise"])
    run = compiled(of_diffusers(family, settings), lambda _: SCALED_LINEAR, golden_denoiser)
    for case in [name for name in CASES if name.startswith(f"diffusers/{family}/{settings}/")]:
        what, count = case.split("/")[3:]
        times = diffusers_times(family, what.split("-")[1], GOLDEN[f"{case}/timesteps"], int(count))
        path = run(jnp.asarray(GOLDEN["start"]), times)
        recorded = GOLDEN[f"{case}/path"]
        if settings == "runge_kutta":
            recorded = recorded[-3:]  # before, its inner steps are among them
        # DEIS of third order: diffusers computes the weights as differences of large numbers, in float32.
        tolerance = 1e-4 if (family, settings) == ("deis", "3") else 1e-5
        np.testing.assert_allclose(
            path[-len(recorded) :], recorded, rtol=tolerance, atol=tolerance, err_msg=case
        )


K_DIFFUSION = [name.split("/")[1] for name in GOLDEN if name.startswith("kdiffusion/")]
K_DIFFUSION.remove("sigmas")


@pytest.mark.parametrize("name", K_DIFFUSION)
def test_samplers_agree_with_k_diffusion(name, replace_noise):
    replace_noise(GOLDEN["noise"])
    what, *settings = name.split("-")
    if what == "lms":
        solver = adams.lms(order=int(settings[0]))
    elif what == "dpmpp_2m":
        solver = multistep.dpmpp_2m(lower_order_final=False)
    elif settings == ["inflated"]:
        solver = multistep.dpmpp_3m_sde(inflate=1.1)
    else:
        solver = SOLVERS[what](variant=settings[0], eta=float(settings[1]))
    schedule, sigmas = edm(), GOLDEN["kdiffusion/sigmas"]
    run = compiled(solver, lambda _: schedule, golden_denoiser)
    times = grids.explicit_sigmas(sigmas=sigmas)(schedule, 10)
    found = run(jnp.asarray(GOLDEN["start"]) * sigmas[0], times)[-1]
    np.testing.assert_allclose(found, GOLDEN[f"kdiffusion/{name}"], rtol=1e-5, atol=1e-5)


# What the others do is among what these do.
LARGEST = [
    make() for name, make in SOLVERS.items() if name not in ("dpm_multistep", "dpmpp_2m", "dpmpp_2m_sde")
]


@each([*LARGEST, multistep.dpm_multistep(order=3, of="eps")])
def test_exact_ends_give_finite_samples_and_gradients(solver, replace_noise):
    """No signal at t = 1 and no noise at t = 0: the last step returns the estimate of the data."""
    replace_noise(np.ones((6, 2, 3), np.float32))
    schedule, known = trigonometric(), jnp.array([[0.3, -0.2, 0.9], [0.5, 0.1, -0.7]])

    def final(x, times, shift):
        def denoise(x, t):
            alpha, sigma, *_ = expand(schedule(t), x)
            return Estimate(shift * known, (x - alpha * shift * known) / sigma)

        def body(state, now):
            return solver.step(denoise, schedule, state[0], now[0], now[1], now[2], state[1]), None

        steps = times[:-1], times[1:], jnp.arange(6)
        x, _ = jax.lax.scan(body, (x, solver.init(x, times)), steps)[0]
        return x.sum(), x

    start, times = jnp.ones((2, 3)), jnp.linspace(1.0, 0.0, 7)
    grad = jax.jit(jax.value_and_grad(final, argnums=(0, 1, 2), has_aux=True))
    (_, found), slopes = grad(start, times, 1.0)
    np.testing.assert_allclose(found, known, atol=1e-5)
    assert all(np.isfinite(slope).all() for slope in slopes)
    np.testing.assert_allclose(slopes[2], known.sum(), atol=1e-4)


@pytest.mark.parametrize("count", [12, 25, 50])
@each([multistep.dpmpp_2m(), multistep.dpmpp_3m(), adams.deis(), unipc.unipc(lower_order_final=False)])
def test_the_long_last_step_does_not_multiply_the_networks_errors(solver, count):
    """On a uniform grid the last step of the cosine schedule is ten times as long as the one before."""
    error = 0.01

    def denoiser_of(setting, schedule):
        def denoise(x, t):
            alpha, sigma, *_ = expand(schedule(t), x)
            x0 = MEAN + error * (1.0 - 2.0 * (jnp.round(widen(t, x) * count) % 2.0))
            return Estimate(jnp.broadcast_to(x0, x.shape), (x - alpha * x0) / sigma)

        return denoise

    run = compiled(solver, lambda setting: cosine(), denoiser_of)
    found = run(jnp.ones((2, 3)), np.linspace(1.0, 0.0, count + 1))[-1]
    assert np.abs(found - MEAN).max() < 1.1 * error


@pytest.mark.parametrize("h", [1e-4, 0.1, 0.49, 0.51, 3.0, 30.0, -1e-4, -0.3, -2.0])
def test_moments_are_the_integrals(h):
    """Against Gauss-Legendre quadrature on pieces, in float64."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    r = ((nodes[None] + 1.0) / 2.0 + np.arange(50)[:, None]) / 50
    kernel = weights * h * np.exp(-h * (1.0 - r)) / 100
    exact = [(kernel * r**i).sum() for i in range(4)]
    np.testing.assert_allclose(exponential_moments(jnp.float32(h), 4), exact, rtol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(exponential_moments(jnp.float64(h), 4), exact, rtol=1e-11)


def test_weights_integrate_polynomials_exactly():
    nodes, moments = (0.0, 1.0, -0.7, -2.5), [jnp.float32(m) for m in (1.0, 1 / 2, 1 / 3, 1 / 4)]
    weights = np.asarray(lagrange_weights(nodes, moments))
    for power, moment in enumerate(moments):
        np.testing.assert_allclose(weights @ np.power(nodes, power), moment, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        ("dpm_multistep", {"order": 4}, "order is 4; expected 1 to 3"),
        ("dpm_multistep", {"variant": "bh1"}, "variant is 'bh1'; expected 'midpoint' or 'heun'"),
        ("dpm_multistep", {"of": "v"}, "of is 'v' and eta 0.0; expected 'x0', or 'eps' with eta 0"),
        ("dpm_multistep", {"of": "eps", "eta": 1.0}, "of is 'eps' and eta 1.0"),
        ("dpm_multistep", {"eta": -1.0}, "eta is -1.0; expected at least 0"),
        ("unipc", {"order": 0}, "order is 0; expected 1 to 3"),
        ("unipc", {"variant": "heun"}, "variant is 'heun'; expected 'bh1' or 'bh2'"),
        ("deis", {"order": 5}, "order is 5; expected 1 to 4"),
        ("lms", {"order": 0}, "order is 0; expected 1 to 4"),
        ("plms", {"start": "euler"}, "start is 'euler'; expected 'heun' or 'runge_kutta'"),
    ],
)
def test_values_without_meaning_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[make](**settings)
