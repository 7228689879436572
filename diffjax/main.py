"""The program: `python -m diffjax.main --config=FILE --workdir=DIR [--mode=MODE] [--config.key=value …]`."""

import contextlib
import errno
import itertools
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffjax.check_config import check_keys
from diffjax.config import is_cascade, nearest
from diffjax.errors import UserError

MODES = ("auto", "train", "sample", "evaluate", "plan", "data", "checkpoint")
FAILED = 2

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, or one like them.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; runs/<name of the config> if unset."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "auto",
    MODES,
    "train: train the stage, or those stages of a cascade that it brings along. sample: images for "
    "config.prompts. evaluate: measures, sheets and a report, of samples or of a folder of "
    "pictures. plan: what memory, traffic and time it would take. data: check every picture and caption. "
    "checkpoint: list, verify, export or average what a run has saved (--action). auto: train what there is "
    "to train; then look at samples of a cascade that was trained, or sample one that was not.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "Of --mode=plan: a TPU slice, such as v5e:4x4, several, such as 2xv5e:4x4, or GPUs, such as h200 or "
    "h100:8; unset, the devices of this machine.",
)
_BATCH = flags.DEFINE_string(
    "batch",
    "",
    "Of --mode=plan: images over all devices, or auto for the most that fit; unset, the configuration's.",
)
_PROGRAM = flags.DEFINE_enum("program", "train", ("train", "sample"), "Of --mode=plan: which program.")
_JSON = flags.DEFINE_bool("json", False, "Of --mode=plan: print JSON.")
_ACTION = flags.DEFINE_enum(
    "action",
    "list",
    ("list", "verify", "export", "average", "reshard"),
    "Of --mode=checkpoint: list what --workdir holds; verify its files and arrays; export parameters as "
    "safetensors; average: export the moving average of the width --sigma_rel; reshard: write the checkpoint "
    "anew as a run of its own, with whole arrays.",
)
_STEP = flags.DEFINE_integer("step", None, "Of --mode=checkpoint: the checkpoint's; the newest if unset.")
_OUTPUT = flags.DEFINE_string("output", None, "Of --mode=checkpoint: the folder that is written.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ("ema", "params"), "Of --mode=checkpoint: the averaged parameters, or the last ones."
)
_SIGMA_REL = flags.DEFINE_float(
    "sigma_rel", None, "Of --mode=checkpoint: the width of the average, relative to the length of training."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT at which the first of several processes listens, if no cluster manager says so; needs "
    "--num_processes and --process_id. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID mean "
    "the same.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes compute together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")


def run(config: ConfigDict, workdir: Path, mode: str) -> None:
    """Do what `mode` says; see its flag."""
    # Imported here, so that a wrong flag is answered before jax is loaded.
    if mode == "data":
        from diffjax.check_data import check_data

        check_data(config, workdir)
        return
    if not is_cascade(config):
        if mode in ("sample", "evaluate"):
            raise UserError(
                f"--mode={mode} wants a cascade's configuration, such as configs/emoji/cascade.py; "
                "this one is of a single stage."
            )
        from diffjax.train import train

        train(config, workdir)
        return
    trainable = [name for name in config.stages if "train" in config.stages[name]]
    if mode == "train" and not trainable:
        raise UserError("this cascade brings no stages to train; train each with its own configuration.")
    if mode in ("train", "auto"):
        from diffjax.train import train

        for name in trainable:
            train(config.stages[name].train, workdir / config.stages[name].workdir, label=name)
    if mode == "evaluate" or (mode == "auto" and trainable):
        from diffjax.evaluate import evaluate

        evaluate(config, workdir, measure=mode == "evaluate")
    if mode == "sample" or (mode == "auto" and not trainable):
        from diffjax.sample import sample

        sample(config, workdir)


def main(argv: list[str]) -> int:
    """Run the program; returns the exit status."""
    if len(argv) > 1:
        return _fail(f"unknown argument {argv[1]!r}: settings are given as --config.key=value.")
    if _MODE.value == "checkpoint":
        return _checkpoint()
    foreign = [flag.name for flag in (_ACTION, _STEP, _OUTPUT, _WEIGHTS, _SIGMA_REL) if flag.present]
    if foreign:
        return _fail(f"--{foreign[0]} is of --mode=checkpoint; it means nothing here.")
    if _CONFIG.value is None:
        return _fail("--config is missing; try --config=configs/quickstart.py.")
    # How the program stops is part of what is not to be imported for a wrong flag.
    from diffjax.parallel import hosts
    from diffjax.training.interrupt import INTERRUPTED, Interrupted

    path = Path(flags.FLAGS["config"].config_filename)  # type: ignore[attr-defined]
    name = path.name.replace(".py:", "-").removesuffix(".py").replace("/", "-")
    workdir = Path(_WORKDIR.value or f"runs/{name}").expanduser()
    try:
        check_keys(_CONFIG.value)
        if _MODE.value == "plan":  # which looks for no devices before it knows for which it is
            from diffjax.plan import plan

            asked = {"topology": _TOPOLOGY.value, "program": _PROGRAM.value, "batch": _BATCH.value}
            plan(_CONFIG.value, workdir, **asked, as_json=_JSON.value)
            return 0
        hosts.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        with contextlib.ExitStack() as stack:
            if not hosts.is_first():  # errors excepted, the first process speaks for all
                quiet = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(quiet))
            run(_CONFIG.value, workdir, _MODE.value)
        hosts.wait("the end")
        return 0
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        status = _fail(str(error), hosts.name())
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        status = 130
    except Exception:
        if not hosts.name():
            raise
        traceback.print_exc()
        status = 1
    hosts.leave(status)
    return status


def _checkpoint() -> int:
    """Mode `checkpoint`, which needs no configuration; returns the exit status."""
    if _WORKDIR.value is None:
        return _fail("--mode=checkpoint wants the folder of a run: give --workdir=RUN.")
    from diffjax.checkpoint import checkpoint

    try:
        checkpoint(
            Path(_WORKDIR.value).expanduser(),
            _ACTION.value,
            step=_STEP.value,
            output=None if _OUTPUT.value is None else Path(_OUTPUT.value).expanduser(),
            weights=_WEIGHTS.value,
            sigma_rel=_SIGMA_REL.value,
        )
        return 0
    except UserError as error:
        return _fail(str(error))


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; a mistake is answered in one or two lines."""
    given = _config_path(argv)
    if given is not None and not Path(given[0]).is_file():  # the flag itself would complain much later
        raise SystemExit(_fail(f"--config={given[0]}: no such file; try --config=configs/quickstart.py."))
    try:
        return flags.FLAGS(argv, known_only=False)
    except flags.Error as error:
        raise SystemExit(_fail(str(error))) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(_fail(explain_override(argv, error))) from None
    except SyntaxError as error:
        raise SystemExit(_fail(f"{error.filename}, line {error.lineno}: {error.msg}.")) from None


def explain_override(argv: list[str], error: Exception) -> str:
    """Say which override is wrong, and what would be right."""
    config = _load_config(argv)
    for argument in argv[1:]:
        match = re.match(r"--config\.([^=]+)", argument)
        if not match or config is None:
            continue
        node: Any = config
        for part in match[1].split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                valid = list(node) if isinstance(node, ConfigDict) else []
                advice = nearest(part, valid) if valid else "it has no parts."
                given = repr(match[1])[1:-1]  # line breaks are escaped
                return f"--config.{given}: there is no {part!r} here; {advice}"
            node = node[part]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _config_path(argv: list[str]) -> tuple[str, str] | None:
    """The configuration file, and the variant of it that is asked for as FILE:VARIANT ("" for none)."""
    paths = [argument.partition("=")[2] for argument in argv if re.match(r"--?config=", argument)]
    paths += [value for flag, value in itertools.pairwise(argv) if flag in ("--config", "-config")]
    if not paths:
        return None
    path, _, variant = paths[-1].partition(".py:")
    return (f"{path}.py", variant) if variant else (paths[-1], "")


def _load_config(argv: list[str]) -> ConfigDict | None:
    given = _config_path(argv)
    if given is None:
        return None
    import runpy

    path, variant = given
    functions = runpy.run_path(path)
    if "get_config" not in functions:
        raise SystemExit(_fail(f"--config={path} is no configuration: it has no function get_config()."))
    return functions["get_config"](*[variant] if variant else [])


def _quiet() -> None:
    """Leave out what is of no use to a person: start-up chatter, and tracebacks beside an error's own lines.

    --verbosity=0 brings the log messages back.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda args: None if _is_echo(args.exc_value) else sys.__unraisablehook__(args)
    threading.excepthook = lambda args: None if _is_echo(args.exc_value) else threading.__excepthook__(args)


def _is_echo(error: BaseException | None) -> bool:
    """Whether an exception outside the main thread only repeats what the program has reported itself.

    After a checkpoint that cannot be read or written, Orbax abandons coroutines that wait for TensorStore; on
    a full disk TensorBoard's thread fails as well.
    """
    left_over = ("Event loop is closed", "Encountered error while reading array index", "handle is closed")
    full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full_disk or str(error).startswith(left_over)


def _fail(message: str, who: str = "") -> int:
    print(f"error: {who}{': ' if who else ''}{message}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    _quiet()
    app.run(main, flags_parser=parse)
