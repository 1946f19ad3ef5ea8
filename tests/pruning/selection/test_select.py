"""Selections: budgets, ties, missing scores, shards, quotas, set algebra, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pruning.cli import configuration, recipes
from pruning.corpus import blocks, reader, selection_reader
from pruning.corpus.selection_reader import load_selection
from pruning.scores.terms import Term, TermError
from pruning.selection import ranking, select, strategies
from pruning.selection.config import Quotas, SelectConfig, SelectError, validate
from pruning.selection.strategies import (
    All,
    Bottom,
    Difference,
    Intersection,
    InverseFrequency,
    InversePropensity,
    Middle,
    Percentiles,
    Random,
    Softmax,
    Split,
    Threshold,
    Top,
    Union,
)
from pruning.store.artifact import load_artifact
from pruning.store.manifest import ArtifactError, ConfigurationChanged

COUNTS = (300, 0, 500, 7)


@dataclasses.dataclass
class House:
    """A corpus with scores, and the same facts as flat arrays."""

    path: Path
    doc_ids: np.ndarray
    n_tokens: np.ndarray
    nll: np.ndarray
    domain: np.ndarray

    def config(self, output: str, strategy, **settings) -> SelectConfig:
        base = {"corpus": self.at("corpus"), "output": self.at(output), "strategy": strategy}
        if isinstance(strategy, strategies.Ranking) and strategy.needs_score:
            base |= {"scores": self.at("scores"), "score": "nll_total"}
        return SelectConfig(**(base | settings))

    def select(self, output: str, strategy, **settings):
        return select.run(self.config(output, strategy, **settings))

    def at(self, name: str) -> str:
        return str(self.path / name)


@pytest.fixture
def house(tmp_path, artifacts) -> House:
    rng = np.random.default_rng(1)
    documents = artifacts.documents(COUNTS)
    domains = [rng.choice(["a", "b", "c"], count, p=[0.6, 0.3, 0.1]) for count in COUNTS]
    nll = [np.round(rng.normal(size=count), 1) for count in COUNTS]  # many ties
    corpus = artifacts.corpus(
        tmp_path / "corpus", documents, domains=[list(map(str, part)) for part in domains]
    )
    ones = [np.full(count, 2, np.int32) for count in COUNTS]
    artifacts.scores(tmp_path / "scores", corpus, {"nll": nll, "n_scored_tokens": ones})
    return House(
        tmp_path,
        np.concatenate([(np.int64(k) << 32) + np.arange(n) for k, n in enumerate(COUNTS)]),
        np.concatenate([[len(tokens) for tokens in part] for part in documents]).astype(np.int64),
        np.concatenate(nll),
        np.concatenate(domains),
    )


def kept(selection) -> np.ndarray:
    opened = load_selection(selection.path)
    return np.concatenate([opened.doc_ids(k) for k in range(opened.num_shards)])


# --------------------------------------------------------------------------------------------------
# Budgets


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.999, 1.0])
def test_top_keeps_the_highest_and_stays_below_the_budget(house, share):
    selection = house.select("top", Top(), keep_tokens=share)
    taken = np.isin(house.doc_ids, kept(selection))
    assert house.nll[taken].min() >= house.nll[~taken].max(initial=-np.inf)
    budget = round(share * house.n_tokens.sum())
    tokens = house.n_tokens[taken].sum()
    assert tokens <= budget
    if share < 1:
        first_out = house.nll[~taken].max()
        assert budget - tokens < house.n_tokens[~taken & (house.nll == first_out)].max()
    summary = selection.manifest.summary
    assert summary["kept"] == {"documents": taken.sum(), "tokens": tokens}
    assert summary["budget"] == {"unit": "tokens", "wanted": budget, "kept": tokens}
    assert selection.manifest.tokens == tokens


def test_a_budget_of_documents_is_met_exactly(house):
    assert len(kept(house.select("share", Bottom(), keep_documents=0.25))) == round(0.25 * 807)
    assert len(kept(house.select("count", Softmax(0.5), keep_documents=123))) == 123


def test_an_absolute_budget_of_tokens(house):
    summary = house.select("top", Top(), keep_tokens=5000).manifest.summary
    assert 5000 - 60 < summary["kept"]["tokens"] <= 5000


def test_middle_is_what_low_and_high_leave(house):
    taken = np.isin(house.doc_ids, kept(house.select("middle", Middle(), keep_tokens=0.4)))
    below = house.n_tokens[~taken & (house.nll <= house.nll[taken].min())].sum()
    above = house.n_tokens[~taken & (house.nll >= house.nll[taken].max())].sum()
    total = house.n_tokens.sum()
    assert below + above + house.n_tokens[taken].sum() >= total
    assert below == pytest.approx(0.3 * total, abs=0.06 * total)  # a tied score may lie on a cut
    assert house.n_tokens[taken].sum() <= 0.4 * total


def test_percentile_windows_are_a_partition(house):
    windows = [(0, 0.25), (0.25, 0.6), (0.6, 1)]
    parts = [kept(house.select(f"{low}", Percentiles(low, high))) for low, high in windows]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), house.doc_ids)


@pytest.mark.parametrize("bounds", [{"low": 0.2}, {"high": -0.5}, {"low": -0.3, "high": 0.3}])
def test_a_threshold_keeps_what_reaches_it_whatever_it_costs(house, bounds):
    selection = house.select("threshold", Threshold(**bounds))
    inside = (house.nll >= bounds.get("low", -9)) & (house.nll <= bounds.get("high", 9))
    np.testing.assert_array_equal(kept(selection), house.doc_ids[inside])
    assert selection.manifest.summary["kept"]["tokens"] == house.n_tokens[inside].sum()
    assert selection.manifest.summary["budget"] is None
    assert selection.manifest.counts["documents"]["not_kept"] == np.count_nonzero(~inside)


def test_a_threshold_that_nothing_reaches_is_an_error(house):
    with pytest.raises(SelectError, match="keeps nothing"):
        house.select("threshold", Threshold(low=1e6))


# --------------------------------------------------------------------------------------------------
# Chains, and several scores at once


@pytest.fixture
def twins(house, artifacts):
    """How near every document's twin is, and how crowded its place; the same facts flat."""
    rng = np.random.default_rng(9)
    similarity = [rng.uniform(0, 1, count).astype(np.float32) for count in COUNTS]
    density = [rng.uniform(0.01, 1, count).astype(np.float32) for count in COUNTS]
    columns = {"twin_similarity": similarity, "density": density}
    artifacts.scores(house.path / "twins", load_artifact(house.at("corpus"), "corpus"), columns)
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in columns.items()}


def test_a_chain_takes_the_best_of_what_is_left(house, twins):
    """SemDeDup at an epsilon, then the top fifth of what it keeps."""
    at = {"scores": house.at("twins"), "score": "twin_distance"}
    house.select("first", Threshold(low=0.3), **at)
    chain = house.select("second", Top(), keep_tokens=0.2, within=house.at("first"))
    left = twins["twin_similarity"] <= 0.7
    pool = house.n_tokens[left].sum()
    assert chain.manifest.summary["pool"]["tokens"] == pool
    taken = np.isin(house.doc_ids, kept(chain))
    assert not (taken & ~left).any()
    assert house.nll[taken].min() >= house.nll[left & ~taken].max()
    assert 0.2 * pool - 60 < house.n_tokens[taken].sum() <= 0.2 * pool


def test_a_larger_epsilon_keeps_a_part_of_what_a_smaller_one_keeps(house, twins):
    at = {"scores": house.at("twins"), "score": "twin_distance"}
    epsilons = (0.05, 0.2, 0.6)
    found = [set(kept(house.select(f"{e}", Threshold(low=e), **at))) for e in epsilons]
    assert found[0] > found[1] > found[2]


def test_quality_and_coverage_meet_at_either_end(house, twins):
    """No quality: inverse propensity. No coverage: quality alone."""
    sets = {"quality": house.at("scores"), "coverage": house.at("twins")}

    def joint(name, quality, coverage):
        terms = (Term("nll_total", quality, "quality"), Term("rarity", coverage, "coverage"))
        return kept(house.select(name, Softmax(1.0), scores=sets, score=terms, keep_tokens=0.3))

    of_density = {"scores": house.at("twins"), "score": "column:density"}
    rare = kept(house.select("rare", InversePropensity(), keep_tokens=0.3, **of_density))
    good = kept(house.select("good", Softmax(0.5), keep_tokens=0.3))
    np.testing.assert_array_equal(joint("coverage", 0.0, 1.0), rare)
    np.testing.assert_array_equal(joint("quality", 2.0, 0.0), good)
    both = np.isin(house.doc_ids, joint("both", 2.0, 1.0))
    all_ = house.nll.mean(), twins["density"].mean()
    assert house.nll[both].mean() > all_[0] and twins["density"][both].mean() < all_[1]


# --------------------------------------------------------------------------------------------------
# The same documents, however they are stored and read


def test_many_shards_give_what_one_gives(tmp_path, artifacts, monkeypatch):
    """The same documents, under the same ids, in one shard and in 64."""
    rng = np.random.default_rng(0)
    [documents] = artifacts.documents([640])
    doc_ids = np.arange(640, dtype=np.int64) * 3
    nll = np.round(rng.normal(size=640), 1)
    domain = rng.choice(["a", "b"], 640)
    configs = {
        "top": (Top(), {"keep_tokens": 0.3}),
        "softmax": (Softmax(0.7), {"keep_documents": 100}),
        "flat": (InverseFrequency(), {"keep_tokens": 0.1}),
        "random": (Random(), {"keep_tokens": 0.5, "scores": None, "score": None}),
        "split": (Split(0.1, 0.4), {"scores": None, "score": None}),
        "quotas": (Top(), {"keep_tokens": 0.3, "quotas": Quotas()}),
        "threshold": (Threshold(high=0.5), {}),
    }
    results = []
    for shards in (1, 64):
        parts = np.split(np.arange(640), shards)
        for module in (ranking, select, reader):
            monkeypatch.setattr(
                module, "doc_ids", lambda k, rows, parts=parts: doc_ids[parts[k]][rows]
            )
        monkeypatch.setattr(
            selection_reader, "shards_of", lambda ids, size=640 // shards: ids // 3 // size
        )
        path = tmp_path / str(shards)
        corpus = artifacts.corpus(
            path / "corpus",
            [[documents[i] for i in part] for part in parts],
            domains=[[str(domain[i]) for i in part] for part in parts],
            doc_ids=[doc_ids[part] for part in parts],
        )
        artifacts.scores(
            path / "scores",
            corpus,
            {"nll": [nll[part] for part in parts]},
            doc_ids=[doc_ids[part] for part in parts],
        )
        base = SelectConfig(
            corpus=str(path / "corpus"),
            output="",
            strategy=Top(),
            scores=str(path / "scores"),
            score="nll_total",
        )
        for name, (strategy, settings) in configs.items():
            config = dataclasses.replace(
                base, strategy=strategy, output=str(path / name), **settings
            )
            results.append((name, kept(select.run(config)).tolist()))
    assert results[: len(configs)] == results[len(configs) :]


@pytest.mark.parametrize("strategy", [Top(), Softmax(1.0), InverseFrequency()])
def test_streamed_and_in_memory_agree(house, strategy):
    one = house.select("one", strategy, keep_tokens=0.3, quotas=Quotas(), threads=3)
    two = house.select("two", strategy, keep_tokens=0.3, quotas=Quotas(), in_memory=False)
    assert one.manifest.to_json() == two.manifest.to_json()


def test_an_interrupted_selection_is_finished(house, monkeypatch):
    whole = house.select("whole", Top(), keep_tokens=0.3)
    write, calls = select._write_shard, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(select, "_write_shard", fails)
        house.select("cut", Top(), keep_tokens=0.3)
    with pytest.raises(ArtifactError, match="unfinished"):
        load_selection(house.at("cut"))
    assert house.select("cut", Top(), keep_tokens=0.3).digest == whole.digest
    with pytest.raises(ConfigurationChanged, match="keep_tokens"):
        house.select("cut", Top(), keep_tokens=0.4)


def test_seeds_change_draws_and_not_orders(house):
    def chosen(name, strategy, seed):
        return kept(house.select(f"{name}{seed}", strategy, keep_tokens=0.3, seed=seed))

    assert not np.array_equal(chosen("random", Random(), 0), chosen("random", Random(), 1))
    a, b = (set(chosen("top", Top(), seed).tolist()) for seed in (0, 1))
    lowest = house.nll[np.isin(house.doc_ids, list(a))].min()
    differ = np.isin(house.doc_ids, list(a ^ b))
    assert set(house.nll[differ]) <= {lowest}  # only among those that tie at the cut


# --------------------------------------------------------------------------------------------------
# Documents without a score


@pytest.fixture
def gappy(tmp_path, artifacts):
    """Ten documents of 10 tokens: three with a reason, one NaN, one that was not looked at."""
    documents = [[[5] * 10] * 10]
    corpus = artifacts.corpus(tmp_path / "corpus", documents)
    nll = np.asarray([9, 8, 7, 6, 5, 4, 3, 2, 1, np.nan])
    statuses = {1: "too_long", 3: "too_long", 4: "empty", 5: "not_selected"}
    statuses = {(0, row): status for row, status in statuses.items()}
    artifacts.scores(tmp_path / "scores", corpus, {"nll": [nll]}, statuses)
    return tmp_path


def gappy_config(path, output, **settings):
    return SelectConfig(
        corpus=str(path / "corpus"),
        output=str(path / output),
        strategy=Top(),
        scores=str(path / "scores"),
        score="nll_total",
        **settings,
    )


def test_what_has_no_score_is_not_kept_and_counted_by_reason(gappy):
    selection = select.run(gappy_config(gappy, "all", keep_tokens=1.0))
    assert kept(selection).tolist() == [0, 2, 6, 7, 8]
    assert selection.manifest.counts["documents"] == {
        "kept": 5,
        "not_kept": 0,
        "outside_of_pool": 1,
        "unscored": {"empty": 1, "no_number": 1, "too_long": 2},
    }
    assert selection.manifest.summary["pool"] == {"documents": 9, "tokens": 90}


def test_what_has_no_score_is_kept_first_when_asked(gappy):
    selection = select.run(gappy_config(gappy, "half", keep_tokens=60, keep_unscored=True))
    assert kept(selection).tolist() == [0, 1, 2, 3, 4, 9]
    assert selection.manifest.counts["kept_unscored"] == {"empty": 1, "no_number": 1, "too_long": 2}
    with pytest.raises(SelectError, match="without a score alone"):
        select.run(gappy_config(gappy, "little", keep_tokens=30, keep_unscored=True))


def test_nothing_kept_is_an_error(gappy):
    with pytest.raises(SelectError, match="Top keeps nothing of 9 documents"):
        select.run(gappy_config(gappy, "none", keep_tokens=5))


def test_every_document_is_counted_once(house):
    pool = house.select("pool", Split(0, 0.5))
    selection = house.select("top", Top(), keep_tokens=0.3, within=house.at("pool"))
    counts = selection.manifest.counts["documents"]
    total = sum(counts[name] for name in ("kept", "not_kept", "outside_of_pool"))
    assert total + sum(counts["unscored"].values()) == len(house.doc_ids)
    assert counts["outside_of_pool"] == len(house.doc_ids) - pool.manifest.rows
    assert set(kept(selection)) <= set(kept(pool))
    wanted = round(0.3 * pool.manifest.tokens)  # a share of the pool, not of the corpus
    assert selection.manifest.summary["budget"]["wanted"] == wanted


# --------------------------------------------------------------------------------------------------
# Scores


def test_scores_are_weighted_sums(house):
    half = Term("nll_total", 0.5, "scores")
    mean = house.select("mean", Top(), score="nll_mean", keep_tokens=0.3)
    same = house.select("same", Top(), score=(half,), keep_tokens=0.3)
    np.testing.assert_array_equal(kept(mean), kept(same))
    low = house.select("low", Top(), score=(Term("nll_total", -1.0),), keep_tokens=0.3)
    np.testing.assert_array_equal(
        kept(low), kept(house.select("bottom", Bottom(), keep_tokens=0.3))
    )


def test_difference_of_two_score_sets(house, artifacts):
    from pruning.store.artifact import load_artifact

    corpus = load_artifact(house.at("corpus"))
    rng = np.random.default_rng(2)
    other = [rng.normal(size=count).astype(np.float32) for count in COUNTS]
    artifacts.scores(house.path / "prior", corpus, {"nll": other})
    selection = house.select(
        "color",
        Top(),
        scores={"reference": house.at("scores"), "prior": house.at("prior")},
        score=(Term("nll_total", -1.0, "reference"), Term("nll_total", 1.0, "prior")),
        keep_documents=200,
    )
    difference = np.concatenate(other).astype(np.float64) - house.nll
    best = house.doc_ids[np.argsort(-difference)[:200]]
    np.testing.assert_array_equal(kept(selection), np.sort(best))
    assert set(selection.manifest.inputs) == {"corpus", "scores_reference", "scores_prior"}


def test_scores_of_another_corpus_are_refused(house, artifacts, tmp_path):
    other = artifacts.corpus(tmp_path / "other", artifacts.documents(COUNTS, seed=9))
    artifacts.scores(tmp_path / "foreign", other, {"nll": [np.zeros(n) for n in COUNTS]})
    with pytest.raises(ArtifactError, match="was made from the corpus at"):
        house.select("top", Top(), scores=str(tmp_path / "foreign"), keep_tokens=0.3)
    select.run(SelectConfig(str(tmp_path / "other"), str(tmp_path / "half"), Split(0, 0.5)))
    with pytest.raises(ArtifactError, match="was made from the corpus at"):
        house.select("top", Top(), keep_tokens=0.3, within=str(tmp_path / "half"))


def test_misplaced_rows_are_refused(house, artifacts):
    from pruning.store.artifact import load_artifact

    corpus = load_artifact(house.at("corpus"))
    ids = [(np.int64(k) << 32) + np.arange(n) for k, n in enumerate(COUNTS)]
    ids[2][[3, 4]] = ids[2][[4, 3]]
    artifacts.scores(
        house.path / "mixed", corpus, {"nll": [np.zeros(n) for n in COUNTS]}, None, ids
    )
    with pytest.raises(ArtifactError, match="row 3"):
        house.select("top", Top(), scores=house.at("mixed"), keep_tokens=0.3)


@pytest.mark.parametrize(
    ("strategy", "settings", "error", "message"),
    [
        (Top(), {}, SelectError, "wants a budget"),
        (Top(), {"keep_tokens": 0.1, "keep_documents": 3}, SelectError, "wants a budget"),
        (Top(), {"keep_tokens": -1}, SelectError, "positive"),
        (Top(), {"keep_tokens": 0.1, "score": None}, SelectError, "ranks by a score"),
        (Top(), {"keep_tokens": 0.1, "score": "nll_men"}, TermError, "nll_mean"),
        (Top(), {"keep_tokens": 0.1, "score": "column:no"}, ArtifactError, "no column no"),
        (Top(), {"keep_tokens": 0.1, "score": "column:status"}, ArtifactError, "not a number"),
        (Top(), {"keep_tokens": 0.1, "score": (Term("nll_mean", 1.0, "x"),)}, SelectError, "'x'"),
        (Top(), {"keep_tokens": 0.1, "quotas": Quotas("tld")}, SelectError, "no column 'tld'"),
        (All(), {"keep_tokens": 0.1}, SelectError, "takes no budget"),
        (All(), {"score": "nll_mean"}, SelectError, "looks at no score"),
        (Split(0, 1), {"quotas": Quotas()}, SelectError, "no budget that quotas"),
        (Threshold(low=0), {"quotas": Quotas()}, SelectError, "no budget that quotas"),
        (Threshold(low=0), {"keep_tokens": 0.1}, SelectError, "takes no budget"),
        ("top", {"keep_tokens": 0.1}, SelectError, "@Top()"),
    ],
)
def test_contradictions_are_refused(house, strategy, settings, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        house.select("refused", strategy, **settings)


# --------------------------------------------------------------------------------------------------
# Quotas


def test_quotas_divide_the_budget(house):
    shares = {"b": 0.5, "c": 0.2}
    selection = house.select("quotas", Top(), keep_tokens=4000, quotas=Quotas("domain", shares))
    taken = np.isin(house.doc_ids, kept(selection))
    assert 4000 - 60 < house.n_tokens[taken].sum() <= 4000
    for name, share in {"b": 0.5, "c": 0.2, "a": 0.3}.items():
        own = house.domain == name
        tokens = house.n_tokens[taken & own].sum()
        assert abs(tokens - 4000 * share) < 60
        assert house.nll[taken & own].min() >= house.nll[~taken & own].max()


def test_a_window_is_of_every_group_the_same(house):
    quotas = Quotas("domain", {"b": 0.5})  # a and c are the others
    selection = house.select("window", Percentiles(0.2, 0.6), quotas=quotas)
    taken = np.isin(house.doc_ids, kept(selection))
    for own in (house.domain == "b", house.domain != "b"):
        assert abs(house.n_tokens[taken & own].sum() - 0.4 * house.n_tokens[own].sum()) < 120


def test_without_shares_every_domain_keeps_the_same_rate(house):
    selection = house.select("quotas", Bottom(), keep_tokens=0.3, quotas=Quotas())
    for row in selection.manifest.summary["domains"]:
        assert row["kept_tokens"] == pytest.approx(0.3 * row["tokens"], abs=60)


def test_domains_of_one_document_keep_the_rate_together(tmp_path, artifacts):
    documents = artifacts.documents([2000])
    domains = [[f"{i // 2 if i < 1000 else i}.org" for i in range(2000)]]
    corpus = artifacts.corpus(tmp_path / "corpus", documents, domains=domains)
    artifacts.scores(tmp_path / "scores", corpus, {"nll": [np.arange(2000.0)]})
    config = SelectConfig(
        corpus=str(tmp_path / "corpus"),
        output=str(tmp_path / "quotas"),
        strategy=Top(),
        scores=str(tmp_path / "scores"),
        score="nll_total",
        keep_tokens=0.2,
        quotas=Quotas(),
    )
    selection = select.run(config)
    budget = 0.2 * corpus.manifest.tokens
    assert budget - 120 < selection.manifest.tokens <= budget
    rows = kept(selection)
    halves = [sum(len(documents[0][i]) for i in rows[part]) for part in (rows < 1000, rows >= 1000)]
    assert halves == pytest.approx([budget / 2, budget / 2], rel=0.15)


def test_a_domain_that_has_too_little_keeps_all(house):
    selection = house.select("quotas", Top(), keep_tokens=0.9, quotas=Quotas("domain", {"c": 0.5}))
    taken = np.isin(house.doc_ids, kept(selection))
    assert taken[house.domain == "c"].all()
    row = {row["group"]: row for row in selection.manifest.summary["thresholds"]}["c"]
    assert row["to"] is None and row["kept"] < row["budget"]


# --------------------------------------------------------------------------------------------------
# Set algebra, and what a selection says of itself


def test_set_algebra(house):
    house.select("a", Random(), keep_tokens=0.5)
    house.select("b", Top(), keep_tokens=0.5)
    house.select("c", Split(0, 0.3))
    a, b, c = (set(kept(load_selection(house.at(name)).artifact)) for name in "abc")
    paths = tuple(house.at(name) for name in "abc")
    assert set(kept(house.select("union", Union(paths)))) == a | b | c
    assert set(kept(house.select("intersection", Intersection(paths)))) == a & b & c
    assert set(kept(house.select("difference", Difference(paths)))) == a - b - c
    chained = house.select("chained", Top(), keep_tokens=0.5, within=house.at("c"))
    assert set(kept(chained)) < c


def test_all_is_the_corpus(house):
    np.testing.assert_array_equal(kept(house.select("all", All())), house.doc_ids)


def test_blocks_hold_every_kept_document_once(house):
    selection = load_selection(house.select("top", Top(), keep_tokens=0.8).path)
    table = pq.read_table(house.at("top") + "/" + blocks.FILE).to_pydict()
    found = [
        selection.doc_ids(shard, first, count)
        for shard, first, count in zip(
            table["shard"], table["first_row"], table["n_documents"], strict=True
        )
    ]
    np.testing.assert_array_equal(np.concatenate(found), kept(selection.artifact))
    tokens = dict(zip(house.doc_ids, house.n_tokens, strict=True))
    assert [sum(tokens[d] for d in part) for part in found] == table["n_tokens"]
    assert max(table["n_documents"]) == blocks.DOCUMENTS


def test_weights_and_overlap_with_chance(house):
    uniform = house.select("r", Random(), keep_tokens=0.3).manifest.summary
    assert uniform["weights"] == {"ess_share": pytest.approx(1), "max_over_min": 1}
    assert uniform["overlap_with_random"]["share"] == pytest.approx(1, abs=0.01)
    sharp = house.select("s", Softmax(0.5), keep_tokens=0.3).manifest.summary
    weights = np.exp(house.nll / 0.5)
    ess = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    assert sharp["weights"]["ess_share"] == pytest.approx(ess)
    assert sharp["weights"]["max_over_min"] == pytest.approx(weights.max() / weights.min())
    top = house.select("t", Top(), keep_tokens=0.3).manifest.summary
    assert top["overlap_with_random"]["share"] == pytest.approx(0.3, abs=0.06)
    assert 0.35 < sharp["overlap_with_random"]["share"] < 0.95
    assert top["thresholds"][0]["to"]["score"] == pytest.approx(
        house.nll[np.isin(house.doc_ids, kept(load_selection(house.at("t")).artifact))].min(),
        abs=0.11,
    )


def test_retention_by_domain(house):
    selection = house.select("top", Top(), keep_tokens=0.3)
    taken = np.isin(house.doc_ids, kept(selection))
    rows = {row["domain"]: row for row in selection.manifest.summary["domains"]}
    for name in "abc":
        own = house.domain == name
        assert rows[name] == {
            "domain": name,
            "documents": own.sum(),
            "tokens": house.n_tokens[own].sum(),
            "kept_documents": (own & taken).sum(),
            "kept_tokens": house.n_tokens[own & taken].sum(),
        }


def test_the_manifest_does_not_depend_on_the_place(house):
    config = house.config("top", Top(), keep_tokens=0.3)
    text = json.dumps(select.run(config).manifest.config)
    assert str(house.path) not in text


# --------------------------------------------------------------------------------------------------
# The configurations that come with the package

CONFIGS = sorted(
    recipes.located(recipe.file) for recipe in recipes.recipes() if recipe.command == "select"
)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_whole(file):
    config = configuration.build(select.NAME, select.CONFIGURABLES, [str(file)])
    validate(config)


def test_every_strategy_has_a_configuration():
    named = {
        type(configuration.build(select.NAME, select.CONFIGURABLES, [str(file)]).strategy).__name__
        for file in CONFIGS
    }
    assert named == set(strategies.CONFIGURABLES)


def test_a_configuration_runs_as_a_command(house):
    from pruning.cli.main import main

    file = next(file for file in CONFIGS if file.stem == "likelihood_middle")
    settings = [f"--gin.{name}={value}" for name, value in command_settings(house).items()]
    assert main(["select", f"--gin_file={file}", *settings]) == 0
    direct = house.select("direct", Middle(), score="nll_mean", keep_tokens=0.4)
    assert load_selection(house.at("command")).artifact.digest == direct.digest


def command_settings(house):
    return {
        "CORPUS": house.at("corpus"),
        "SCORES": house.at("scores"),
        "OUTPUT": house.at("command"),
        "KEEP": 0.4,
    }


def test_a_missed_budget_is_said_with_its_reason(tmp_path, artifacts, capsys):
    documents = [[[5] * 10, [5] * 10, [5] * 90, [5] * 10]]
    corpus = artifacts.corpus(tmp_path / "corpus", documents)
    scores = {"nll": [np.arange(4.0)], "n_scored_tokens": [np.ones(4, np.int32)]}
    artifacts.scores(tmp_path / "scores", corpus, scores)

    def said(output: str, strategy, **settings) -> str:
        paths = {name: str(tmp_path / name) for name in ("corpus", "scores")}
        config = SelectConfig(
            **paths, output=str(tmp_path / output), strategy=strategy, score="nll_total", **settings
        )
        select.run(config)
        lines = capsys.readouterr().err.splitlines()
        return "\n".join(line for line in lines if line.startswith("select: "))

    assert said("short", Top(), keep_tokens=0.5) == (
        "select: 10 of 60 tokens of the budget are used (16.7%): the next document in rank is too "
        "long for what is left (up to 90 tokens)"
    )
    assert said("met", Top(), keep_tokens=100.0 / 120) == ""
    assert "120 of 300 tokens of the budget are used (40.0%): the pool holds no further" in said(
        "all", Top(), keep_tokens=300
    )
    assert said("few", Bottom(), keep_tokens=20) == (
        "select: Select.keep_tokens=20 is a number of tokens: for 20% of them write 0.2 or 20%"
    )
    with pytest.raises(SelectError, match="keep_tokens=5 is a number of tokens: for 5%"):
        said("none", Bottom(), keep_tokens=5)


def test_a_column_that_the_corpus_lacks_is_named(house):
    with pytest.raises(ArtifactError, match="has no column scre; it has: doc_id, text"):
        house.select("x", Top(), scores=None, score="corpus:scre", keep_tokens=0.2)
