"""Two processes that train together, one of which stops answering: the other does not wait for ever."""

import signal
import subprocess
import time

import program
import pytest
from runs import saved_steps

from diffjax.training.watch import HUNG


def start(workdir, cache_dir, port, number, *, code=""):
    argv = [f"--config={program.TINY_STAGE}", f"--workdir={workdir}", f"--config.data.cache_dir={cache_dir}"]
    argv += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"]
    argv += ["--config.recovery.hang_minutes=1.5", "--config.steps=8"]
    return subprocess.Popen(
        [*program.command_after(code), *argv],
        cwd=program.ROOT,
        env=program.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_the_other_ends_and_the_same_command_goes_on(cache_dir, tmp_path, number):
    lost = f"""
import os
from program import after
def stop(result, calls):
    if calls == 6:
        os.kill(os.getpid(), {int(number)})
after("diffjax.training.metrics:MetricsBuffer.add", stop)
"""
    port = program.free_port()
    one, two = start(tmp_path, cache_dir, port, 0), start(tmp_path, cache_dir, port, 1, code=lost)
    try:
        began = time.monotonic()
        _, errors = one.communicate(timeout=400)
        # A minute and a half (hang_minutes) after the last step, or a minute after the last sign of life.
        assert time.monotonic() - began < 300
    finally:
        two.kill()
        two.communicate()
        one.kill()
        one.communicate()
    assert one.returncode != 0, errors
    if one.returncode == HUNG:
        assert "make_steps" in errors  # where it hung
    assert 2 <= max(saved_steps(tmp_path), default=0) <= 4, errors

    done = program.start(tmp_path, cache_dir, "--config.steps=8", config=program.TINY_STAGE)
    assert done.returncode == 0, done.stderr
    assert max(saved_steps(tmp_path)) == 8
