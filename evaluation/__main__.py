"""Evaluation as commands: `python -m evaluation COMMAND --gin_file=... --gin.NAME=VALUE`.

Help answers at once: what a command needs is imported when it runs. An error that a user can mend
is one line; any other keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pruning import configuration


class Command(NamedTuple):
    module: str
    summary: str
    example: str


COMMANDS = {
    "perplexity": Command(
        "evaluation.perplexity",
        "perplexity and bits per byte of a model on held-out documents",
        "--gin_file=configs/evaluate/perplexity.gin --gin.MODEL=runs/t5 --gin.CORPUS=runs/held_out",
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
    given, rest = _parser().parse_known_args(arguments)
    try:
        return _run(given, rest)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_mendable(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    import importlib

    bindings = configuration.split_bindings(rest)  # before anything slow
    module = importlib.import_module(COMMANDS[given.command].module)
    config = configuration.build(module.NAME, module.CONFIGURABLES, given.gin_file, bindings)
    options = {"dry_run": True} if getattr(given, "dry_run", False) else {}
    for line in module.run(config, **options):
        print(line)
    return 0


def _is_mendable(error: Exception) -> bool:
    """Whether the message says all: an error of our own kinds, or of the system, naming a file."""
    ours = type(error).__module__.partition(".")[0] in ("evaluation", "pruning", "models")
    return ours or isinstance(error, OSError | FloatingPointError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="Judge models and selections, and report what the pruning bought.",
        epilog="Every command can be interrupted; the same command finishes it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"example:\n  python -m evaluation {name} {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        configuration.add_arguments(added)
        if name == "study":
            added.add_argument(
                "--dry_run", action="store_true", help="print the stages and run nothing"
            )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
