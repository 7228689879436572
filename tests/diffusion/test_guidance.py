from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser

from diffjax.diffusion.guidance import (
    SCALES,
    Pair,
    cosine_in_time,
    guided,
    in_turn,
    linear_in_time,
    modulate,
    one_batch,
    over_frames,
    several,
    with_momentum,
)
from diffjax.diffusion.guidance_rules import GUIDANCES, apg, classifier_free
from diffjax.diffusion.predictions import Estimate
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import cosine, expand
from diffjax.diffusion.solvers.ancestral import ddim
from diffjax.diffusion.solvers.base import Solver, evaluate, no_memory

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guidance.npz")
SCHEDULE = cosine()
X = jnp.linspace(-2.0, 2.0, 12).reshape(3, 4)
T = jnp.array([0.2, 0.5, 0.9])
COND, NULL = {"shift": jnp.array([1.0, 2.0, 3.0])}, {"shift": jnp.array([-1.0, 0.0, 0.5])}

each_rule = pytest.mark.parametrize("name", GUIDANCES)


def spy(fraction=False):
    """A denoiser bound to a condition, and the batches that it was evaluated with."""
    seen = []

    def denoiser_of(cond):
        def denoise(x, t):
            seen.append(x.shape)
            coeffs = expand(SCHEDULE(t), x)
            x0 = jnp.tanh(x) + cond["shift"][:, None] * t[:, None]
            share = jnp.broadcast_to(cond["shift"][:, None], x.shape) if fraction else None
            return Estimate(x0, (x - coeffs.alpha * x0) / coeffs.sigma, share)

        return denoise

    return denoiser_of, seen


def gaussian_of(mean):
    """Denoises N(mean, 1), a mean for each example."""

    def denoise(x, t):
        at_zero = gaussian_denoiser(SCHEDULE, 0.0, 1.0)(x - expand(SCHEDULE(t), x).alpha * mean[:, None], t)
        return Estimate(at_zero.x0 + mean[:, None], at_zero.eps)

    return denoise


def assert_same(found, wanted, **tolerance):
    for part, other in zip(found, wanted, strict=True):
        if other is not None:
            np.testing.assert_allclose(part, other, **(tolerance or {"rtol": 1e-5, "atol": 2e-5}))


@pytest.mark.parametrize("fraction", [False, True])
def test_one_batch_and_in_turn_are_the_same_pair(fraction):
    denoiser_of, seen = spy(fraction)
    joint = one_batch(denoiser_of, COND, NULL)
    apart = in_turn(denoiser_of(COND), denoiser_of(NULL))
    both = joint.both(X, T)
    assert seen == [(6, 4)]
    for found, wanted in zip(both, apart.both(X, T), strict=True):
        assert_same(found, wanted)
    assert seen[1:] == [(3, 4), (3, 4)]
    assert_same(joint.positive(X, T), apart.positive(X, T))


@each_rule
@pytest.mark.parametrize("scale", [1, 1.0])
def test_a_number_at_which_it_is_off_costs_one_pass(name, scale):
    denoiser_of, seen = spy()
    guidance = GUIDANCES[name]()
    guided(one_batch(denoiser_of, COND, NULL), guidance, SCHEDULE, scale)(X, T)
    assert seen == [(3, 4) if guidance.off_at == 1.0 else (6, 4)]


# The others change the contrast of the negative, or lead only partly away from it.
@pytest.mark.parametrize("name", ["classifier_free", "cfg_plus_plus"])
def test_a_scale_of_zero_is_the_negative(name):
    denoiser_of, _ = spy()
    found = guided(one_batch(denoiser_of, COND, NULL), GUIDANCES[name](), SCHEDULE, 0.0)(X, T)
    assert_same(found, denoiser_of(NULL)(X, T))


@each_rule
def test_a_traced_scale_of_one_has_the_positive_x0(name):
    denoiser_of, _ = spy()
    pair = one_batch(denoiser_of, COND, NULL)
    found = jax.jit(lambda scale: guided(pair, GUIDANCES[name](), SCHEDULE, scale)(X, T))(1.0)
    np.testing.assert_allclose(found.x0, denoiser_of(COND)(X, T).x0, rtol=1e-5, atol=1e-5)


@each_rule
def test_another_scale_does_not_compile_again(name):
    denoiser_of, _ = spy()

    @jax.jit
    def run(scale, x):
        denoise = guided(one_batch(denoiser_of, COND, NULL), GUIDANCES[name](), SCHEDULE, scale, (0.1, 0.8))
        return sample(
            denoise,
            SCHEDULE,
            ddim(),
            keys=jax.random.split(jax.random.key(0), 3),
            shape=(4,),
            times=jnp.linspace(1.0, 0.0, 5),
            start=x,
        )

    results = [run(scale, X) for scale in (0.2, 0.5, 1.0)]
    assert run._cache_size() == 1
    assert np.abs(results[0] - results[2]).max() > 1e-3


@pytest.mark.parametrize("name", ["classifier_free", "cfg_plus_plus"])
def test_every_form_of_a_scale(name):
    denoiser_of, _ = spy()
    pair = in_turn(denoiser_of(COND), denoiser_of(NULL))

    def x0(scale):
        return guided(pair, GUIDANCES[name](), SCHEDULE, scale)(X, T).x0

    with_cond, without = (e.x0 for e in pair.both(X, T))
    of_each, of_pixels = jnp.array([0.5, 2.0, 3.0]), jnp.arange(4.0)[None]
    for scale, weights in (
        (3.0, 3.0),
        (jnp.float32(3.0), 3.0),
        (of_each, of_each[:, None]),
        (of_pixels, of_pixels),
        (lambda t: 2.0 * t, 2.0 * T[:, None]),
    ):
        np.testing.assert_allclose(x0(scale), without + weights * (with_cond - without), atol=2e-5)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_in_time_goes_from_the_noise_to_the_data(name):
    scale = SCALES[name](low=1.5, high=4.0)
    values = np.asarray(scale(jnp.linspace(1.0, 0.0, 11)))
    np.testing.assert_allclose(values[[0, 5, 10]], [1.5, 2.75, 4.0], atol=1e-6)
    assert (np.diff(values) > 0.0).all()


def test_scales_in_time_are_the_published_ones():
    t = np.linspace(0.0, 1.0, 7)
    # Wang et al. (2024), whose weights have the mean of the constant one: 2 (1 - t) w and (1 + cos(pi t)) w.
    np.testing.assert_allclose(linear_in_time(low=0.0, high=6.0)(t), 2.0 * (1.0 - t) * 3.0, atol=1e-6)
    np.testing.assert_allclose(
        cosine_in_time(low=0.0, high=6.0)(t), (1.0 + np.cos(np.pi * t)) * 3.0, atol=1e-5
    )
    power = (1.0 - np.cos(np.pi * (1.0 - t) ** 4)) / 2.0 * 3.0  # MDT's power cosine
    np.testing.assert_allclose(cosine_in_time(low=0.0, high=3.0, power=4.0)(t), power, atol=1e-6)


def test_frames_have_scales_of_their_own():
    video = jnp.ones((2, 5, 2, 2, 3))
    pair = in_turn(lambda x, t: Estimate(x, x), lambda x, t: Estimate(0.0 * x, 0.0 * x))
    found = guided(pair, classifier_free(), SCHEDULE, over_frames(1.0, 3.0, 5))(video, T[:2]).x0
    for frame, scale in enumerate([1.0, 1.5, 2.0, 2.5, 3.0]):
        np.testing.assert_allclose(found[:, frame], scale)


@each_rule
def test_outside_the_interval_there_is_no_guidance(name):
    denoiser_of, _ = spy()
    pair = one_batch(denoiser_of, COND, NULL)
    found = guided(pair, GUIDANCES[name](), SCHEDULE, 0.5, (0.3, 0.7))(X, T)  # T is 0.2, 0.5, 0.9
    within = guided(pair, GUIDANCES[name](), SCHEDULE, 0.5)(X, T)
    plain = pair.positive(X, T)
    for part, led, unled in zip(found[:2], within[:2], plain[:2], strict=True):
        np.testing.assert_allclose(part, jnp.stack([unled[0], led[1], unled[2]]), atol=2e-6)
        assert np.abs(part[1] - unled[1]).max() > 1e-3


def test_outside_the_interval_the_negative_is_not_evaluated():
    evaluated = []

    def count(x, t):
        jax.debug.callback(lambda t: evaluated.append(float(t)), t[0])
        return Estimate(x, x)

    denoise = jax.jit(guided(in_turn(spy()[0](COND), count), classifier_free(), SCHEDULE, 2.0, (0.3, 0.7)))
    for t in (0.1, 0.3, 0.5, 0.7, 0.8):
        jax.block_until_ready(denoise(X, jnp.full((3,), t)))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(evaluated), [0.3, 0.5, 0.7])


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.3), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_bad_interval_is_refused(interval):
    with pytest.raises(ValueError, match=r"interval is .*; expected \(low, high\)"):
        guided(Pair(None, None), classifier_free(), SCHEDULE, 2.0, interval)


@each_rule
def test_guidance_works_under_jit(name):
    denoiser_of, _ = spy(fraction=True)
    denoise = guided(one_batch(denoiser_of, COND, NULL), GUIDANCES[name](), SCHEDULE, 0.5, (0.1, 0.6))
    assert_same(jax.jit(denoise)(X, T), denoise(X, T))


def test_two_conditions_are_a_product_of_experts():
    # prior N(-0.5, 1); p(x) prod_k (p(x|c_k) / p(x))^w_k is N(-0.5 + sum_k w_k (m_k + 0.5), 1).
    means = [jnp.full((3,), m) for m in (1.0, -2.0)]
    found = several(gaussian_of, jnp.full((3,), -0.5), means, (2.0, jnp.array([0.5, 0.0, 1.0])))(X, T)
    wanted = gaussian_of(-0.5 + 2.0 * 1.5 + jnp.array([0.5, 0.0, 1.0]) * -1.5)(X, T)
    assert_same(found, wanted)


def test_chained_conditions_are_those_of_instruct_pix2pix():
    denoiser_of, seen = spy(fraction=True)
    image, text = COND, {"shift": jnp.array([0.3, -0.7, 2.0])}
    found = several(denoiser_of, NULL, (image, text), (1.5, 7.5), chained=True)(X, T)
    assert seen == [(9, 4)]
    uncond, with_image, with_text = (denoiser_of(c)(X, T) for c in (NULL, image, text))
    for k in range(2):  # equation 3 of the paper
        wanted = uncond[k] + 1.5 * (with_image[k] - uncond[k]) + 7.5 * (with_text[k] - with_image[k])
        np.testing.assert_allclose(found[k], wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found.fraction, with_text.fraction)


def test_one_of_several_conditions_is_classifier_free_guidance():
    denoiser_of, _ = spy()
    pair = one_batch(denoiser_of, COND, NULL)
    for chained in (False, True):
        found = several(denoiser_of, NULL, [COND], [2.5], chained=chained)(X, T)
        assert_same(found, guided(pair, classifier_free(), SCHEDULE, 2.5)(X, T))


@pytest.mark.parametrize(("conds", "scales"), [([], []), ([COND], [1.0, 2.0])])
def test_conditions_need_a_scale_each(conds, scales):
    with pytest.raises(ValueError, match="expected a scale for each"):
        several(spy()[0], NULL, conds, scales)


@pytest.mark.parametrize("momentum", [-0.5, 0.25])
def test_momentum_agrees_with_diffusers(momentum):
    """A trajectory whose step k sees the k-th pair; in theirs the prediction is x0."""
    positives, negatives = (jnp.asarray(GOLDEN[f"momentum/{sign}"]) for sign in ("positive", "negative"))
    steps = len(positives)

    def seer(outputs):
        def denoise(x, t):
            coeffs, number = expand(SCHEDULE(t), x), jnp.round((0.9 - t[0]) * 10.0).astype(int)
            return Estimate(outputs[number], (x - coeffs.alpha * outputs[number]) / coeffs.sigma)

        return denoise

    shower = Solver(
        no_memory, lambda denoise, schedule, x, t, s, keys, carry: (evaluate(denoise, x, t).x0, carry), 1
    )
    guidance = apg(eta=0.25, norm_threshold=9.0, from_negative=False)
    pair = in_turn(seer(positives), seer(negatives))
    # Theirs starts at the positive and counts the scale from there: 3 is a scale of 4.
    solver = with_momentum(
        shower, pair, lambda pair: guided(pair, guidance, SCHEDULE, 4.0), momentum=momentum
    )
    found = sample(
        pair.positive,
        SCHEDULE,
        solver,
        keys=jax.random.split(jax.random.key(0), 2),
        shape=positives.shape[2:],
        times=0.9 - 0.1 * np.arange(steps + 1),
        trajectory=True,
    )[1:]
    theirs = GOLDEN[f"momentum/{momentum}"]
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=2e-5 * np.abs(theirs).max())


def test_momentum_of_zero_is_none():
    denoiser_of, _ = spy()
    pair = one_batch(denoiser_of, COND, NULL)
    settings = {
        "keys": jax.random.split(jax.random.key(0), 3),
        "shape": (4,),
        "times": np.linspace(1.0, 0.0, 5),
        "start": X,
    }

    def denoiser_of_pair(pair):
        return guided(pair, apg(), SCHEDULE, 3.0)

    solver = with_momentum(ddim(), pair, denoiser_of_pair, momentum=0.0)
    found = sample(pair.positive, SCHEDULE, solver, **settings)
    plain = sample(denoiser_of_pair(pair), SCHEDULE, ddim(), **settings)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
    assert (solver.order, solver.rises) == (1, False)


def test_momentum_of_guidance_that_is_off_is_none():
    pair = one_batch(spy()[0], COND, NULL)
    solver = with_momentum(ddim(), pair, lambda pair: guided(pair, apg(), SCHEDULE, 1.0))
    step = (SCHEDULE, X, jnp.float32(0.6), jnp.float32(0.5), jax.random.split(jax.random.key(0), 3))
    found, _ = solver.step(pair.positive, *step, solver.init(X, jnp.array([0.6, 0.5])))
    np.testing.assert_allclose(found, ddim().step(pair.positive, *step, ())[0])


def test_modulation_leads_from_the_negative_to_the_positive():
    pooled, positive, negative = (jnp.full((2, 3), value) for value in (1.0, 5.0, 2.0))
    np.testing.assert_array_equal(modulate(pooled, positive, negative, 0.0), pooled)
    np.testing.assert_array_equal(modulate(pooled, positive, negative, 3.0), jnp.full((2, 3), 10.0))
