"""Costs of a compiled GPU program: bytes moved, FLOPs, communication, and a roofline.

The input is the optimized, scheduled HLO text. Totals are for one GPU and one step, by kind:

- "attention": the project's kernels, cuDNN's, and the operations of the plain form, by name;
- "products": all other matrix products, of cuBLAS or Triton;
- "copies": operations that only move data, such as slicing a layer's weights from their stack;
- "elementwise": everything else.

Choices
- An operation moves its operands and its results once. Of an operand that it slices or gathers
  from, it moves the part that it reads. Caches are not modeled: a product may read its operands
  more than once, and a small operand may never leave the cache.
- The time of an operation is the larger of its bytes divided by the bandwidth and its FLOPs divided
  by the peak, where both rates are multiplied by an assumed share (tpu/gpus.py). It is a roofline,
  not a measurement.
- FLOPs of the project's kernels are those of all pairs of a row: an upper bound for packed rows.
- A collective overlaps with the operations scheduled between its start and its end.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator

from tpu import hlo
from tpu.gpus import Gpu
from tpu.hlo import Computation, Instruction

KINDS = ("attention", "products", "elementwise", "copies")
# Matrix products of this project's kernels, each of [queries, head_dim] and [keys, head_dim].
KERNELS = {
    "fused_attention": 2,
    "fused_attention_keys": 4,
    "fused_attention_queries": 3,
    "fused_attention_bias": 2,
}
GATED = "gated_products"  # the kernel of gated MLPs (models/kernels/gated.py): two products
_FREE = frozenset(
    (
        *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"),
        *("partition-id", "replica-id", "while", "conditional", "call", "domain", "opt-barrier"),
    )
)
_MOVES = frozenset(
    (
        *("parameter", "constant", "bitcast", "copy", "transpose", "reshape", "slice", "pad"),
        *("dynamic-slice", "dynamic-update-slice", "concatenate", "tuple", "get-tuple-element"),
        "convert",
    )
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the program, with all its executions in a step.

    Attributes:
      kind: one of KINDS, or the opcode of a collective.
      bytes, flops: numbers per execution.
      seconds: roofline time of one execution.
      exposed: seconds of one execution of a collective that overlap with nothing.
    """

    name: str
    kind: str
    source: str
    count: int
    bytes: int
    flops: float
    seconds: float
    exposed: float = 0.0

    @property
    def is_collective(self) -> bool:
        return self.kind in hlo.COLLECTIVES


def operations(text: str, gpu: Gpu) -> list[Operation]:
    """Return the operations of a program.

    Raises:
      hlo.HloError: the text is not HLO, or the trip count of a loop is not constant.
    """
    computations, entry = hlo.parse(text)
    found: list[Operation] = []
    for name, times in hlo.executions(computations, entry).items():
        found += _of_computation(computations[name], computations, times, gpu)
    return found


def _of_computation(
    computation: Computation, computations: dict[str, Computation], times: int, gpu: Gpu
) -> Iterator[Operation]:
    elapsed = 0.0  # seconds of the operations scheduled so far
    started: dict[str, float] = {}
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode.endswith("-start") or opcode == "async-start":
            started[instruction.name] = elapsed
        kind = _collective(instruction, computations)
        if kind is not None and not opcode.endswith("-start"):
            if opcode.endswith("-done"):
                start = computation.instructions[instruction.operands[0]]
                between = elapsed - started.get(start.name, elapsed)
            else:
                start, between = instruction, 0.0
            if hlo.is_alone(_innermost(start, computations)):
                continue
            size = hlo.collective_size(start, computation)
            seconds = size / (gpu.links * gpu.link_share)
            exposed = max(0.0, seconds - between)
            yield Operation(start.name, kind, hlo.source(start), times, size, 0.0, seconds, exposed)
            elapsed += exposed
            continue
        if opcode in _FREE or opcode.endswith(("-start", "-done")):
            continue
        kind = _kind(instruction, computations)
        moved = _bytes(instruction, computation, computations)
        flops = _flops(instruction, computation, computations)
        share = gpu.kernel if kind == "attention" and _kernel(instruction) else gpu.product
        seconds = max(moved / (gpu.bandwidth * gpu.stream), flops / (gpu.peak * share))
        yield Operation(
            instruction.name, kind, hlo.source(instruction), times, moved, flops, seconds
        )
        elapsed += seconds


def _collective(instruction: Instruction, computations: dict[str, Computation]) -> str | None:
    """Return the kind of collective that an instruction is, starts or ends; or None."""
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    if kind in hlo.COLLECTIVES:
        return kind
    if kind == "async":
        inner = _innermost(instruction, computations)
        return inner.opcode if inner.opcode in hlo.COLLECTIVES else None
    return None


def _innermost(instruction: Instruction, computations: dict[str, Computation]) -> Instruction:
    for called in instruction.called("calls", "called_computation"):
        return computations[called].root
    return instruction


def _kernel(instruction: Instruction) -> str | None:
    """Return the name of this project's kernel, or None."""
    name = hlo.kernel_name(instruction)
    return name if instruction.opcode == "custom-call" and name in KERNELS else None


def _is_gated(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and hlo.kernel_name(instruction) == GATED


def _kind(instruction: Instruction, computations: dict[str, Computation]) -> str:
    source = hlo.source(instruction)
    if _is_gated(instruction):
        return "products"
    if "fused_attention" in source or "plain_attention" in source:
        return "attention"
    if '"__cudnn$fmha' in instruction.attributes:
        return "attention"
    if _is_cublas(instruction) or instruction.opcode == "dot":
        return "products"
    inner = [instruction]
    for called in instruction.called("calls"):
        inner = list(computations[called].instructions.values())
    if any(each.opcode == "dot" for each in inner):
        return "products"
    large = [each for each in inner if hlo.size_of(each.shape) > 64]
    if large and all(each.opcode in _MOVES for each in large):
        return "copies"
    return "elementwise"


def _is_cublas(instruction: Instruction) -> bool:
    return 'custom_call_target="__cublas$' in instruction.attributes


def _bytes(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Return the bytes that an operation reads and writes."""
    shapes = [computation.instructions[name].shape for name in instruction.operands]
    written = instruction.shape
    if _is_cublas(instruction):  # excluding its workspace, the last result
        written = re.sub(r", s8\[\d+\]\{0\}\)$", ")", written)
    if instruction.opcode in _SLICES:
        return 2 * hlo.size_of(written)
    called = instruction.called("calls")
    if instruction.opcode != "fusion" or not called:
        return sum(map(hlo.size_of, (*shapes, written)))
    inner = computations[called[0]]
    total = sum(_read(inner, inner.parameter(i), shape) for i, shape in enumerate(shapes))
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    return total + sum(_written(inner, root) for root in roots)


def _read(inner: Computation, parameter: Instruction, shape: str) -> int:
    """Return the bytes that a fused computation reads of a parameter.

    NOTE: an array of which all users read slices, or that is updated in place, is not read whole.
    """
    total, pending = 0, [parameter.name]
    while pending:
        name = pending.pop()
        for user in inner.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape"):
                pending.append(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += hlo.size_of(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return hlo.size_of(shape)
    return min(total, hlo.size_of(shape))


def _written(inner: Computation, root: Instruction) -> int:
    """Return the bytes that a root of a fused computation writes; for an update, only that part."""
    while root.opcode == "bitcast":
        root = inner.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return hlo.size_of(inner.instructions[root.operands[1]].shape)
    return hlo.size_of(root.shape)


def _flops(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> float:
    """Return the FLOPs of matrix products in an instruction."""
    if (kernel := _kernel(instruction)) is not None:
        query, key = (_dimensions(computation, name) for name in instruction.operands[:2])
        batch, queries, heads, head_dim = query
        return 2.0 * KERNELS[kernel] * batch * heads * queries * key[1] * head_dim
    if _is_gated(instruction):
        rows, depth = _dimensions(computation, instruction.operands[0])
        return 4.0 * rows * depth * _first(instruction.shape)[1]
    if _is_cublas(instruction):
        match = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', instruction.attributes)
        contracted = json.loads(match[1])["lhs_contracting_dimensions"] if match else []
        left = _dimensions(computation, instruction.operands[0])
        result = _first(instruction.shape)
        return 2.0 * math.prod(result) * math.prod(left[int(n)] for n in contracted)
    total = 0.0
    wheres = [(instruction, computation)]
    for called in instruction.called("calls"):
        inner = computations[called]
        wheres = [(each, inner) for each in inner.instructions.values()]
    for each, where in wheres:
        if each.opcode == "dot":
            match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
            contracted = [n for n in match[1].split(",") if n] if match else []
            left = _dimensions(where, each.operands[0])
            total += (
                2.0 * math.prod(_first(each.shape)) * math.prod(left[int(n)] for n in contracted)
            )
    return total


def _dimensions(computation: Computation, name: str) -> list[int]:
    return _first(computation.instructions[name].shape)


def _first(shape: str) -> list[int]:
    """Return the dimensions of the first array of a shape."""
    match = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in match[1].split(",") if n] if match else []


# --------------------------------------------------------------------------------------------------
# Totals


def traffic(found: list[Operation]) -> dict[str, int]:
    """Return the bytes of a step by kind, collectives left out."""
    total: collections.Counter[str] = collections.Counter(dict.fromkeys(KINDS, 0))
    for each in found:
        if not each.is_collective:
            total[each.kind] += each.bytes * each.count
    return dict(total)


def roofline(found: list[Operation]) -> dict[str, float]:
    """Return the seconds of a step by kind; "communication" is its exposed time."""
    total = dict.fromkeys((*KINDS, "communication"), 0.0)
    for each in found:
        if each.is_collective:
            total["communication"] += each.exposed * each.count
        else:
            total[each.kind] += each.seconds * each.count
    return total


def collectives(found: list[Operation]) -> dict[str, dict[str, int]]:
    """Return bytes of collectives by kind: those that overlap with other work, and the others.

    They are named "asynchronous" and "synchronous", as for TPUs.
    """
    total: dict[str, dict[str, int]] = {}
    for each in found:
        if each.is_collective:
            kind = total.setdefault(each.kind, {"synchronous": 0, "asynchronous": 0})
            alone = each.exposed / each.seconds if each.seconds else 0.0
            kind["synchronous"] += int(each.bytes * each.count * alone)
            kind["asynchronous"] += int(each.bytes * each.count * (1 - alone))
    return total
