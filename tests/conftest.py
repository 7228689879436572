"""Eight virtual devices, one folder of compiled programs, and fixtures that several folders share.

That this file is here also makes the folder importable: tests can `import oracle` and `import program`.
"""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

# All of this must stand in the environment before jax is imported.
# The tests compile much and compute little, so the compiler is not to try hard. Fusion emitters, which can be
# switched off until jaxlib 0.12, make the compilation of gradients three times as long.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + ("--xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib") < "0.12" else "")
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests and the programs that they start compile the same few networks again and again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="diffjax-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

from pathlib import Path

import program
import pytest

from diffjax.data.emoji import load_emoji


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A folder with the emoji pictures at 64 px; a test that damages it must copy it first."""
    folder = tmp_path_factory.mktemp("emoji")
    load_emoji(folder, resolution=64)
    return folder


@pytest.fixture(scope="session")
def trained(cache_dir, tmp_path_factory) -> Path:
    """The working directory of the tiny cascade, trained by one uninterrupted program; not to be changed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    done = program.start(workdir, cache_dir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def run(monkeypatch, capsys, cache_dir, tmp_path):
    """Calls the program with the tiny configuration; returns exit status and what was printed."""

    def call(*extra, workdir=tmp_path / "run"):
        capsys.readouterr()
        status = program.call(monkeypatch, *program.arguments(workdir, cache_dir, *extra))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def fails(run):
    """Calls the program, which must fail in at most three lines; returns them."""

    def call(*extra, **options):
        status, _, text = run(*extra, **options)
        assert status == 2, text
        assert text.startswith("error: ")
        assert 1 <= len(text.splitlines()) <= 3
        assert "Traceback" not in text
        return text

    return call


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the trained cascade that a test may change; where `run` and `fails` work."""
    return shutil.copytree(trained, tmp_path / "run")
