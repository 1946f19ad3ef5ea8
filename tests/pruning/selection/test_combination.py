"""Combined scores: scales and operations equal plain NumPy and SciPy over the whole pool."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pruning.corpus.selection_reader import load_selection
from pruning.scores.terms import Combination, Term, TermError, read_scores
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Split, Threshold, Top
from pruning.store.artifact import load_artifact

COUNTS = (210, 0, 90, 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory, artifacts):
    """A corpus, two score sets with ties and a few documents without a score."""
    path = tmp_path_factory.mktemp("combination")
    rng = np.random.default_rng(0)
    corpus = artifacts.corpus(path / "corpus", artifacts.documents(COUNTS))
    a = [np.round(rng.normal(size=n), 1) for n in COUNTS]
    b = [rng.lognormal(size=n) for n in COUNTS]
    status = {
        (k, row): "empty" for k, n in enumerate(COUNTS) for row in range(n) if rng.random() < 0.1
    }
    artifacts.scores(path / "a", corpus, {"x": a})
    artifacts.scores(path / "b", corpus, {"y": b}, status)
    tokens = np.concatenate([corpus.read(k, ["n_tokens"])["n_tokens"] for k in range(4)])
    known = np.array([(k, row) not in status for k, n in enumerate(COUNTS) for row in range(n)])
    return path, np.concatenate(a), np.concatenate(b), tokens.astype(float), known


def kept(world, output: str, **settings) -> tuple[np.ndarray, dict]:
    """Return a mask of the kept documents, and the summary."""
    path, *_ = world
    defaults = {"strategy": Top(), "keep_documents": 40}
    base = {"scores": {"a": str(path / "a"), "b": str(path / "b")}}
    made = select.run(
        SelectConfig(str(path / "corpus"), str(path / output), **{**defaults, **base, **settings})
    )
    masks = [load_selection(made.path).mask(k, n) for k, n in enumerate(COUNTS)]
    return np.concatenate(masks), made.manifest.summary


def scaled(kind: str, x: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Return the reference of a scale fitted to x[pool]."""
    if kind == "none":
        return x
    if kind == "log":
        return np.log(x)
    if kind == "standardize":
        return (x - x[pool].mean()) / x[pool].std()
    found = np.full(len(x), np.nan)
    found[pool] = (stats.rankdata(x[pool]) - 0.5) / pool.sum()
    return found if kind == "rank" else np.floor(found * 10)


OPERATIONS = {
    "sum": lambda p: p.sum(axis=0),
    "mean": lambda p: p.mean(axis=0),
    "maximum": lambda p: p.max(axis=0),
    "minimum": lambda p: p.min(axis=0),
    "product": lambda p: p.prod(axis=0),
}


@pytest.mark.parametrize(
    ("scale", "operation"),
    [("rank", "maximum"), ("standardize", "sum"), ("rank", "product"), ("quantile", "mean"),
     ("none", "minimum")],
)  # fmt: skip
def test_a_combined_score_keeps_what_numpy_keeps(scale, operation, world):
    _, a, b, tokens, known = world
    terms = (
        Term("column:x", 2.0, "a", scale=scale, buckets=10),
        Term("column:y", -1.0, "b", scale=scale, buckets=10),
        Term("corpus:n_tokens", 0.5, scale="log"),
    )
    taken, summary = kept(world, f"{scale}-{operation}", score=terms, combine=operation)
    parts = [2.0 * scaled(scale, a, known), -scaled(scale, b, known), 0.5 * np.log(tokens)]
    score = OPERATIONS[operation](np.stack(parts))
    assert taken.sum() == 40 and known[taken].all()
    assert score[taken].min() >= score[known & ~taken].max()
    (threshold,) = summary["thresholds"]
    assert threshold["to"]["score"] == pytest.approx(score[known & ~taken].max(), abs=1e-12)
    fitted = [one["scale"] for one in summary.get("scales", ())]
    assert fitted == ([] if scale == "none" else [scale, scale, "log"])


def test_buckets_hold_equal_numbers_of_documents_in_order(world):
    path, _, b, _, known = world
    masks = []
    for bucket in (0, 7, 9):
        mask, _ = kept(
            world,
            f"bucket-{bucket}",
            strategy=Threshold(bucket, bucket),
            keep_documents=None,
            score=(Term("column:y", scores="b", scale="quantile", buckets=10),),
            scores={"b": str(path / "b")},
        )
        assert abs(mask.sum() - known.sum() / 10) <= 1
        masks.append(mask)
    assert b[masks[0]].max() < b[masks[1]].min()
    assert b[masks[1]].max() < b[masks[2]].min()


def test_scales_are_fitted_within_the_pool(world):
    path, _, b, _, known = world
    half, _ = kept(world, "half", strategy=Split(0, 0.5), keep_documents=None, scores=None)
    term = Term("column:y", scores="b", scale="quantile", buckets=2)
    upper, _ = kept(
        world,
        "upper",
        strategy=Threshold(1, 1),
        keep_documents=None,
        score=(term,),
        scores={"b": str(path / "b")},
        within=str(path / "half"),
    )
    pool = half & known
    np.testing.assert_array_equal(upper, pool & (b >= np.median(b[pool])))


def test_a_scale_that_nobody_fitted_is_refused(world):
    path, *_ = world
    score = Combination((Term("column:x", scale="rank"),))
    ids = np.arange(COUNTS[0])
    corpus, a = load_artifact(path / "corpus"), load_artifact(path / "a")
    with pytest.raises(TermError, match="fitted by `select`"):
        read_scores(score, corpus, {"scores": a}, 0, ids)
