"""Two processes that compute as one; and what of it can be seen in one."""

import json
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import program
import pytest

from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.parallel.mesh import AXES, batch_rows, batch_sharding, make_mesh, put_batch

# Runs the program, which fails when all is done and saved.
FAILING = """
import runpy, sys
from diffjax.parallel import hosts
sys.argv = ["diffjax", *sys.argv[1:]]
wait = hosts.wait
def failing(what):
    if what == "the end":
        raise RuntimeError("this host has an error")
    wait(what)
hosts.wait = failing
runpy.run_module("diffjax.main", run_name="__main__")
"""

# Two processes agree; then one no longer answers, and the other waits for it.
FROZEN = """
import os, signal, sys
import numpy as np
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_rows, batch_sharding, make_mesh, put_batch
hosts.HEARTBEAT_SECONDS = 2
second = sys.argv[2] == "1"
hosts.start(sys.argv[1], 2, int(second))
assert hosts.name() == f"process {int(second)}" and hosts.is_first() != second
assert hosts.anywhere(np.array([False, second, not second])).tolist() == [False, True, True]
flags = hosts.SharedFlags()
told = [flags(second and step == 1, step == 2) for step in range(4)]
assert told == [(False, False), (False, False), (True, False), (False, True)]
mesh, array = make_mesh(), np.arange(4.0)
rows = batch_rows(4, mesh)
assert rows.tolist() == ([2, 3] if second else [0, 1])
placed = put_batch({"x": array[rows]}, mesh)["x"]
assert not placed.is_fully_addressable
for each in (placed, hosts.spread(array, batch_sharding(mesh))):
    assert hosts.gather(each).tolist() == array.tolist()
with hosts.first_alone("a file"):
    assert os.path.exists(sys.argv[3]) == second
    open(sys.argv[3], "w").close()
hosts.wait("the end")
print("agreed", flush=True)
if second:
    os.kill(os.getpid(), signal.SIGSTOP)
hosts.wait("for ever")
"""

# The base stage of the tiny cascade, large enough for FSDP to divide its parameters.
STAGE = f"""
import runpy
def get_config():
    config = runpy.run_path({str(program.TINY)!r})["get_config"]().stages.base.train
    config = config.copy_and_resolve_references()
    config.model.embed = 64
    config.mesh.fsdp, config.mesh.data = 4, 2
    config.steps, config.checkpoint.every, config.preview.every = 4, 100, 4
    return config
"""


def start(folder, cache_dir, number, count, *, port=0, driver=("-m", "diffjax.main")):
    """Start process `number` of `count`, with the same eight devices in all."""
    (folder / "stage.py").write_text(STAGE)
    argv = [f"--config={folder / 'stage.py'}", f"--workdir={folder / str(count)}"]
    argv += [f"--config.data.cache_dir={cache_dir}"]
    # Orbax compiles a hundred programs of milliseconds, which the later processes are to find.
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return program.start_one_of(number, count, port, argv, command=(sys.executable, *driver), **cached)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def saved(folder, step):
    """The averaged parameters of a checkpoint, by their names."""
    import orbax.checkpoint as ocp

    path = folder / "checkpoints" / str(step) / "ema_params"
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(path, restore_args=wanted)
    return {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one_and_leave_together(tmp_path, cache_dir):
    statuses, _, errors = program.finish(start(tmp_path, cache_dir, 0, 1))
    assert statuses == [0], errors

    # Only the second is asked to stop: both leave, after the same step, which is saved.
    port = program.free_port()
    asked = ("diffjax.training.metrics:MetricsBuffer.add", 1, 0, int(signal.SIGTERM))
    driver = ("-c", program.DRIVER, *(str(value) for value in asked))
    statuses, outputs, errors = program.finish(
        start(tmp_path, cache_dir, 0, 2, port=port),
        start(tmp_path, cache_dir, 1, 2, port=port, driver=driver),
    )
    assert statuses == [75, 75], errors
    assert "a signal to another process at step 2; saved" in errors[0]
    assert "SIGTERM at step 2; saved" in errors[1]

    # The same command goes on. An error in one ends both, though the first waits for the second.
    port = program.free_port()
    statuses, outputs, errors = program.finish(
        start(tmp_path, cache_dir, 0, 2, port=port),
        start(tmp_path, cache_dir, 1, 2, port=port, driver=("-c", FAILING)),
    )
    assert 0 not in statuses
    assert "RuntimeError: this host has an error" in errors[1]
    assert "this host has an error" not in errors[0]
    assert "steps 2 to 4, 8 cpu device(s)" in outputs[0]
    assert "train:" not in outputs[1]  # the first speaks

    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for step in two:
        if step != 3:  # the mean over steps 2 and 3 in one run is of one step in the other
            np.testing.assert_allclose(two[step]["loss"], one[step]["loss"], rtol=1e-5)
            np.testing.assert_allclose(two[step]["grad_norm"], one[step]["grad_norm"], rtol=1e-4)
    assert max(two) == 4
    expected, found = saved(tmp_path / "1", 4), saved(tmp_path / "2", 4)
    assert expected.keys() == found.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-5, err_msg=name)
    assert len(list((tmp_path / "2" / "previews").iterdir())) == 1
    # One file for each start of the first process; the second has written none.
    assert len(list((tmp_path / "2" / "tensorboard").iterdir())) == 2


def test_two_processes_agree_and_one_that_no_longer_answers_ends_the_other(tmp_path):
    port = program.free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FROZEN, f"127.0.0.1:{port}", str(i), str(tmp_path / "file")],
            env=program.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        output, errors = processes[0].communicate(timeout=100)
    finally:
        processes[1].kill()  # before it is waited for: it stands still
        program.finish(*processes[1:])
        processes[0].kill()
    assert "agreed" in output, errors
    assert processes[0].returncode != 0
    assert "stopped sending heartbeats" in errors


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, ""),  # a batch script, not a step
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, ""),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, "a Slurm step"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1", "TPU_WORKER_ID": "0"}, "TPU hosts"),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1", "JAX_PLATFORMS": "cpu"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a-0", "MEGASCALE_NUM_SLICES": "2"}, "TPU hosts"),
    ],
)
def test_where_jax_is_asked_to_find_other_processes(monkeypatch, environ, found):
    monkeypatch.setattr("glob.glob", lambda pattern: [])  # a machine without TPUs
    assert hosts.cluster(environ) == found


def test_a_machine_with_tpus_may_be_one_of_several(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/vfio/0"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert hosts.cluster({}) == "a TPU VM"
    assert hosts.cluster({"JAX_PLATFORMS": "cpu"}) == hosts.cluster({"TPU_SKIP_MDS_QUERY": "1"}) == ""


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (("a:1", None, None), {}, "not told num_processes, process_id"),
        ((None, 2, None), {"JAX_PROCESS_ID": "0"}, "not told coordinator"),
        (("a", 2, 0), {}, "HOST:PORT"),
        (("a:1", 2, 2), {}, "process_id=2 of num_processes=2"),
        (("a:1", 0, None), {}, "num_processes=0"),
        (("a:1", 2, -1), {}, "process_id=-1"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
    ],
)
def test_what_does_not_make_a_job(monkeypatch, given, environ, message):
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        hosts.start(*given)


def test_an_address_where_nobody_can_meet(monkeypatch):
    monkeypatch.setattr(hosts, "MEETING_SECONDS", 0.1)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot listen there"):
            hosts.start(address, 2, 0)
    with pytest.raises(UserError, match="the first process does not answer"):
        hosts.start(address, 2, 1)


def test_a_single_process_needs_nobody():
    hosts.start()
    assert hosts.is_first()
    assert hosts.name() == ""
    hosts.wait("nobody")
    hosts.leave(3)  # does not
    flags = hosts.SharedFlags()
    assert [flags(False, True), flags(True, False)] == [(False, True), (True, False)]
    flags = np.array([True, False])
    np.testing.assert_array_equal(hosts.anywhere(flags), flags)
    with hosts.first_alone("nobody"):
        pass


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2)])
def test_a_batch_is_placed_row_by_row(sizes):
    mesh = make_mesh(**dict(zip(AXES, sizes, strict=True)))
    rows = batch_rows(16, mesh)
    np.testing.assert_array_equal(rows, np.arange(16))  # one process has all of them
    array = np.arange(16 * 3).reshape(16, 3)
    placed = put_batch({"x": array}, mesh)["x"]
    assert placed.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(placed, array)
    np.testing.assert_array_equal(hosts.gather(hosts.spread(array, batch_sharding(mesh))), array)


def test_a_process_has_the_rows_of_its_devices(monkeypatch):
    """Two halves of the devices take turns to be this process's; together they have the whole batch."""
    mesh = make_mesh(data=4, tensor=2)
    index_map = batch_sharding(mesh).devices_indices_map((4,))
    halves = [list(mesh.devices.flat)[:4], list(mesh.devices.flat)[4:]]
    seen = []
    for half in halves:
        monkeypatch.setattr(
            jax.sharding.NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, half=half: {device: index_map[device] for device in half},
        )
        seen.append(batch_rows(8, mesh).tolist())
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
