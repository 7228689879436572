"""Disks that are full or may not be written: training goes on while it can, and what was saved stays."""

import contextlib
import os
import subprocess

import program
import pytest
from runs import assert_same, saved_steps

from diffjax import train as training
from diffjax.errors import UserError
from diffjax.feed import Feed
from diffjax.training.checkpoint import Checkpoints

resource = pytest.importorskip("resource")


@pytest.fixture(scope="module")
def clean(cache_dir, tmp_path_factory):
    """The stage, trained where nothing went wrong."""
    workdir = tmp_path_factory.mktemp("clean")
    training.train(program.tiny_stage(cache_dir, 12), workdir)
    return workdir


@pytest.fixture
def disk(monkeypatch):
    """Fills the disk from one update to another: no file may be longer than 20,000 bytes then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    take = Feed.take

    def full(first, last):
        def limited(self, step, number):
            if first <= number <= last:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            return take(self, step, number)

        monkeypatch.setattr(Feed, "take", limited)

    yield full
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_while_the_disk_is_full_training_goes_on_and_saving_is_tried_again(
    cache_dir, clean, disk, tmp_path, monkeypatch, capfd
):
    save = Checkpoints.save

    def save_and_wait(self, *args, **kwargs):  # so that it is known which saves meet the full disk
        save(self, *args, **kwargs)
        with contextlib.suppress(UserError):
            self.wait()

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    monkeypatch.setattr(training, "RETRY_SECONDS", 0.0)
    disk(6, 9)
    config = program.tiny_stage(cache_dir, 12)
    config.checkpoint.every = 4
    training.train(config, tmp_path)
    told = capfd.readouterr().err
    assert "could not be written" in told
    assert "File too large" in told
    assert_same(tmp_path, clean, whole=False)
    assert saved_steps(tmp_path) == [4, 10, 12]  # 8 was due, and was tried again until there was room


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_and_the_same_command_goes_on(cache_dir, tmp_path):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    steps = "--config.steps={}".format
    options = {"config": program.TINY_STAGE}
    done = program.start(tmp_path / "run", cache_dir, steps(4), **options)
    assert done.returncode == 0, done.stderr
    stopped = program.start(tmp_path / "run", cache_dir, steps(12), code=code, **options)
    assert stopped.returncode == 2, stopped.stderr
    assert "The checkpoint of step 4 is intact" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert max(saved_steps(tmp_path / "run")) == 4
    for name in ("run", "clean"):
        done = program.start(tmp_path / name, cache_dir, steps(12), **options)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", tmp_path / "clean", whole=False)


@pytest.mark.slow
def test_a_working_directory_that_may_not_be_written_is_an_error(cache_dir, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    prefix = ()
    if os.geteuid():
        folder.chmod(0o555)
        why = "Permission denied"
    else:  # for whom everything can be written that is not on a file system that cannot
        read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        prefix, why = ("unshare", "--mount", "sh", "-c", read_only, str(folder)), "Read-only file system"
        if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
    stopped = program.start(folder / "run", cache_dir, config=program.TINY_STAGE, prefix=prefix)
    assert stopped.returncode == 2, stopped.stderr
    assert stopped.stderr == (
        f"error: cannot write to the working directory {folder / 'run'}: {why}. Choose another --workdir.\n"
    )
