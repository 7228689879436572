"""Several processes that compute as one: how they find each other, agree, and leave together.

JAX's distributed runtime does the work. Every process runs the same program on its part of the data; the
first one writes what is for people, and files that must be written once. All of them write checkpoints.
"""

import contextlib
import functools
import glob
import importlib.util
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from diffjax.errors import UserError

HEARTBEAT_SECONDS = 60
"""After how long a process that no longer answers takes down the others."""

MEETING_SECONDS = 300
"""How long processes wait for each other at the start and at the end."""

_GRACE_SECONDS = 2.0


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of a job; does nothing where there is one process.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and else
    found by JAX: on TPU VMs, on GKE, and in a Slurm step of several tasks. It must be called before anything
    touches a device.

    Args:
      coordinator: HOST:PORT at which the first process listens.
      num_processes: how many there are.
      process_id: the number of this one, from 0.

    Raises:
      UserError: only some of it is known, it is out of range, or the processes do not meet.
    """
    given = _given(os.environ, coordinator, num_processes, process_id)
    manager = cluster(os.environ)
    if not given and not manager:
        return
    missing = {"coordinator", "num_processes", "process_id"} - given.keys()
    if missing and not manager:
        raise UserError(
            f"of several processes, this one is not told {', '.join(sorted(missing))}; give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        )
    if not missing:
        _check_address(given["coordinator"], listens=given["process_id"] == 0)
    # JAX's own handler would swallow the SIGTERMs that come before and after training; see SharedFlags.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    names = {"coordinator": "coordinator_address"}
    try:
        jax.distributed.initialize(
            **{names.get(name, name): value for name, value in given.items()},
            # What is told is not also looked for: Slurm would give each process one device.
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=MEETING_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if manager == "a TPU VM" and isinstance(error, ValueError) and not given:
            return  # the machine has TPUs, and JAX finds no others that belong to them
        where = given.get("coordinator", manager)
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"the processes of this job ({where}) do not meet: {reason}") from error


def cluster(environ: Mapping[str, str]) -> str:
    """Which manager has started several processes, or may have; "" for none."""
    in_step = "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ
    if in_step and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "a Slurm step"
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu").split(","):
        return ""
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return "TPU hosts"
    # A TPU VM's metadata say whether it is one of several; nobody else is to be kept waiting for them.
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    has_tpus = devices and importlib.util.find_spec("libtpu") is not None
    return "a TPU VM" if has_tpus and "TPU_SKIP_MDS_QUERY" not in environ else ""


def is_first() -> bool:
    """Whether this is the process that writes; it is, where there is one."""
    return jax.process_index() == 0


def name() -> str:
    """This process, for messages: "process 1", or "" where there is one."""
    started = jax.distributed.is_initialized() and jax.process_count() > 1
    return f"process {jax.process_index()}" if started else ""


def wait(what: str) -> None:
    """Wait until every process is here; `what` must be the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The block is run by the first process, then by the others, who find on disk what it has made."""
    if not is_first():
        wait(what)
    yield
    if is_first():
        wait(what)


def anywhere(flags: np.ndarray) -> np.ndarray:
    """Which of `flags`, booleans of the same shape in all processes, are set in any of them."""
    if jax.process_count() == 1:
        return flags
    return multihost_utils.process_allgather(flags).any(axis=0)


def spread(tree: Any, place: Sharding) -> Any:
    """Place arrays that every process has in full; each of its devices gets its part."""
    if place.is_fully_addressable:
        return jax.device_put(tree, place)
    return jax.jit(lambda tree: tree, out_shardings=place)(tree)


def gather(array: jax.Array) -> np.ndarray:
    """The whole of an array that lies on the devices of all processes, in each of them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


class SharedFlags:
    """Whether any process has raised one of several flags, which all learn at the same step.

    Every process calls it once in every step. With several processes the answer is that of the call before:
    the flags travel while the devices work, and nobody waits for a step that was only just dispatched.
    """

    def __init__(self) -> None:
        self._answer: jax.Array | None = None
        self._count = jax.local_device_count()
        mesh = Mesh(np.array(jax.devices()), "all", axis_types=(AxisType.Auto,))
        self._place = NamedSharding(mesh, PartitionSpec("all"))
        together = functools.partial(jnp.any, axis=0)
        self._any: Any = jax.jit(together, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, *raised: bool) -> tuple[bool, ...]:
        """Tell the others; returns which flags were raised by any. There must be as many in every call."""
        if jax.process_count() == 1:
            return raised
        before = self._answer
        flags = np.tile(raised, (self._count, 1))
        self._answer = self._any(jax.make_array_from_process_local_data(self._place, flags))
        if before is None:
            return (False,) * len(raised)
        return tuple(bool(flag) for flag in np.asarray(before))


def leave(status: int) -> None:
    """End this process, which has failed, at once: whoever waits for it then fails too.

    The ordinary way out waits for the other processes, who may be waiting for this one. Those on CPUs see the
    connection break, all others are ended by JAX's runtime after `HEARTBEAT_SECONDS`. Does nothing where
    there is one process.
    """
    if not name():
        return
    if is_first():  # the others end with it: what failed here may have failed there, and is to be said there
        time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _given(
    environ: Mapping[str, str], coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any]:
    """What flags or environment say about this process, checked."""
    found: dict[str, Any] = {
        "coordinator": coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes,
        "process_id": _number(environ, "JAX_PROCESS_ID") if process_id is None else process_id,
    }
    given = {key: value for key, value in found.items() if value not in (None, "")}
    address = given.get("coordinator")
    if address is not None and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise UserError(f"the coordinator {address!r} is none; expected HOST:PORT, such as 10.0.0.1:8476.")
    count, number = given.get("num_processes", 2**31), given.get("process_id", 0)
    if not 0 <= number < count:
        raise UserError(f"process_id={number} of num_processes={count}; they are counted from 0.")
    return given


def _check_address(address: str, *, listens: bool) -> None:
    """Refuse an address where processes cannot meet; JAX would end this one without a word."""
    host, port = address.rsplit(":", 1)
    if listens:
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                own.bind(("", int(port)))
            except (OSError, OverflowError) as error:
                raise UserError(
                    f"coordinator {address}: this process cannot listen there: {error}."
                ) from error
        return
    deadline = time.monotonic() + MEETING_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the first process does not answer at {address} after {MEETING_SECONDS} s: {error}."
                ) from error
            time.sleep(0.2)


def _number(environ: Mapping[str, str], key: str) -> int | None:
    text = environ.get(key, "")
    if text and not text.isdecimal():
        raise UserError(f"{key}={text} is no number.")
    return int(text) if text else None
