"""Fault injection: breaks artifacts and processes, and counts what becomes of it.

    python tests/faults/run.py --trials=2000

Prints a table of faults and one of commands. The exit status is 1 if a trial ended in wrong data,
in a traceback, or with advice that does not help. Trial k is the same in every run of a seed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parent))

GOOD = ("IDENTICAL", "REPAIRED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument(
        "--models", type=float, default=0.125, help="share of trials with any stage; 0: no models"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    given = parser.parse_args()

    os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # the same sums in all processes
    import surroundings
    import trials
    from trials import Outcome, Workshop, trial

    kinds = {**trials.TRIALS, **surroundings.TRIALS}
    if given.models:
        import checkpoint_trials

        kinds |= checkpoint_trials.TRIALS

    found: list[tuple[str, str, Outcome]] = []
    began = time.monotonic()
    ends = began + given.seconds
    with tempfile.TemporaryDirectory() as directory:
        workshop = Workshop(Path(directory), given.models)
        for number in range(given.first, given.first + given.trials):
            if time.monotonic() > ends:
                break
            fault, stage, outcome, words = trial(
                workshop, random.Random(f"{given.seed}/{number}"), kinds
            )
            found.append((fault, stage, outcome))
            if len(found) % 50 == 0:
                print(f"{len(found)} trials, {time.monotonic() - began:.0f} s", flush=True)
            if outcome.name not in GOOD:
                print(f"trial {number}: {fault}, {stage}: {outcome.value}\n{words}\n", flush=True)
    for title, column in (("fault", 0), ("command", 1)):
        print("\n".join(table(title, [(row[column], row[2].name) for row in found])) + "\n")
    return int(any(outcome.name not in GOOD for _, _, outcome in found))


def table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    """Return a table in Markdown: how many trials of each kind had each outcome."""
    outcomes = {
        "IDENTICAL": "identical",
        "REPAIRED": "one-line error, then repaired",
        "UNREPAIRED": "one-line error, not repaired",
        "WRONG": "silently wrong",
        "TRACEBACK": "traceback",
    }
    counts = Counter(rows)
    lines = [f"| {title} | trials | {' | '.join(outcomes.values())} |"]
    lines.append("|---" * (len(outcomes) + 2) + "|")
    kinds = sorted({kind for kind, _ in rows})
    for kind in [*kinds, "all"]:
        of = [sum(n for (k, o), n in counts.items() if o == name and kind in (k, "all"))
              for name in outcomes]  # fmt: skip
        lines.append(f"| {kind} | {sum(of)} | {' | '.join(map(str, of))} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
