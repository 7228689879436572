"""What a program asks of chips: its memory, what it sends, and a bound on its speed."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from diffjax.errors import UserError
from diffjax.parallel.chips import Chip, chip_of
from diffjax.parallel.collectives import Traffic, traffic
from diffjax.programs import Program

ADVICE = (
    "Try a smaller batch (--batch=auto finds the largest), a larger config.mesh.fsdp, "
    "config.model.remat='full', or more chips."
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a program on chips.

    Attributes:
      program: its name.
      chip: one of its devices.
      devices: their number.
      mesh: sizes of its axes.
      batch: images of one run, over all devices.
      parameters: their number.
      bytes: on each device, by kind; what the compiler adds is missing where it did not fit.
      needed: bytes on each device, all together.
      limit: bytes that a device has; 0: unknown.
      fits: whether the compiler found room.
      flops: of the model in one run, over all devices.
      collectives: what each device sends in one run, by kind; None: unknown.
      seconds: that one run takes at least, for each bound that is known.
      notes: what is assumed, or not counted.
    """

    program: str
    chip: Chip
    devices: int
    mesh: dict[str, int]
    batch: int
    parameters: int
    bytes: dict[str, int]
    needed: int
    limit: int
    fits: bool
    flops: float
    collectives: dict[str, Traffic] | None
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def best(self) -> float:
        """Seconds of a run if compute, memory and links work at the same time; 0: unknown."""
        return max(self.seconds.values(), default=0.0)

    def mfu(self, seconds: float) -> float:
        """Share of the chips' peak rate that the model's FLOPs are, at so many seconds a run."""
        return self.flops / (seconds * self.devices * self.chip.flops)


def measure(program: Program, mesh: Mesh) -> Plan:
    """Compile a program and read what the compiler made of it.

    Raises:
      UserError: the compiler refuses it for other reasons than its size.
    """
    chip = chip_of(mesh.devices.flat[0])
    parts = program.bytes_per_chip()
    known: dict[str, Any] = {
        "program": program.name,
        "chip": chip,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": program.batch,
        "parameters": program.parameters,
        "flops": program.flops(),
    }
    lowered = program.lower()
    try:
        compiled, text = _compile(lowered, mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        needed, limit = _out_of_memory(str(error), sum(parts.values()), chip)
        return Plan(
            bytes=parts,
            needed=needed,
            limit=limit,
            fits=False,
            collectives=None,
            seconds={},
            notes=program.notes,
            **known,
        )
    memory = compiled.memory_analysis()
    padding = max(memory.argument_size_in_bytes - sum(parts.values()), 0)  # less than 0: some are not used
    parts |= {
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program, padding": memory.generated_code_size_in_bytes + padding,
    }
    notes = program.notes
    try:
        sent = traffic(text or compiled.as_text())
    except Exception as error:  # the text cannot be made, or not be read
        sent, notes = None, (*notes, f"what is sent is unknown: {str(error).splitlines()[0][:80]}.")
    needed = sum(parts.values())
    return Plan(
        bytes=parts,
        needed=needed,
        limit=chip.hbm,
        fits=not chip.hbm or needed <= chip.hbm,
        collectives=sent,
        seconds=bounds(known["flops"] / mesh.size, parts, sent, chip),
        notes=notes,
        **known,
    )


def bounds(
    flops: float, parts: dict[str, int], sent: dict[str, Traffic] | None, chip: Chip
) -> dict[str, float]:
    """Seconds that one run takes at least, by what bounds it, as far as the chip is known.

    Args:
      flops: of one device.
      parts: its bytes by kind.
      sent: what it sends.
      chip: what it can do.
    """
    arguments = sum(parts[kind] for kind in ("parameters", "EMA", "optimizer", "batch") if kind in parts)
    trained = "optimizer" in parts
    moved = (2 if trained else 1) * arguments + 2 * parts["temporaries"]
    seconds = {}
    if chip.flops:
        seconds["compute"] = flops / chip.flops
    if chip.bandwidth:
        seconds["memory"] = moved / chip.bandwidth
    if chip.links and sent is not None:
        seconds["links"] = sum(each.bytes for each in sent.values()) / chip.links
    return seconds


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """The compiled program and, of TPUs, its text as their compiler writes it.

    JAX's own way to that text fails for some programs: it reads by the rules of its own version.
    """
    if platform == "gpu" and jax.default_backend() != "gpu":
        # Without a GPU to try them on, XLA finds no tiles for some products that it would write in Triton.
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False}), ""
    if platform != "tpu":
        return lowered.compile(), ""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        found = sorted(Path(folder).glob("*after_optimizations_after_buffer_assignment.txt"))
        return compiled, max((path.read_text() for path in found), key=len, default="")


def _out_of_memory(message: str, arguments: int, chip: Chip) -> tuple[int, int]:
    """What the compiler says it would need and has, in bytes; 0 and the chip's if it does not say.

    Some versions say what temporaries alone need: `arguments` are added to that.

    Raises:
      UserError: the message is about something else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise UserError(f"the compiler refuses this program: {message.strip().splitlines()[0][:300]}")
    size = r"([\d.]+)([KMGT])"
    whole = re.search(rf"Used {size} of {size} hbm", message)
    temporaries = re.search(rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if found := whole or temporaries:
        used, unit, limit, limit_unit = found.groups()
        needed = int(float(used) * _UNITS[unit]) + (0 if whole else arguments)
        return needed, int(float(limit) * _UNITS[limit_unit])
    return 0, chip.hbm


def to_dict(found: Plan) -> dict[str, Any]:
    """A plan as JSON has it."""
    values = dataclasses.asdict(found)
    values["chip"] = found.chip._asdict()
    if found.collectives is not None:
        values["collectives"] = {kind: each._asdict() for kind, each in found.collectives.items()}
    return values


def report(found: Plan) -> str:
    """A plan in lines of text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    lines = [
        f"{found.program}: {found.parameters:,} parameters, batch {found.batch:,}, "
        f"{found.devices} x {found.chip.name} ({mesh})",
        "  bytes on each chip",
        *(f"    {kind:<20}{_memory(size)}" for kind, size in found.bytes.items() if size >= 2**14),
    ]
    limit = f" of {_memory(found.limit).strip()}" if found.limit else ""
    needed = _memory(found.needed) if found.needed else f"{'more':>12}"
    lines.append(f"    {'together':<20}{needed}{limit}: {'fits' if found.fits else 'DOES NOT FIT'}")
    lines.append(f"  model FLOPs             {found.flops:.3g}, {found.flops / found.batch:.3g} an image")
    if not found.fits:
        lines.append(f"  {ADVICE}")
    if found.collectives is not None:
        lines.append("  sent by each chip")
        lines += [
            f"    {kind:<20}{each.bytes / 1e9:9.3f} GB in {each.times:,}"
            for kind, each in found.collectives.items()
        ] or ["    nothing"]
    lines += _speed(found)
    lines += [f"  note: {note}" for note in found.notes]
    return "\n".join(lines) + "\n"


def _speed(found: Plan) -> list[str]:
    if not found.fits or not found.chip.flops:
        return (
            []
            if not found.fits
            else ["  no estimate of the time: the table of chips does not know this one."]
        )
    chip = found.chip
    how = {
        "compute": f"the model's FLOPs at {chip.flops / 1e12:.0f} TFLOP/s",
        "memory": f"arguments once, temporaries written and read once, at {chip.bandwidth / 1e9:.0f} GB/s",
        "links": f"what is sent, over all links at once, at {chip.links / 1e9:.0f} GB/s",
    }
    if "optimizer" in found.bytes:
        how["memory"] = how["memory"].replace("arguments once", "state read and written")
    lines = ["  at least"]
    lines += [f"    {kind:<20}{1e3 * s:9.2f} ms  {how[kind]}" for kind, s in found.seconds.items()]
    for name, seconds in (("all at once", found.best), ("one by one", sum(found.seconds.values()))):
        rate = f"{found.batch / seconds:,.0f} images/s, {100 * found.mfu(seconds):.0f} % MFU"
        lines.append(f"    {name:<20}{1e3 * seconds:9.2f} ms  {rate}")
    return lines


def _memory(size: int) -> str:
    unit, name = (2**30, "GiB") if size >= 2**27 else (2**20, "MiB")
    return f"{size / unit:9.2f} {name}"
