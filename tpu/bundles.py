"""Cycles of Pallas kernels, counted in the compiler's final schedule.

The compiler estimates no cycles for a kernel, but writes its schedule down when asked, without a
device:

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true \
        --xla_jf_dump_llo_pass_label_regex=final_bundles"

A bundle is what a core issues in one cycle. The time of a kernel is the sum over its bundles of the
trips of the loops that they stand in.

- The grid is the outermost loop, and the steps in which its first window comes and its last one
  goes are trips of it. Every loop shows the constant that its counter is compared with:
  marked as its exit test, or as what its branch back depends on (loops that copy the window of an
  operand which is on the chip already). One that shows none (its bound depends on data) is an
  error.
- What is jumped over unless an index of the grid is 0 (a table that is built for the first row of a
  batch and serves all) runs once in as many iterations as the caller says that there are rows.
- Whatever else runs in some iterations only (blocks that are skipped) is counted as if it always
  ran: the figure is an upper bound. Waiting for memory is not in it.
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
    """A schedule whose time cannot be told."""


def cycles(text: str, rows: int = 1) -> int:
    """Cycles of one execution, from the text of a "...final_bundles.txt".

    Args:
      rows: what runs only where an index of the grid is 0 runs in one of so many iterations.

    Raises:
      BundleError: no bundles, or a loop without a constant bound.
    """
    trips: dict[int, int] = {}  # of the loop that the bundles belong to, by the loop's number
    loop_of: list[tuple[int, ...]] = []  # numbers of the loops around every bundle
    around: list[int] = []
    starts: list[set[str]] = []  # regions that begin with every loop
    compared: dict[tuple[int, str], int] = {}  # loop, its predicate: "at least this"
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
        # NOTE: a bundle of one level deeper that stands behind a loop belongs to that loop: the
        # scheduler fills the slots behind a branch.
        bundles.append(match[3])
        loop_of.append(tuple(around[:depth]))
        branch = _BRANCH.search(match[3])
        for loop in around:  # the branch back may be written one level further out
            if branch and branch[2] in starts[loop] and (loop, branch[1]) in compared:
                trips.setdefault(loop, compared[loop, branch[1]])
        if not around[:depth]:
            continue
        loop = around[depth - 1]
        compared |= {(loop, name): int(least) for name, least in _COMPARED.findall(match[3])}
        if exit_test := _EXIT.search(match[3]):
            trips[loop] = int(exit_test[1])
    if not bundles:
        raise BundleError("no bundles in this text: it is not a final schedule")
    total, once = 0, _for_first_rows(bundles)
    for number, loops_around in enumerate(loop_of):
        times = 1
        for loop in loops_around:
            if loop not in trips:
                raise BundleError(
                    f"loop {loop} around bundle {number}: its bound is not a constant, so its "
                    "trips are unknown"
                )
            times *= trips[loop]
        total += math.ceil(times / rows) if number in once else times
    return total


def _for_first_rows(bundles: list[str]) -> set[int]:
    """Those that are jumped over unless an index of the grid is 0."""
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


def of_kernel(directory: Path, instructions: Iterable[str], rows: int = 1) -> int:
    """Cycles of a kernel, from a dump of the program that has it.

    Args:
      directory: of the dump.
      instructions: that call it; the compiler may have written the schedule of one of them only.
      rows: see `cycles`.

    Raises:
      BundleError: the dump lacks it, or its time cannot be told.
    """
    for name in instructions:
        for file in sorted(directory.glob(f"*-{glob.escape(name)}-*-final_bundles.txt")):
            if "schedule-analysis" not in file.name:
                try:
                    return cycles(file.read_text(), rows)
                except BundleError as error:
                    raise BundleError(f"kernel {name}: {error}") from error
    raise BundleError(f"no schedule of the kernel {name} among the files in {directory}")
