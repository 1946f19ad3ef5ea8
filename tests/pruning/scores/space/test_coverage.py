"""The stages over stored embeddings: density, k-means, SemDeDup, and what they say together."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest

from pruning.corpus.reader import load_corpus
from pruning.scores import score_set
from pruning.scores.quantities import bytes_in_words
from pruning.scores.space import density, kmeans, race, semdedup
from pruning.scores.space.density import DensityConfig
from pruning.scores.space.kmeans import KMeansConfig
from pruning.scores.space.race import Race
from pruning.scores.space.semdedup import SemDeDupConfig
from pruning.store.artifact import load_artifact, require_input
from pruning.store.manifest import ArtifactError, ConfigurationChanged, config_of

WIDTH = 8
RACE = Race(rows=50, buckets=300, hashes_per_row=2, bandwidth=1.0)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def topics(n, seed):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((12, WIDTH))
    return unit(centres[random.integers(12, size=n)] + 0.3 * random.standard_normal((n, WIDTH)))


def texts(*sizes):
    return [[f"document {row} of shard {k}" for row in range(n)] for k, n in enumerate(sizes)]


@pytest.fixture
def world(tmp_path, write):
    """A corpus of three shards, one of them empty, with embeddings for all documents but two."""
    sizes = (300, 0, 200)
    corpus = write.corpus(tmp_path / "corpus", texts(*sizes))
    vectors = [topics(n, seed) for seed, n in enumerate(sizes)]
    unscored = {(0, 7): "empty", (2, 199): "empty"}
    write.scores(tmp_path / "embeddings", corpus, {"embedding": vectors}, unscored)
    return tmp_path, corpus, vectors, unscored


def stage_config(cls, world, name, **settings):
    path = world[0]
    return cls(
        corpus=str(path / "corpus"),
        embeddings=str(path / "embeddings"),
        output=str(path / name),
        **settings,
    )


def statuses(scores):
    return [
        s
        for k in range(scores.num_shards)
        for s in scores.read(k, ["status"])["status"].to_pylist()
    ]


def same_bytes(a, b):
    assert a.manifest.shards == b.manifest.shards
    assert a.manifest.files == b.manifest.files


# --------------------------------------------------------------------------------------------------


def test_density_is_the_sketchs_answer_for_every_document(world, column):
    _, corpus, vectors, unscored = world
    scores = density.run(stage_config(DensityConfig, world, "density", race=RACE))
    require_input(scores, "corpus", corpus.artifact)
    found = column(scores, "density")
    assert statuses(scores) == [
        "empty" if (k, row) in unscored else "ok"
        for k in range(3)
        for row in range(len(vectors[k]))
    ]
    assert np.isnan(found).sum() == 2
    x = np.concatenate(vectors)[~np.isnan(found)]
    sketch = race.Sketch.draw(RACE, WIDTH)
    buckets = np.asarray(race.buckets_of(RACE, sketch.projections, sketch.offsets, x))
    share = np.mean(
        [np.bincount(b, minlength=RACE.buckets)[b] for b in buckets.T], axis=0
    ) / len(x)  # fmt: skip
    expected = race.without_chance(RACE, share, len(x))
    np.testing.assert_allclose(found[~np.isnan(found)], expected, rtol=1e-5)
    weights = scores.manifest.summary["weights"]
    assert 0 < weights["ess_share"] < 1 < weights["max_over_min"]
    stored = race.Sketch.from_bytes((scores.path / density.SKETCH).read_bytes())
    assert stored.documents == 498


def test_density_of_several_workers_is_that_of_one(world):
    alone = density.run(stage_config(DensityConfig, world, "alone", race=RACE))
    # The second worker counted and went away; the first one finishes, then it comes back.
    config = stage_config(DensityConfig, world, "shared", race=RACE)
    second = dataclasses.replace(config, worker=1, workers=2)
    first = dataclasses.replace(config, worker=0, workers=2)
    corpus = load_corpus(config.corpus)
    embeddings = density.Embeddings.open(config.embeddings, "embedding", corpus.artifact)
    build = score_set.begin(
        config.output,
        {"scorer": config_of(RACE), "column": "embedding"},
        {"embeddings": embeddings.artifact},
        corpus,
        density.COLUMNS,
    )
    parts = density.Parts(build, "sketch", 3)
    sketch = race.Sketch.draw(RACE, WIDTH)  # of shard 1, which is empty
    parts.write(1, sketch.to_bytes())
    assert density.run(first) is None
    same_bytes(density.run(second), alone)


def test_density_of_a_union_adds_sketches(world, write, column):
    """Two halves of a corpus, the second with the first one's sketch added, against the whole."""
    path, _, vectors, _ = world
    halves = []
    for k, part in enumerate((vectors[0], vectors[2])):
        half = write.corpus(path / f"corpus{k}", texts(len(part)))
        write.scores(path / f"embeddings{k}", half, {"embedding": [part]})
        halves.append(
            DensityConfig(
                corpus=str(path / f"corpus{k}"),
                embeddings=str(path / f"embeddings{k}"),
                output=str(path / f"half{k}"),
                race=RACE,
                add=(str(path / "half0"),) if k else (),
            )
        )
    density.run(halves[0])
    union = density.run(halves[1])
    whole = write.corpus(path / "whole", texts(300, 200))
    write.scores(path / "whole_embeddings", whole, {"embedding": [vectors[0], vectors[2]]})
    expected = density.run(
        DensityConfig(
            corpus=str(path / "whole"),
            embeddings=str(path / "whole_embeddings"),
            output=str(path / "whole_density"),
            race=RACE,
        )
    )
    np.testing.assert_array_equal(column(union, "density"), column(expected, "density")[300:])
    other = dataclasses.replace(halves[1], race=Race(rows=50), output=str(path / "other"))
    with pytest.raises(ValueError, match="do not add up"):
        density.run(other)


# --------------------------------------------------------------------------------------------------


def test_kmeans_assigns_every_document_to_its_nearest_centroid(world, column):
    _, _, vectors, _ = world
    settings = {"clusters": 12, "iterations": 6}
    scores = kmeans.run(stage_config(KMeansConfig, world, "kmeans", **settings))
    with np.load(io.BytesIO((scores.path / kmeans.CENTROIDS).read_bytes())) as file:
        centroids = file["centroids"]
    cluster, similarity = column(scores, "cluster"), column(scores, "centroid_similarity")
    ok = ~np.isnan(cluster)
    cosines = np.concatenate(vectors)[ok] @ centroids.T
    np.testing.assert_array_equal(cluster[ok], cosines.argmax(axis=1))
    np.testing.assert_allclose(similarity[ok], cosines.max(axis=1), atol=1e-6)
    summary = scores.manifest.summary
    assert summary["training_documents"] == 498
    assert summary["objective"] == sorted(summary["objective"])


def test_kmeans_says_what_it_was_trained_on_and_reads_again_what_it_cannot_hold(world):
    settings = {"clusters": 6, "iterations": 3, "points_per_cluster": 20}
    held = kmeans.run(stage_config(KMeansConfig, world, "held", **settings))
    assert 80 < held.manifest.summary["training_documents"] < 160
    read = kmeans.run(stage_config(KMeansConfig, world, "read", cached_gb=0.0, **settings))
    same_bytes(held, read)
    with pytest.raises(ValueError, match="fewer clusters"):
        kmeans.run(stage_config(KMeansConfig, world, "many", clusters=1000))


def test_prototypes_are_the_bottom_of_centroid_similarity(world):
    """What SSL prototypes prune first, the most prototypical, is what Bottom keeps last."""
    from pruning.scores.terms import Combination, Term, read_scores

    scores = kmeans.run(stage_config(KMeansConfig, world, "kmeans", clusters=5, iterations=4))
    corpus = load_corpus(world[1].artifact.path)
    doc_ids = corpus.columns(0, ["doc_id"])["doc_id"].to_numpy()
    found = read_scores(
        Combination((Term("column:centroid_similarity"),)),
        corpus.artifact,
        {"scores": scores},
        0,
        doc_ids,
    )
    assert (found.reason != 0).sum() == 1 and 0.5 < np.nanmax(found.score) <= 1 + 1e-6


# --------------------------------------------------------------------------------------------------


@pytest.fixture
def clustered(world):
    kmeans.run(stage_config(KMeansConfig, world, "kmeans", clusters=7, iterations=4))
    return world


def semdedup_config(world, name, **settings):
    settings = {"clusters": str(world[0] / "kmeans"), **settings}
    return stage_config(SemDeDupConfig, world, name, **settings)


def plain_semdedup(world, column, order):
    """Twins by a loop over pairs, clusters from the score set."""
    path, _, vectors, _ = world
    clusters = load_artifact(path / "kmeans", "scores")
    x, cluster = np.concatenate(vectors), column(clusters, "cluster")
    value = np.full(len(x), np.nan)
    for c in range(7):
        members = sorted(np.flatnonzero(cluster == c), key=order)
        for j, later in enumerate(members):
            best = -1.0
            for earlier in members[:j]:
                cosine = float(x[earlier] @ x[later])
                if cosine > value[earlier]:
                    best = max(best, cosine)
            value[later] = best
    return value


@pytest.mark.parametrize("keep", ["closest", "farthest"])
def test_semdedup_compares_within_clusters_in_the_order_of_keeping(clustered, keep, column):
    similarity = column(load_artifact(clustered[0] / "kmeans"), "centroid_similarity")
    sign = -1 if keep == "closest" else 1
    scores = semdedup.run(semdedup_config(clustered, keep, keep=keep))
    expected = plain_semdedup(clustered, column, lambda i: sign * similarity[i])
    np.testing.assert_allclose(column(scores, "twin_similarity"), expected, atol=2e-6)


def test_semdedup_keeps_the_better_twin(clustered, write, column):
    path, corpus, _, _ = clustered
    quality = np.random.default_rng(3).standard_normal(500)
    parts = [quality[:300], quality[:0], quality[300:]]
    write.scores(path / "quality", corpus, {"ask": parts})
    better = semdedup_config(
        clustered, "better", keep="highest", scores=str(path / "quality"), score="column:ask"
    )
    found = column(semdedup.run(better), "twin_similarity")
    np.testing.assert_allclose(
        found, plain_semdedup(clustered, column, lambda i: -quality[i]), atol=2e-6
    )


def test_semdedup_does_not_depend_on_memory_or_workers(clustered):
    whole = semdedup.run(semdedup_config(clustered, "whole", keep="random"))
    small = semdedup_config(clustered, "small", keep="random", memory_gb=4 * WIDTH * 200 / 1e9)
    same_bytes(semdedup.run(small), whole)
    tiny = semdedup_config(clustered, "tiny", memory_gb=4 * WIDTH * 10 / 1e9)
    with pytest.raises(ArtifactError, match="more clusters"):
        semdedup.run(tiny)


def test_semdedup_reads_every_embedding_once(clustered, monkeypatch):
    read = []
    stored = semdedup.Embeddings.stored

    def counted(self, shard, groups=None):
        for rows, vectors in stored(self, shard, groups):
            read.extend((shard, row) for row in rows.tolist())
            yield rows, vectors

    monkeypatch.setattr(semdedup.Embeddings, "stored", counted)
    small = semdedup_config(clustered, "once", memory_gb=4 * WIDTH * 200 / 1e9)
    made = semdedup.run(small)
    assert len(read) == len(set(read)) == made.manifest.counts["documents"]["ok"]


def test_semdedup_stopped_after_every_file_and_on_three_hosts_gives_the_same(
    clustered, monkeypatch
):
    settings = {"keep": "random", "memory_gb": 4 * WIDTH * 200 / 1e9}
    alone = semdedup.run(semdedup_config(clustered, "alone", **settings))
    real = semdedup.Regrouped.write

    def write(self, part, batches):
        real(self, part, batches)
        raise KeyboardInterrupt

    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(semdedup.Regrouped, "write", write)
        while True:
            try:
                made = semdedup.run(semdedup_config(clustered, "stopped", **settings))
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops > 4
    same_bytes(made, alone)
    # Hosts in turn; none waits, so that one process can play all of them.
    monkeypatch.setattr("pruning.store.intermediate.Parts.wait", lambda self: None)
    made = None
    for _ in range(4):
        for worker in range(3):
            config = semdedup_config(clustered, "hosts", worker=worker, workers=3, **settings)
            with contextlib.suppress(ArtifactError):  # another host's part is missing
                made = made or semdedup.run(config)
    same_bytes(made, alone)


@pytest.mark.parametrize("stage", ["kmeans", "semdedup", "density"])
def test_a_dry_run_says_what_is_read_and_writes_nothing(clustered, capsys, stage):
    config = {
        "kmeans": stage_config(KMeansConfig, clustered, "dry", clusters=7, dry_run=True),
        "semdedup": semdedup_config(clustered, "dry", dry_run=True),
        "density": stage_config(DensityConfig, clustered, "dry", race=RACE, dry_run=True),
    }[stage]
    assert {"kmeans": kmeans, "semdedup": semdedup, "density": density}[stage].run(config) is None
    said = capsys.readouterr().out
    assert "498 vectors of 8 float32" in said and not (clustered[0] / "dry").exists()
    read = 498 * WIDTH * 4 * 2 + (2 * WIDTH * 4 if stage == "kmeans" else 0)  # whole row groups
    written = 498 * WIDTH * 4 if stage == "semdedup" else 0
    assert f"read {bytes_in_words(read)}, written {bytes_in_words(written)}" in said


def test_kmeans_trains_on_a_share_of_some_row_groups():
    """Training reads eight times its sample in whole row groups, for any number of shards."""
    settings = {"corpus": "", "embeddings": "", "output": "", "clusters": 10}
    for shards in (4, 40, 400):
        groups = [(k, g, 100 + g) for k in range(shards) for g in range(20)]
        rows = sum(size for _, _, size in groups)
        embeddings = SimpleNamespace(row_groups=groups, documents=rows - 50, width=WIDTH)
        config = KMeansConfig(**settings, points_per_cluster=100)
        sample = kmeans.Sample.draw(config, embeddings)
        sizes = [groups[20 * k + g][2] for k, chosen in sample.groups.items() for g in chosen]
        assert min(8000, rows) <= sum(sizes) < 8000 + 120
        assert sample.share * sum(sizes) == pytest.approx(1000, rel=0.01)
        assert sample.groups == kmeans.Sample.draw(config, embeddings).groups
        whole = KMeansConfig(**settings, points_per_cluster=0)
        everything = kmeans.Sample.draw(whole, embeddings)
        assert sum(map(len, everything.groups.values())) == len(groups) and everything.share == 1.0


def test_chains_drop_more_than_either_other_rule(clustered, column):
    found = {
        name: column(semdedup.run(semdedup_config(clustered, name, **settings)), "twin_similarity")
        for name, settings in {
            "nested": {},
            "at": {"epsilon": 0.05},
            "chains": {"chains": True},
        }.items()
    }
    dropped = {name: set(np.flatnonzero(value > 0.95)) for name, value in found.items()}
    assert dropped["at"] < dropped["chains"] and dropped["nested"] < dropped["chains"]


def test_what_does_not_belong_together_is_refused(clustered, write):
    path = clustered[0]
    other = write.corpus(path / "other", texts(5))
    write.scores(path / "others", other, {"embedding": [topics(5, 1)]})
    config = stage_config(DensityConfig, clustered, "new", race=RACE)
    with pytest.raises(ArtifactError, match="was made from the corpus"):
        density.run(dataclasses.replace(config, embeddings=str(path / "others")))
    with pytest.raises(ArtifactError, match="has no column 'vector'"):
        density.run(dataclasses.replace(config, column="vector"))
    with pytest.raises(ArtifactError, match="not vectors"):
        density.run(dataclasses.replace(config, column="doc_id"))
    kmeans_of = load_artifact(path / "kmeans", "scores")
    with pytest.raises(ArtifactError, match="names no input 'embeddings'"):
        semdedup.run(semdedup_config(clustered, "x", clusters=str(path / "embeddings")))
    density.run(config)
    with pytest.raises(ConfigurationChanged, match="rows: 50 -> 51"):
        density.run(dataclasses.replace(config, race=dataclasses.replace(RACE, rows=51)))
    assert kmeans_of.manifest.rows == 500
    with pytest.raises(ValueError, match="goes with"):
        semdedup_config(clustered, "x", keep="highest")


def test_a_vector_of_no_length_is_an_error_that_names_its_row(tmp_path, write):
    corpus = write.corpus(tmp_path / "corpus", texts(20))
    x = topics(20, 0)
    x[13] = np.nan
    write.scores(tmp_path / "embeddings", corpus, {"embedding": [x]})
    with pytest.raises(ArtifactError, match="row 13: the embedding has length nan"):
        density.run(stage_config(DensityConfig, (tmp_path,), "density", race=RACE))
