"""What the devices of a compiled program send to each other, read from its text (HLO)."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_NAME = r"%?([\w.\-]+)"
_HEAD = re.compile(rf"^(ENTRY )?{_NAME} \(.*\{{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?{_NAME} = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(rf"(?:calls|to_apply|body|true_computation|false_computation)={_NAME}")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


class Traffic(NamedTuple):
    """Collectives of one kind: how often a device takes part, and how many bytes it sends to others.

    Bytes are those of rings, which send the least that is possible: of an array of n devices' parts, n - 1
    parts to gather it or to reduce and scatter it, twice as many for both (all-reduce).
    """

    times: int = 0
    bytes: int = 0


class Instruction(NamedTuple):
    """A line of a computation: `name = shape operation(rest`."""

    name: str
    shape: str
    operation: str
    rest: str


Program = dict[str, list[Instruction]]


def traffic(text: str) -> dict[str, Traffic]:
    """The collectives of one run of a program by kind, those in loops as often as they run.

    Args:
      text: of a compiled program, `compiled.as_text()`.

    Raises:
      ValueError: a loop with collectives runs nobody knows how often, or the text cannot be read.
    """
    program, entry = _computations(text)
    sizes = (
        re.search(r"num_partitions=(\d+)", text[:200_000]),
        re.search(r"replica_count=(\d+)", text[:200_000]),
    )
    devices = math.prod(int(match[1]) for match in sizes if match)
    # The compiler may copy a collective into several fusions that start it, hide it and end it: one channel.
    found: dict[tuple[str, str], Traffic] = {}
    for computation, times in _times(program, entry).items():
        for line in program[computation]:
            kind = line.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            group = 2 if kind == "collective-permute" else _group_size(line.rest, devices)
            if group == 1:
                continue
            if times == math.inf:
                raise ValueError(f"{line.name} is in a loop of unknown length")
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # TPU's way to write it
                kind, sent = "reduce-scatter", _sent("all-reduce", line, group) // 2
            else:
                sent = _sent(kind, line, group)
            channel = re.search(r"channel_id=(\d+)", line.rest)
            key = (kind, channel[1] if channel else f"{computation} {line.name}")
            found[key] = max(found.get(key, Traffic()), Traffic(int(times), int(times) * sent))
    total: dict[str, Traffic] = {}
    for (kind, _), each in found.items():
        before = total.get(kind, Traffic())
        total[kind] = Traffic(before.times + each.times, before.bytes + each.bytes)
    return {kind: total[kind] for kind in KINDS if kind in total}


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of the arrays of a tuple, as HLO writes its shape; without padding."""
    total = 0.0
    for letters, bits, sides in _ARRAY.findall(shape):
        width = 8 if letters == "pred" else int(bits or 0)
        total += width / 8 * math.prod(int(side) for side in sides.split(",") if side)
    return math.ceil(total)


def _sent(kind: str, line: Instruction, group: int) -> int:
    """Bytes that a device sends in one collective among `group` devices."""
    size = shape_bytes(line.shape)
    if line.operation.endswith("-start") and kind != "all-reduce":  # operand and result, and flags
        size -= shape_bytes(" ".join(re.findall(r"u32\[\]", line.shape)))
        if kind == "all-gather":  # one is a part of the other
            size = size * group // (group + 1)
        else:
            size //= group + 1 if kind == "reduce-scatter" else 2
    if kind == "reduce-scatter":
        size *= group
    if kind.startswith("collective"):
        return size
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) // group


def _group_size(rest: str, devices: int) -> int:
    """How many devices take part in each of a collective's groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _computations(text: str) -> tuple[Program, str]:
    """The instructions of each computation, and the name of that which is the program."""
    program: Program = {}
    entry, lines = "", []
    for row in text.splitlines():
        if head := _HEAD.match(row):
            lines = program.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(row):
            lines.append(Instruction(*match.groups()))
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no entry")
    return program, entry


def _times(program: Program, entry: str) -> dict[str, float]:
    """How often each computation runs; infinity: nobody knows."""
    times: dict[str, float] = {}
    waiting = [(entry, 1.0)]
    while waiting:
        name, count = waiting.pop()
        if times.get(name, 0.0) >= count:
            continue
        times[name] = count
        for line in program[name]:
            within = count * (_trips(program, line) if line.operation == "while" else 1)
            waiting += [(called, within) for called in _called(line) if called in program]
    return times


def _called(line: Instruction) -> Iterator[str]:
    yield from _CALLED.findall(line.rest)
    for branches in _BRANCHES.findall(line.rest):
        yield from re.findall(_NAME, branches)


def _trips(program: Program, line: Instruction) -> float:
    """How often a loop runs: as the compiler says or, where it does not, as its counter does.

    That counter is an entry of the loop's state which the condition compares with a constant and the body
    adds constants to; it starts at 0. Infinity: nobody knows.
    """
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line.rest):
        return int(known[1])
    condition, body = (re.search(rf"{part}={_NAME}", line.rest) for part in ("condition", "body"))
    if not condition or not body:
        return math.inf
    tests = [test for test in program[condition[1]] if test.operation == "compare" and "=LT" in test.rest]
    if len(tests) != 1:
        return math.inf
    names = {each.name: each for each in program[condition[1]]}
    left, right = (names.get(operand) for operand in _operands(tests[0])[:2])
    limit = _constant(right)
    if limit is None or left is None or left.operation != "get-tuple-element":
        return math.inf
    step = _step(program[body[1]], _index(left))
    return math.ceil(limit / step) if step else math.inf


def _step(body: list[Instruction], index: int) -> int:
    """What a loop's body adds to an entry of its state; 0: something else happens to it."""
    names = {line.name: line for line in body}
    entry = names.get(_operands(body[-1])[index])
    step = 0
    while entry is not None and entry.operation in ("add", "copy"):
        operands = [names.get(name) for name in _operands(entry)]
        if entry.operation == "add":
            constants = [_constant(operand) for operand in operands]
            operands.sort(key=lambda operand: _constant(operand) is not None)
            if constants.count(None) != 1:
                return 0
            step += next(constant for constant in constants if constant is not None)
        entry = operands[0]
    is_counter = entry is not None and entry.operation == "get-tuple-element" and _index(entry) == index
    return step if is_counter else 0


def _operands(line: Instruction) -> list[str]:
    """The names in `(a, b), attributes`; shapes before them are left out."""
    inner = re.split(r"\)(?:,|$)", line.rest)[0]
    return re.findall(r"%([\w.\-]+)", inner) or [
        part.split()[-1] for part in inner.split(",") if part.strip()
    ]


def _index(line: Instruction) -> int:
    found = re.search(r"index=(\d+)", line.rest)
    return int(found[1]) if found else -1


def _constant(line: Instruction | None) -> int | None:
    if line is None or line.operation != "constant":
        return None
    value = line.rest.split(")")[0]
    return int(value) if value.lstrip("-").isdigit() else None
