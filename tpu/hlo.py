"""Costs of a compiled TPU program: estimated cycles, collectives and memory traffic.

The input is the optimized, scheduled HLO text (`compiled.as_text()`). Totals are for one chip and
one step: all instructions of the entry computation, and those of loop bodies times their trip
counts.

Choices
- Time is the compiler's "estimated_cycles", found in the backend_config of every fusion and copy.
  (`optimal_seconds` of the cost analysis counts loop bodies once and can be negative.)
- A trip count is derived from the loop: first value, bound and step of its counter. A loop for
  which these are not constants is an error.
- A Pallas kernel is opaque to the compiler and has no cycle estimate. The number of its executions
  is returned; `tpu/compile.py` multiplies it with the cycles of one.
- One operation may appear in several places under one channel id, if the compiler has split it into
  parts that overlap with other work; it is counted once. Such parts, and `-start`/`-done` pairs,
  are asynchronous. Everything else is synchronous: nothing overlaps with it.
- The bytes of a collective are those of its larger side on one chip: the result of an all-gather,
  the operand of a reduce-scatter.
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
_CONTINUED = re.compile(r'\n(?="xprof_metadata|\}\}, )')  # annotations of profilers span lines


class HloError(ValueError):
    """An HLO text whose cost cannot be computed; the message names the place."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      shape: shape of the result, as in the text.
      operands: names of the operands, without "%".
      inside: text between the parentheses; the value of a constant, the index of a parameter.
      attributes: text after the parentheses.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """Return the computations named by these attributes, such as "calls" or "body"."""
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
    """A named computation of an HLO module."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def parameter(self, index: int) -> Instruction:
        """Return the instruction of a parameter."""
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.inside == str(index):
                return instruction
        raise HloError(f"{self.name} has no parameter {index}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, with all its executions in a step.

    Attributes:
      kind: opcode, such as "all-gather".
      bytes: bytes of one execution, as defined in the module's docstring.
      largest: bytes of the largest array; one operation may carry several.
      count: executions in a step.
      asynchronous: True if other work overlaps with it.
      source: operation of the model that it was compiled from.
    """

    kind: str
    bytes: int
    largest: int
    count: int
    asynchronous: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel on operands of given shapes, with all its executions in a step.

    Attributes:
      name: name of the kernel.
      instructions: names of the instructions that call it.
      count: executions in a step.
    """

    name: str
    instructions: tuple[str, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one step on one chip.

    Attributes:
      cycles: the compiler's estimate, without Pallas kernels.
      kernels: Pallas kernels.
      collectives: collective operations.
      bytes: HBM traffic of the instructions that have cycles, estimated from shapes.
      operations: the most expensive instructions: (cycles in a step, executions, name, source).
    """

    cycles: int
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    bytes: int
    operations: tuple[tuple[int, int, str, str], ...]


# --------------------------------------------------------------------------------------------------
# Parsing


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry = None
    name: str | None = None
    instructions: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in _CONTINUED.sub("", text).splitlines():
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
    """Return the bytes of a shape; of a tuple, the sum over its arrays.

    Args:
      memory: "hbm" leaves out arrays in on-chip memory, marked S(1) in their layouts; None counts
        all.
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
# Totals


def cost(text: str) -> Cost:
    """Return the cost of a step.

    Raises:
      HloError: the text is not HLO, or the trip count of a loop is not constant.
    """
    computations, entry = parse(text)
    times_of = executions(computations, entry)
    cycles = moved = 0
    kernels: dict[tuple[str, ...], list[tuple[str, int]]] = collections.defaultdict(list)
    operations: list[tuple[int, int, str, str]] = []
    for name, times in times_of.items():
        inside = computations[name].instructions
        for instruction in inside.values():
            if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                shapes = [_plain(inside[operand].shape) for operand in instruction.operands]
                kind = (kernel_name(instruction), _plain(instruction.shape), *shapes)
                kernels[kind].append((instruction.name, times))
            own = instruction.cycles
            if own is None or own < 0:
                continue
            cycles += own * times
            moved += _traffic(instruction, computations[name], computations) * times
            operations.append((own * times, times, instruction.name, source(instruction)))
    return Cost(
        cycles=cycles,
        kernels=tuple(
            Kernel(kind[0], tuple(name for name, _ in calls), sum(times for _, times in calls))
            for kind, calls in sorted(kernels.items())
        ),
        collectives=tuple(_collectives(computations, times_of)),
        bytes=moved,
        operations=tuple(sorted(operations, reverse=True)[:20]),
    )


def executions(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """Return the executions of each computation in a step, fused computations excluded."""
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
                # NOTE: only one branch runs; counting all of them gives an upper bound.
                for called in instruction.called(
                    "true_computation", "false_computation", "branch_computations"
                ):
                    visit(called, times)
            elif instruction.opcode == "call":
                for called in instruction.called("to_apply", "calls"):
                    visit(called, times)

    visit(entry, 1)
    return dict(total)


def kernel_name(instruction: Instruction) -> str:
    """Return the name of a kernel, from its source .../NAME/pallas_call."""
    path = source(instruction).removesuffix("/pallas_call")
    return path.rpartition("/")[2] or instruction.name


def _plain(shape: str) -> str:
    """Return a shape without layouts."""
    return _ARRAY.sub(r"\1[\2]", shape)


def source(instruction: Instruction) -> str:
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
        """Return the executions of a computation, and True if it is part of an async operation."""
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
                if kind not in COLLECTIVES or is_alone(instruction):
                    continue
                times, parts = runs(computation.name)
                asynchronous = parts or instruction.opcode != kind
                if kind == "all-reduce" and any(
                    _is_reduction(caller) for _, caller in callers[computation.name]
                ):
                    kind = "reduce-scatter"
                # A pass may split one operation into several with the same channel id, so the id
                # identifies an operation only together with its kind and size.
                size = collective_size(instruction, computation)
                key = instruction.channel or (computation.name, instruction.name)
                place = None if asynchronous else (computation.name, instruction.name)
                shapes = [computation.instructions[name].shape for name in instruction.operands]
                arrays = _ARRAY.finditer(" ".join([instruction.shape, *shapes]))
                largest = max(size_of(array[0]) for array in arrays)
                yield (
                    (key, kind, size, place),
                    Collective(kind, size, largest, times, asynchronous, source(instruction)),
                )

    counted: dict[object, Collective] = {}
    for key, collective in found():
        if key not in counted or counted[key].count < collective.count:
            counted[key] = collective
    for key in sorted(counted, key=str):
        if counted[key].count:
            yield counted[key]


def is_alone(instruction: Instruction) -> bool:
    """Return True if every group has one device, so that nothing is sent."""
    match = re.search(r"\breplica_groups=(\{\{.*?\}\}|\[[\d,]+\])", instruction.attributes)
    if match is None:
        return False
    if match[1].startswith("["):  # [groups, devices of a group]
        return match[1].strip("[]").split(",")[-1] == "1"
    return "," not in match[1].replace("},{", "")


def _is_reduction(fusion: Instruction) -> bool:
    """Return True for a fusion of an all-reduce and a slice: a synchronous reduce-scatter."""
    return any("all-reduce-scatter" in called for called in fusion.called("calls"))


def collective_size(instruction: Instruction, computation: Computation) -> int:
    operands = sum(size_of(computation.instructions[name].shape) for name in instruction.operands)
    result = size_of(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        result = max(result - operands, 0)  # the tuple includes the operands
    return max(operands, result)


# --------------------------------------------------------------------------------------------------
# Memory traffic


def _traffic(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Return the HBM bytes that an instruction reads and writes; of a slice, only that part."""
    reads = [computation.instructions[name].shape for name in instruction.operands]
    written = instruction.shape
    if instruction.opcode == "fusion":
        called = instruction.called("calls")
        inner = computations[called[0]] if called else None
        if inner is not None:
            reads = [_part(inner, i, shape, computations) for i, shape in enumerate(reads)]
            if inner.root.opcode == "dynamic-update-slice":
                written = inner.instructions[inner.root.operands[1]].shape
                reads = [r for r in reads if _ARRAY.sub("", r) or r != instruction.shape]
    return sum(size_of(shape, "hbm") for shape in (*reads, written))


def _part(inner: Computation, index: int, shape: str, computations: dict[str, Computation]) -> str:
    """Return the shape of the part of a parameter that a fused computation reads.

    It is that of its slices, where it is only sliced, also inside of further fusions.
    """
    parameter = inner.parameter(index)
    layouts = _ARRAY.findall(shape)
    layout = layouts[0][2] if layouts else ""
    parts = []
    for user in inner.instructions.values():
        places = [i for i, name in enumerate(user.operands) if name == parameter.name]
        if places == [0] and user.opcode == "dynamic-slice":
            parts += [f"{d}[{n}]{layout}" for d, n, _ in _ARRAY.findall(user.shape)]
        elif places and user.opcode == "fusion" and (called := user.called("calls")):
            within = computations[called[0]]
            parts += [_part(within, place, shape, computations) for place in places]
        elif places:
            return shape
    return shape if shape in parts else " ".join(parts) or shape


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
            f"loop {loop.name} ({source(loop) or 'no source'}): unknown trip count, {why}"
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
        """Return ("constant", value) or ("carried", index in the loop's tuple)."""
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
            raise unknown("its condition reads an unknown parameter")
        raise unknown(f"its condition depends on {instruction.opcode!r}")

    left, right = term(root.operands[0]), term(root.operands[1])
    if left[0] != "carried":
        raise unknown("its condition does not compare a counter")
    initial = computation.instructions[loop.operands[0]]

    def start(index: int) -> int:
        if initial.opcode != "tuple":
            raise unknown("the first value of its counter is not a constant")
        instruction = computation.instructions[initial.operands[index]]
        while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            instruction = computation.instructions[instruction.operands[0]]
        if instruction.opcode != "constant" or not instruction.inside.lstrip("-").isdigit():
            raise unknown(f"the first value of its counter is {instruction.opcode!r}")
        return int(instruction.inside)

    first = start(left[1])
    bound = right[1] if right[0] == "constant" else start(right[1])
    if right[0] == "carried" and _step(body, right[1], computations) != 0:
        raise unknown("its bound is not constant")
    step = _step(body, left[1], computations)
    if not step:
        raise unknown("the step of its counter is not a constant")
    distance = bound - first + {"LT": 0, "LE": 1, "NE": 0, "GT": 0, "GE": -1}[direction[1]]
    if direction[1] not in ("LT", "LE", "NE", "GT", "GE") or distance * step < 0:
        return 0
    return math.ceil(distance / step)


def _step(body: Computation, index: int, computations: dict[str, Computation]) -> int | None:
    """Return what a body adds to element `index` of the loop's tuple; None if not constant."""
    if body.root.opcode != "tuple":
        return None

    def added(instruction: Instruction, where: Computation, outer: dict[str, Instruction]):
        """Return (index in the tuple, or None, and the constant) of counter + constant."""
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
    """Return bytes per step, by kind and by "synchronous" or "asynchronous"."""
    added: dict[str, dict[str, int]] = {}
    for collective in collectives:
        kind = added.setdefault(collective.kind, {"synchronous": 0, "asynchronous": 0})
        way = "asynchronous" if collective.asynchronous else "synchronous"
        kind[way] += collective.bytes * collective.count
    return added
