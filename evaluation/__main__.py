"""Evaluation as commands: `python -m evaluation COMMAND --gin_file=... --gin.NAME=VALUE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pruning import command
from pruning.command import Command

COMMANDS = {
    "perplexity": Command(
        "evaluation.perplexity",
        "perplexity and bits per byte of a model on held-out documents",
        "--gin_file=configs/evaluate/perplexity.gin --gin.MODEL=runs/t5 --gin.CORPUS=runs/held_out",
    ),
    "scores": Command(
        "evaluation.score_report",
        "compare score sets: rank agreement, length, documents at each decile",
        "--gin_file=configs/evaluate/scores.gin --gin.CORPUS=runs/c4/corpus",
    ),
    "tasks": Command(
        "evaluation.tasks.judged",
        "a model's answers to GLUE, SuperGLUE, SQuAD, CNN/DailyMail, and their metrics",
        "--gin_file=configs/evaluate/tasks.gin --gin.MODEL=runs/finetuned --gin.DATA=eval "
        "--gin.TASKS=glue_v002_proportional",
    ),
    "examples": Command(
        "evaluation.tasks.examples",
        "write tasks as token ids, for fine-tuning with train.py",
        "--gin_file=configs/evaluate/examples.gin --gin.TASKS=glue_v002_proportional "
        "--gin.DATA=eval --gin.VOCABULARY=t5.model",
    ),
    "harness": Command(
        "evaluation.harness",
        "tasks of lm-evaluation-harness, published or from local files",
        "--gin_file=configs/evaluate/harness.gin --gin.MODEL=runs/t5 --gin.TASKS=winnow_zero_shot",
    ),
    "contamination": Command(
        "evaluation.contamination",
        "find documents of a corpus that repeat an evaluation set",
        "--gin_file=configs/evaluate/contamination.gin --gin.CORPUS=runs/corpus",
    ),
    "study": Command(
        "evaluation.study",
        "score, select, train and evaluate over a whole grid, and write the report",
        "--gin_file=configs/quickstart.gin",
    ),
    "report": Command(
        "evaluation.report",
        "write the report of a study that has run",
        "--gin.Report.study=runs/demo",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given, rest = _parser(command.explained(arguments)).parse_known_args(arguments)
    return command.status(lambda: _run(given, rest))


def _run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    module, config = COMMANDS[given.command].load(given, rest)
    options = {name: getattr(given, name) for name in ("dry_run", "only") if hasattr(given, name)}
    for line in module.run(config, **options):
        print(line)
    return 0


def _parser(explained: str | None) -> argparse.ArgumentParser:
    """Args: explained: the command whose settings the help will show."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="Judge models and selections, and report what the pruning bought.",
        epilog="Every command can be interrupted; the same command finishes it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, item in COMMANDS.items():
        added = command.add(commands, parser.prog, name, item, name == explained)
        if name == "study":
            added.add_argument(
                "--dry_run", action="store_true", help="print the stages and run nothing"
            )
            added.add_argument(
                "--only",
                action="append",
                metavar="PATTERN",
                help="run only stages of such names, e.g. 'train/*-seed1*'; may be given several "
                "times. For launchers: each process its cells, over one shared directory",
            )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
