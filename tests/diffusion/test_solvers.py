import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser, gaussian_flow

from diffjax.diffusion import noise as noise_module
from diffjax.diffusion import thresholding
from diffjax.diffusion.noise import normal_like
from diffjax.diffusion.predictions import Estimate, solve, velocity
from diffjax.diffusion.schedules import Coeffs, cosine, expand, linear_flow
from diffjax.diffusion.solvers.ancestral import ddim, ddpm

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
SCHEDULES = {"cosine": cosine(), "flow": linear_flow()}
MEAN, STD = 0.3, 0.5

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def run(denoise, schedule, solver, x, times, seed=0):
    """All steps between `times`, without the ends that `sample` adds."""

    @jax.jit
    def steps(x):
        def body(state, now):
            number, t, s = now
            return solver.step(denoise, schedule, state[0], t, s, steps_keys[number], state[1]), None

        numbers = jnp.arange(len(times) - 1)
        return jax.lax.scan(body, (x, solver.init(x, None)), (numbers, times[:-1], times[1:]))[0][0]

    steps_keys = jax.random.split(jax.random.key(seed), (len(times) - 1, x.shape[0]))
    return steps(x)


@pytest.fixture
def replace_noise(monkeypatch):
    """Let the solvers add the given noise instead of a random draw."""
    return lambda noise: monkeypatch.setattr(noise_module, "normal_like", lambda keys, x, draw=0: noise)


@each_schedule
def test_ddim_converges_at_first_order_to_the_exact_flow(schedule):
    x = jnp.linspace(-2.0, 2.0, 9)[None]
    errors = []
    for steps in (20, 40, 80):
        found = run(
            gaussian_denoiser(schedule, MEAN, STD), schedule, ddim(), x, jnp.linspace(0.95, 0.05, steps + 1)
        )
        errors.append(float(jnp.abs(found - gaussian_flow(schedule, MEAN, STD, x, 0.95, 0.05)).max()))
    assert errors[-1] < 0.03
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


@each_schedule
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.0), (0.9, 0.3), (0.2, 0.1)])
def test_one_step_of_ddim_is_exact_if_the_denoiser_knows(schedule, t, s):
    """It needs the levels at the *next* time; those of another one would not land on the path."""
    random = np.random.default_rng(0)
    x0, eps = (jnp.asarray(random.normal(size=(2, 5)), jnp.float32) for _ in range(2))
    now, then = schedule(jnp.float32(t)), schedule(jnp.float32(s))
    x = now.alpha * x0 + now.sigma * eps
    solver = ddim()
    found, _ = solver.step(
        lambda x, t: Estimate(x0, eps),
        schedule,
        x,
        jnp.float32(t),
        jnp.float32(s),
        keys_of(2),
        solver.init(x, None),
    )
    np.testing.assert_allclose(found, then.alpha * x0 + then.sigma * eps, atol=1e-6)


@each_schedule
def test_every_example_is_denoised_at_the_time_it_has(schedule):
    seen = []

    def denoise(x, t):
        seen.append(t)
        return Estimate(x, x)

    for solver in (ddim(), ddim(eta=1.0), ddpm()):
        x = jnp.zeros((3, 2))
        solver.step(
            denoise, schedule, x, jnp.float32(0.7), jnp.float32(0.4), keys_of(3), solver.init(x, None)
        )
    for t in seen:
        np.testing.assert_array_equal(t, np.full(3, 0.7, np.float32))
    assert len(seen) == 3  # one evaluation a step


@each_schedule
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.8, 0.2), (0.05, 0.01)])
def test_ancestral_steps_draw_from_the_posterior(schedule, t, s, replace_noise):
    """By Bayes: q(x_s | x_t, x0) ~ q(x_s | x0) q(x_t | x_s), whose precisions add."""
    random = np.random.default_rng(0)
    x0, x = (random.normal(size=(2, 5)) for _ in range(2))
    with jax.enable_x64(True):
        now, then = (jax.tree.map(float, schedule(jnp.asarray(time))) for time in (t, s))
    ratio = now.alpha / then.alpha
    transition = now.sigma**2 - ratio**2 * then.sigma**2
    precision = 1.0 / then.sigma**2 + ratio**2 / transition
    mean = (then.alpha * x0 / then.sigma**2 + ratio * x / transition) / precision
    noise = random.normal(size=(2, 5))

    def step(solver):
        x0_, x_ = jnp.asarray(x0, jnp.float32), jnp.asarray(x, jnp.float32)
        estimate = Estimate(x0_, (x_ - now.alpha * x0_) / now.sigma)
        return solver.step(
            lambda x, t: estimate,
            schedule,
            x_,
            jnp.float32(t),
            jnp.float32(s),
            keys_of(2),
            solver.init(x_, None),
        )[0]

    for solver in (ddpm(), ddim(eta=1.0), ddpm(variance="large")):
        replace_noise(jnp.zeros((2, 5)))
        np.testing.assert_allclose(step(solver), mean, atol=2e-4)
    replace_noise(jnp.asarray(noise, jnp.float32))
    for solver in (ddpm(), ddim(eta=1.0)):
        np.testing.assert_allclose(step(solver), mean + noise * precision**-0.5, atol=5e-4)
    large = step(ddpm(variance="large"))
    np.testing.assert_allclose(large, mean + noise * transition**0.5, atol=5e-4)
    half = step(ddim(eta=0.5))
    replace_noise(jnp.zeros((2, 5)))
    np.testing.assert_allclose(half - step(ddim(eta=0.5)), 0.5 * noise * precision**-0.5, atol=5e-4)


@each_schedule
@pytest.mark.parametrize("solver", [ddpm(), ddim(eta=1.0), ddpm(variance="large")])
def test_ancestral_sampling_returns_the_datas_mean_and_deviation(schedule, solver):
    count = 10_000
    start = schedule(jnp.float32(1.0))
    x = start.sigma * jax.random.normal(jax.random.key(1), (count, 1))
    samples = run(gaussian_denoiser(schedule, MEAN, STD), schedule, solver, x, jnp.linspace(1.0, 0.0, 251))
    assert abs(float(samples.mean()) - MEAN) < 4.0 * STD / count**0.5 + 0.01
    assert abs(float(samples.std()) / STD - 1.0) < 0.03


def before_the_end(solver, std, count=10_000):
    """Standard deviation of x_s over that of the forward process, after three long steps from t = 1."""
    schedule = cosine()
    x = jax.random.normal(jax.random.key(1), (count, 1))
    s = jnp.float32(0.25)
    samples = run(gaussian_denoiser(schedule, 0.0, std), schedule, solver, x, jnp.array([1.0, 0.75, 0.5, s]))
    then = schedule(s)
    return float(samples.std() / jnp.sqrt(then.alpha**2 * std**2 + then.sigma**2))


def test_the_large_variance_is_right_for_data_of_unit_variance_and_the_small_one_for_a_point():
    assert abs(before_the_end(ddpm(variance="large"), std=1.0) - 1.0) < 0.02
    assert before_the_end(ddpm(variance="small"), std=1.0) < 0.95
    assert abs(before_the_end(ddpm(variance="small"), std=0.0) - 1.0) < 0.02
    assert before_the_end(ddpm(variance="large"), std=0.0) > 1.05


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_last_step_adds_no_noise(variance):
    schedule, solver, x = cosine(), ddpm(variance=variance), jnp.ones((2, 3))
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    ends = [
        solver.step(denoise, schedule, x, jnp.float32(0.1), jnp.float32(0.0), keys_of(2, seed), ())[0]
        for seed in range(2)
    ]
    np.testing.assert_array_equal(*ends)
    np.testing.assert_allclose(ends[0], denoise(x, jnp.full((2,), 0.1)).x0, atol=1e-3)


def test_the_noise_of_an_example_does_not_depend_on_its_batch():
    keys, x = keys_of(5), jnp.zeros((5, 4, 4, 3))
    together = normal_like(keys, x)
    np.testing.assert_array_equal(together[3:], normal_like(keys[3:], x[3:]))
    np.testing.assert_array_equal(together[jnp.array([4, 0])], normal_like(keys[jnp.array([4, 0])], x[:2]))
    assert abs(float(together.std()) - 1.0) < 0.2
    assert float(jnp.abs(together[0] - together[1]).max()) > 0.1


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="variance is 'medium'; expected 'small', 'large' or 'learned'"):
        ddpm(variance="medium")


def on_grid(levels):
    """The schedule of levels `[num_steps + 1, 2]` recorded at equally spaced times from 1 to 0."""
    steps = len(levels) - 1
    levels = jnp.asarray(levels)

    def schedule(t):
        now = levels[jnp.round((1.0 - t) * steps).astype(int)]
        return Coeffs(now[..., 0], now[..., 1], jnp.full_like(t, -1.0), jnp.full_like(t, 1.0))

    return schedule, jnp.arange(steps, -1, -1) / steps


@pytest.mark.parametrize(
    ("name", "solver", "threshold"),
    [
        ("ddim", ddim(), thresholding.none()),
        ("ddim_eta1", ddim(eta=1.0), thresholding.none()),
        ("ddpm", ddpm(), thresholding.static()),
        ("ddpm_large", ddpm(variance="large"), thresholding.none()),
        ("ddpm_dynamic", ddpm(), thresholding.dynamic(percentile=0.95, max_value=1.5)),
        ("flow_shift3", ddim(), thresholding.none()),
    ],
)
def test_trajectories_agree_with_diffusers(name, solver, threshold, replace_noise):
    golden = {k.removeprefix(f"diffusers/{name}/"): v for k, v in GOLDEN.items()}
    schedule, times = on_grid(golden["levels"])
    x = jnp.asarray(golden["start"])
    for i, (t, s) in enumerate(itertools.pairwise(times)):

        def denoise(x, t, output=golden["outputs"][i]):
            wide = expand(schedule(t), x)
            if name == "flow_shift3":
                return solve(velocity(wide), wide, x, output)
            return Estimate((x - wide.sigma * output) / wide.alpha, jnp.asarray(output))

        if "noise" in golden:
            last = i == len(golden["noise"])  # where diffusers draws none
            replace_noise(jnp.zeros_like(x) if last else jnp.asarray(golden["noise"][i]))
        bounded = thresholding.thresholded(denoise, schedule, threshold)
        x, _ = solver.step(bounded, schedule, x, t, s, None, ())
        np.testing.assert_allclose(x, golden["trajectory"][i], rtol=1e-4, atol=2e-5, err_msg=str(i))


@pytest.mark.parametrize(("name", "solver"), [("final", ddim()), ("final_ancestral", ddim(eta=1.0))])
def test_samplers_agree_with_k_diffusion(name, solver, replace_noise):
    golden = {k.removeprefix("kdiffusion/euler/"): v for k, v in GOLDEN.items()}
    sigmas = golden["sigmas"]  # the last is zero
    schedule, times = on_grid(np.stack([np.ones_like(sigmas), sigmas], axis=1))
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    x = jnp.asarray(golden["start"])
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        replace_noise(jnp.asarray(golden["noise"][i]))
        x, _ = solver.step(denoise, schedule, x, t, s, None, ())
    np.testing.assert_allclose(x, golden[name], rtol=1e-4, atol=2e-5)


def test_posteriors_agree_with_imagen_pytorch(replace_noise):
    golden = {k.removeprefix("imagen/cosine/"): v for k, v in GOLDEN.items()}
    first = np.tan(0.008 / 1.008 * np.pi / 2.0)  # where its cosine begins
    schedule = cosine(logsnr_min=-100.0, logsnr_max=float(-2.0 * np.log(first)))
    for i, (t, s) in enumerate(zip(golden["t"], golden["s"], strict=True)):
        x0, x = jnp.asarray(golden["x0"][i : i + 1]), jnp.asarray(golden["x"][i : i + 1])
        denoise = lambda x, t, x0=x0: Estimate(x0, x0)  # noqa: E731
        replace_noise(jnp.zeros_like(x))
        mean, _ = ddpm().step(denoise, schedule, x, jnp.float32(t), jnp.float32(s), None, ())
        np.testing.assert_allclose(mean[0], golden["posterior_mean"][i], rtol=1e-4, atol=1e-5)
        replace_noise(jnp.ones_like(x))
        shifted, _ = ddpm().step(denoise, schedule, x, jnp.float32(t), jnp.float32(s), None, ())
        variance = golden["posterior_variance"][i] if s > 0.0 else 0.0
        np.testing.assert_allclose((shifted - mean)[0], variance**0.5, rtol=1e-3, atol=1e-5)
