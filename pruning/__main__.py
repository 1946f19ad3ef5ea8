"""The stages of pruning as commands: `python -m pruning COMMAND --gin_file=... --gin.NAME=VALUE`.

Choices
- A stage is a module with CONFIGURABLES (gin name -> dataclass), NAME (the one to make) and
  run(config). Adding a stage to the command line is adding a line to `STAGES`.
- Help answers at once: nothing heavy is imported for it. What a stage can be told is read from its
  module's source, where the dataclass's docstring says it.
- An error that a user can mend is one line; any other keeps its traceback.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pruning import configuration


class Stage(NamedTuple):
    module: str
    summary: str
    example: str


STAGES = {
    "vocabulary": Stage(
        "pruning.vocabulary_training",
        "train a SentencePiece vocabulary on a sample of a source",
        "--gin_file=configs/ingest/vocabulary.gin --gin.OUTPUT=runs/vocabulary",
    ),
    "ingest": Stage(
        "pruning.corpus",
        "read documents, tokenise them once, write a corpus",
        "--gin_file=configs/ingest/jsonl.gin --gin.FILES=mine/*.jsonl.gz --gin.OUTPUT=runs/corpus",
    ),
    "judge": Stage(
        "pruning.judge",
        "make the examples that teach a model to answer Ask-LLM",
        "--gin_file=configs/score/judge.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/examples",
    ),
    "score": Stage(
        "pruning.scoring.engine",
        "score every document of a corpus with a model",
        "--gin_file=configs/score/ask_llm.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/scores",
    ),
    "entropy": Stage(
        "pruning.scorers.entropy",
        "score documents by how rare their words are",
        "--gin.Entropy.corpus=runs/corpus --gin.Entropy.output=runs/entropy",
    ),
    "distill": Stage(
        "pruning.scorers.distilled",
        "score everything with a cheap student of a costly scorer",
        "--gin.Distill.corpus=runs/corpus --gin.Distill.teacher=runs/ask_llm "
        "--gin.Distill.output=runs/student",
    ),
    "classifier": Stage(
        "pruning.ngrams.classifier",
        "score documents by their likeness to good ones",
        "--gin.Classifier.corpus=runs/corpus --gin.Classifier.good=runs/good "
        "--gin.Classifier.output=runs/quality",
    ),
    "dsir": Stage(
        "pruning.ngrams.dsir",
        "score documents by their likeness to a target's n-grams",
        "--gin.DSIR.corpus=runs/corpus --gin.DSIR.target=runs/target --gin.DSIR.output=runs/dsir",
    ),
    "kmeans": Stage(
        "pruning.coverage.kmeans",
        "cluster stored embeddings",
        "--gin.KMeans.corpus=runs/corpus --gin.KMeans.embeddings=runs/embeddings "
        "--gin.KMeans.output=runs/clusters",
    ),
    "semdedup": Stage(
        "pruning.coverage.semdedup",
        "find near twins within clusters",
        "--gin.SemDeDup.corpus=runs/corpus --gin.SemDeDup.embeddings=runs/embeddings "
        "--gin.SemDeDup.clusters=runs/clusters --gin.SemDeDup.output=runs/twins",
    ),
    "density": Stage(
        "pruning.coverage.density",
        "estimate how crowded each document's neighbourhood is",
        "--gin.Density.corpus=runs/corpus --gin.Density.embeddings=runs/embeddings "
        "--gin.Density.output=runs/density",
    ),
    "select": Stage(
        "pruning.selection.select",
        "choose the documents to train on, by a strategy and a budget",
        "--gin_file=configs/select/top.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/selection",
    ),
    "export": Stage(
        "pruning.export",
        "write a selection, or scores, as a dataset for other programs",
        "--gin_file=configs/export.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/dataset",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    wants_help = not {"-h", "--help"}.isdisjoint(arguments)
    given, rest = _parser(arguments[0] if wants_help else None).parse_known_args(arguments)
    try:
        return _inspect(given, rest) if given.command == "inspect" else _run(given, rest)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be written there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_mendable(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    import importlib

    bindings = configuration.split_bindings(rest)  # before anything slow
    stage = importlib.import_module(STAGES[given.command].module)
    config = configuration.build(stage.NAME, stage.CONFIGURABLES, given.gin_file, bindings)
    artefact = stage.run(config)
    if artefact is not None:  # else other workers are still at it
        made = artefact.manifest
        size = f"{made.rows:,} rows" + (f", {made.tokens:,} tokens" if made.tokens else "")
        print(f"{artefact.path}: {made.kind} {made.digest[:12]}, {size}")
    return 0


def _inspect(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise SystemExit(f"inspect: unknown argument {rest[0]!r}")
    from pruning import inspect

    for line in inspect.lines(given.path, rows=given.rows, shard=given.shard, verify=given.verify):
        print(line)
    return 0


def _is_mendable(error: Exception) -> bool:
    """Whether the message says all: an error of our own kinds, or of the system, naming a file."""
    ours = type(error).__module__.partition(".")[0] in ("pruning", "models")
    return ours or isinstance(error, OSError | FloatingPointError)


# --------------------------------------------------------------------------------------------------
# Arguments and help


def _parser(explained: str | None) -> argparse.ArgumentParser:
    """Args: explained: the command whose settings the help will show."""
    parser = argparse.ArgumentParser(
        prog="python -m pruning",
        description="Score, prune and hand on a pretraining corpus, one artefact after another.",
        epilog="Every stage can be interrupted; the same command finishes it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, stage in STAGES.items():
        example = f"example:\n  python -m pruning {name} {stage.example}"
        settings = settings_of(stage.module) if name == explained else ()
        command = commands.add_parser(
            name,
            help=stage.summary,
            description=stage.summary,
            epilog="\n\n".join([example, *settings]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        configuration.add_arguments(command)
    inspect = commands.add_parser(
        "inspect",
        help="show what an artefact is and holds, finished or not",
        description="Show an artefact's manifest, what was counted, and some rows.",
    )
    inspect.add_argument("path", help="directory of a corpus, scores, a selection, ...")
    inspect.add_argument("--rows", type=int, default=3, help="how many rows to show (default: 3)")
    inspect.add_argument("--shard", type=int, default=0, help="of which shard (default: 0)")
    inspect.add_argument("--verify", action="store_true", help="read every file, compare checksums")
    return parser


def settings_of(module: str) -> Iterator[str]:
    """What the docstrings of a stage's dataclasses say of its settings, without importing it."""
    for name, cls in _configurables(module):
        attributes = (ast.get_docstring(cls) or "").partition("Attributes:\n")[2]
        if attributes:
            defaults = _defaults(cls)
            described = re.sub(
                r"^  (\w+(?:, \w+)*):",
                lambda match: f"  {match[1]}{_shown(match[1], defaults)}:",  # noqa: B023
                attributes.partition("\n\n")[0],
                flags=re.MULTILINE,
            )
            yield f"settings [and defaults] of --gin.{name}.SETTING=VALUE:\n{described}"


def _configurables(module: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """gin names and dataclasses, from the module's CONFIGURABLES and those that it takes in.

    What is not written out as a dictionary is passed over: this is for the help alone.
    """
    tree = _source(module)
    constants = dict(_constants(tree))
    origins = {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = constants.get("CONFIGURABLES")
    if not isinstance(table, ast.Dict):
        return
    for key, item in zip(table.keys, table.values, strict=True):
        if key is None and isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name):
            yield from _configurables(".".join(origins[item.value.id]))  # **sources.CONFIGURABLES
        elif isinstance(item, ast.Name):
            place, original = origins.get(item.id, (module, item.id))
            named: Any = constants.get(key.id) if isinstance(key, ast.Name) else key
            for node in _source(place).body:
                if isinstance(node, ast.ClassDef) and node.name == original:
                    yield ast.literal_eval(named), node


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names of the module and the expressions that they stand for."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


@functools.cache
def _source(module: str) -> ast.Module:
    path = Path(__file__).parent.parent / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_bytes())


def _defaults(cls: ast.ClassDef) -> dict[str, str]:
    """Settings whose default is a plain value."""
    return {
        node.target.id: ast.unparse(node.value)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        if not any(isinstance(part, ast.Call) for part in ast.walk(node.value))
    }


def _shown(names: str, defaults: dict[str, str]) -> str:
    values = [defaults[name] for name in names.split(", ") if name in defaults]
    return f" [{', '.join(values)}]" if values else ""


if __name__ == "__main__":
    raise SystemExit(main())
