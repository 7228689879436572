import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser

from diffjax.diffusion import predictions, weightings
from diffjax.diffusion.losses import denoising_loss
from diffjax.diffusion.predictions import PREDICTIONS, Estimate, Row, combine
from diffjax.diffusion.schedules import Coeffs, cosine, expand, linear_flow, logsnr
from diffjax.diffusion.weightings import Weighting

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
SCHEDULES = {"cosine": cosine(), "flow": linear_flow()}
UNIT = weightings.unit()
PAIRS = list(itertools.product(PREDICTIONS, repeat=2))
TIMES = np.array([0.0, 1e-3, 0.3, 0.8, 0.999, 1.0])


def data(seed=0):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(len(TIMES), 4, 4, 3)) for _ in range(2))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("prediction", "target"), PAIRS)
def test_a_perfect_network_has_no_loss(schedule, prediction, target):
    x0, eps = (jnp.asarray(part, jnp.float32) for part in data())
    t = jnp.asarray(TIMES[2:4], jnp.float32)
    x0, eps = x0[2:4], eps[2:4]
    coeffs = schedule(t)
    row = PREDICTIONS[prediction]()(expand(coeffs, x0))
    seen = []

    def net(x, level):
        seen.append((x, level))
        return combine(row, Estimate(x0, eps))

    loss = denoising_loss(
        net,
        schedule,
        prediction=PREDICTIONS[prediction](),
        target=PREDICTIONS[target](),
        weighting=UNIT,
        x0=x0,
        eps=eps,
        t=t,
    )
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss, 0.0, atol=1e-9)
    ((x, level),) = seen
    np.testing.assert_allclose(level, logsnr(coeffs))
    wide = expand(coeffs, x0)
    np.testing.assert_allclose(x, wide.alpha * x0 + wide.sigma * eps, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_loss_and_gradient_are_finite_at_the_ends(schedule):
    x0, eps = (jnp.asarray(part, jnp.float32) for part in data())

    def total(scale, prediction, target):
        return denoising_loss(
            lambda x, level: scale * x,
            schedule,
            prediction=PREDICTIONS[prediction](),
            target=PREDICTIONS[target](),
            weighting=UNIT,
            x0=x0,
            eps=eps,
            t=jnp.asarray(TIMES, jnp.float32),
        ).sum()

    results = jax.jit(lambda scale: {pair: jax.value_and_grad(total)(scale, *pair) for pair in PAIRS})(0.5)
    for pair, (loss, gradient) in results.items():
        assert np.isfinite(loss), pair
        assert np.isfinite(gradient), pair


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        # alpha 3/4, sigma 1/4, x0 = 2, eps = -1: x = 5/4, velocity -3, v = -5/4. The network says 1.
        ("velocity", "velocity", 16.0),
        ("x0", "x0", 1.0),
        ("x0", "eps", 9.0),  # eps = (5/4 - 3/4) / (1/4) = 2
        ("x0", "velocity", 16.0),  # 2 - 1 against -3
        ("eps", "x0", 4.0 / 9.0),  # x0 = (5/4 - 1/4) / (3/4) = 4/3
        ("v", "v", 2.25**2),
    ],
)
def test_loss_by_hand(prediction, target, expected):
    loss = denoising_loss(
        lambda x, level: jnp.ones_like(x, jnp.bfloat16),
        linear_flow(sigma_min=0.0),
        prediction=PREDICTIONS[prediction](),
        target=PREDICTIONS[target](),
        weighting=Weighting(lambda coeffs: 3.0 * coeffs.alpha),
        x0=jnp.full((1, 2, 2), 2.0),
        eps=jnp.full((1, 2, 2), -1.0),
        t=jnp.array([0.25]),
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [2.25 * expected], rtol=1e-6)


def losses(schedule, target, weighting, prediction="x0"):
    """Of a wrong network, at each of TIMES but the ends."""
    with jax.enable_x64(True):
        x0, eps = (jnp.asarray(part)[1:-1] for part in data())
        t = jnp.asarray(TIMES)[1:-1]
        value = denoising_loss(
            lambda x, level: jnp.tanh(x).astype(jnp.float32),
            schedule,
            prediction=PREDICTIONS[prediction](),
            target=PREDICTIONS[target](),
            weighting=weighting,
            x0=x0,
            eps=eps,
            t=t,
        )
        return np.asarray(value), np.asarray(jnp.exp(logsnr(schedule(t))))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_same_error_in_other_spaces(prediction):
    of_x0, snr = losses(cosine(), "x0", UNIT, prediction)
    np.testing.assert_allclose(losses(cosine(), "v", UNIT, prediction)[0], (snr + 1.0) * of_x0, rtol=1e-3)
    np.testing.assert_allclose(losses(cosine(), "eps", UNIT, prediction)[0], snr * of_x0, rtol=1e-3)


def test_min_snr_in_v_is_the_papers_weight_in_x0():
    of_v, snr = losses(cosine(), "v", weightings.min_snr(gamma=5.0))
    of_x0, _ = losses(cosine(), "x0", UNIT)
    assert snr.min() < 5.0 < snr.max()
    np.testing.assert_allclose(of_v, np.minimum(snr, 5.0) * of_x0, rtol=1e-5)


@pytest.mark.parametrize("bias", [-1.0, 2.0])
def test_sigmoid_in_v_is_the_papers_weight_in_eps(bias):
    of_v, snr = losses(cosine(), "v", weightings.sigmoid(bias=bias))
    of_eps, _ = losses(cosine(), "eps", UNIT)
    papers = 1.0 / (1.0 + np.exp(np.log(snr) - bias))
    np.testing.assert_allclose(of_v, (1.0 + np.exp(-bias)) * papers * of_eps, rtol=1e-5)


@pytest.mark.parametrize("name", weightings.WEIGHTINGS)
def test_weights_are_finite_and_positive_everywhere(name):
    weights = weightings.WEIGHTINGS[name]().weight(cosine()(jnp.linspace(0.0, 1.0, 101)))
    assert weights.shape == (101,)
    assert np.isfinite(weights).all()
    assert (weights > 0.0).all()


@pytest.mark.parametrize("target", ["x0", "eps", "v", "velocity"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_posterior_mean_is_the_minimum(schedule, target):
    mean, std, time = 0.3, 0.5, 0.4
    with jax.enable_x64(True):
        # Two nodes at +-1 integrate a quadratic against a standard normal exactly.
        nodes = jnp.array(list(itertools.product([-1.0, 1.0], repeat=2)))
        x0, eps = mean + std * nodes[:, :1], nodes[:, 1:]
        t = jnp.full((4,), time)
        denoise = gaussian_denoiser(schedule, mean, std)

        def expected(offset):
            def net(x, level):
                return denoise(x, t).x0 + offset[0] + offset[1] * x

            return denoising_loss(
                net,
                schedule,
                prediction=predictions.x0,
                target=PREDICTIONS[target](),
                weighting=UNIT,
                x0=x0,
                eps=eps,
                t=t,
            ).mean()

        best, slope = jax.value_and_grad(expected)(jnp.zeros(2))
        c = jax.tree.map(float, schedule(jnp.asarray(time)))
        assert (np.linalg.eigvalsh(jax.hessian(expected)(jnp.zeros(2))) > 0.0).all()
    posterior_variance = c.sigma**2 * std**2 / (c.alpha**2 * std**2 + c.sigma**2)
    # An error of x0 by 1 is one of eps by -alpha / sigma.
    row = PREDICTIONS[target]()(Coeffs(*map(jnp.float32, c)))
    scale = float(row.a) - float(row.b) * c.alpha / c.sigma
    np.testing.assert_allclose(best, posterior_variance * scale**2, rtol=1e-4)
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)  # the network's output is rounded to float32


def test_loss_agrees_with_k_diffusion():
    golden = {k.removeprefix("kdiffusion/edm/"): v for k, v in GOLDEN.items()}
    sigma = jnp.asarray(golden["sigma"])

    def schedule(t):  # the examples, at times 0, 1, 2, 3
        now = sigma[t.astype(int)]
        return Coeffs(jnp.ones_like(now), now, jnp.zeros_like(now), jnp.ones_like(now))

    def edm(coeffs):
        variance = coeffs.sigma**2 + 0.5**2
        c_skip, c_out = 0.5**2 / variance, coeffs.sigma * 0.5 / variance**0.5
        return Row((1.0 - c_skip) / c_out, -c_skip * coeffs.sigma / c_out)

    def loss(target, weighting):
        return denoising_loss(
            lambda x, level: jnp.asarray(golden["output"]),
            schedule,
            prediction=edm,
            target=target,
            weighting=weighting,
            x0=golden["x0"],
            eps=golden["eps"],
            t=jnp.arange(4.0),
        )

    np.testing.assert_allclose(loss(edm, UNIT), golden["loss"], rtol=1e-5)
    # The paper's own form: the error of x0, weighted by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    in_x0 = loss(predictions.x0, Weighting(lambda c: (c.sigma**2 + 0.25) / (0.5 * c.sigma) ** 2))
    np.testing.assert_allclose(in_x0, golden["loss"], rtol=1e-3)
