"""The benchmarks run and say what they promise; how fast anything is, is not tested."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, ours, peers, run, timing
from diffjax.models.dit import DiT
from diffjax.nn.placement import unbox
from diffjax.training.state import count_params

NUMBERS = ("parameters", "first_seconds", "seconds", "core_seconds", "images_per_second", "ratio", "load")


def tiny(**peer):
    return cases.Case(
        "tiny DiT",
        lambda **how: DiT(embed=16, depth=2, heads=2, classes=3, text="", **how),
        side=8,
        channels=3,
        batch=2,
        small=True,
        classes=3,
        peer=peer or None,
    )


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What the command writes about some cases."""

    def measure(found, *arguments):
        monkeypatch.setattr(run, "CASES", found)
        monkeypatch.setattr(ours, "matrix_rate", lambda dtype: 1e12)
        file = tmp_path / "results.json"
        run.main([*arguments, "--rounds=2", "--steps=2", f"--json={file}"])
        return json.loads(file.read_text(encoding="utf-8"))

    return measure


def test_every_suite_of_networks_has_its_fields(measured):
    results = measured({"tiny": tiny()}, "--suite", "train", "forward", "sampling", "--peers")
    assert results["hardware"]["platform"] == "cpu"
    assert results["matrix_flops_per_second"] == 1e12
    assert [row["suite"] for row in results["rows"]] == ["train", "forward", "sampling"]
    for row in results["rows"]:
        assert all(row[name] > 0 for name in NUMBERS if name != "load")
        assert row["ratio"] == 1.0
        assert row["batch"] == 2
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
    train, forward, sampling = (row["flops"] for row in results["rows"])
    assert train == 3 * forward
    assert sampling == 2 * forward
    assert len({row["parameters"] for row in results["rows"]}) == 1


def test_absent_peers_and_large_networks_are_said(measured, capsys):
    found = {
        "none": tiny(library="no_such_library", **{"class": "Net", "config": {}}),
        "large": cases.CASES["dit-xl2"],
    }
    rows = measured(found, "--suite", "forward", "--peers", "eager")["rows"]
    notes = {(row["case"], row.get("program")): row["note"] for row in rows if "note" in row}
    assert notes["tiny DiT", "torch eager"].startswith("absent: ModuleNotFoundError")
    assert notes["DiT-XL/2", None] == "skipped on a CPU; ask by --case=large"
    assert "absent" in capsys.readouterr().out


def test_a_peer_is_timed_in_its_own_process():
    peer = peers.Peer(sys.executable)
    with pytest.raises(peers.Absent, match=r"ModuleNotFoundError|Error"):
        peer.build("train", {"peer": {"library": "no_such_library"}}, compiled=False, threads=1)
    with pytest.raises(peers.Absent, match="IndexError"):
        peer.run(0, 1)  # it lives on, and nothing was built
    peer.close()
    with pytest.raises(peers.Absent, match="no/such/python"):
        peers.Peer("no/such/python").run(0, 1)


def test_programs_take_turns():
    order = []
    runs = {
        "a": lambda count: order.append(("a", count)),
        "b": lambda count: order.append(("b", count)) or (6.0, 9.0),
    }
    times = timing.in_turns(runs, rounds=3, count=3)
    assert order == [("a", 3), ("b", 3), ("b", 3), ("a", 3), ("a", 3), ("b", 3)]
    np.testing.assert_array_equal(times["b"], np.tile([2.0, 3.0], (3, 1)))
    assert times["a"].shape == (3, 2)


@pytest.mark.parametrize("name", [name for name, case in cases.CASES.items() if case.small] + ["dit-xl2"])
def test_networks_take_what_they_are_given(name):
    case = cases.CASES[name]
    image, level, cond = case.inputs(2)
    module = case.network(dtype=jnp.float32)
    out, variables = jax.eval_shape(
        lambda *args: module.init_with_output(jax.random.key(0), *args), image, level, cond
    )
    assert out.shape[:-1] == image.shape[:-1]
    assert out.shape[-1] in (case.channels, 2 * case.channels)
    if name == "dit-xl2":
        assert round(count_params(unbox(variables)) / 1e6) == 675
