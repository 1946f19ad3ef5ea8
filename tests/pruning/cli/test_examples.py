"""A strategy and a source of a user's own (docs/examples), by the commands and without an edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pruning.cli.main import main
from pruning.corpus.reader import load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.store.artifact import load_artifact

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def code_lines(name: str) -> int:
    return sum(bool(line.strip()) for line in (EXAMPLES / name).read_text().splitlines())


def test_a_strategy_of_the_users_keeps_the_scores_nearest_to_its_target(tmp_path, artifacts):
    counts, rng = (80, 0, 120), np.random.default_rng(0)
    documents = artifacts.documents(counts)
    corpus = artifacts.corpus(tmp_path / "corpus", documents)
    nll = [np.round(rng.normal(size=count), 1) for count in counts]
    ones = [np.full(count, 2, np.int32) for count in counts]
    artifacts.scores(tmp_path / "scores", corpus, {"nll": nll, "n_scored_tokens": ones})
    flags = {"CORPUS": tmp_path / "corpus", "SCORES": tmp_path / "scores", "SCORE": "nll_total",
             "TARGET": 0.5, "OUTPUT": tmp_path / "kept", "KEEP": 0.3}  # fmt: skip
    given = [f"--gin.{name}={value}" for name, value in flags.items()]
    assert main(["select", f"--gin_file={EXAMPLES / 'nearest.gin'}", *given]) == 0

    selection = load_selection(tmp_path / "kept")
    ids = np.concatenate([selection.doc_ids(shard) for shard in range(selection.num_shards)])
    every = np.concatenate([(np.int64(k) << 32) + np.arange(n) for k, n in enumerate(counts)])
    kept = np.isin(every, ids)
    distance = np.abs(np.concatenate(nll) - 0.5)
    assert distance[kept].max() <= distance[~kept].min()
    tokens = np.asarray([len(tokens) for shard in documents for tokens in shard])
    assert abs(tokens[kept].sum() - 0.3 * tokens.sum()) <= tokens.max()
    strategy = load_artifact(tmp_path / "kept", "selection").manifest.config["strategy"]
    assert strategy == {"class": "Nearest", "target": 0.5}
    assert code_lines("nearest.py") <= 15


def test_a_source_of_the_users_makes_a_corpus(tmp_path, small_vocabulary_file, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"The first\nof the time.\n\nThe other.\n\n\xff")
    (tmp_path / "in" / "b.txt").write_bytes(b"A letter.")
    given = [f"--gin_file={EXAMPLES / 'paragraphs.gin'}", f"--gin.FILES={tmp_path / 'in'}",
             f"--gin.VOCABULARY={small_vocabulary_file}", f"--gin.OUTPUT={tmp_path / 'corpus'}",
             "--gin.Ingest.extra_ids=0", "--gin.Ingest.max_bad_fraction=1.0"]  # fmt: skip
    assert main(["ingest", *given, "--gin.Ingest.source=@paragraphs.Paragraphs"]) != 0
    assert "Ingest.source must be Source" in capsys.readouterr().err
    assert main(["ingest", *given]) == 0

    corpus = load_corpus(tmp_path / "corpus")
    tables = [corpus.columns(shard, ["text"]) for shard in range(corpus.num_shards)]
    texts = [text for table in tables for text in table["text"].to_pylist()]
    assert texts == ["The first\nof the time.", "The other.", "A letter."]
    assert corpus.artifact.manifest.counts["dropped"] == {"invalid_utf8": 1}
    assert corpus.artifact.manifest.config["source"] == {"class": "Paragraphs"}
    assert code_lines("paragraphs.py") <= 35
