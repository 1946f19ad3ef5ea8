"""Reads what the TPU compiler writes: cycles, collectives and memory traffic of a program.

Input is the optimised, scheduled HLO text (`compiled.as_text()`). What is summed is what one chip
does in one step: every instruction of the entry computation, loop bodies times their trip counts.

Choices
- Time is the compiler's own "estimated_cycles", which stand in the backend_config of every fusion
  and copy. (The cost analysis' `optimal_seconds` counts loop bodies once and can be negative.)
- A trip count is taken from the loop itself: first value, bound and step of its counter. A loop
  that does not show them is an error, never a guess.
- A Pallas kernel is opaque to the compiler and has no cycles: how often each runs is returned, and
  whoever knows its cycles adds them (`tpu/compile.py`).
- An operation under one channel id may stand in several places, where the compiler has cut it into
  parts that run beside other work: it is counted once. Such parts, and `-start`/`-done` pairs, are
  asynchronous; what is left is synchronous and nothing runs beside it.
- The bytes of a collective are its larger side, what one chip holds before or after it: of an
  all-gather the result, of a reduce-scatter the operand.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")


class HloError(ValueError):
    """The program is not of a form whose cost can be told; the message says where."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      shape: the result's, as written.
      operands: names, without "%"; the text between the parentheses for constants and parameters.
      attributes: what follows.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """The computations that it names under `calls=`, `body=`, ..."""
        found = []
        for key in keys:
            for match in re.finditer(rf"\b{key}=(%[\w.-]+|\{{[^}}]*\}})", self.attributes):
                found += _NAME.findall(match[1])
        return found

    @property
    def cycles(self) -> int | None:
        match = re.search(r'"estimated_cycles":"(-?\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def channel(self) -> int | None:
        match = re.search(r"\bchannel_id=(\d+)", self.attributes)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def parameter(self, index: int) -> Instruction:
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.inside == str(index):
                return instruction
        raise HloError(f"{self.name} has no parameter {index}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of one operation in a step.

    Attributes:
      kind: such as "all-gather".
      bytes: of one execution, see the module's head.
      largest: bytes of the largest array among them; one operation may carry several.
      count: executions in a step.
      asynchronous: whether other work runs beside it.
      source: the model's operation that it came from.
    """

    kind: str
    bytes: int
    largest: int
    count: int
    asynchronous: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All executions of a Pallas kernel on operands of the same shapes.

    Attributes:
      name: that it was given.
      instructions: which call it.
      count: executions in a step.
    """

    name: str
    instructions: tuple[str, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one chip does in one step.

    Attributes:
      cycles: the compiler's estimate, without Pallas kernels.
      kernels: see there.
      collectives: see there.
      bytes: read from and written to HBM by what has cycles; an estimate from shapes.
      operations: the costliest, (cycles in a step, executions, name, source).
    """

    cycles: int
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    bytes: int
    operations: tuple[tuple[int, int, str, str], ...]


# --------------------------------------------------------------------------------------------------
# Reading


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry = None
    name: str | None = None
    instructions: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in text.splitlines():
        if name is None:
            match = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
            if match:
                name, instructions, root = match[2], {}, None
                entry = name if match[1] else entry
            continue
        if line.startswith("}"):
            if root is None:
                raise HloError(f"computation {name} has no root")
            computations[name] = Computation(name, instructions, root)
            name = None
            continue
        match = re.match(r"\s+(ROOT )?%([\w.-]+) = ", line)
        if match is None:
            continue
        instruction = _instruction(match[2], line[match.end() :])
        instructions[instruction.name] = instruction
        if match[1]:
            root = instruction
    if entry is None:
        raise HloError("no entry computation: this is not the text of an HLO module")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name, rest[:opening], shape, tuple(_NAME.findall(inside)), inside, rest[closing + 1 :]
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise HloError(f"unbalanced parentheses in {text[:80]!r}")


def size_of(shape: str, memory: str | None = None) -> int:
    """Bytes of a shape, a tuple's being the sum; with `memory`, of its arrays in that one alone.

    `memory` "hbm" leaves out what the compiler keeps in on-chip memory, marked S(1) in layouts.
    """
    total = 0
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        if memory == "hbm" and re.search(r"S\([1-9]\)", layout):
            continue
        digits = re.sub(r"\D.*", "", dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))
        bits = _BITS.get(dtype, int(digits) if digits else 0)
        numbers = [int(number.strip("<= ")) for number in dimensions.split(",") if number]
        total += math.prod(numbers) * bits // 8
    return total


# --------------------------------------------------------------------------------------------------
# Adding up


def cost(text: str) -> Cost:
    """What a step costs.

    Raises:
      HloError: the text is not HLO, or a loop's trip count cannot be told.
    """
    computations, entry = parse(text)
    executions = _executions(computations, entry)
    cycles = traffic = 0
    kernels: dict[tuple[str, ...], list[tuple[str, int]]] = collections.defaultdict(list)
    operations: list[tuple[int, int, str, str]] = []
    for name, times in executions.items():
        inside = computations[name].instructions
        for instruction in inside.values():
            if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                shapes = [_plain(inside[operand].shape) for operand in instruction.operands]
                kind = (_kernel(instruction), _plain(instruction.shape), *shapes)
                kernels[kind].append((instruction.name, times))
            own = instruction.cycles
            if own is None or own < 0:
                continue
            cycles += own * times
            traffic += _traffic(instruction, computations[name], computations) * times
            operations.append((own * times, times, instruction.name, _source(instruction)))
    return Cost(
        cycles=cycles,
        kernels=tuple(
            Kernel(kind[0], tuple(name for name, _ in calls), sum(times for _, times in calls))
            for kind, calls in sorted(kernels.items())
        ),
        collectives=tuple(_collectives(computations, executions)),
        bytes=traffic,
        operations=tuple(sorted(operations, reverse=True)[:20]),
    )


def _executions(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """How often each computation runs in a step; those inside fusions are not among them."""
    total: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        total[name] += times
        for instruction in computations[name].instructions.values():
            if instruction.opcode == "while":
                trips = _trip_count(instruction, computations[name], computations)
                for called in instruction.called("body"):
                    visit(called, times * trips)
                for called in instruction.called("condition"):
                    visit(called, times * (trips + 1))
            elif instruction.opcode == "conditional":
                # NOTE: one branch runs; all are counted, which is too much rather than too little.
                for called in instruction.called(
                    "true_computation", "false_computation", "branch_computations"
                ):
                    visit(called, times)
            elif instruction.opcode == "call":
                for called in instruction.called("to_apply", "calls"):
                    visit(called, times)

    visit(entry, 1)
    return dict(total)


def _kernel(instruction: Instruction) -> str:
    """The name that a kernel was given: .../NAME/pallas_call among the model's operations."""
    path = _source(instruction).removesuffix("/pallas_call")
    return path.rpartition("/")[2] or instruction.name


def _plain(shape: str) -> str:
    """A shape without layouts."""
    return _ARRAY.sub(r"\1[\2]", shape)


def _source(instruction: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


# --------------------------------------------------------------------------------------------------
# Collectives


def _collectives(
    computations: dict[str, Computation], executions: dict[str, int]
) -> Iterator[Collective]:
    callers: dict[str, list[tuple[str, Instruction]]] = collections.defaultdict(list)
    for computation in computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("fusion", "async-start"):
                for called in instruction.called("calls", "called_computations"):
                    callers[called].append((computation.name, instruction))

    @functools.cache
    def runs(name: str) -> tuple[int, bool]:
        """Executions of a computation, and whether it is a part of an asynchronous operation."""
        if name in executions:
            return executions[name], False
        times, parts = 0, False
        for outer, caller in callers[name]:
            outer_times, outer_parts = runs(outer)
            times += outer_times
            parts |= outer_parts or caller.opcode == "async-start" or not _is_reduction(caller)
        return times, parts

    def found() -> Iterator[tuple[object, Collective]]:
        for computation in computations.values():
            for instruction in computation.instructions.values():
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES or _is_alone(instruction):
                    continue
                times, parts = runs(computation.name)
                asynchronous = parts or instruction.opcode != kind
                if kind == "all-reduce" and any(
                    _is_reduction(caller) for _, caller in callers[computation.name]
                ):
                    kind = "reduce-scatter"
                # A channel id may serve several operations that a pass made out of one, so it
                # names an operation only together with its kind and size.
                size = _collective_size(instruction, computation)
                key = instruction.channel or (computation.name, instruction.name)
                place = None if asynchronous else (computation.name, instruction.name)
                shapes = [computation.instructions[name].shape for name in instruction.operands]
                arrays = _ARRAY.finditer(" ".join([instruction.shape, *shapes]))
                largest = max(size_of(array[0]) for array in arrays)
                yield (
                    (key, kind, size, place),
                    Collective(kind, size, largest, times, asynchronous, _source(instruction)),
                )

    counted: dict[object, Collective] = {}
    for key, collective in found():
        if key not in counted or counted[key].count < collective.count:
            counted[key] = collective
    for key in sorted(counted, key=str):
        if counted[key].count:
            yield counted[key]


def _is_alone(instruction: Instruction) -> bool:
    """Whether every group is of one device: nothing is sent."""
    match = re.search(r"\breplica_groups=(\{\{.*?\}\}|\[[\d,]+\])", instruction.attributes)
    if match is None:
        return False
    if match[1].startswith("["):  # [groups, devices of a group]
        return match[1].strip("[]").split(",")[-1] == "1"
    return "," not in match[1].replace("},{", "")


def _is_reduction(fusion: Instruction) -> bool:
    """A fusion of an all-reduce and the slice that is kept: a reduce-scatter, synchronous."""
    return any("all-reduce-scatter" in called for called in fusion.called("calls"))


def _collective_size(instruction: Instruction, computation: Computation) -> int:
    operands = sum(size_of(computation.instructions[name].shape) for name in instruction.operands)
    result = size_of(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        result = max(result - operands, 0)  # the tuple holds the operands too
    return max(operands, result)


# --------------------------------------------------------------------------------------------------
# Memory traffic


def _traffic(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes that an instruction moves from and to HBM; of a slice or an update, only that part."""
    reads = [computation.instructions[name].shape for name in instruction.operands]
    written = instruction.shape
    if instruction.opcode == "fusion":
        called = instruction.called("calls")
        inner = computations[called[0]] if called else None
        if inner is not None:
            reads = [_part(inner, i, shape) for i, shape in enumerate(reads)]
            if inner.root.opcode == "dynamic-update-slice":
                written = inner.instructions[inner.root.operands[1]].shape
                reads = [r for r in reads if _ARRAY.sub("", r) or r != instruction.shape]
    return sum(size_of(shape, "hbm") for shape in (*reads, written))


def _part(inner: Computation, index: int, shape: str) -> str:
    """The shape of what a fused computation reads of a parameter, in the parameter's memory."""
    parameter = inner.parameter(index)
    users = [i for i in inner.instructions.values() if parameter.name in i.operands]
    if users and all(u.opcode == "dynamic-slice" for u in users):
        layouts = _ARRAY.findall(shape)
        layout = layouts[0][2] if layouts else ""
        return " ".join(f"{d}[{n}]{layout}" for u in users for d, n, _ in _ARRAY.findall(u.shape))
    return shape


# --------------------------------------------------------------------------------------------------
# Trip counts


def _trip_count(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if match:
        return int(match[1])
    condition = computations[loop.called("condition")[0]]
    body = computations[loop.called("body")[0]]

    def unknown(why: str) -> HloError:
        return HloError(
            f"loop {loop.name} ({_source(loop) or 'no source'}): unknown trip count, {why}"
        )

    root, given = condition.root, condition
    arguments: dict[str, str] = {}
    if root.opcode == "fusion":
        inner = computations[root.called("calls")[0]]
        arguments = {inner.parameter(i).name: name for i, name in enumerate(root.operands)}
        root, given = inner.root, inner
    direction = re.search(r"direction=(\w\w)", root.attributes)
    if root.opcode != "compare" or direction is None:
        raise unknown(f"its condition ends in {root.opcode!r}")

    def term(name: str) -> tuple[str, int]:
        """("constant", value) or ("carried", index in the loop's tuple)."""
        name, where = (arguments[name], condition) if name in arguments else (name, given)
        instruction = where.instructions[name]
        if instruction.opcode in ("copy", "bitcast", "convert"):
            return term(instruction.operands[0])
        if instruction.opcode == "constant" and instruction.inside.lstrip("-").isdigit():
            return "constant", int(instruction.inside)
        index = re.search(r"index=(\d+)", instruction.attributes)
        if instruction.opcode == "get-tuple-element" and index:
            return "carried", int(index[1])
        if instruction.opcode == "parameter" and where is not condition:
            raise unknown("its condition reads a parameter that is not traced")
        raise unknown(f"its condition depends on {instruction.opcode!r}")

    left, right = term(root.operands[0]), term(root.operands[1])
    if left[0] != "carried":
        raise unknown("its condition compares no counter")
    initial = computation.instructions[loop.operands[0]]

    def start(index: int) -> int:
        if initial.opcode != "tuple":
            raise unknown("its counter begins with what another operation returns")
        instruction = computation.instructions[initial.operands[index]]
        while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            instruction = computation.instructions[instruction.operands[0]]
        if instruction.opcode != "constant" or not instruction.inside.lstrip("-").isdigit():
            raise unknown(f"its counter begins with {instruction.opcode!r}")
        return int(instruction.inside)

    first = start(left[1])
    bound = right[1] if right[0] == "constant" else start(right[1])
    if right[0] == "carried" and _step(body, right[1], computations) != 0:
        raise unknown("its bound changes")
    step = _step(body, left[1], computations)
    if not step:
        raise unknown("what its counter grows by is not a constant")
    distance = bound - first + {"LT": 0, "LE": 1, "NE": 0, "GT": 0, "GE": -1}[direction[1]]
    if direction[1] not in ("LT", "LE", "NE", "GT", "GE") or distance * step < 0:
        return 0
    return math.ceil(distance / step)


def _step(body: Computation, index: int, computations: dict[str, Computation]) -> int | None:
    """What a body adds to element `index` of the loop's tuple; None where it is no constant."""
    if body.root.opcode != "tuple":
        return None

    def added(instruction: Instruction, where: Computation, outer: dict[str, Instruction]):
        """(index carried or None, constant) of counter + constant."""
        if instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            return added(where.instructions[instruction.operands[0]], where, outer)
        if instruction.opcode == "parameter" and instruction.name in outer:
            return added(outer[instruction.name], body, {})
        if instruction.opcode == "constant" and instruction.inside.lstrip("-").isdigit():
            return None, int(instruction.inside)
        if instruction.opcode == "get-tuple-element":
            match = re.search(r"index=(\d+)", instruction.attributes)
            return (int(match[1]) if match else -1), 0
        if instruction.opcode in ("add", "subtract"):
            sides = [added(where.instructions[n], where, outer) for n in instruction.operands]
            if any(side is None for side in sides):
                return None
            (first, a), (second, b) = sides
            if first is not None and second is not None:
                return None
            sign = -1 if instruction.opcode == "subtract" else 1
            return (first if first is not None else second), a + sign * b
        if instruction.opcode == "fusion":
            inner = computations[instruction.called("calls")[0]]
            operands = [where.instructions[name] for name in instruction.operands]
            names = {inner.parameter(i).name: operand for i, operand in enumerate(operands)}
            return added(inner.root, inner, names) if where is body else None
        return None

    found = added(body.instructions[body.root.operands[index]], body, {})
    return found[1] if found is not None and found[0] == index else None


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Kind, then "synchronous" and "asynchronous" -> bytes in a step."""
    added: dict[str, dict[str, int]] = {}
    for collective in collectives:
        kind = added.setdefault(collective.kind, {"synchronous": 0, "asynchronous": 0})
        way = "asynchronous" if collective.asynchronous else "synchronous"
        kind[way] += collective.bytes * collective.count
    return added
