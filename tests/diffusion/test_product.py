"""What must hold of every schedule with every prediction, at any time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.diffusion.losses import denoising_loss, error_ratio, loss_weight
from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine, determinant, solve
from diffjax.diffusion.schedules import SCHEDULES, expand, logsnr, time_at
from diffjax.diffusion.weightings import WEIGHTINGS, unit

NAMES = [(schedule, prediction) for schedule in SCHEDULES for prediction in PREDICTIONS]
TIMES = st.lists(st.floats(1e-3, 1.0 - 1e-3), min_size=4, max_size=4)
SEEDS = st.integers(0, 2**31)
few = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def pair(seed):
    random = np.random.default_rng(seed)
    return Estimate(*(jnp.asarray(random.normal(size=(4, 3))) for _ in range(2)))


@pytest.mark.parametrize(("schedule", "prediction"), NAMES)
@few
@given(times=TIMES, seed=SEEDS)
def test_target_and_inversion_agree(schedule, prediction, times, seed):
    with jax.enable_x64(True):
        truth = pair(seed)
        coeffs = expand(SCHEDULES[schedule]()(jnp.asarray(times)), truth.x0)
        x = coeffs.alpha * truth.x0 + coeffs.sigma * truth.eps
        row = PREDICTIONS[prediction]()(coeffs)
        found = solve(row, coeffs, x, combine(row, truth))
        # What the prediction leaves open is that much less certain.
        size = jnp.abs(determinant(row, coeffs))
        for part, wanted, share in (("x0", truth.x0, coeffs.sigma), ("eps", truth.eps, coeffs.alpha)):
            slack = 1e-12 * (1.0 + (1.0 + jnp.abs(row.a) + jnp.abs(row.b)) * (1.0 + share) / size)
            assert (jnp.abs(getattr(found, part) - wanted) < 20.0 * slack).all(), part


@pytest.mark.parametrize(("schedule", "prediction"), NAMES)
@few
@given(times=TIMES, seed=SEEDS)
def test_conversions_round_trip(schedule, prediction, times, seed):
    """From a prediction to x0 and eps, to any other prediction, and back."""
    with jax.enable_x64(True):
        output = pair(seed).x0
        coeffs = expand(SCHEDULES[schedule]()(jnp.asarray(times)), output)
        x = pair(seed + 1).eps
        row = PREDICTIONS[prediction]()(coeffs)
        estimate = solve(row, coeffs, x, output)
        for name, factory in PREDICTIONS.items():
            other = factory()(coeffs)
            back = solve(other, coeffs, x, combine(other, estimate))
            np.testing.assert_allclose(combine(row, back), output, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("schedule", "prediction"), NAMES)
@few
@given(times=TIMES, seed=SEEDS)
def test_the_oracle_has_no_loss_and_an_error_counts_as_its_row_says(schedule, prediction, times, seed):
    with jax.enable_x64(True):
        truth, t = pair(seed), jnp.asarray(times)
        process, row = SCHEDULES[schedule](), PREDICTIONS[prediction]()
        target = combine(row(expand(process(t), truth.x0)), truth)

        def loss(offset, space, weighting):
            return denoising_loss(
                lambda x, level: target + offset,
                process,
                prediction=row,
                target=PREDICTIONS[space](),
                weighting=weighting,
                x0=truth.x0,
                eps=truth.eps,
                t=t,
            )

        coeffs = process(t)
        scale = 1.0 + jnp.max(jnp.abs(target), axis=1)
        for space in PREDICTIONS:
            # At the same x_t, an error of x0 by sigma is one of eps by -alpha.
            a, b = PREDICTIONS[space]()(coeffs)
            c, d = row(coeffs)
            ratio = (a * coeffs.sigma - b * coeffs.alpha) / (c * coeffs.sigma - d * coeffs.alpha)
            assert (loss(0.0, space, unit()) <= (1e-6 * ratio * scale) ** 2).all(), space
            offset = 0.1 * scale[:, None]
            found = loss(offset, space, unit())
            np.testing.assert_allclose(found, (0.1 * ratio * scale) ** 2, rtol=1e-4, err_msg=space)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@few
@given(times=TIMES)
def test_a_weighting_means_the_same_wherever_the_error_is_measured(schedule, weighting, times):
    """The weight of an eps error is that of an x0 error over the SNR, and so on for all pairs."""
    with jax.enable_x64(True):
        coeffs = SCHEDULES[schedule]()(jnp.asarray(times))
        chosen = WEIGHTINGS[weighting]()
        if chosen.space is None:
            return  # defined by where the error is measured
        of_x0 = loss_weight(coeffs, chosen, PREDICTIONS["x0"]())
        assert (of_x0 > 0.0).all()
        assert np.isfinite(of_x0).all()
        snr = jnp.exp(logsnr(coeffs))
        np.testing.assert_allclose(loss_weight(coeffs, chosen, PREDICTIONS["eps"]()), of_x0 / snr, rtol=1e-6)
        for name, factory in PREDICTIONS.items():
            times_larger = error_ratio(coeffs, factory(), PREDICTIONS["x0"]()) ** 2
            np.testing.assert_allclose(
                loss_weight(coeffs, chosen, factory()) * times_larger, of_x0, rtol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("schedule", SCHEDULES)
@few
@given(times=TIMES)
def test_log_snr_and_its_inverse_agree(schedule, times):
    process = SCHEDULES[schedule]()
    t = jnp.asarray(times, jnp.float32)
    level = logsnr(process(t))
    found = time_at(process, level)
    # In the log-SNR, whose slope may be steep, and in the time, where it may be flat.
    close = jnp.abs(found - t) < 1e-4
    assert (close | (jnp.abs(logsnr(process(found)) - level) < 1e-5 * (1.0 + jnp.abs(level)))).all()
    assert (jnp.abs(logsnr(process(found)) - level) < 1e-4 * (1.0 + jnp.abs(level))).all()
