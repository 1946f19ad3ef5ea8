"""What goes wrong while scoring: a document, the disk, the memory. Nothing else is lost."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pruning.corpus.reader import load_corpus
from pruning.scores.model import batches, engine
from pruning.scores.model.batches import Reader
from pruning.scores.model.scorer import Documents
from pruning.scores.score_set import schema_of
from pruning.store import status
from pruning.store.artifact import Artifact
from pruning.store.build import Build

REPOSITORY = Path(__file__).resolve().parents[4]
# How many documents the larger of two corpora has; 1000000 for a thorough run by hand.
DOCUMENTS = int(os.environ.get("WINNOW_TEST_DOCUMENTS", "30000"))


def score(corpus_path, output, prepared) -> Artifact:
    corpus = load_corpus(corpus_path)
    inputs = {"corpus": corpus.artifact}
    build = Build(output, "scores", {}, inputs, corpus.num_shards, schema_of(prepared.columns))
    reader = Reader(corpus, None, prepared, (300,), 4)
    engine.score(reader, build.pending(), lambda rows: rows["tokens"] * 1.0, build)
    return build.finish()


def rows(scores: Artifact) -> list[dict]:
    return [row for shard in range(scores.num_shards) for row in scores.read(shard).to_pylist()]


@pytest.mark.parametrize("chunk_documents", [1, 10_000])
def test_documents_that_the_scorer_fails_on_are_named_and_only_they(
    corpus_path, summing, random_shards, tmp_path, monkeypatch, capsys, chunk_documents
):
    monkeypatch.setattr(batches, "CHUNK_DOCUMENTS", chunk_documents)
    monkeypatch.setattr(batches, "_READ_DOCUMENTS", 5)
    holds = [7 in tokens for shard in random_shards for tokens in shard]
    assert 2 < sum(holds) < len(holds) / 2
    healthy = rows(score(corpus_path, tmp_path / "healthy", summing()))
    found = score(corpus_path, tmp_path / "found", summing(poison=7))
    for row, other, poisoned in zip(rows(found), healthy, holds, strict=True):
        assert row == (other | {"status": "failed", "sum": None} if poisoned else other)
    said = capsys.readouterr().err
    assert said.count("there is poison in it") == sum(holds)
    assert f"document {healthy[holds.index(True)]['doc_id']} of {corpus_path}" in said
    assert found.manifest.counts["documents"]["failed"] == sum(holds)


def test_documents_whose_inputs_cannot_be_made_are_named_and_only_they(
    make_corpus, summing, tmp_path, capsys
):
    """A scorer that makes its inputs from texts, such as prompts, fails on some of them."""
    texts = ["one", "", "poison", "two", "poison, too", "three"]
    corpus = make_corpus(tmp_path / "texts", [[{"text": text} for text in texts if text]])

    def read(given):
        if any("poison" in text for text in given):
            raise ValueError("there is poison in it")
        return Documents.of([list(text.encode()) for text in given])

    scores = score(
        corpus.artifact.path, tmp_path / "scores", dataclasses.replace(summing(), read=read)
    )
    expected = [None if "poison" in t else sum(t.encode()) for t in texts if t]
    assert [row["sum"] for row in rows(scores)] == expected
    assert scores.manifest.counts["documents"] == {"ok": 3, "failed": 2}
    assert capsys.readouterr().err.count("there is poison in it") == 2


def test_a_scorer_that_fails_on_everything_stops_the_run(
    corpus_path, summing, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "_MOST_FAILED", 2)
    with pytest.raises(ValueError, match="poison"):
        score(corpus_path, tmp_path / "scores", summing(poison=7))
    [failed] = status.look(tmp_path / "scores").of("failed")
    assert failed.shard == 0 and "there is poison in it" in failed.error


def test_a_disk_that_is_full_while_scoring(corpus_path, summing, tmp_path):
    """A limit on the size of files, which any user can set, instead of a full disk."""
    undisturbed = score(corpus_path, tmp_path / "undisturbed", summing())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    output = tmp_path / "disturbed"
    sizes = [(undisturbed.path / s.file).stat().length for s in undisturbed.manifest.shards]
    assert sizes[1] < sizes[0] < sizes[2]
    try:
        # Room for the first two shards, and not for the third.
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[2] - 1, hard))
        with pytest.raises(OSError, match=r"cannot write .*data-00002-of-00003\.parquet"):
            score(corpus_path, output, summing())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    found = status.look(output)
    assert found.done == 2
    assert [worker.shard for worker in found.of("failed")] == [2]
    assert not list(output.glob(".data*.tmp"))
    score(corpus_path, output, summing())
    assert contents(output) == contents(tmp_path / "undisturbed")


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the one with the times."""
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name != "measured.json"}


def test_memory_does_not_grow_with_the_corpus():
    """Scored with nothing, ten times the documents take no more memory."""

    def peak(documents: int) -> float:
        done = subprocess.run(
            [
                sys.executable, "benchmarks/engine_host.py", f"--documents={documents}",
                "--scorers=nothing", f"--shard={max(DOCUMENTS // 20, 1000)}",
            ],
            cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        [line] = [line for line in done.stdout.splitlines() if line.startswith("nothing")]
        return float(line.split()[-2].replace(",", ""))

    small, large = peak(DOCUMENTS // 10), peak(DOCUMENTS)
    assert large < 1.15 * small, f"{small:.0f} MB for a tenth, {large:.0f} MB for all"


def test_a_document_of_unknown_tokens_has_a_status_of_its_own(make_corpus, summing, tmp_path):
    """Chinese under a vocabulary without it: a few tokens, that would score like any document."""
    english = "The river has been there for a long time."
    texts = [english, "\u6c34\u5c71\u4eba\u53e3\u3002 \u6c34", english * 9 + "\u6c34"]
    corpus = make_corpus(tmp_path, [[{"text": text} for text in texts]])
    found = {}
    for max_unknown in (engine.ScoreConfig.max_unknown, 1.0):
        output = tmp_path / f"scores-{max_unknown}"
        prepared = summing()
        schema = schema_of(prepared.columns)
        build = Build(output, "scores", {}, {"corpus": corpus.artifact}, 1, schema)
        reader = Reader(corpus, None, prepared, (300,), 4, max_unknown)
        engine.score(reader, [0], lambda rows: rows["tokens"] * 1.0, build)
        made = build.finish()
        found[max_unknown] = [row["status"] for row in rows(made)]
        assert (rows(made)[1]["sum"] is None) == (max_unknown < 1)
        said = list(engine.losses(made.manifest.counts))
        assert said == ["no score: 1 of 3 documents (1 unknown_tokens)"] * (max_unknown < 1)
    assert found == {0.1: ["ok", "unknown_tokens", "ok"], 1.0: ["ok"] * 3}
