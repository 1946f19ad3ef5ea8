"""Evaluation as commands: `python -m evaluation COMMAND --gin_file=... --gin.NAME=VALUE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pruning.cli import command
from pruning.cli.command import Command

COMMANDS = {
    "perplexity": Command(
        "evaluation.perplexity",
        "perplexity and bits per byte of a model on held-out documents",
        "--model=runs/t5 --corpus=runs/held_out --output=runs/t5/perplexity",
    ),
    "scores": Command(
        "evaluation.report.score_report",
        "compare score sets: rank agreement, length, documents at each decile",
        "--gin_file=configs/evaluate/scores.gin --gin.CORPUS=runs/c4/corpus",
    ),
    "selections": Command(
        "evaluation.report.selection_report",
        "compare selections: their overlap, and what each kept by length, source and domain",
        "--corpus=runs/corpus --selections=\"('runs/top', 'runs/random')\" --output=runs/compared",
    ),
    "tasks": Command(
        "evaluation.tasks.judged",
        "a model's answers to GLUE, SuperGLUE, SQuAD, CNN/DailyMail, and their metrics",
        "--model=runs/finetuned --data=eval --tasks=glue_v002_proportional",
    ),
    "examples": Command(
        "evaluation.tasks.examples",
        "write tasks as token ids, for fine-tuning with train.py",
        "--tasks=glue_v002_proportional --data=eval --vocabulary=t5.model",
    ),
    "harness": Command(
        "evaluation.harness",
        "tasks of lm-evaluation-harness, published or from local files",
        "--model=runs/t5 --tasks=winnow_zero_shot",
    ),
    "contamination": Command(
        "evaluation.contamination",
        "find documents of a corpus that repeat an evaluation set",
        "--corpus=runs/corpus --data=eval",
    ),
    "study": Command(
        "evaluation.study.run",
        "score, select, train and evaluate over a whole grid, and write the report",
        "--recipe=quickstart",
        "quickstart",
    ),
    "report": Command(
        "evaluation.report",
        "write the report of a study that has run, or of a training run (--run)",
        "--study=runs/demo",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given, rest = _parser(arguments).parse_known_args(arguments)
    return command.exit_status(lambda: _run(given, rest))


def _run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    module, config = COMMANDS[given.command].load(given.command, given, rest)
    options = {
        name: getattr(given, name) for name in ("dry_run", "only", "until") if hasattr(given, name)
    }
    from models.terminal import say  # after pruning.cli, which refuses a user's package `models`

    for line in module.run(config, **options):
        say(line)
    return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    program = command.program(
        "python -m evaluation",
        "Judge models and selections, and report what the pruning bought.",
        "Every command can be interrupted; the same command finishes it.",
        COMMANDS,
        arguments,
    )
    study = program.commands["study"]
    study.add_argument(
        *("--dry-run", "--dry_run"), action="store_true", help="print the stages and run nothing"
    )
    study.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="run only stages of such names, e.g. 'train/*-seed1*'; may be given several times. "
        "For launchers: each process its cells, over one shared directory",
    )
    study.add_argument(
        "--until",
        action="append",
        metavar="PATTERN",
        help="run only stages of such names and what they need, e.g. score/ask_llm: a judge "
        "trained on the corpus, its exam, and its scores",
    )
    return program.parser


if __name__ == "__main__":
    raise SystemExit(main())
