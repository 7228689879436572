import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import predictions, schedules, weightings
from diffjax.diffusion.losses import denoising_loss, loss_weight
from diffjax.diffusion.predictions import PREDICTIONS
from diffjax.diffusion.schedules import Coeffs
from diffjax.diffusion.timesteps import EDGE
from diffjax.diffusion.weightings import WEIGHTINGS

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "training_maths.npz")
TIMES = np.linspace(0.02, 0.98, 13)
SCHEDULES = {
    "cosine": schedules.cosine(),
    "trigonometric": schedules.trigonometric(),
    "flow": schedules.linear_flow(sigma_min=0.0),
    "edm": schedules.edm(),
    "sub_vp": schedules.sub_vp(),
}

# Each as its authors give it: the quantity whose squared error it weighs, and the weight. For weights given
# for the straight path only, sigma is what it is there at the same signal-to-noise ratio.
PUBLISHED = {
    "unit": ("any", {}, lambda snr, sigma: np.ones_like(snr)),
    "snr": ("x0", {}, lambda snr, sigma: snr),
    "truncated_snr": ("x0", {}, lambda snr, sigma: np.maximum(snr, 1.0)),
    "min_snr": ("x0", {"gamma": 3.0}, lambda snr, sigma: np.minimum(snr, 3.0)),
    "soft_min_snr": ("x0", {"gamma": 3.0}, lambda snr, sigma: snr * 3.0 / (snr + 3.0)),
    "edm": ("x0", {"sigma_data": 0.4}, lambda snr, sigma: (1.0 / snr + 0.16) / (0.16 / snr)),
    "p2": ("eps", {"k": 2.0, "gamma": 0.5}, lambda snr, sigma: 1.0 / (2.0 + snr) ** 0.5),
    "sigmoid": ("eps", {"bias": 0.5}, lambda snr, sigma: (1.0 + np.exp(-0.5)) / (1.0 + snr * np.exp(-0.5))),
    "sigma_sqrt": ("x0", {}, lambda snr, sigma: sigma**-2.0),
    "cosmap": ("any", {}, lambda snr, sigma: 2.0 / (np.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))),
}


def test_every_weighting_is_compared_with_its_publication():
    assert {*PUBLISHED, "velocity_clipped"} == set(WEIGHTINGS)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_the_published_ones_in_every_space(name, schedule):
    space, settings, published = PUBLISHED[name]
    with jax.enable_x64(True):
        coeffs = schedule(jnp.asarray(TIMES))
        weighting = WEIGHTINGS[name](**settings)
        weights = {key: np.asarray(loss_weight(coeffs, weighting, PREDICTIONS[key]())) for key in PREDICTIONS}
        rows = {key: tuple(map(np.asarray, PREDICTIONS[key]()(coeffs))) for key in PREDICTIONS}
        alpha, sigma = np.asarray(coeffs.alpha), np.asarray(coeffs.sigma)

    def error(key):  # for an error of x0 by one, which is an error of eps by -alpha / sigma
        a, b = rows[key]
        return a - b * alpha / sigma

    expected = published((alpha / sigma) ** 2, sigma / (alpha + sigma))
    for target, weight in weights.items():
        factor = 1.0 if space == "any" else (error(space) / error(target)) ** 2
        np.testing.assert_allclose(weight, expected * factor, rtol=1e-9, err_msg=target)


@functools.cache
def losses(name, target):
    """Of a network that predicts x0 wrongly."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        x0, eps = (jnp.asarray(random.normal(size=(len(TIMES), 5))) for _ in range(2))
        value = denoising_loss(
            lambda x, level: jnp.tanh(x),
            SCHEDULES["cosine"],
            prediction=predictions.x0,
            target=PREDICTIONS[target](),
            weighting=WEIGHTINGS[name](),
            x0=x0,
            eps=eps,
            t=jnp.asarray(TIMES),
        )
        return np.asarray(value)


@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if WEIGHTINGS[name]().space is not None])
def test_the_loss_is_the_same_wherever_the_error_is_measured(name, target):
    np.testing.assert_allclose(losses(name, target), losses(name, "x0"), rtol=1e-9)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_weights_are_finite_and_positive_between_exact_ends(schedule):
    coeffs = schedules.SCHEDULES[schedule]()(jnp.array([EDGE, 1e-4, 0.5, 1.0 - 1e-4, 1.0 - EDGE]))

    @jax.jit
    def weights(coeffs):
        return {
            (name, target): loss_weight(coeffs, WEIGHTINGS[name](), PREDICTIONS[target]())
            for name in WEIGHTINGS
            for target in PREDICTIONS
        }

    for case, weight in weights(coeffs).items():
        assert np.isfinite(weight).all(), (case, weight)
        assert (weight > 0.0).all(), (case, weight)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("schedule", [SCHEDULES["flow"], SCHEDULES["trigonometric"]])
def test_weights_are_finite_at_exact_ends(schedule, name):
    coeffs = schedule(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal([coeffs.sigma[0], coeffs.alpha[1]], 0.0)
    weighting = WEIGHTINGS[name]()
    assert np.isfinite(weighting.weight(coeffs)).all()
    assert np.isfinite(loss_weight(coeffs, weighting, predictions.v)).all()


def test_weights_of_diffusers_snr_and_min_snr():
    coeffs = schedules.ddpm(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)(
        jnp.asarray((GOLDEN["snr/index"] + 1) / 1000, jnp.float32)
    )

    def weight(name, target):
        return loss_weight(coeffs, WEIGHTINGS[name](), PREDICTIONS[target]())

    # Theirs subtracts alpha^2 from one in float32: at the first step 1175.4405, and not 0.99915 / 0.00085.
    np.testing.assert_allclose(weight("snr", "x0"), GOLDEN["snr/snr"], rtol=3e-5)
    np.testing.assert_allclose(weight("min_snr", "eps"), GOLDEN["snr/min_snr_eps"], rtol=3e-5)
    np.testing.assert_allclose(weight("min_snr", "v"), GOLDEN["snr/min_snr_v"], rtol=3e-5)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_of_diffusers_stable_diffusion_3(name):
    coeffs = schedules.linear_flow(sigma_min=0.0)(jnp.asarray(GOLDEN["sd3/sigma"]))
    weight = loss_weight(coeffs, WEIGHTINGS[name](), predictions.x0)
    np.testing.assert_allclose(weight, GOLDEN[f"sd3/{name}"], rtol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "weighting"),
    [
        ("karras", weightings.edm(sigma_data=0.5)),
        ("snr", weightings.snr()),
        ("soft-min-snr", weightings.soft_min_snr(gamma=1.0 / 0.5**2)),
        ("soft-min-snr", weightings.soft_min_snr()),
    ],
)
def test_losses_of_k_diffusion(theirs, weighting):
    sigma = jnp.asarray(GOLDEN["edm/sigma"])

    def schedule(t):  # the examples, at times 0, 1, 2, 3
        now = sigma[t.astype(int)]
        return Coeffs(jnp.ones_like(now), now, jnp.zeros_like(now), jnp.ones_like(now))

    edm = predictions.edm(sigma_data=0.5)
    loss = denoising_loss(
        lambda x, level: jnp.asarray(GOLDEN["edm/output"]),
        schedule,
        prediction=edm,
        target=edm,
        weighting=weighting,
        x0=jnp.asarray(GOLDEN["edm/x0"]),
        eps=jnp.asarray(GOLDEN["edm/eps"]),
        t=jnp.arange(4.0),
    )
    np.testing.assert_allclose(loss, GOLDEN[f"edm/loss/{theirs}"], rtol=1e-5)


def test_the_loss_of_jit_is_its_own():
    """Both velocities are `(x_t - x0) / max(sigma, 0.05)`, of the true x0 or of the predicted one."""
    random = np.random.default_rng(0)
    x0, eps = (jnp.asarray(random.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    t = np.array([0.0, 0.01, 0.05, 0.3, 1.0], np.float32)
    clipped = np.maximum(t, 0.05)[:, None]
    x = (1.0 - t[:, None]) * x0 + t[:, None] * eps
    expected = (((x - np.tanh(x)) / clipped - (x - x0) / clipped) ** 2).mean(axis=1)
    loss = denoising_loss(
        lambda x, level: jnp.tanh(x),
        schedules.linear_flow(sigma_min=0.0),
        prediction=predictions.x0,
        target=predictions.x0,
        weighting=weightings.velocity_clipped(),
        x0=x0,
        eps=eps,
        t=jnp.asarray(t),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_clipped_velocity_is_one_in_velocity_down_to_the_smallest_sigma(schedule):
    coeffs = schedule(jnp.asarray(TIMES, jnp.float32))
    weight = loss_weight(coeffs, weightings.velocity_clipped(min_sigma=0.2), predictions.velocity)
    np.testing.assert_allclose(weight, np.minimum(1.0, (coeffs.sigma / 0.2) ** 2), rtol=1e-4)


@pytest.mark.parametrize(
    ("weighting", "settings"),
    [
        (weightings.min_snr, {"gamma": 0.0}),
        (weightings.soft_min_snr, {"gamma": -1.0}),
        (weightings.edm, {"sigma_data": 0.0}),
        (weightings.p2, {"k": 0.0}),
        (weightings.p2, {"gamma": -1.0}),
        (weightings.velocity_clipped, {"min_sigma": 0.0}),
    ],
)
def test_impossible_settings_are_refused(weighting, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*expected"):
        weighting(**settings)
