"""Two thousand steps with bad pictures, bad numbers and restarts: flat memory, and the right result."""

import shutil
import signal

import program
import pytest
from pictures import EMPTY, TRUNCATED, write_pictures
from runs import assert_same, metrics

from diffjax import recovery

STEPS = 2000

# Texts of three batches in a row are NaN. How much memory and how many files are in use is told now and then.
CODE = """
import os
from program import after
from diffjax.feed import Feed
take = Feed.take
def poisoned(self, step, number):
    batch = take(self, step, number)
    if POISON and 611 <= self.taken(number).before["next_index"] // 8 + 1 <= 613:
        batch["text"] = batch["text"] * float("nan")
    return batch
Feed.take = poisoned
def tell(result, calls):
    if calls % 100 == 0:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        print("USED", pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd")), flush=True)
    if calls == STOP[0]:
        os.kill(os.getpid(), STOP[1])
after("diffjax.training.metrics:MetricsBuffer.add", tell)
"""


def run(workdir, folder, cache_dir, *, steps=STEPS, poison=False, stop=(0, 0)):
    settings = {
        "steps": steps,
        "data.source": "folder",
        "data.folder": folder,
        "data.resolution": 16,
        "data.check": "decode",
        "data.max_rejects": 0.5,
        "log_every": 50,
        "checkpoint.every": 100,
        "checkpoint.keep": 2,
        "recovery.max_skips": 3,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    code = f"POISON, STOP = {poison}, {tuple(map(int, stop))}\n" + CODE
    return program.start(workdir, cache_dir, *flags, code=code, config=program.TINY_STAGE)


def used(done):
    """Bytes of memory and numbers of open files, every hundred steps."""
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("USED ")]
    return [tuple(map(int, line)) for line in lines]


@pytest.mark.slow
def test_two_thousand_steps_with_faults_end_as_a_clean_run_on_what_is_sound(tmp_path, cache_dir):
    cache_dir = shutil.copytree(cache_dir, tmp_path / "cache")
    dirty = write_pictures(tmp_path / "dirty" / "pictures")
    (dirty / "page.jpg").write_text("<!doctype html><title>404</title>")
    clean = tmp_path / "clean" / "pictures"
    write_pictures(clean, truncated=(), empty=(), leave_out=(*TRUNCATED, *EMPTY))

    stopped = run(tmp_path / "faulty", dirty, cache_dir, poison=True, stop=(450, signal.SIGTERM))
    assert stopped.returncode == 75, stopped.stderr
    killed = run(tmp_path / "faulty", dirty, cache_dir, poison=True, stop=(700, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(tmp_path / "faulty", dirty, cache_dir, poison=True)
    assert done.returncode == 0, done.stderr
    (entry,) = recovery.rollbacks(tmp_path / "faulty")
    assert (entry["step"], entry["restored"]) == (611, 600)
    assert len((tmp_path / "faulty" / "rejects.jsonl").read_text().splitlines()) == len(TRUNCATED) + 2

    # The clean run leaves out the same data after step 600, which are not bad there.
    assert run(tmp_path / "plain", clean, cache_dir, steps=600).returncode == 0
    shutil.copy(tmp_path / "faulty" / recovery.FILE, tmp_path / "plain")
    plain = run(tmp_path / "plain", clean, cache_dir)
    assert plain.returncode == 0, plain.stderr
    assert_same(tmp_path / "faulty", tmp_path / "plain", whole=False)
    assert metrics(tmp_path / "faulty")[-1]["step"] == STEPS

    for each in (done, plain):
        memory, files = zip(*used(each), strict=True)
        assert len(memory) >= 8
        # Nothing is left of a step; a save leaves 0.1 MB or so in Orbax and TensorStore, and more at first.
        assert max(memory[1:]) - memory[1] < 32 * 2**20, memory
        assert max(files[1:]) - files[1] <= 2, files
