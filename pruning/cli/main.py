"""The stages of pruning as commands: `python -m pruning COMMAND --gin_file=... --gin.NAME=VALUE`.

A stage is a module with CONFIGURABLES (gin name -> dataclass), NAME (the one to make) and
run(config). Adding a stage to the command line is adding a line to `STAGES`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from models.terminal import escaped, say, write
from pruning.cli import command
from pruning.cli.command import Command
from pruning.cli.places import require_place

STAGES = {
    "vocabulary": Command(
        "pruning.corpus.vocabulary_training",
        "train a SentencePiece vocabulary on a sample of a source",
        "--output=runs/vocabulary",
    ),
    "ingest": Command(
        "pruning.corpus.ingest",
        "read documents, tokenize them once, write a corpus",
        "--files='mine/*.jsonl.gz' --vocabulary=t5.model --output=runs/corpus",
        "jsonl",
    ),
    "import": Command(
        "pruning.scores.imported.join",
        "join scores from Parquet, JSON lines or CSV to the documents of a corpus",
        "--corpus=runs/corpus --files=scores.parquet --column=score --output=runs/imported",
    ),
    "tokenize": Command(
        "pruning.corpus.token_set",
        "tokenize a corpus for a model with another tokenizer",
        "--corpus=runs/corpus --tokenizer=Qwen/Qwen3-8B --output=runs/qwen3_tokens",
    ),
    "judge": Command(
        "pruning.scores.distilled.judge",
        "make training examples for an Ask-LLM judge",
        "--corpus=runs/corpus --output=runs/examples",
    ),
    "score": Command(
        "pruning.scores.model.engine",
        "score every document of a corpus with a model",
        "--corpus=runs/corpus --model=google/flan-t5-large --output=runs/scores",
        "ask_llm",
    ),
    "entropy": Command(
        "pruning.scores.text.entropy",
        "score documents by the mean surprisal of their words",
        "--corpus=runs/corpus --output=runs/entropy",
    ),
    "distill": Command(
        "pruning.scores.distilled.ngram_student",
        "fit an n-gram student to the scores of a part of the corpus, and score all of it",
        "--corpus=runs/corpus --teacher=runs/ask_llm --output=runs/student",
    ),
    "distill_encoder": Command(
        "pruning.scores.distilled.encoder_student",
        "fit an encoder to the scores of a part of the corpus, for `score`",
        "--corpus=runs/corpus --teacher=runs/ask_llm --output=runs/student",
    ),
    "distill_embedding": Command(
        "pruning.scores.distilled.embedding_student",
        "fit a linear layer of stored embeddings to scores of a part of the corpus, and score it",
        "--corpus=runs/corpus --embeddings=runs/embeddings --output=runs/student",
    ),
    "classifier": Command(
        "pruning.scores.text.classifier",
        "score documents by similarity to good documents",
        "--corpus=runs/corpus --good=runs/good --output=runs/quality",
    ),
    "quality": Command(
        "pruning.scores.text.quality",
        "score web documents by length, main text, edited language and educational value",
        "--corpus=runs/corpus --data=../shared/data/corpus --output=runs/quality",
    ),
    "text_score": Command(
        "pruning.scores.text.text_score",
        "score documents by a function of their text, such as one of your own",
        "--gin_file=docs/examples/zlib_ratio.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/zlib",
    ),
    "dsir": Command(
        "pruning.scores.text.dsir",
        "score documents by similarity to the n-grams of a target",
        "--corpus=runs/corpus --target=runs/target --output=runs/dsir",
    ),
    "dedup": Command(
        "pruning.scores.text.dedup.stage",
        "find documents that repeat others, word for word or nearly",
        "--corpus=runs/corpus --output=runs/duplicates",
    ),
    "whiten": Command(
        "pruning.scores.space.whiten",
        "whiten stored embeddings",
        "--corpus=runs/corpus --embeddings=runs/embeddings --output=runs/whitened",
    ),
    "embedding_score": Command(
        "pruning.scores.space.embedding_score",
        "score documents by a function of their embeddings, such as one of your own",
        "--gin_file=docs/examples/axis.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/axis",
    ),
    "towards": Command(
        "pruning.scores.space.towards",
        "score documents by similarity to target texts, such as a benchmark's examples",
        "--corpus=runs/corpus --embeddings=runs/embeddings --targets=runs/arc "
        "--target-embeddings=runs/arc_embeddings --output=runs/towards",
    ),
    "kmeans": Command(
        "pruning.scores.space.kmeans",
        "cluster stored embeddings",
        "--corpus=runs/corpus --embeddings=runs/embeddings --output=runs/clusters",
    ),
    "semdedup": Command(
        "pruning.scores.space.semdedup",
        "find semantic near-duplicates within clusters",
        "--corpus=runs/corpus --embeddings=runs/embeddings --clusters=runs/clusters "
        "--output=runs/twins",
    ),
    "density": Command(
        "pruning.scores.space.density",
        "estimate the density of each document's neighborhood",
        "--corpus=runs/corpus --embeddings=runs/embeddings --output=runs/density",
    ),
    "combine": Command(
        "pruning.scores.distilled.combine",
        "learn the weights of several scores from a label, and score by their sum",
        "--gin_file=configs/score/combine.gin --gin.CORPUS=runs/corpus --gin.OUTPUT=runs/combined",
    ),
    "cascade": Command(
        "pruning.selection.cascade.stage",
        "keep what a costly judge would keep, asking it about few documents, with a promise",
        "--corpus=runs/corpus --model=google/flan-t5-xl --keep=20% --output=runs/cascade",
        "cascade",
    ),
    "select": Command(
        "pruning.selection.select",
        "choose the documents to train on, by a strategy and a budget",
        "--corpus=runs/corpus --scores=runs/scores --keep=20% --output=runs/selection",
        "top",
    ),
    "export": Command(
        "pruning.data.export",
        "write a selection, or scores, as a dataset for other programs",
        "--corpus=runs/corpus --selection=runs/selection --output=runs/dataset",
    ),
    "publish": Command(
        "pruning.data.publish",
        "send an exported dataset to a repository of the Hugging Face hub",
        "--dataset=runs/dataset --repository=owner/name --dry-run",
    ),
}

# Commands that read directories and write nothing.
VIEWS = {
    "inspect": "show what an artifact is and holds, finished or not",
    "explain": "show why a selection kept a document or not: its scores, rank, thresholds, reason",
    "status": "show progress: finished, running and failed shards, time left",
}

# Stages that need no accelerator and map a function over shards: see parallel.py.
ON_SHARDS = (
    *("ingest", "import", "tokenize", "judge", "entropy", "classifier", "quality", "text_score"),
    *("dsir", "dedup", "export"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given, rest = _parser(arguments).parse_known_args(arguments)
    work = {"inspect": _inspect, "status": _status, "explain": _explain}.get(given.command, _run)
    return command.exit_status(lambda: work(given, rest))


def _run(given: argparse.Namespace, rest: Sequence[str]) -> int:
    stage, config = STAGES[given.command].load(given.command, given, rest)
    if given.command in ON_SHARDS:
        from pruning.store import parallel

        with parallel.using(given.runner, given.beam_pipeline_options):
            artifact = stage.run(config)
    else:
        artifact = stage.run(config)
    if artifact is not None:  # else other workers are still at it
        made = artifact.manifest
        say(f"{artifact.path}: {made.kind} {made.digest[:12]}, {made.size}")
    return 0


def _inspect(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise SystemExit(f"inspect: unknown argument {rest[0]!r}")
    from pruning.store import inspect

    require_place(given.path, "the path")
    for line in inspect.lines(given.path, rows=given.rows, shard=given.shard, verify=given.verify):
        say(escaped(line))
    return 0


def _explain(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise SystemExit(f"explain: unknown argument {rest[0]!r}")
    from pruning.selection import explain

    for line in explain.lines(given.path, given.documents):
        say(escaped(line))
    return 0


def _status(given: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise SystemExit(f"status: unknown argument {rest[0]!r}")
    for path in given.paths:
        require_place(path, "the path")
    if given.serve:
        if given.watch is not None:
            raise SystemExit("status: --serve reloads by itself: leave out --watch.")
        from pruning.cli import status_server

        status_server.require_any(given.paths)
        address = status_server.ADDRESS if given.address is None else given.address
        status_server.serve(given.paths, address, given.public)
        return 0
    if given.address is not None or given.public:
        raise SystemExit("status: --address and --public need --serve.")
    import time

    from pruning.store import status

    clear = "\x1b[H\x1b[J" if given.watch and sys.stdout.isatty() else ""
    while True:
        shown = [escaped(line) for path in given.paths for line in status.lines(path)]
        write(clear, sys.stdout)
        say("\n".join(shown))
        if not given.watch or all(map(status.is_finished, given.paths)):
            return 0
        time.sleep(given.watch)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    program = command.program(
        "python -m pruning",
        "Score, prune and export a pretraining corpus, one artifact after another.",
        "Every stage can be interrupted; the same command finishes it.",
        STAGES,
        arguments,
    )
    for name in ON_SHARDS:
        program.commands[name].add_argument(
            "--runner",
            choices=("local", "beam"),
            default="local",
            help="what maps the shards: processes of this machine, or Apache Beam",
        )
        program.commands[name].add_argument(
            "--beam_pipeline_options",
            default="",
            metavar="NAME=VALUE,...",
            help="for Beam, such as runner=DataflowRunner,project=mine,region=us-east1",
        )
    inspect = program.subparsers.add_parser(
        "inspect",
        help=VIEWS["inspect"],
        description="Show an artifact's manifest, what was counted, and some rows.",
    )
    inspect.add_argument("path", help="directory of a corpus, scores, a selection, ...")
    inspect.add_argument("--rows", type=int, default=3, help="how many rows to show (default: 3)")
    inspect.add_argument("--shard", type=int, default=0, help="of which shard (default: 0)")
    inspect.add_argument("--verify", action="store_true", help="read every file, compare checksums")
    explain = program.subparsers.add_parser(
        "explain",
        help=VIEWS["explain"],
        description="Show scores, rank, thresholds and the reason for some documents of a "
        "selection's corpus.",
    )
    explain.add_argument("path", help="directory of the selection")
    explain.add_argument(
        "documents", nargs="+", type=int, metavar="doc_id", help="ids, as the corpus has them"
    )
    status = program.subparsers.add_parser(
        "status",
        help=VIEWS["status"],
        description="Show how far unfinished work is, from its directory alone, and what finished "
        "work took.",
    )
    status.add_argument("paths", nargs="+", metavar="path", help="directories of artifacts")
    status.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="look again every so many seconds (5), until all is finished",
    )
    status.add_argument(
        "--serve",
        action="store_true",
        help="serve a page that shows artifacts, training runs and studies in the directories and "
        "below, read-only, until Ctrl-C",
    )
    status.add_argument(
        "--address",
        metavar="[HOST:]PORT",
        help="where --serve listens (default: 127.0.0.1:8321); port 0 takes a free one",
    )
    status.add_argument(
        "--public",
        action="store_true",
        help="allow an address that other machines can reach",
    )
    return program.parser
