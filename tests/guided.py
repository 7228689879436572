"""Fuzzing that is guided by which lines of the readers have run (atheris), in a process of its own.

    python tests/guided.py TARGET SEEDS RUNS

SEEDS is a folder of files to begin from; what is found to reach new lines is added to it. The process fails
if a reader raises another error than its documented one, takes 20 seconds for a file, or 2 GiB.
"""

import contextlib
import resource
import sys
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["diffjax"]):
    from diffjax.data.decode import Limits, PictureError, decode
    from diffjax.data.tar import Damage, list_members
    from diffjax.errors import UserError
    from diffjax.interop.pth import read_pth
    from diffjax.interop.store import Store


def picture(data: bytes, path: Path) -> None:
    with contextlib.suppress(PictureError):
        assert decode(data, 8, limits=Limits(max_pixels=10**6)).shape == (8, 8, 3)


def tar(data: bytes, path: Path) -> None:
    path.with_name("a.tar").write_bytes(data)
    try:
        for member in list_members(path.with_name("a.tar")):
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
    except (Damage, UserError):
        pass


def safetensors(data: bytes, path: Path) -> None:
    path.with_name("model.safetensors").write_bytes(data)
    try:
        with Store(path.parent) as store:
            for name in store.names():
                assert store.read(name).nbytes <= len(data)
    except UserError:
        pass


def pth(data: bytes, path: Path) -> None:
    path.with_name("a.pth").write_bytes(data)
    try:
        arrays = read_pth(path.with_name("a.pth")).values()
        assert all(isinstance(array, np.ndarray) for array in arrays)
    except UserError:
        pass


TARGETS = {"picture": picture, "tar": tar, "safetensors": safetensors, "pth": pth}


def main() -> None:
    target, seeds, runs = sys.argv[1:]
    work = Path(seeds).parent / "work"
    work.mkdir(exist_ok=True)
    # libFuzzer's own limit is of the peak, which a process has from the one that started it.
    resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
    limits = ["-timeout=20", "-rss_limit_mb=0", "-max_len=65536", f"-artifact_prefix={work}/"]
    arguments = [sys.argv[0], f"-runs={runs}", "-seed=1", *limits, seeds]
    atheris.Setup(arguments, lambda data: TARGETS[target](data, work / "file"))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
