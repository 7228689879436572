"""Runs the program with the tiny configuration: in this process, or in one of its own that can be killed."""

import importlib
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "configs" / "tiny.py"
TINY_STAGE = ROOT / "tests" / "configs" / "tiny_stage.py"

# Runs diffjax.main, but first arranges for a signal: argv is WHERE COUNT DELAY SIGNAL and then the program's.
# WHERE is a function, "module:Class.name" or "module:name"; the signal comes DELAY seconds after its COUNT-th
# call.
DRIVER = """
import os, runpy, sys, threading
sys.path.insert(0, "tests")
from program import after
where, count, delay, number = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
sys.argv = ["diffjax", *sys.argv[5:]]
def signal(result, calls):
    if calls == count and delay:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    elif calls == count:
        os.kill(os.getpid(), number)
after(where, signal)
runpy.run_module("diffjax.main", run_name="__main__")
"""


def after(where, do):
    """From now on, call `do(result, how many calls)` after each call of a function; see DRIVER."""
    module, _, name = where.partition(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(1)
        do(result, len(calls))
        return result

    setattr(owner, name, wrapped)


def tiny_stage(cache_dir, steps):
    """The configuration of TINY_STAGE, to be trained in this process."""
    config = runpy.run_path(str(TINY_STAGE))["get_config"]()
    config.data.cache_dir, config.steps = str(cache_dir), steps
    return config


def command_after(code):
    """The command that runs `code` and then, in the same process, the program."""
    prelude = 'import sys\nsys.path.insert(0, "tests")\nsys.argv[0] = "diffjax"\n'
    run = '\nimport runpy\nrunpy.run_module("diffjax.main", run_name="__main__")\n'
    return [sys.executable, "-c", prelude + code + run]


def arguments(workdir, cache_dir, *extra):
    return [f"--config={TINY}", f"--workdir={workdir}", f"--config.cache_dir={cache_dir}", *extra]


def environment():
    """One device, as a person's computer has."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(ROOT)}


def start(workdir, cache_dir, *extra, signal=None, code="", config=TINY, prefix=(), **options):
    """Run the program in a process of its own.

    `signal` is (where, count, delay, number), see DRIVER; `code` is run before the program, in its process;
    `prefix` is a command that runs the rest of its arguments.
    """
    command = [sys.executable, "-m", "diffjax.main"]
    if code:
        command = command_after(code)
    if signal is not None:
        command = [sys.executable, "-c", DRIVER, *(str(value) for value in signal)]
    argv = arguments(workdir, cache_dir, *extra)
    if config != TINY:
        argv = [f"--config={config}", f"--workdir={workdir}", f"--config.data.cache_dir={cache_dir}", *extra]
    options = {"timeout": 300, "env": environment(), **options}
    command = [*prefix, *command, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_one_of(number, count, port, argv, *, command=(sys.executable, "-m", "diffjax.main"), **variables):
    """Start process `number` of `count`, with eight devices in all; `variables` are for its environment."""
    flags = [f"--xla_force_host_platform_device_count={8 // count}"]
    flags += [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    if count > 1:
        argv = [
            *argv,
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={count}",
            f"--process_id={number}",
        ]
    return subprocess.Popen(
        [*command, *argv],
        cwd=ROOT,
        env=environment() | {"XLA_FLAGS": " ".join(flags)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, timeout=240):
    """Their exit statuses and what they printed; none is left over."""
    try:
        done = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*done, strict=True)


def call(monkeypatch, *argv):
    """Run the program in this process; returns its exit status."""
    from diffjax import main

    # The flags of a configuration's keys are defined anew by each parse.
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
    sys.modules.pop("config_config", None)  # the configuration file that was loaded before
    flags.FLAGS.unparse_flags()
    for name in ("config", "workdir", "mode"):
        flags.FLAGS[name].unparse()
    argv = ["diffjax", *(str(argument) for argument in argv)]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        return main.main(main.parse(argv))
    except SystemExit as stop:
        return stop.code
