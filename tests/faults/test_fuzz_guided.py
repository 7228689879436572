"""Readers of strangers' files, fuzzed with atheris towards lines that have not run yet; see `guided.py`."""

import importlib.util
import io
import re
import subprocess
import sys
import tarfile

import numpy as np
import program
import pytest
from pictures import encode, png, raw_png
from PIL import Image
from safetensors.numpy import save

RUNS = 20_000


def seeds(target):
    """A few good files to begin from."""
    if target == "picture":
        image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
        return [encode(image, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")] + [
            raw_png(8, 8, 8, 2, b"")
        ]
    if target == "tar":
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in (("a.png", png(1)), ("a.txt", b"a word"), ("d" * 120 + "/b.png", png(2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return [file.getvalue()]
    if target == "safetensors":
        return [save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int8)}, {"format": "pt"})]
    folder = program.ROOT / "tests" / "golden" / "features"
    return [path.read_bytes() for path in sorted(folder.glob("*.pth"))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", ["picture", "tar", "safetensors", "pth"])
def test_no_reader_fails_otherwise_than_it_says(target, tmp_path):
    folder = tmp_path / "seeds"
    folder.mkdir()
    for number, data in enumerate(seeds(target)):
        (folder / str(number)).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "tests/guided.py", target, str(folder), str(RUNS)],
        cwd=program.ROOT,
        env=program.environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    assert re.search(rf"Done {RUNS} runs", text), text[-3000:]
    found = [int(lines) for lines in re.findall(r"cov: (\d+)", text)]
    assert max(found) > 30  # it did follow the lines of this library
