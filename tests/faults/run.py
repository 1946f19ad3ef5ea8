"""Fault injection: breaks artifacts and processes, and counts what becomes of it.

    python tests/faults/run.py --trials=2000 --record=trials.jsonl

Prints a table of faults and one of commands. The exit status is 1 if a trial ended in wrong data,
in a traceback, or with advice that does not help. Every kind of trial has a fixed share, and within
it every case, such as a damage to the input of a stage, has the same. Trial k is the same in every
run of a seed with the same number of trials. The record gets a line per trial; the same command
goes on after the trials that it holds, and `--seconds=0` prints the tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).parent))

GOOD = ("IDENTICAL", "REPAIRED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the trials to run")
    parser.add_argument(
        "--models", type=float, default=0.06, help="share of stages with models; 0: no models"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--record", type=Path, help="file of one line for each trial")
    given = parser.parse_args()

    plan = {"trials": given.trials, "seed": given.seed, "models": given.models}
    found = _recorded(given.record, plan) if given.record else {}
    wanted = given.only or range(given.trials)
    began = time.monotonic()
    remaining = [number for number in wanted if number not in found]
    if given.seconds > 0 and remaining:
        _run(given, plan, found, remaining, began + given.seconds)
    outcomes = list(found.values())
    for title, column in (("fault", "fault"), ("command", "stage")):
        print("\n".join(table(title, [(row[column], row["outcome"]) for row in outcomes])) + "\n")
    return int(any(row["outcome"] not in GOOD for row in outcomes))


def _run(
    given: argparse.Namespace,
    plan: dict[str, Any],
    found: dict[int, dict[str, Any]],
    remaining: list[int],
    ends: float,
) -> None:
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # the same sums in all processes
    # Programs compile in a third of the time.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
    import surroundings
    import trials

    kinds = {**trials.TRIALS, **surroundings.TRIALS}
    if given.models:
        import checkpoint_trials
        import training_trials

        kinds |= {**checkpoint_trials.TRIALS, **training_trials.TRIALS}

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        workshop = trials.Workshop(Path(directory), given.models)
        dealt = trials.dealt(workshop, kinds, given.trials, random.Random(given.seed))
        for done, number in enumerate(remaining, 1):
            if time.monotonic() > ends:
                break
            make, case = dealt[number]
            started = time.monotonic()
            rng = random.Random(f"{given.seed}/{number}")
            fault, stage, outcome, words = trials.trial(workshop, rng, make, case)
            seconds = round(time.monotonic() - started, 2)
            found[number] = {
                **plan,
                "number": number,
                "fault": fault,
                "stage": stage,
                "outcome": outcome.name,
                "seconds": seconds,
            }
            if outcome.name not in GOOD:
                found[number]["words"] = words
                print(f"trial {number}: {fault}, {stage}: {outcome.value}\n{words}\n", flush=True)
            if given.record:
                with given.record.open("a") as file:
                    file.write(json.dumps(found[number]) + "\n")
            if done % 50 == 0:
                print(f"{len(found)} trials, {time.monotonic() - began:.0f} s", flush=True)


def _recorded(record: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the trials of a record by number."""
    if not record.exists():
        return {}
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    if any(row[name] != value for row in rows for name, value in plan.items()):
        sys.exit(f"{record} holds trials of another plan: give another file")
    return {row["number"]: row for row in rows}


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
