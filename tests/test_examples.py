"""Which examples are trained on: the same batches however the bad ones are found, and by however many."""

import json
import os
import subprocess
import sys

import numpy as np
import program
import pytest
from pictures import EMPTY, TRUNCATED, write_pictures

from diffjax.config import stage_config
from diffjax.errors import UserError
from diffjax.experiment import build_loader, build_source, open_rejects, usable_examples


def config_of(folder, cache_dir, **data):
    config = stage_config()
    config.resolution, config.batch_size, config.conditions = 8, 8, ()
    config.data.update(source="folder", folder=str(folder), cache_dir=str(cache_dir), resolution=16)
    config.data.update(num_threads=2, max_rejects=0.5, **data)
    return config


def opened(config, workdir, *, resumed=False):
    said = []
    rejects = open_rejects(config, workdir, resumed=resumed, log=said.append)
    source = usable_examples(config, build_source(config.data), rejects, log=said.append)
    return build_loader(config, source, None, rejects=rejects), rejects, said


def take(loader, count):
    return [next(loader) for _ in range(count)]


def named(path):
    return {entry["key"]: entry["reason"] for entry in map(json.loads, path.read_text().splitlines())}


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("why", ["decode", "latents"])
def test_what_is_known_before_is_as_if_it_had_never_been_there(tmp_path, why):
    bad, good = (
        write_pictures(tmp_path / "bad"),
        write_pictures(tmp_path / "good", leave_out=TRUNCATED + EMPTY),
    )
    config = config_of(bad, tmp_path / "cache", flip=True, check="decode" if why == "decode" else "header")
    config.latent.cache = why == "latents"
    loader, rejects, said = opened(config, tmp_path / "run")
    others, none, _ = opened(config_of(good, tmp_path / "cache", flip=True), tmp_path / "other")
    assert_equal(take(loader, 12), take(others, 12))
    assert loader.get_state() == others.get_state()
    assert len(none) == 0
    found = named(rejects.path)
    assert set(found) == {f"{i:02d}.jpg" for i in TRUNCATED + EMPTY}
    assert len(set(found.values())) == 2
    assert "4 of 24 examples are left out" in said[-1]

    _, rejects, said = opened(config, tmp_path / "run", resumed=True)
    assert "Checking" not in "".join(said)  # the findings are kept
    assert len(rejects) == 4
    assert len(named(rejects.path)) == 4


def test_what_is_met_in_training_is_replaced(tmp_path):
    config = config_of(write_pictures(tmp_path / "bad"), tmp_path / "cache")
    loader, rejects, _ = opened(config, tmp_path / "run")
    assert list(named(rejects.path)) == ["05.jpg"]  # its header is no header
    seen = np.concatenate([batch["index"] for batch in take(loader, 12)])
    keys = [f"{i:02d}.jpg" for i in range(24) if i not in EMPTY]
    assert {keys[i] for i in seen} == {f"{i:02d}.jpg" for i in range(24) if i not in TRUNCATED + EMPTY}
    assert len(named(rejects.path)) == 4


def test_too_many_are_refused_before_the_training(tmp_path):
    config = config_of(write_pictures(tmp_path / "bad"), tmp_path / "cache", check="decode")
    config.data.max_rejects = 0.1
    with pytest.raises(UserError, match=r"4 of 24 examples cannot be used, more than data.max_rejects=0.1"):
        opened(config, tmp_path / "run")
    assert len(named(tmp_path / "run" / "rejects.jsonl")) == 4


def test_no_usable_picture_and_a_wrong_setting(tmp_path):
    folder = write_pictures(tmp_path / "bad", 3, truncated=range(3), empty=())
    config = config_of(folder, tmp_path / "cache", check="decode")
    config.data.max_rejects = 1.0
    with pytest.raises(UserError, match="None of the 3 examples"):
        opened(config, tmp_path / "run")
    config.data.check = "everything"
    with pytest.raises(
        UserError, match=r"data\.check='everything' does not exist; there are: decode, header"
    ):
        opened(config, tmp_path / "run")


# argv: the coordinator, the number of this process, its folder of pictures, that of all else, data.check.
PROCESS = """
import sys
from pathlib import Path
import numpy as np
from diffjax.parallel import hosts
hosts.start(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, "tests")
import test_examples
from diffjax.experiment import build_loader, build_source, open_rejects, usable_examples
where, number = Path(sys.argv[4]), int(sys.argv[2])
config = test_examples.config_of(sys.argv[3], where / "cache", check=sys.argv[5])
rejects = open_rejects(config, where / "run", resumed=False)
source = usable_examples(config, build_source(config.data), rejects)
rows = range(4 * number, 4 * number + 4)
loader = build_loader(config, source, None, rows=rows, rejects=rejects)
batches = [next(loader) for _ in range(12)]
np.savez(where / f"{number}.npz", **{name: np.stack([b[name] for b in batches]) for name in batches[0]})
hosts.wait("the end")
"""


def two_processes(folders, where, check):
    address = f"127.0.0.1:{program.free_port()}"
    environment = program.environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), str(folders[i]), str(where), check],
            cwd=program.ROOT,
            env=environment
            | {"PYTHONPATH": os.pathsep.join([str(program.ROOT), str(program.ROOT / "tests")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    statuses, outputs, _ = program.finish(*started, timeout=120)
    return list(zip(outputs, statuses, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["header", "decode"])
def test_two_processes_whose_shares_hold_unequally_many_bad_ones(tmp_path, check):
    """All are met by some process and not by the other; the batches are those of one process all the same."""
    folder = write_pictures(tmp_path / "bad", truncated=(0, 1, 2, 3, 4, 9, 10))
    ends = two_processes([folder, folder], tmp_path, check)
    assert [status for _, status in ends] == [0, 0], ends
    config = config_of(folder, tmp_path / "cache alone", check=check)
    alone, rejects, _ = opened(config, tmp_path / "alone")
    parts = [np.load(tmp_path / f"{i}.npz") for i in range(2)]
    for i, batch in enumerate(take(alone, 12)):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name][i] for part in parts]), array)
    found = {}
    for path in (tmp_path / "run").glob("rejects*.jsonl"):
        found |= named(path)
    assert found == named(rejects.path)


@pytest.mark.slow
def test_processes_that_see_different_data_are_refused(tmp_path):
    folders = [write_pictures(tmp_path / "a", 24), write_pictures(tmp_path / "b", 23)]
    ends = two_processes(folders, tmp_path, "header")
    assert all("UserError: The processes see different data" in output for output, _ in ends), ends
