"""Cycle counts of Pallas kernels, from the compiler's final schedule.

The compiler gives no cycle estimate for a Pallas kernel, but it can dump the schedule of one, also
without a device:

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true \
        --xla_jf_dump_llo_pass_label_regex=final_bundles"

A bundle is what a core issues in one cycle. A kernel takes the sum, over its bundles, of the trip
counts of the loops around each bundle.

- The grid is the outermost loop; the pipeline steps that load its first window and store its last
  one are trips of this loop. The trip count of a loop is the constant that its counter is compared
  with, either in the marked exit test or in the condition of the backward branch (loops that copy
  the window of an operand that is already on the chip). A loop without such a constant has a bound
  that depends on data: it runs as often as the caller says on average (`trips`), or is an error.
- Code that is skipped unless a grid index is 0, such as building a table once per batch, runs once
  in `rows` iterations; the caller passes `rows`.
- Any other conditional code, such as skipped blocks, is counted as if it always ran, so the figure
  is an upper bound. Memory stalls are not included.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:(LB|LH|LE|PB|PF|CT)\s*)?:\s*([> ]*)\{(.*)")
_EXIT = re.compile(r"= scmp\.(?:ge|gt|eq|ne|lt|le)\.\w+(?:\.\w+)? [^;]*?, (\d+) /\* loop exit test")
_COMPARED = re.compile(r"(%p\w+) = scmp\.ge\.\w+(?:\.\w+)? %\w+, (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(!(%p\w+)\) target = \$region(\d+)")
_STARTS = re.compile(r"Start region (\d+)")
_INDEX = re.compile(r"(%s\w+) = sphi [^;\n]*/\*[^*]*iteration index")
_SPILLED = re.compile(r"sst \[smem:\[(#allocation\w+_spill)\]\] (%s\w+)")
_RELOADED = re.compile(r"(%s\w+) = sld \[smem:\[(#allocation\w+_spill)\]\]")
_IS_FIRST = re.compile(r"(%p\w+) = scmp\.eq\.\w+(?:\.\w+)? (%s\w+), 0\s")
FLAGS = (
    "--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)


class BundleError(ValueError):
    """A schedule whose cycles cannot be counted."""


def cycles(text: str, rows: int = 1, trips: float | None = None) -> int:
    """Return the cycles of one execution, from the text of a "...final_bundles.txt" file.

    Args:
      text: content of the file.
      rows: code under the condition that a grid index is 0 runs in one of this many iterations.
      trips: mean trip count of a loop without a constant bound; None if there may be none.

    Raises:
      BundleError: the text has no bundles, or a loop has no constant bound and `trips` is None, or
        such loops are nested.
    """
    known: dict[int, int] = {}  # loop number -> trip count
    loop_of: list[tuple[int, ...]] = []  # for each bundle, the numbers of the loops around it
    around: list[int] = []
    starts: list[set[str]] = []  # for each loop, the regions that begin with it
    compared: dict[tuple[int, str], int] = {}  # loop and predicate -> constant of the comparison
    bundles: list[str] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        depth = match[2].count(">")
        if match[1] == "LB":
            del around[depth - 1 :]
            around.append(len(starts))
            starts.append(set(_STARTS.findall(match[3])))
        # NOTE: a bundle that follows a loop at its depth belongs to that loop: the scheduler fills
        # the delay slots of the branch.
        bundles.append(match[3])
        loop_of.append(tuple(around[:depth]))
        branch = _BRANCH.search(match[3])
        for loop in around:  # the backward branch may be listed one level further out
            if branch and branch[2] in starts[loop] and (loop, branch[1]) in compared:
                known.setdefault(loop, compared[loop, branch[1]])
        if not around[:depth]:
            continue
        loop = around[depth - 1]
        compared |= {(loop, name): int(least) for name, least in _COMPARED.findall(match[3])}
        if exit_test := _EXIT.search(match[3]):
            known[loop] = int(exit_test[1])
    if not bundles:
        raise BundleError("the text has no bundles: it is not a final schedule")
    total, once = 0.0, _for_first_rows(bundles)
    for number, loops_around in enumerate(loop_of):
        unknown = [loop for loop in loops_around if loop not in known]
        if unknown and (trips is None or len(unknown) > 1):
            raise BundleError(
                f"loop {unknown[-1]} around bundle {number} has no constant bound, so its trip "
                "count is unknown"
            )
        times = math.prod(known.get(loop, trips or 0) for loop in loops_around)
        total += math.ceil(times / rows) if number in once else times
    return round(total)


def _for_first_rows(bundles: list[str]) -> set[int]:
    """Return the numbers of the bundles that are skipped unless a grid index is 0."""
    text = "\n".join(bundles)
    indices = set(_INDEX.findall(text))
    slots = {slot for slot, name in _SPILLED.findall(text) if name in indices}
    indices |= {name for name, slot in _RELOADED.findall(text) if slot in slots}
    firsts = {predicate for predicate, name in _IS_FIRST.findall(text) if name in indices}
    found: set[int] = set()
    for number, bundle in enumerate(bundles):
        jump = _BRANCH.search(bundle)
        if jump is None or jump[1] not in firsts:
            continue
        target = re.compile(rf"Start(?:/End empty)? region {jump[2]}\b")
        lands = (n for n in range(number + 1, len(bundles)) if target.search(bundles[n]))
        found.update(range(number + 1, next(lands, number + 1)))
    return found


def of_kernel(
    directory: Path, instructions: Iterable[str], rows: int = 1, trips: float | None = None
) -> int:
    """Return the cycles of a kernel, from the dump of a program that calls it.

    Args:
      directory: directory of the dump.
      instructions: names of the instructions that call the kernel; the dump may hold the schedule
        of only one of them.
      rows, trips: as in `cycles`.

    Raises:
      BundleError: the dump has no schedule of the kernel, or its cycles cannot be counted.
    """
    for name in instructions:
        for file in sorted(directory.glob(f"*-{glob.escape(name)}-*-final_bundles.txt")):
            if "schedule-analysis" not in file.name:
                try:
                    return cycles(file.read_text(), rows, trips)
                except BundleError as error:
                    raise BundleError(f"kernel {name}: {error}") from error
    raise BundleError(f"no schedule of the kernel {name} among the files in {directory}")
