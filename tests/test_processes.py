"""From a configuration to a loss and to samples, for every entry of every table of the diffusion core."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import stage as stages
from diffjax.config import sampler_config, stage_config
from diffjax.diffusion import resampling
from diffjax.diffusion.couplings import COUPLINGS
from diffjax.diffusion.grids import TIME_GRIDS
from diffjax.diffusion.guidance_rules import GUIDANCES
from diffjax.diffusion.inputs import INPUTS
from diffjax.diffusion.levels import uncertain
from diffjax.diffusion.losses import PENALTIES
from diffjax.diffusion.predictions import PREDICTIONS
from diffjax.diffusion.schedules import SCHEDULES
from diffjax.diffusion.timesteps import TIMESTEPS
from diffjax.diffusion.weightings import WEIGHTINGS
from diffjax.errors import UserError
from diffjax.experiment import build_sampler, build_stage, check_sampler
from diffjax.nn.conditioning import Cond

TABLES = {
    "schedule": SCHEDULES,
    "prediction": PREDICTIONS,
    "target": PREDICTIONS,
    "weighting": WEIGHTINGS,
    "times": TIMESTEPS,
    "inputs": INPUTS,
    "penalty": PENALTIES,
    "coupling": COUPLINGS,
}
EXPLICIT = {"explicit": {"times": (1.0, 0.5, 0.0)}, "explicit_sigmas": {"sigmas": (9.0, 1.0, 0.0)}}


def config_of(**changes):
    config = stage_config()
    config.resolution = config.data.resolution = 8
    config.text.length = 3
    config.model = {"name": "dit", "patch": 4, "embed": 16, "depth": 1, "heads": 2, "cross_attention": False}
    for key, value in changes.items():
        config.diffusion[key] = value
    return config


def batch(count=4, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(random.integers(0, 256, (count, 8, 8, 3)), jnp.uint8),
        "text": jnp.asarray(random.normal(size=(count, 3, 5)), jnp.float32),
        "mask": jnp.ones((count, 3), bool),
        "pooled": jnp.asarray(random.normal(size=(count, 5)), jnp.float32),
    }


@functools.cache
def params_of(channels=3):
    """Parameters without zeros, of the network that all these stages have."""
    model = build_stage(config_of(vlb_weight=1e-3 if channels == 6 else 0.0), text_embed=5)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(random.normal(0.0, 0.2, s.shape), jnp.float32), model.shapes)


def loss_of(stage, params, history=None, data=None):
    run = jax.jit(lambda params, *given: stages.loss(stage, params, *stages.draw(stage, *given, history)))
    return run(params, data or batch(), jax.random.key(0))


def samples_of(stage, settings, params):
    data = batch()
    cond = Cond(data["text"], data["mask"], data["pooled"])
    return jax.jit(functools.partial(stages.sample, stage, settings))(
        params, cond, jax.random.split(jax.random.key(0), 4)
    )


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")
@pytest.mark.parametrize(("key", "name"), [(key, name) for key, table in TABLES.items() for name in table])
def test_every_entry_can_be_trained_with(key, name):
    stage = build_stage(config_of(**{key: {"name": name}}), text_embed=5).stage
    losses = loss_of(stage, params_of())
    assert losses.loss.shape == (4,)
    assert np.isfinite(losses.loss).all()
    assert (losses.loss > 0.0).all()
    np.testing.assert_array_equal(losses.objective, losses.loss)
    assert ((losses.t > 0.0) & (losses.t <= 1.0)).all()


@pytest.mark.parametrize("name", TIME_GRIDS)
def test_every_time_grid_can_be_sampled_with(name):
    stage = build_stage(config_of(), text_embed=5).stage
    solver = {"name": "restart"} if name == "restart" else {"name": "ddim"}
    times = {"name": name, **EXPLICIT.get(name, {})}
    settings = build_sampler(sampler_config(times=times, solver=solver, num_steps=2), "sampler")
    check_sampler(stage, settings, "sampler")
    assert np.isfinite(samples_of(stage, settings, params_of())).all()


@pytest.mark.parametrize("name", GUIDANCES)
def test_every_guidance_can_be_sampled_with_in_one_pass_or_two_and_in_an_interval(name):
    stage = build_stage(config_of(), text_embed=5).stage
    changes = {
        "guidance": {"name": name},
        "num_steps": 3,
        "guidance_scale": 0.7,
        "threshold": {"name": "none"},
    }
    results = [
        samples_of(stage, build_sampler(sampler_config(**changes, **more), "sampler"), params_of())
        for more in ({}, {"two_passes": True}, {"guidance_interval": (0.4, 0.9)})
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)
    assert float(jnp.abs(results[0] - results[2]).max()) > 1e-4


def test_a_learned_variance_is_trained_and_sampled():
    stage = build_stage(config_of(vlb_weight=1e-2), text_embed=5).stage
    params = params_of(channels=6)
    with_bound = loss_of(stage, params).loss

    def spread(scale):
        """The loss when the second half of the output, the variance, is multiplied."""
        last = params["patch_out"]
        half = jnp.tile(jnp.repeat(jnp.array([1.0, scale]), 3), last["bias"].shape[0] // 6)
        changed = {**params, "patch_out": {"kernel": last["kernel"] * half, "bias": last["bias"] * half}}
        return loss_of(stage, changed).loss, changed

    assert float(jnp.abs(spread(0.0)[0] - with_bound).max()) > 1e-6  # the bound sees the variance
    settings = build_sampler(
        sampler_config(solver={"name": "ddpm", "variance": "learned"}, num_steps=3), "sampler"
    )
    images = samples_of(stage, settings, params)
    assert images.shape == (4, 8, 8, 3)
    assert float(jnp.abs(images - samples_of(stage, settings, spread(3.0)[1])).max()) > 1e-3
    plain = build_stage(config_of(), text_embed=5).stage
    with pytest.raises(ValueError, match="learns no variance"):
        samples_of(plain, settings, params_of())


def test_times_are_drawn_by_their_losses():
    model = build_stage(config_of(resample=True), text_embed=5)
    history = model.history
    for t in np.repeat((np.arange(100) + 0.5) / 100, 10):  # only the losses around t = 0.3 are large
        history = resampling.update(history, jnp.array([t]), jnp.array([50.0 if 0.3 < t < 0.31 else 1e-3]))
    losses = loss_of(model.stage, params_of(), history, batch(64))
    assert np.mean((losses.t > 0.3) & (losses.t < 0.31)) > 0.9
    weight = losses.objective / losses.loss
    np.testing.assert_allclose(weight, resampling.draw(history, jax.random.key(0), 64)[1].min(), rtol=0.2)
    assert build_stage(config_of(), text_embed=5).history is None


def test_the_uncertainty_is_learned_beside_the_network():
    model = build_stage(config_of(uncertainty=True), text_embed=5)
    start = model.init(jax.random.key(0))
    losses = loss_of(model.stage, {**start, "net": params_of()})
    np.testing.assert_array_equal(losses.objective, losses.loss)  # it starts at zero
    random = np.random.default_rng(1)
    params = {
        "net": params_of(),
        "uncertainty": jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), start["uncertainty"]),
    }
    changed = loss_of(model.stage, params)
    u = model.stage.uncertainty(params, changed.logsnr)
    np.testing.assert_array_equal(changed.loss, losses.loss)
    np.testing.assert_allclose(changed.objective, uncertain(losses.loss, u), rtol=1e-4, atol=1e-5)
    assert float(jnp.std(u)) > 0.1
    settings = build_sampler(sampler_config(num_steps=2), "sampler")
    plain = build_stage(config_of(), text_embed=5).stage
    np.testing.assert_allclose(
        samples_of(model.stage, settings, params), samples_of(plain, settings, params_of()), atol=1e-6
    )


def test_given_pairs_take_the_place_of_the_noise():
    stage = build_stage(config_of(coupling={"name": "given"}), text_embed=5).stage
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(4, 8, 8, 3)), jnp.float32)
    drawn, given, again = (
        loss_of(stage, params_of(), data=data).loss
        for data in (batch(), {**batch(), "noise": noise}, {**batch(), "noise": noise[::-1]})
    )
    assert float(jnp.abs(drawn - given).min()) > 1e-4
    assert float(jnp.abs(again - given).min()) > 1e-4


def test_the_coupling_chooses_the_noise_of_each_image():
    """A coupling that turns the batch around, against noise that was turned around."""
    stage = build_stage(config_of(), text_embed=5).stage
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(4, 8, 8, 3)), jnp.float32)
    turned = dataclasses.replace(stage, coupling=lambda key, x0, eps: (x0, eps[::-1]))
    found = loss_of(turned, params_of(), data={**batch(), "noise": noise}).loss
    expected = loss_of(stage, params_of(), data={**batch(), "noise": noise[::-1]}).loss
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (
        float(jnp.abs(found - loss_of(stage, params_of(), data={**batch(), "noise": noise}).loss).min()) > 0
    )


def test_a_missing_package_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(UserError, match=r"diffusion.coupling: .* run `pip install 'diffjax\[ot\]'`"):
        build_stage(config_of(coupling={"name": "exact"}), text_embed=5)


SHOULD_FAIL = [
    ({"solver": {"name": "dimm"}}, "sampler.solver.name='dimm' does not exist; did you mean ddim"),
    ({"times": {"name": "zzz"}}, "there are: explicit, .*, karras, "),
    ({"times": {"name": "karras", "sigma_min": 80.0, "sigma_max": 2.0}}, "sigma_min 80.0 must be .* below"),
    ({"times": {"name": "explicit", "times": (1.0, 0.2, 0.4, 0.0)}}, "0.2 is followed by 0.4"),
    ({"times": {"name": "explicit", "times": (1.2, 0.2)}}, r"must lie in \[0, 1\]"),
    ({"times": {"name": "karras", "sigma_max": 1e5}}, r"sigma_max is 100000; .* reaches 1808"),
    ({"guidance_interval": (0.5, 1.5)}, r"guidance_interval=\(0.5, 1.5\); expected"),
    ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
    ({"guidance": {"name": "rescaled", "phi": 2.0}}, r"phi is 2.0; expected"),
    ({"threshold": {"name": "dynamic", "percentile": 3.0}}, "percentile is 3.0"),
    ({"num_steps": 0}, "num_steps=0; expected at least 1"),
]


@pytest.mark.parametrize(("changes", "words"), SHOULD_FAIL)
def test_a_bad_sampler_is_refused_with_a_reason(changes, words):
    stage = build_stage(config_of(), text_embed=5).stage
    with pytest.raises(UserError, match=words):
        check_sampler(stage, build_sampler(sampler_config(**changes), "sampler"), "sampler")


@pytest.mark.parametrize(
    ("schedule", "prediction", "solver", "fails"),
    [
        ("trigonometric", "eps", {"name": "ddim"}, "t = 1"),  # alpha(1) = 0
        ("trigonometric", "v", {"name": "ddim"}, None),
        ("trigonometric", "x0", {"name": "ddim"}, None),
        ("ddpm", "x0", {"name": "heun", "last": "same"}, "t = 0"),  # sigma(0) = 0, and it looks there
        ("ddpm", "x0", {"name": "heun"}, None),
        ("cosine", "eps", {"name": "ddim"}, None),
    ],
)
def test_a_prediction_that_is_singular_where_the_grid_evaluates_it_is_refused(
    schedule, prediction, solver, fails
):
    config = config_of(schedule={"name": schedule}, prediction={"name": prediction})
    stage = build_stage(config, text_embed=5).stage
    settings = build_sampler(sampler_config(solver=solver, num_steps=4), "sampler")
    if fails is None:
        check_sampler(stage, settings, "sampler")
        assert np.isfinite(samples_of(stage, settings, params_of())).all()
    else:
        with pytest.raises(UserError, match=f"sampler: the prediction is singular at {fails}"):
            check_sampler(stage, settings, "sampler")
