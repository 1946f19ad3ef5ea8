"""The stages of pruning as commands: `python -m pruning COMMAND --gin_file=... --gin.NAME=VALUE`.

A stage is a module with CONFIGURABLES (gin name -> dataclass), NAME (the one to make) and
run(config). Adding a stage to the command line is adding a line to `STAGES`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pruning import command
from pruning.command import Command

STAGES = {
    "vocabulary": Command(
        "pruning.vocabulary_training",
        "train a SentencePiece vocabulary on a sample of a source",
        "--gin_file=configs/ingest/vocabulary.gin --gin.OUTPUT=runs/vocabulary",
    ),
    "ingest": Command(
        "pruning.corpus",
        "read documents, tokenise them once, write a corpus",
        "--gin_file=configs/ingest/jsonl.gin --gin.FILES=mine/*.jsonl.gz --gin.OUTPUT=runs/corpus",
    ),
    "judge": Command(
        "pruning.judge",
        "make the examples that teach a model to answer Ask-LLM",
        "--gin_file=configs/score/judge.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/examples",
    ),
    "score": Command(
        "pruning.scoring.engine",
        "score every document of a corpus with a model",
        "--gin_file=configs/score/ask_llm.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/scores",
    ),
    "entropy": Command(
        "pruning.scorers.entropy",
        "score documents by how rare their words are",
        "--gin.Entropy.corpus=runs/corpus --gin.Entropy.output=runs/entropy",
    ),
    "distill": Command(
        "pruning.scorers.distilled",
        "score everything with a cheap student of a costly scorer",
        "--gin.Distill.corpus=runs/corpus --gin.Distill.teacher=runs/ask_llm "
        "--gin.Distill.output=runs/student",
    ),
    "distill_encoder": Command(
        "pruning.scorers.student",
        "teach a T5 encoder a costly scorer's scores; `score` then scores with it",
        "--gin_file=configs/score/distill_encoder.gin --gin.CORPUS=runs/corpus "
        "--gin.TEACHER=runs/ask_llm --gin.OUTPUT=runs/student",
    ),
    "classifier": Command(
        "pruning.ngrams.classifier",
        "score documents by their likeness to good ones",
        "--gin.Classifier.corpus=runs/corpus --gin.Classifier.good=runs/good "
        "--gin.Classifier.output=runs/quality",
    ),
    "dsir": Command(
        "pruning.ngrams.dsir",
        "score documents by their likeness to a target's n-grams",
        "--gin.DSIR.corpus=runs/corpus --gin.DSIR.target=runs/target --gin.DSIR.output=runs/dsir",
    ),
    "whiten": Command(
        "pruning.coverage.whiten",
        "take from stored embeddings what all documents share",
        "--gin.Whiten.corpus=runs/corpus --gin.Whiten.embeddings=runs/embeddings "
        "--gin.Whiten.output=runs/whitened",
    ),
    "kmeans": Command(
        "pruning.coverage.kmeans",
        "cluster stored embeddings",
        "--gin.KMeans.corpus=runs/corpus --gin.KMeans.embeddings=runs/embeddings "
        "--gin.KMeans.output=runs/clusters",
    ),
    "semdedup": Command(
        "pruning.coverage.semdedup",
        "find near twins within clusters",
        "--gin.SemDeDup.corpus=runs/corpus --gin.SemDeDup.embeddings=runs/embeddings "
        "--gin.SemDeDup.clusters=runs/clusters --gin.SemDeDup.output=runs/twins",
    ),
    "density": Command(
        "pruning.coverage.density",
        "estimate how crowded each document's neighbourhood is",
        "--gin.Density.corpus=runs/corpus --gin.Density.embeddings=runs/embeddings "
        "--gin.Density.output=runs/density",
    ),
    "select": Command(
        "pruning.selection.select",
        "choose the documents to train on, by a strategy and a budget",
        "--gin_file=configs/select/top.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/selection",
    ),
    "export": Command(
        "pruning.export",
        "write a selection, or scores, as a dataset for other programs",
        "--gin_file=configs/export.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/dataset",
    ),
}


# Stages that need no accelerator and map a function over shards: see parallel.py.
ON_SHARDS = ("ingest", "judge", "entropy", "classifier", "dsir", "export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given, rest = _parser(command.explained(arguments)).parse_known_args(arguments)
    work = {"inspect": _inspect, "status": _status}.get(given.command, _run)
    return command.status(lambda: work(given, rest))


def _run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    stage, config = STAGES[given.command].load(given, rest)
    if given.command in ON_SHARDS:
        from pruning import parallel

        with parallel.using(given.runner, given.beam_pipeline_options):
            artefact = stage.run(config)
    else:
        artefact = stage.run(config)
    if artefact is not None:  # else other workers are still at it
        made = artefact.manifest
        print(f"{artefact.path}: {made.kind} {made.digest[:12]}, {made.size}")
    return 0


def _inspect(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise SystemExit(f"inspect: unknown argument {rest[0]!r}")
    from pruning import inspect

    for line in inspect.lines(given.path, rows=given.rows, shard=given.shard, verify=given.verify):
        print(line)
    return 0


def _status(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise SystemExit(f"status: unknown argument {rest[0]!r}")
    import time

    from pruning import status

    clear = "\x1b[H\x1b[J" if given.watch and sys.stdout.isatty() else ""
    while True:
        shown = [line for path in given.paths for line in status.lines(path)]
        print(clear + "\n".join(shown), flush=True)
        if not given.watch or all(map(status.is_finished, given.paths)):
            return 0
        time.sleep(given.watch)


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
        added = command.add(commands, parser.prog, name, stage, name == explained)
        if name in ON_SHARDS:
            added.add_argument(
                "--runner",
                choices=("local", "beam"),
                default="local",
                help="what maps the shards: processes of this machine, or Apache Beam",
            )
            added.add_argument(
                "--beam_pipeline_options",
                default="",
                metavar="NAME=VALUE,...",
                help="for Beam, such as runner=DataflowRunner,project=mine,region=us-east1",
            )
    inspect = commands.add_parser(
        "inspect",
        help="show what an artefact is and holds, finished or not",
        description="Show an artefact's manifest, what was counted, and some rows.",
    )
    inspect.add_argument("path", help="directory of a corpus, scores, a selection, ...")
    inspect.add_argument("--rows", type=int, default=3, help="how many rows to show (default: 3)")
    inspect.add_argument("--shard", type=int, default=0, help="of which shard (default: 0)")
    inspect.add_argument("--verify", action="store_true", help="read every file, compare checksums")
    status = commands.add_parser(
        "status",
        help="show how far work is: what is done, who runs, what failed, how long is left",
        description="Show how far unfinished work is, from its directory alone, and what finished "
        "work took.",
    )
    status.add_argument("paths", nargs="+", metavar="path", help="directories of artefacts")
    status.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="look again every so many seconds (5), until all is finished",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
