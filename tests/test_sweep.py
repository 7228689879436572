"""Which ways of sampling are compared."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import sweep
from diffjax.cascade import Cascade, TrainedStage
from diffjax.errors import UserError
from diffjax.experiment import build_sampler, build_stage
from diffjax.sweep import up_to, variants
from diffjax.training import ema


@pytest.fixture(scope="module")
def config():
    return importlib.import_module("configs.tiny").get_config()


@pytest.fixture(scope="module")
def cascade(config):
    stages = []
    for name in ("base", "super_resolution"):
        train = config.stages[name].train.copy_and_resolve_references()
        settings = build_sampler(config.stages[name].sampler, name)
        params = {"w": np.float32(1.0)}
        stages.append(
            TrainedStage(name, train, build_stage(train, text_embed=384).stage, settings, params, 6)
        )
    return Cascade(tuple(stages), None, 16, None)


@pytest.fixture
def ways(config, cascade, tmp_path):
    def of(**values):
        changed = config.copy_and_resolve_references()
        changed.evaluate.sweep.update(values)
        return variants(changed, cascade, tmp_path)

    return of


def test_one_setting_is_changed_at_a_time_and_the_configured_one_comes_first(ways):
    found = ways(guidance_scale=(1.0, 4.0), num_steps=(2, 5), solver=("heun",))
    # Two steps are what is configured.
    assert [way.changes for way in found] == [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"num_steps": 5},
        {"solver": "heun"},
    ]
    settings = [way.cascade.stages[0].settings for way in found]
    assert [s.guidance_scale for s in settings] == [2.0, 1.0, 4.0, 2.0, 2.0]
    assert [s.num_steps for s in settings] == [2, 2, 2, 5, 2]
    assert settings[4].solver != settings[0].solver
    assert all(way.cascade.stages[1] == found[0].cascade.stages[1] for way in found)
    assert len({str(way.samplers) for way in found}) == len({way.name for way in found}) == 5


def test_a_product_is_all_combinations_and_the_stage_can_be_chosen(ways):
    found = ways(product=True, stage="super_resolution", aug_level=(0.0, 0.3), num_steps=(3, 4))
    changed = [way.cascade.stages[1].settings for way in found[1:]]
    assert sorted((s.aug_level, s.num_steps) for s in changed) == [(0.0, 3), (0.0, 4), (0.3, 3), (0.3, 4)]
    assert found[1].name == "super_resolution: num_steps=3, aug_level=0.0"
    assert all(way.cascade.stages[0] == found[0].cascade.stages[0] for way in found)


def test_parameters_are_averaged_with_the_width_that_is_asked_for(config, cascade, monkeypatch, tmp_path):
    steps, widths = range(1, 7), []
    for step in steps:
        (tmp_path / "base" / "checkpoints" / str(step)).mkdir(parents=True)
    # A parameter that is the number of the step, averaged as a run would have kept it: t^gamma weighs step t,
    # whose mean up to T is T (gamma + 1) / (gamma + 2).
    gamma = ema.gamma_of(ema.SIGMA_REL)
    monkeypatch.setattr(
        sweep.archive,
        "read_arrays",
        lambda path, item: {"w": np.float64(int(path.name) * (gamma + 1.0) / (gamma + 2.0))},
    )
    base = cascade.stages[0]
    kind = type(base.config.ema)({"name": "power_function", "sigma_rel": ema.SIGMA_REL})
    trained = base.config.copy_and_resolve_references()
    with trained.unlocked():
        trained.ema = kind
    base = dataclasses.replace(base, config=trained, params={"w": jnp.float32(0.0)})
    changed = config.copy_and_resolve_references()
    changed.evaluate.sweep.sigma_rel = (0.08, ema.SIGMA_REL, 0.15)
    given = dataclasses.replace(cascade, stages=(base, cascade.stages[1]))
    for way in variants(changed, given, tmp_path)[1:]:
        widths.append(float(way.cascade.stages[0].params["w"]))
    assert widths[1] == pytest.approx(6 * (gamma + 1.0) / (gamma + 2.0), rel=1e-5)  # the one that was kept
    for sigma_rel, value in zip((0.08, 0.15), (widths[0], widths[2]), strict=True):
        own = ema.gamma_of(sigma_rel)
        assert value == pytest.approx(6 * (own + 1.0) / (own + 2.0), rel=0.03)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"solver": ("dimm",)}, ["evaluate.sweep", "'dimm'", "ddim"]),
        ({"aug_level": (0.1,)}, ["aug_level", "evaluate.sweep.stage"]),
        ({"sigma_rel": (0.1,)}, ["sigma_rel", "power_function"]),
        ({"num_steps": (0,)}, ["num_steps=0"]),
        ({"stage": "sr", "num_steps": (3,)}, ["evaluate.sweep.stage='sr'", "super_resolution"]),
    ],
)
def test_what_cannot_be_tried_is_named(ways, values, words):
    with pytest.raises(UserError) as error:
        ways(**values)
    for word in words:
        assert word in str(error.value)


def test_a_cascade_ends_where_it_is_told(cascade):
    assert up_to(cascade, "") is cascade
    assert [item.name for item in up_to(cascade, "base").stages] == ["base"]
    with pytest.raises(UserError, match=r"evaluate\.stage='bas' does not exist; did you mean base"):
        up_to(cascade, "bas")
