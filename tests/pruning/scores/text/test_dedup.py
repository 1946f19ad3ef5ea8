"""Duplicates of text: against plain Python over sets and dictionaries, and under interruption."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores.regroup import Regrouped
from pruning.scores.text.dedup import components as connected
from pruning.scores.text.dedup import library, minhash, stage
from pruning.scores.text.dedup.components import components, nodes_of
from pruning.scores.text.dedup.minhash import MinHash
from pruning.scores.text.dedup.stage import DedupConfig
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Random, Threshold
from pruning.store.manifest import ArtifactError, ConfigurationChanged

WORDS = [f"{a}{b}" for a in "bcdfghjklm" for b in "aeiou"] + ["naïve", "straße", "кот", "Ölpreis"]


def changed(words: list[str], share: float, random: np.random.Generator) -> list[str]:
    places = random.permutation(len(words))[: round(share * len(words))].tolist()
    return [str(random.choice(WORDS)) if i in places else word for i, word in enumerate(words)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of random words; chains of copies, each with up to 12% of the words changed."""
    random = np.random.default_rng(0)
    found = [[str(w) for w in random.choice(WORDS, random.integers(30, 200))] for _ in range(120)]
    for number in range(150):
        original = found[int(random.integers(len(found)))]
        found.append(changed(original, (0, 0.01, 0.03, 0.06, 0.12)[number % 5], random))
    found += [["too", "short"], ["too", "short"], ["short", "too"]]
    order = random.permutation(len(found))
    return [", ".join(found[i]) if i % 7 == 0 else " ".join(found[i]) for i in order]


def corpus_of(path: Path, texts: list[str], shards: int = 4) -> str:
    for k in range(shards):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[k::shards])
        path.mkdir(exist_ok=True)
        (path / f"{k}.jsonl").write_text(lines)
    source = JsonlSource(paths=(str(path / "*.jsonl"),))
    ingest.run(IngestConfig(source, "bytes", str(path / "corpus"), workers=1))
    return str(path / "corpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts) -> str:
    return corpus_of(tmp_path_factory.mktemp("texts"), texts)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Every shard is a unit of its own."""
    monkeypatch.setattr(library, "UNIT", 1)


def ngrams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def in_order(texts: list[str], shards: int = 4) -> list[str]:
    """Return the texts in the order of their documents."""
    return [text for k in range(shards) for text in texts[k::shards]]


def column(scores, name: str) -> np.ndarray:
    return np.concatenate([scores.read(k)[name].to_numpy() for k in range(scores.num_shards)])


def clusters_of(scores) -> list[int]:
    """Return the place of the document that stays for every document."""
    ids = column(scores, "doc_id").tolist()
    return [ids.index(kept) for kept in column(scores, "kept_doc_id").tolist()]


def reference(texts: list[str], settings: MinHash, least: float | None) -> list[int]:
    """Return the first document of every document's cluster: dictionaries, sets, and SciPy."""
    pairs = set()
    seen: dict = {}
    for i, text in enumerate(texts):
        if text in seen:
            pairs.add((seen[text], i))
        else:
            seen[text] = i
    alone = [i for i in seen.values() if ngrams(texts[i], settings.n)]
    grams, offsets = minhash.shingles(pa.array([texts[i] for i in alone]), settings.n)
    values = minhash.signatures(grams, offsets, settings).T
    buckets: dict = {}
    for i, signature in zip(alone, values.tolist(), strict=True):
        for band in range(settings.bands):
            rows = tuple(signature[band * settings.rows : (band + 1) * settings.rows])
            buckets.setdefault((band, rows), []).append(i)
    for bucket in buckets.values():
        for a, b in itertools.combinations(bucket, 2):
            if least is None or jaccard(ngrams(texts[a]), ngrams(texts[b])) >= least:
                pairs.add((a, b))
    a, b = np.asarray(sorted(pairs)).T
    size = len(texts)
    _, label = connected_components(coo_matrix((np.ones(len(a)), (a, b)), (size, size)), False)
    first: dict = {}
    return [first.setdefault(x, i) for i, x in enumerate(label.tolist())]


def test_equal_values_of_signatures_estimate_the_jaccard_similarity():
    random = np.random.default_rng(1)
    settings = MinHash(bands=64, rows=16)
    errors = []
    for share in np.linspace(0.05, 0.95, 60):
        common = int(share * 400)
        sets = random.integers(0, 1 << 32, 800 - common, dtype=np.uint64).astype(np.uint32)
        grams = np.concatenate([sets[:400], sets[400 - common :]])
        values = minhash.signatures(grams, np.asarray([0, 400, 800]), settings)
        true = common / (800 - common)
        deviation = np.sqrt(true * (1 - true) / settings.hashes)
        errors.append(((values[:, 0] == values[:, 1]).mean() - true) / deviation)
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))  # no bias
    assert 0.7 < np.std(errors) < 1.3  # as independent hash functions have it


@pytest.mark.parametrize("together", [1, 1 << 20])
def test_components_are_those_of_scipy(monkeypatch, together):
    """In batches as they come, and joined."""
    joined = connected._joined
    monkeypatch.setattr(connected, "_joined", lambda batches, _: joined(batches, together))
    random = np.random.default_rng(2)
    for pairs in (3, 200, 900, 4000):
        edges = random.integers(0, 1000, (pairs, 2)).astype(np.uint64) * np.uint64(7)
        chain = np.stack([np.arange(5000, 6000), np.arange(5001, 6001)], 1).astype(np.uint64)
        edges = random.permutation(np.concatenate([edges, chain]))
        batches = np.array_split(edges, 5)
        nodes = nodes_of(batches)
        assert nodes.tolist() == np.unique(edges).tolist()
        found = components(nodes, batches)
        a, b = np.searchsorted(nodes, edges.T)
        graph = coo_matrix((np.ones(len(a)), (a, b)), (len(nodes), len(nodes)))
        _, label = connected_components(graph, False)
        least = {}
        for i, x in enumerate(label.tolist()):
            least.setdefault(x, i)
        assert found.tolist() == [least[x] for x in label.tolist()]


@pytest.mark.parametrize("least", [None, 0.6])
def test_clusters_are_those_of_plain_python(tmp_path, corpus, texts, least):
    settings = MinHash(bands=20, rows=4)
    made = stage.run(
        DedupConfig(corpus, str(tmp_path / "out"), minhash=settings, min_jaccard=least, workers=1)
    )
    ordered = in_order(texts)
    expected = reference(ordered, settings, least)
    assert clusters_of(made) == expected
    rank = column(made, "duplicate_rank")
    assert ((rank == 0) == (np.asarray(expected) == np.arange(len(expected)))).all()
    sizes = np.bincount(expected)[expected]
    assert column(made, "cluster_documents").tolist() == sizes.tolist()
    same = [ordered[i] == ordered[k] for i, k in enumerate(expected)]
    assert column(made, "same_text").tolist() == same
    summary = made.manifest.summary
    assert summary["duplicates"]["same_text"] == sum(same) - len(set(expected))
    assert summary["duplicates"]["similar"] == len(same) - sum(same)
    assert summary["clusters"] == np.count_nonzero(np.bincount(expected) > 1)
    shown = pq.read_table(made.path / "clusters.parquet").to_pylist()
    ids = column(made, "doc_id").tolist()
    for row in shown:
        place = ids.index(row["doc_id"])
        assert row["text"] == ordered[place][:400] and row["duplicate_rank"] == rank[place]
    assert {row["doc_id"] for row in shown if row["duplicate_rank"] == 0} == {
        ids[k] for k in set(expected) if sizes[k] > 1
    }


def test_equal_texts_alone(tmp_path, corpus, texts):
    made = stage.run(DedupConfig(corpus, str(tmp_path / "out"), near=False, workers=1))
    ordered = in_order(texts)
    assert clusters_of(made) == [ordered.index(text) for text in ordered]


def contents(path: Path) -> dict[str, str]:
    assert not (path / "unfinished").exists()
    names = ("data-*", "manifest.json", "clusters.parquet")
    files = sorted(file for name in names for file in path.glob(name))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_bytes_however_often_it_is_stopped(tmp_path, corpus, monkeypatch):
    """Stops after every single write of an intermediate file, each time resuming."""
    settings = {"corpus": corpus, "min_jaccard": 0.6, "workers": 1}
    stage.run(DedupConfig(output=str(tmp_path / "whole"), **settings))
    stops = 0
    real = Regrouped.write

    def write(self, part, batches):
        new = not self.parts.path(part).exists()
        real(self, part, batches)
        if new:
            raise KeyboardInterrupt

    monkeypatch.setattr(Regrouped, "write", write)
    while True:
        try:
            made = stage.run(DedupConfig(output=str(tmp_path / "stopped"), **settings))
            break
        except KeyboardInterrupt:
            stops += 1
    assert made is not None and stops == 5 * 4 + 2 * 16 + 1
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_the_same_bytes_with_any_memory_processes_and_hosts(tmp_path, corpus, monkeypatch):
    settings = {"corpus": corpus, "min_jaccard": 0.6}
    stage.run(DedupConfig(output=str(tmp_path / "one"), workers=1, **settings))
    stage.run(DedupConfig(output=str(tmp_path / "three"), workers=3, **settings))
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    stage.run(DedupConfig(output=str(tmp_path / "little"), workers=1, memory_gb=1e-6, **settings))
    assert contents(tmp_path / "little") == contents(tmp_path / "one")
    # Hosts in turn: none waits, since each leaves what it has done to the others.
    monkeypatch.setattr("pruning.store.intermediate.Parts.wait", lambda self: None)
    hosts = [
        DedupConfig(output=str(tmp_path / "hosts"), workers=1, host=k, hosts=3, **settings)
        for k in range(3)
    ]
    made = None
    for _ in range(12):
        for config in hosts:
            try:
                made = made or stage.run(config)
            except ArtifactError as error:
                assert "is missing" in str(error)
    assert made is not None
    assert contents(tmp_path / "hosts") == contents(tmp_path / "one")


def test_who_stays(tmp_path, corpus, texts, write):
    from pruning.corpus.reader import load_corpus

    opened = load_corpus(corpus)
    draws = np.random.default_rng(3).random(len(texts))
    parts = np.split(draws, np.cumsum([opened.documents(k) for k in range(3)]))
    scores = write.scores(tmp_path / "scores", opened, {"quality": parts}, {(0, 0): "failed"})
    by_score = stage.run(
        DedupConfig(
            corpus,
            str(tmp_path / "highest"),
            keep="highest",
            scores=str(scores.path),
            score="column:quality",
            workers=1,
        )
    )
    draws[0] = -1  # it has no score
    longest = stage.run(DedupConfig(corpus, str(tmp_path / "long"), keep="longest", workers=1))
    lengths = np.asarray([len(text.encode()) for text in in_order(texts)])
    first = stage.run(DedupConfig(corpus, str(tmp_path / "first"), workers=1))
    for made, value in ((by_score, draws), (longest, lengths)):
        kept = np.asarray(clusters_of(made))
        for place in set(kept.tolist()):
            members = np.flatnonzero(kept == place)
            assert value[place] == value[members].max()
            ranks = column(made, "duplicate_rank")[members]
            order = members[np.argsort(ranks)]
            assert sorted(ranks) == list(range(len(members)))
            assert (np.diff(value[order]) <= 0).all()
            # The same clusters, whoever stays.
            assert len(set(np.asarray(clusters_of(first))[members])) == 1


def test_what_repeats_another_corpus_goes(tmp_path, corpus, texts):
    random = np.random.default_rng(4)
    held_out = [in_order(texts)[i] for i in (3, 50)]
    held_out += [" ".join(random.choice(WORDS, 60)) for _ in range(5)]
    other = corpus_of(tmp_path / "other", held_out, shards=2)
    alone = stage.run(DedupConfig(corpus, str(tmp_path / "alone"), workers=1))
    made = stage.run(
        DedupConfig(corpus, str(tmp_path / "out"), against={"held_out": other}, workers=1)
    )
    kept = np.asarray(clusters_of(alone))
    repeats = np.isin(kept, kept[[3, 50]])
    assert (column(made, "duplicate_rank")[repeats] > 0).all()
    assert (column(made, "kept_corpus") == repeats).all()
    assert (column(made, "kept_doc_id")[~repeats] == column(alone, "kept_doc_id")[~repeats]).all()
    found = [
        in_order(held_out, 2)[i & 0xFFFF_FFFF | (i >> 32) * 4]
        for i in column(made, "kept_doc_id")[[3, 50]].tolist()
    ]
    assert found == held_out[:2]
    assert made.manifest.summary["repeats_of"] == {"held_out": int(repeats.sum())}
    assert made.manifest.summary["documents"] == {"corpus": len(texts), "held_out": 7}


def test_a_selection_is_made_within_it(tmp_path, corpus):
    made = stage.run(DedupConfig(corpus, str(tmp_path / "out"), workers=1))
    distinct = select.run(
        SelectConfig(
            corpus,
            str(tmp_path / "distinct"),
            Threshold(high=0.0),
            str(made.path),
            "column:duplicate_rank",
        )
    )
    assert distinct.manifest.rows == np.count_nonzero(column(made, "duplicate_rank") == 0)
    half = select.run(
        SelectConfig(
            corpus, str(tmp_path / "half"), Random(), keep_tokens=0.5, within=str(distinct.path)
        )
    )
    assert set(column(half, "doc_id")) < set(column(distinct, "doc_id"))
    # Within a selection there are no duplicates left, and the others are not looked at.
    again = stage.run(
        DedupConfig(corpus, str(tmp_path / "again"), within=str(distinct.path), workers=1)
    )
    inside = np.isin(column(again, "doc_id"), column(distinct, "doc_id"))
    assert ((column(again, "status") == "not_selected") == ~inside).all()
    assert again.manifest.summary["clusters"] == 0


def test_bad_settings_and_damage(tmp_path, corpus, monkeypatch, capsys):
    for settings in (
        {"min_jaccard": 1.5},
        {"keep": "highest"},
        {"keep": "best"},
        {"against": {"corpus": corpus}},
        {"against_within": {"x": corpus}},
        {"host": 2, "hosts": 2},
        {"memory_gb": 0},
    ):
        with pytest.raises(ValueError, match=r"\."):
            DedupConfig(corpus, "out", **settings)
    out = tmp_path / "out"
    assert stage.run(DedupConfig(corpus, str(out), dry_run=True, workers=1)) is None
    assert "documents/s" in capsys.readouterr().out and not out.exists()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("pruning.scores.text.dedup.stage._summary", lambda *_: 1 / 0)
        stage.run(DedupConfig(corpus, str(out), workers=1))
    file = next((out / "unfinished").glob("candidates*.part"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"candidates.* is damaged: delete it"):
        stage.run(DedupConfig(corpus, str(out), workers=1))
    with pytest.raises(ConfigurationChanged, match="keep"):
        stage.run(DedupConfig(corpus, str(out), keep="longest", workers=1))
