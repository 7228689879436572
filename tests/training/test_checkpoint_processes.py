"""Checkpoints that two processes write and read together."""

import json
import shutil
import socket
import subprocess
import sys

import program
import pytest

from diffjax.training import archive
from diffjax.training.checkpoint import FOLDER

# argv: coordinator, process, folder, what to do
WORKER = """
import json, os, resource, sys
import jax, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec
from pathlib import Path
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.parallel.mesh import make_mesh
from diffjax.training import checkpoint, digests
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.state import create_state
second, what = sys.argv[2] == "1", sys.argv[4]
hosts.start(sys.argv[1], 2, int(second))
checkpoint.SAVE_SECONDS = 5
mesh = make_mesh(data=1, fsdp=2)

def placed(leaf):
    spec = PartitionSpec("fsdp") if leaf.shape else PartitionSpec()
    return hosts.spread(np.asarray(leaf), NamedSharding(mesh, spec))

def state_of(step, rows=8):
    params = {"w": np.random.default_rng(step).normal(size=(rows, 4096)).astype(np.float32)}
    return jax.tree.map(placed, create_state(params, optax.adam(1e-3))._replace(step=np.int32(step)))

told = []
checkpoints = Checkpoints(Path(sys.argv[3]), log=told.append)
if what == "save":
    for step in (1, 2):
        checkpoints.save(state_of(step), {"next": step})
    checkpoints.wait()
    print(json.dumps(checkpoints.steps()))
elif what == "restore":
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0))
    state, data = checkpoints.restore(like)
    same = digests.of_tree(state) == digests.of_tree(state_of(data["next"]))
    print(json.dumps({"step": int(state.step), "data": data, "same": same, "told": len(told)}))
elif what == "full":
    if second:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    checkpoints.save(state_of(3, 512), {"next": 3})
    try:
        checkpoints.wait()
    except UserError as error:
        told.append(str(error))
    if second:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    failed = checkpoints.failed
    checkpoints.save(state_of(4, 512), {"next": 4})
    checkpoints.wait()
    end = {"failed": failed, "told": told, "steps": checkpoints.steps(), "after": checkpoints.failed}
    print(json.dumps(end))
checkpoints.close()
hosts.wait("the end")
"""


def both(folder, what):
    """What the two processes say at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(number), str(folder), what],
            env=program.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.slow
def test_two_processes_agree_on_what_is_damaged_and_on_what_could_not_be_saved(tmp_path):
    folder = tmp_path / FOLDER
    assert both(tmp_path, "save") == [[1, 2]] * 2
    assert archive.verify(folder / "2") == []
    sound = {"step": 2, "data": {"next": 2}, "same": True, "told": 0}
    assert both(tmp_path, "restore") == [sound] * 2
    # One process has no room; the other waits for it in vain. Both know, and both can save again.
    ended = both(tmp_path, "full")
    assert [end["failed"] for end in ended] == [True, True]
    assert "Timed out" in ended[0]["told"][0]
    assert "File too large" in ended[1]["told"][0]
    assert [(end["steps"], end["after"]) for end in ended] == [([2, 4], False)] * 2
    # What the first process finds in a file of the second, the second hears of, and both take the one before.
    shutil.rmtree(folder / "4")
    shutil.copytree(folder / "2", folder / "4")
    victim = max((folder / "4" / "params" / "ocdbt.process_1" / "d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    assert both(tmp_path, "restore") == [sound | {"told": 1}, sound]
    assert sorted(path.name for path in folder.iterdir()) == ["2", "damaged-4"]
