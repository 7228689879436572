"""Sets of samples: kept in files, gone on with, and how often networks look at each image."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import samples
from diffjax.cascade import Cascade, TrainedStage
from diffjax.diffusion import predictions, thresholding, timesteps, weightings
from diffjax.diffusion.schedules import cosine
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.solvers.ancestral import ddim, ddpm
from diffjax.diffusion.solvers.multistep import dpmpp_2m
from diffjax.samples import Asked, ask, network_evaluations, sample_set, set_key
from diffjax.stage import SamplerSettings, Stage, sample


def stage(name="base", resolution=8, low_res=0, solver=None, steps=2, scale=1.0, **changes):
    """A stage whose network multiplies by a number."""
    made = Stage(
        net=lambda params, x, level, cond: params["w"] * x,
        schedule=cosine(),
        prediction=predictions.v,
        target=predictions.v,
        weighting=weightings.unit(),
        times=timesteps.uniform(),
        resolution=resolution,
        low_res=low_res,
        conditions=(),
    )
    settings = SamplerSettings(solver or ddpm(), steps, scale, thresholding.static(), **changes)
    return TrainedStage(name, None, made, settings, {"w": jnp.float32(0.1)}, 1)


def cascade():
    mesh = jax.make_mesh(
        (8, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()
    )
    return Cascade((stage(), stage("sr", 16, 8, ddim())), None, 3, mesh)


def test_every_caption_comes_before_any_comes_again():
    assert ask("abcdef", 3) == Asked([0, 2, 4], ["a", "c", "e"], [0, 0, 0])
    assert ask("abc", 7) == Asked([0, 1, 2, 0, 1, 2, 0], list("abcabca"), [0, 0, 0, 1, 1, 1, 2])


@pytest.fixture
def counted(monkeypatch):
    """How many batches were sampled."""
    calls = []
    real = samples.generate
    monkeypatch.setattr(samples, "generate", lambda *args, **more: calls.append(1) or real(*args, **more))
    return calls


def collect(folder, asked, **more):
    parts = list(sample_set(cascade(), asked, folder, seed=0, batch_size=8, log=lambda line: None, **more))
    return [np.concatenate(stages) for stages in zip(*parts, strict=True)]


def test_a_set_that_was_stopped_goes_on_with_what_is_missing_and_is_the_same(tmp_path, counted):
    asked = ask(list("abcdef"), 20)
    whole = collect(tmp_path / "whole", asked)
    assert [part.shape for part in whole] == [(20, 8, 8, 3), (20, 16, 16, 3)]
    assert len(np.unique(whole[1].reshape(20, -1), axis=0)) == 20
    assert len(counted) == 3
    assert len(list((tmp_path / "whole").glob("*.npy"))) == 6

    (tmp_path / "whole" / "000008-sr.npy").unlink()  # as if it had been stopped there
    (tmp_path / "whole" / "000016-base.npy").write_bytes(b"half a file")
    again = collect(tmp_path / "whole", asked)
    assert len(counted) == 5
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    collect(tmp_path / "whole", asked)
    assert len(counted) == 5


def test_a_file_of_another_shape_or_with_objects_is_not_taken(tmp_path, counted):
    asked = ask(["a"], 8)
    collect(tmp_path, asked)
    for wrong in (np.zeros((8, 4, 4, 3), np.uint8), np.zeros((8, 8, 8, 3)), np.array([{}] * 8)):
        np.save(tmp_path / "000000-base.npy", wrong, allow_pickle=True)
        before = len(counted)
        collect(tmp_path, asked)
        assert len(counted) == before + 1


def test_the_key_tells_all_that_changes_images_apart():
    one, asked = cascade(), ask(["a", "b"], 4)
    samplers = {"base": {"num_steps": 2}, "sr": {"num_steps": 2}}
    base, sr = one.stages
    trained = dataclasses.replace(one, stages=(dataclasses.replace(base, params={"w": jnp.float32(0.2)}), sr))
    keys = [
        set_key(one, samplers, asked, 0, 8),
        set_key(trained, samplers, asked, 0, 8),
        set_key(one, {**samplers, "sr": {"num_steps": 3}}, asked, 0, 8),
        set_key(one, samplers, ask(["a", "c"], 4), 0, 8),
        set_key(one, samplers, asked, 1, 8),
        set_key(one, samplers, asked, 0, 8, np.zeros((4, 8, 8, 3), np.uint8)),
    ]
    assert len(set(keys)) == len(keys)
    assert set_key(one, json.loads(json.dumps(samplers)), asked, 0, 8) == keys[0]


@pytest.mark.parametrize(
    "item",
    [
        stage(steps=3),
        stage(steps=3, scale=2.0),
        stage(steps=3, scale=2.0, two_passes=True),
        stage(steps=4, solver=SOLVERS["heun"]()),
        stage(steps=4, solver=dpmpp_2m(), scale=3.0),
        stage("sr", 16, 4, ddim(), steps=5),
    ],
    ids=["ddpm", "guided", "two passes", "heun", "dpmpp_2m guided", "super-resolution"],
)
def test_evaluations_are_as_many_as_the_network_is_called(item):
    calls = []

    def net(params, x, level, cond):
        calls.append(len(x))
        return 0.1 * x

    counting = dataclasses.replace(item.stage, net=net)
    low_res = jnp.zeros((1, 4, 4, 3)) if item.stage.low_res else None
    cond = samples.Cond()
    with jax.disable_jit():  # a loop is then Python's, and every call is seen
        sample(counting, item.settings, None, cond, jax.random.split(jax.random.key(0), 1), low_res)
    assert network_evaluations(item) == sum(calls) > 0
