"""Explanations: the rank and the verdict are those of the selection."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pruning.scores.terms import Term
from pruning.selection import explain, select
from pruning.selection.config import Quotas, SelectConfig, SelectError
from pruning.selection.strategies import (
    Difference,
    Intersection,
    InverseFrequency,
    Middle,
    Random,
    Softmax,
    Split,
    Threshold,
    Top,
)
from pruning.store.manifest import ArtifactError

COUNTS = (60, 0, 41)


@pytest.fixture(scope="module")
def world(tmp_path_factory, artifacts):
    """A corpus with domains, a score set in which three documents have no score."""
    path = tmp_path_factory.mktemp("explain")
    rng = np.random.default_rng(0)
    domains = [list(map(str, rng.choice(["a", "b"], n))) for n in COUNTS]
    documents = artifacts.documents(COUNTS)
    corpus = artifacts.corpus(path / "corpus", documents, domains=domains)
    values = [np.round(rng.normal(size=n), 1) for n in COUNTS]
    statuses = {(0, 5): "empty", (0, 9): "not_selected", (2, 0): "empty"}
    artifacts.scores(path / "scores", corpus, {"x": values}, statuses)
    select.run(SelectConfig(str(path / "corpus"), str(path / "half"), Split(0.0, 0.5)))
    select.run(SelectConfig(str(path / "corpus"), str(path / "most"), Split(0.0, 0.9)))
    return path


CONFIGS = {
    "top": {"strategy": Top(), "keep_tokens": 0.3},
    "rank": {
        "strategy": Top(),
        "keep_documents": 20,
        "score": (Term("column:x", 2.0, scale="rank"), Term("corpus:n_tokens", scale="log")),
        "combine": "product",
    },
    "within": {"strategy": Middle(), "keep_documents": 0.3, "within": "half"},
    "quotas": {"strategy": Top(), "keep_tokens": 0.4, "quotas": Quotas("domain", {"a": 0.7})},
    "softmax": {"strategy": Softmax(0.5), "keep_documents": 30, "seed": 3, "keep_unscored": True},
    "fitted": {"strategy": InverseFrequency(bins=8), "keep_documents": 30},
    "threshold": {"strategy": Threshold(low=0.2)},
    "random": {"strategy": Random(), "keep_tokens": 0.2, "scores": None, "score": None},
    "split": {"strategy": Split(0.2, 0.6), "scores": None, "score": None},
    "joined": {"strategy": Difference(("most", "half")), "scores": None, "score": None},
}


def config(world, name: str) -> SelectConfig:
    settings = {"scores": "scores", "score": "column:x"} | CONFIGS[name]
    for key in ("scores", "within"):
        if settings.get(key):
            settings[key] = str(world / settings[key])
    if isinstance(settings["strategy"], Difference | Intersection):
        paths = tuple(str(world / one) for one in settings["strategy"].selections)
        settings["strategy"] = type(settings["strategy"])(paths)
    return SelectConfig(str(world / "corpus"), str(world / name), **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_document_is_explained_as_it_was_decided(name, world):
    given = config(world, name)
    made = select.run(given)
    assert explain.config_of(made).identity == given.identity
    kept = set(
        np.concatenate(
            [made.read(k, ["doc_id"])["doc_id"] for k in range(made.num_shards)]
        ).tolist()
    )
    ids = [(shard << 32) + row for shard, count in enumerate(COUNTS) for row in range(count)]
    text = "\n".join(explain.lines(str(made.path), ids))
    blocks = re.split(r"(?m)^document ", text)[1:]
    assert len(blocks) == len(ids)
    ranks: dict[tuple[str, int], list[int]] = {}
    for block, document in zip(blocks, ids, strict=True):
        assert block.startswith(f"{document} ")
        verdict = block.partition("\n")[0]
        assert verdict.endswith(": kept" if document in kept else ": not kept")
        assert "reason: " in block
        if found := re.search(r"rank by \w+: ([\d,]+) of ([\d,]+) documents( of \S+)?", block):
            group = (found[3] or "", int(found[2].replace(",", "")))
            ranks.setdefault(group, []).append(int(found[1].replace(",", "")))
    for (_, total), found in ranks.items():  # a permutation: every rank once
        assert sorted(found) == list(range(1, total + 1))
    assert ranks or name in ("split", "joined")


def test_reasons_name_what_decided(world):
    select.run(config(world, "top"))
    by_row = {row: "\n".join(explain.lines(str(world / "top"), [row])) for row in (5, 9)}
    assert "without a score it is not kept (status empty)" in by_row[5]
    assert "the scorer was told to leave it out" in by_row[9]
    with pytest.raises(SelectError, match="has no document 60"):
        list(explain.lines(str(world / "top"), [60]))


def test_an_input_that_changed_is_refused(world, artifacts, tmp_path):
    corpus = artifacts.corpus(tmp_path / "corpus", artifacts.documents((9,)))
    made = select.run(SelectConfig(str(corpus.path), str(tmp_path / "s"), Split(0.0, 0.5)))
    for file in sorted(corpus.path.iterdir(), reverse=True):
        file.unlink()
    artifacts.corpus(tmp_path / "corpus", artifacts.documents((9,), seed=1))
    with pytest.raises(ArtifactError, match="was made from the corpus at"):
        list(explain.lines(str(made.path), [0]))
