"""launch/local.sh starts processes that meet, and takes them down; worker.sh outlives its connection."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# They add up their numbers, over gloo.
MEET = """
import os
import jax
from jax.experimental import multihost_utils
jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"],
    num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
    process_id=int(os.environ["JAX_PROCESS_ID"]),
)
rank = jax.process_index()
total = multihost_utils.process_allgather(jax.numpy.array([rank + 1.0])).sum()
print(rank, jax.process_count(), jax.local_device_count(), jax.device_count(), total, flush=True)
"""
# One fails at once; the others would go on for ever, and cannot be stopped by SIGTERM.
FAIL = """
import os, pathlib, signal, subprocess, sys, time
if os.environ["JAX_PROCESS_ID"] == "1":
    while len(list(pathlib.Path(sys.argv[1]).iterdir())) < 4:
        time.sleep(0.05)
    sys.exit(7)
signal.signal(signal.SIGTERM, lambda *_: None)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
for pid in (os.getpid(), child.pid):
    pathlib.Path(sys.argv[1], str(pid)).touch()
while True:
    time.sleep(100)
"""
# Leaves at a signal as the program does, and counts how many it had; the one that is named fails instead.
LEAVE = """
import os, pathlib, signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
pathlib.Path(sys.argv[1], os.environ["JAX_PROCESS_ID"]).touch()
while not signals:
    time.sleep(0.05)
    if sys.argv[2:] == [os.environ["JAX_PROCESS_ID"]] and len(list(pathlib.Path(sys.argv[1]).iterdir())) == 3:
        sys.exit(7)
time.sleep(0.5)
print("signals", len(signals), flush=True)
sys.exit(75)
"""


def start(clone, number, module, *arguments, **variables):
    (clone.folder / "stand_in.py").write_text(module)
    return subprocess.Popen(
        ["bash", str(clone.folder / "launch" / "local.sh"), str(number), "--", *arguments],
        env=clone.environment(PYTHON=sys.executable, MODULE="stand_in", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def runs(pid):
    """Whether a process is there and is not one that only waits to be looked at."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_meet(clone):
    process = start(clone, 2, MEET, DEVICES="2")
    out, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    # Gloo speaks in between, also in the middle of its own lines.
    lines = [line for line in out.splitlines() if line[:1].isdigit() and "connected" not in line]
    assert sorted(lines) == ["0 2 2 4 3.0", "1 2 2 4 3.0"]


def test_if_one_fails_all_are_taken_down_with_what_they_started(clone, tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    process = start(clone, 3, FAIL, str(pids), GRACE_SECONDS="1")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "exit code 7: stopping the other 2" in error
    assert len(list(pids.iterdir())) == 4
    wait_for(lambda: not any(runs(file.name) for file in pids.iterdir()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(clone, tmp_path, number):
    """Ctrl-C goes to the whole process group, as a terminal sends it; SIGTERM to the script alone."""
    ready = tmp_path / "ready"
    ready.mkdir()
    process = start(clone, 2, LEAVE, str(ready))
    wait_for(lambda: len(list(ready.iterdir())) == 2)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert out.splitlines() == ["signals 1"] * 2


def test_if_one_fails_the_others_get_one_signal_and_may_save(clone, tmp_path):
    ready = tmp_path / "ready"
    ready.mkdir()
    process = start(clone, 3, LEAVE, str(ready), "2")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 7, error
    assert out.splitlines() == ["signals 1"] * 2


@pytest.mark.parametrize("arguments", [(), ("2",), ("two", "--"), ("0", "--"), ("--config=x.py",)])
def test_a_wrong_call_is_answered_with_the_right_one(clone, arguments):
    done = clone.run("local.sh", *arguments, PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh NUM -- ARGUMENTS")


def test_local_makes_the_environment_if_no_python_is_given(clone):
    clone.python('if [[ $1 == -c ]]; then echo 1234; else echo "$JAX_PROCESS_ID $*"; fi')
    done = clone.run("local.sh", "2", "--", "--config=x.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{i} -m diffjax.main --config=x.py" for i in range(2)]


def test_a_worker_prepares_runs_and_passes_on_the_exit_code(clone):
    clone.python('echo "program: $*"; exit 3')
    done = clone.run("worker.sh", "--config=x.py", PREPARE="echo mounted >prepared")
    assert done.returncode == 3
    assert done.stdout == "program: -m diffjax.main --config=x.py\n"
    assert (clone.folder / "prepared").read_text() == "mounted\n"


def test_a_worker_whose_preparation_fails_does_not_run(clone):
    done = clone.run("worker.sh", PREPARE="false; true")
    assert done.returncode == 1
    assert not (clone.folder / "run.pid").exists()


def test_a_lost_connection_leaves_the_program_running_and_the_same_command_follows_it(clone):
    clone.python('echo begun; until [[ -e go ]]; do sleep 0.05; done; echo "$1 ended"; exit 75')
    first = subprocess.Popen(
        ["bash", str(clone.folder / "launch" / "worker.sh")],
        env=clone.environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert first.stdout.readline() == "begun\n"
    os.killpg(first.pid, signal.SIGHUP)
    first.communicate(timeout=60)
    second = subprocess.Popen(
        ["bash", str(clone.folder / "launch" / "worker.sh")],
        env=clone.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stdout.readline() == "begun\n"
    (clone.folder / "go").touch()
    out, _ = second.communicate(timeout=60)
    assert out == "-m ended\n"
    assert second.returncode == 75
