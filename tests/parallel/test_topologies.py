"""Devices that are not there: what their compilers are asked for, and what is said without them."""

import os
from types import SimpleNamespace

import pytest

from diffjax.errors import UserError
from diffjax.parallel.chips import chip_of
from diffjax.parallel.topologies import GPUS, topology_devices


@pytest.fixture
def asked(monkeypatch):
    """What a compiler is asked for that knows all devices."""
    found = []

    def describe(**settings):
        found.append(settings)
        return SimpleNamespace(devices=["a device"])

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    monkeypatch.setattr(os, "environ", {})
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("v5e:4x4", {"topology_name": "v5e:4x4"}),
        ("2xv5e:4x4", {"topology_name": "v5e:4x4", "num_slices": 2}),
        ("16xv4:2x2x4", {"topology_name": "v4:2x2x4", "num_slices": 16, "chip_config_name": "megacore"}),
        ("tpu7x:2x2", {"topology_name": "tpu7x:2x2"}),
    ],
)
def test_several_slices_are_a_number_before_the_name(name, settings, asked):
    assert topology_devices(name) == ["a device"]
    assert asked == [{"platform": "tpu", **settings}]


@pytest.mark.parametrize(("name", "count"), [("h200", 1), ("h100:8", 8), ("a100:4", 4)])
def test_gpus_are_named_with_their_number(name, count, asked):
    assert topology_devices(name) == ["a device"]
    (settings,) = asked
    assert (settings["platform"], settings["topology"]) == ("cuda", f"1x1x{count}")
    gpu = GPUS[name.split(":")[0]]
    assert f'device_description_str: "{gpu.kind}"' in settings["target_config"]
    assert f"major: {gpu.capability[0]} minor: 0" in settings["target_config"]
    assert chip_of(SimpleNamespace(device_kind=gpu.kind, platform="gpu")).flops > 0


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "plan"), ("h200", "plan_gpu"), ("h200:0", "plan")])
def test_without_the_compiler_its_extra_is_named(name, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--topology={name}.*pip install 'diffjax\[{extra}\]'"):
        topology_devices(name)


@pytest.mark.parametrize("name", ["v5e:nonsense", "h200"])
def test_what_a_compiler_says_is_passed_on(name, asked, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(UserError, match=rf"--topology={name}: no such thing\n"):
        topology_devices(name)
