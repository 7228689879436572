import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gaussian_denoiser, mixture_denoiser

from diffjax.diffusion.denoiser import make_denoiser
from diffjax.diffusion.grids import uniform
from diffjax.diffusion.noise import normal_like
from diffjax.diffusion.predictions import PREDICTIONS, Estimate, combine
from diffjax.diffusion.sampling import sample
from diffjax.diffusion.schedules import cosine, expand, linear_flow, logsnr
from diffjax.diffusion.solvers import SOLVERS, Solver
from diffjax.diffusion.solvers.ancestral import ddim, ddpm
from diffjax.diffusion.solvers.base import no_memory

SCHEDULE = cosine()


def draw(keys, *, denoise=None, schedule=SCHEDULE, solver=None, steps=5, shape=(2, 2, 3)):
    denoise = denoise or gaussian_denoiser(schedule, 0.3, 0.5)
    solver = solver or ddpm()
    return jax.jit(
        lambda keys: sample(
            denoise, schedule, solver, keys=keys, shape=shape, times=uniform()(SCHEDULE, steps)
        )
    )(keys)


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_image_depends_on_its_key_alone(name):
    keys, solver = keys_of(5), SOLVERS[name]()
    together = draw(keys, solver=solver)
    assert together.dtype == jnp.float32
    assert together.shape == (5, 2, 2, 3)
    # Programs for other batches round otherwise; these two solvers magnify it where alpha begins at zero.
    near = {"rtol": 2e-3 if name in ("dpm_solver", "dpm2") else 1e-5, "atol": 1e-6}
    for chosen in ([3], [4, 2, 0]):
        rows = jnp.array(chosen)
        np.testing.assert_allclose(draw(keys[rows], solver=solver), together[rows], **near)
    assert float(jnp.abs(together[0] - together[1]).max()) > 0.01
    np.testing.assert_array_equal(together, draw(keys, solver=solver))


def test_each_step_has_noise_of_its_own():
    """Equal draws would add up to more than the unit variance of independent ones."""
    steps, count = 20, 4000
    samples = draw(
        keys_of(count),
        denoise=gaussian_denoiser(SCHEDULE, 0.0, 1.0),
        solver=ddpm(variance="large"),
        steps=steps,
        shape=(1,),
    )
    assert abs(float(samples.std()) - 1.0) < 0.05


def test_the_first_step_does_not_repeat_the_noise_of_the_start():
    still = Solver(no_memory, lambda denoise, schedule, x, t, s, keys, carry: (x, carry), 1)
    noise = Solver(
        no_memory, lambda denoise, schedule, x, t, s, keys, carry: (normal_like(keys, x), carry), None
    )
    start, first = (
        np.asarray(draw(keys_of(1), solver=solver, steps=1, shape=(4000,))) for solver in (still, noise)
    )
    np.testing.assert_allclose([start.std(), first.std()], 1.0, atol=0.05)
    assert abs(np.corrcoef(start, first)[0, 1]) < 0.06


def test_the_result_is_the_data_not_its_share_of_the_last_level():
    schedule = cosine(logsnr_max=2.0)  # where noise is still an eighth of the variance
    samples = draw(
        keys_of(2),
        denoise=lambda x, t: Estimate(jnp.full_like(x, 0.7), jnp.zeros_like(x)),
        schedule=schedule,
        solver=ddim(),
    )
    np.testing.assert_allclose(samples, 0.7, rtol=1e-5)


@pytest.mark.parametrize("steps", [3, 50])
def test_the_trajectory_is_one_loop_of_constant_memory(steps):
    denoise = gaussian_denoiser(SCHEDULE, 0.0, 1.0)

    def run(keys):
        return sample(denoise, SCHEDULE, ddpm(), keys=keys, shape=(8, 8, 3), times=uniform()(SCHEDULE, steps))

    jaxpr = jax.make_jaxpr(run)(keys_of(2))
    (loop,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert loop.params["length"] == steps
    assert not [equation for equation in jaxpr.eqns if equation.primitive.name == "while"]
    # Nothing is stacked over the steps: the largest output is the batch itself.
    assert max(out.aval.size for out in loop.outvars) == 2 * 8 * 8 * 3


def test_a_program_does_not_grow_with_the_number_of_steps():
    def size(steps):
        lowered = jax.jit(
            lambda keys: sample(
                gaussian_denoiser(SCHEDULE, 0.0, 1.0),
                SCHEDULE,
                ddim(),
                keys=keys,
                shape=(2,),
                times=uniform()(SCHEDULE, steps),
            )
        ).lower(keys_of(2))
        return lowered.as_text().count("\n")

    assert size(4) == size(400)


@pytest.mark.parametrize("schedule", [cosine(), linear_flow()], ids=["cosine", "flow"])
@pytest.mark.parametrize("solver", [ddim(), ddim(eta=1.0), ddpm()], ids=["ddim", "eta1", "ddpm"])
def test_a_mixture_is_sampled_in_its_proportions(schedule, solver):
    count, weights, means, std = 4000, (0.2, 0.8), (-0.8, 0.5), 0.05
    denoise = mixture_denoiser(schedule, weights, means, std)
    samples = np.asarray(
        draw(keys_of(count), denoise=denoise, schedule=schedule, solver=solver, steps=100, shape=(1,))
    )
    left = samples < -0.15
    assert abs(left.mean() - weights[0]) < 4.0 * (0.16 / count) ** 0.5
    for chosen, mean in ((samples[left], means[0]), (samples[~left], means[1])):
        assert abs(chosen.mean() - mean) < 0.01
        assert abs(chosen.std() - std) < 0.01


@pytest.mark.parametrize("name", PREDICTIONS)
def test_any_prediction_samples_the_same_images(name):
    """A network that predicts another quantity of the same denoiser is the same denoiser."""
    exact = gaussian_denoiser(SCHEDULE, 0.3, 0.5)
    row = PREDICTIONS[name]()

    def net(x, level):
        # The time of a log-SNR, to evaluate the oracle there.
        start, end = (np.arctan(np.exp(-bound / 2.0)) for bound in (15.0, -15.0))
        t = (jnp.arctan(jnp.exp(-level / 2.0)) - start) / (end - start)
        wide = expand(SCHEDULE(t), x)
        return combine(row(wide), exact(x, t))

    samples = draw(keys_of(3), denoise=make_denoiser(net, SCHEDULE, row), solver=ddim(), steps=8)
    np.testing.assert_allclose(
        samples, draw(keys_of(3), solver=ddim(), steps=8), atol=2e-3 if name in ("eps", "score") else 1e-4
    )


def test_a_denoiser_tells_the_network_its_log_snr_and_returns_float32():
    seen = []

    def net(x, level):
        seen.append(level)
        return x.astype(jnp.bfloat16)

    t = jnp.array([0.2, 0.9])
    estimate = make_denoiser(net, SCHEDULE, PREDICTIONS["v"]())(jnp.ones((2, 3, 3, 1)), t)
    np.testing.assert_array_equal(seen[0], logsnr(SCHEDULE(t)))
    assert estimate.x0.dtype == estimate.eps.dtype == jnp.float32


def test_times_fall_from_noise_to_data():
    times = uniform()(SCHEDULE, 4)
    np.testing.assert_allclose(times, [1.0, 0.75, 0.5, 0.25, 0.0])
    assert times[-1] == 0.0  # exactly: the last step is recognised by it
    assert uniform()(SCHEDULE, 1000)[-1] == 0.0
    with pytest.raises(ValueError, match="num_steps is 0; expected at least 1"):
        uniform()(SCHEDULE, 0)
