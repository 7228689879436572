from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser

from diffjax.diffusion.guidance_rules import GUIDANCES, apg, cfg_plus_plus, classifier_free, rescaled
from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine, solve
from diffjax.diffusion.schedules import Coeffs, cosine, expand, trigonometric

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guidance.npz")
SCHEDULE = cosine()
X = jnp.linspace(-2.0, 2.0, 12).reshape(3, 4)
T = jnp.array([0.2, 0.5, 0.9])
WIDE = expand(SCHEDULE(T), X)

each_rule = pytest.mark.parametrize("name", GUIDANCES)


def estimate_of(space, coeffs, x, output):
    return solve(PREDICTIONS[space]()(coeffs), coeffs, x, output)


def pair(coeffs=WIDE, x=X, seed=0):
    """Two estimates of the same x_t, finite whatever the coefficients."""
    outputs = np.random.default_rng(seed).normal(size=(2, *x.shape)).astype(np.float32)
    return [estimate_of("v", coeffs, x, jnp.asarray(o)) for o in outputs]


def in_space(guidance, space, positive, negative, scale):
    """What a rule makes of two predictions in a space."""
    coeffs, x = expand(SCHEDULE(T[:2]), positive), jnp.full_like(positive, 0.3)
    estimates = [estimate_of(space, coeffs, x, jnp.asarray(p)) for p in (positive, negative)]
    result = guidance.rule(*estimates, coeffs, scale)
    return combine(PREDICTIONS[space]()(coeffs), result)


@pytest.mark.parametrize("name", [name for name in GUIDANCES if GUIDANCES[name]().off_at is not None])
def test_a_scale_at_which_it_is_off_gives_the_positive(name):
    guidance, (positive, negative) = GUIDANCES[name](), pair()
    for found, plain in zip(
        guidance.rule(positive, negative, WIDE, guidance.off_at)[:2], positive[:2], strict=True
    ):
        np.testing.assert_allclose(found, plain, atol=3e-6)


@each_rule
def test_the_learned_variance_is_the_positive_ones(name):
    positive, negative = (
        e._replace(fraction=jnp.full_like(X, f)) for e, f in zip(pair(), (0.2, 0.7), strict=True)
    )
    guided = GUIDANCES[name]().rule(positive, negative, WIDE, 3.0)
    np.testing.assert_array_equal(guided.fraction, positive.fraction)


@each_rule
def test_an_example_is_guided_by_itself(name):
    guidance, (positive, negative) = GUIDANCES[name](), pair()
    together = guidance.rule(positive, negative, WIDE, 0.4)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (positive, negative, WIDE))
        alone = guidance.rule(*one, 0.4)
        for found, plain in zip(alone[:2], together[:2], strict=True):
            np.testing.assert_allclose(found[0], plain[i], atol=1e-6)


@each_rule
@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 1.0])
def test_a_guided_estimate_is_finite_and_of_the_same_x(name, t):
    schedule = trigonometric()  # whose ends are exact
    coeffs = expand(schedule(jnp.full((3,), t)), X)
    guided = GUIDANCES[name]().rule(*pair(coeffs), coeffs, 3.0)
    assert np.isfinite(jnp.stack(guided[:2])).all()
    if name != "cfg_plus_plus":
        np.testing.assert_allclose(coeffs.alpha * guided.x0 + coeffs.sigma * guided.eps, X, atol=3e-6)


def test_small_differences_survive_near_the_data():
    """eps differs by 1 where x0 differs by 1e-6, less than its own rounding errors."""
    coeffs = Coeffs(jnp.ones((1, 1)), jnp.full((1, 1), 1e-6), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    negative = Estimate(jnp.array([[0.9, 1.1]]), jnp.array([[0.0, 0.0]]))
    positive = Estimate(negative.x0 - coeffs.sigma * jnp.array([[1.0, -2.0]]), jnp.array([[1.0, -2.0]]))
    guided = apg(eta=1.0).rule(positive, negative, coeffs, 3.0)
    np.testing.assert_allclose(guided.eps, [[3.0, -6.0]], rtol=1e-5)


def test_classifier_free_guidance_of_gaussians_is_the_tilted_one():
    # p(x|c) = N(1, 1), p(x) = N(-0.5, 1): p(x) (p(x|c) / p(x))^w is N(-0.5 + 1.5 w, 1) at every noise level.
    at = [gaussian_denoiser(SCHEDULE, mean, 1.0)(X, T) for mean in (1.0, -0.5, -0.5 + 1.5 * 3.0)]
    guided = classifier_free().rule(at[0], at[1], WIDE, 3.0)
    np.testing.assert_allclose(guided.x0, at[2].x0, atol=2e-5)
    np.testing.assert_allclose(guided.eps, at[2].eps, atol=2e-5)


@pytest.mark.parametrize("space", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_agrees_with_diffusers(phi, space):
    found = in_space(rescaled(phi=phi, space=space), space, GOLDEN["positive"], GOLDEN["negative"], 7.5)
    theirs = GOLDEN[f"rescaled/{phi}"]
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("space", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("case", range(5))
def test_projection_agrees_with_diffusers(case, space):
    eta, threshold, from_negative, scale = GOLDEN[f"apg/{case}/settings"]
    guidance = apg(
        eta=round(float(eta), 6), norm_threshold=threshold, space=space, from_negative=bool(from_negative)
    )
    found = in_space(guidance, space, GOLDEN["positive"], GOLDEN["negative"], float(scale))
    theirs = GOLDEN[f"apg/{case}/guided"]
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_projection_adds_nothing_along_the_positive():
    positive, negative = pair()
    guided = apg(norm_threshold=0.5).rule(positive, negative, WIDE, 4.0)
    change = guided.x0 - positive.x0
    np.testing.assert_allclose((change * positive.x0).sum(axis=1), 0.0, atol=3e-6)
    assert float(jnp.linalg.norm(change, axis=1).max()) <= 3.0 * 0.5 + 1e-5


def test_apg_without_limits_is_classifier_free_guidance():
    found, plain = (
        g.rule(*pair(), WIDE, 4.0) for g in (apg(eta=1.0, norm_threshold=np.inf), classifier_free())
    )
    np.testing.assert_allclose(found.x0, plain.x0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.eps, plain.eps, rtol=1e-5, atol=1e-5)


def test_cfg_plus_plus_renoises_with_the_negative():
    positive, negative = pair()
    guided = cfg_plus_plus().rule(positive, negative, WIDE, 0.6)
    np.testing.assert_allclose(guided.x0, 0.4 * negative.x0 + 0.6 * positive.x0, atol=1e-5)
    np.testing.assert_array_equal(guided.eps, negative.eps)


def test_a_constant_prediction_can_be_rescaled():
    flat = Estimate(jnp.zeros_like(X), jnp.zeros_like(X))
    assert np.isfinite(rescaled().rule(flat, flat, WIDE, 3.0).x0).all()
    assert np.isfinite(apg().rule(flat, flat, WIDE, 3.0).x0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rescaled(phi=1.5), r"phi is 1.5; expected a number in \[0, 1\]"),
        (lambda: rescaled(space="w"), "space is 'w'; expected one of"),
        (lambda: apg(eta=-0.1), r"eta is -0.1; expected a number in \[0, 1\]"),
        (lambda: apg(norm_threshold=0.0), "norm_threshold is 0.0; expected more than 0"),
        (lambda: apg(space="w"), "space is 'w'; expected one of"),
    ],
)
def test_a_bad_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
