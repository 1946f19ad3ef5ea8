"""Console command `winnow`: the commands of all packages under one name.

    winnow ingest --files='data/*.jsonl.gz' --vocabulary=t5.model --output=runs/corpus
    winnow score --corpus=runs/corpus --model=google/flan-t5-large --output=runs/ask_llm
    winnow train --recipe=t5_tiny --corpus=runs/corpus --output=runs/tiny
    winnow recipes score

Each is the same as `python -m PACKAGE COMMAND` or `python train.py`, with one difference: the
current directory is not searched for modules, so that files of yours named `models` or `train.py`
do not hide those of Winnow.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence

from models.terminal import say

# Commands of a module of its own; the others are those of `pruning` and `evaluation`.
_PROGRAMS = {
    "recipes": "list the configurations that come with Winnow, of all commands or of one",
    "train": "pretrain or fine-tune a model",
    "weights": "convert weights, or list what is in them",
    "compile": "compile a program for a TPU topology without a TPU, and estimate its cost",
    "launch": "launch jobs on TPU VMs, GKE or Slurm",
}
_MODULES = {"train": "train", "weights": "models", "compile": "tpu.compile", "launch": "tpu.launch"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from evaluation.__main__ import COMMANDS
    from evaluation.__main__ import main as evaluate
    from pruning.cli.command import exit_status
    from pruning.cli.main import STAGES, VIEWS
    from pruning.cli.main import main as prune

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    mains: dict[str, Callable[[Sequence[str]], int]] = dict.fromkeys(STAGES, prune)
    mains |= dict.fromkeys(VIEWS, prune) | dict.fromkeys(COMMANDS, evaluate)
    if name in mains:
        return mains[name](arguments)
    if name == "recipes":
        if {"-h", "--help"} & set(arguments):
            say(
                "usage: winnow recipes [COMMAND]\n\n"
                "List the configurations: command, name and summary of each."
            )
            return 0
        return exit_status(lambda: _list_recipes(*arguments[1:2]))
    if name in _MODULES:
        return _run_module(_MODULES[name], arguments[1:])
    summaries = {command: item.summary for command, item in (STAGES | COMMANDS).items()}
    summaries |= VIEWS | _PROGRAMS
    width = max(map(len, summaries))
    lines = "\n".join(f"  {command:<{width}}  {text}" for command, text in summaries.items())
    text = f"usage: winnow COMMAND ...\n\n{lines}\n\n`winnow COMMAND --help` lists its settings."
    if name in ("-h", "--help"):
        say(text)
        return 0
    say(f"error: no command {name!r}\n\n{text}" if name else text, error=True)
    return 2


def _list_recipes(command: str | None = None) -> int:
    from pruning.cli import recipes

    say("\n".join(recipes.lines(command)))
    return 0


def _run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a module as `python -m` would; return its exit status."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            say(end.code, error=True)
            return 1
        return end.code or 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
