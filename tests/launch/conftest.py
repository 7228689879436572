"""A clone, and stand-ins for the cloud's tools that write down what they are asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("gcloud", "git", "kubectl", "scontrol", "srun")
# Answers come from a list for each verb, in order; then, or if there is no list, it is silence and success.
STAND_IN = f"""#!{sys.executable} -ISE
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
call = [pathlib.Path(__file__).name, *sys.argv[1:]]
given = "" if sys.stdin is None or call[:2] != ["kubectl", "apply"] else sys.stdin.read()
with (folder / "calls").open("a") as file:
    file.write(json.dumps([call, given]) + "\\n")
answers = json.loads((folder / "answers").read_text())
for verb, lines in answers.items():
    if verb in call and lines:
        out, error, code = lines.pop(0)
        (folder / "answers").write_text(json.dumps(answers))
        sys.stdout.write(out)
        sys.stderr.write(error)
        sys.exit(code)
"""


class Clone:
    """A copy of what the scripts need, whose .venv is there already and whose Python only reports."""

    def __init__(self, folder: Path):
        self.folder = folder / "clone"
        self.tools = folder / "tools"
        self.tools.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.folder / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        for name in TOOLS:
            (self.tools / name).write_text(STAND_IN)
            (self.tools / name).chmod(0o755)
        self.answer()
        self.python('echo "program: $*"')

    def answer(self, **answers):
        """What the tools say to a verb: lists of (stdout, stderr, exit code)."""
        (self.tools / "answers").write_text(json.dumps(answers))

    def python(self, script):
        """Make .venv, with a shell script in the place of the interpreter, for any extras."""
        programs = self.folder / ".venv" / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        (programs / "python").write_text(f"#!/usr/bin/env bash\n{script}\n")
        (programs / "python").chmod(0o755)
        wanted = "cat setup.cfg pyproject.toml launch/setup.sh | cksum"
        stamp = subprocess.run(["bash", "-c", wanted], cwd=self.folder, capture_output=True, check=True)
        for extras in ("tpu", "cuda", "emoji"):
            (self.folder / ".venv" / f".diffjax-{extras}").write_bytes(stamp.stdout)

    def environment(self, **variables):
        return {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            # Whatever is installed on this machine, it is not to find an account or a cluster.
            "CLOUDSDK_CONFIG": str(self.folder / "nobody"),
            "KUBECONFIG": str(self.folder / "nowhere"),
            "POLL_SECONDS": "0",
            **variables,
        }

    def run(self, script, *arguments, **variables):
        """Run a script of launch/, for a minute at most; what it printed and its exit code come back."""
        return subprocess.run(
            ["bash", str(self.folder / "launch" / script), *arguments],
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self):
        """What the tools were asked: lists of words."""
        return [call for call, _ in self._log()]

    def given(self):
        """What the tools were given on their standard input."""
        return [given for _, given in self._log() if given]

    def _log(self):
        file = self.tools / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.fixture(autouse=True)
def _signals_are_heeded():
    """Programs inherit ignored signals: from nohup, or from a shell that runs the tests in the background."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in defaults if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
