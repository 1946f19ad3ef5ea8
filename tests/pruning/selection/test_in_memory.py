"""Selection from tables in memory: the documents of the stage, in tables of every kind."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pyarrow as pa
import pytest

import pruning
from pruning.scores import tables
from pruning.scores.terms import Term, TermError
from pruning.selection import select as stage
from pruning.selection.config import Quotas, SelectConfig, SelectError
from pruning.selection.strategies import (
    Bottom,
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

COUNT = 400
KINDS = ("pyarrow", "pandas", "polars", "datasets")


@dataclasses.dataclass
class House:
    """A corpus of one shard with scores, and the same as an Arrow table."""

    settings: dict
    table: pa.Table


@pytest.fixture(scope="module")
def house(tmp_path_factory, artifacts) -> House:
    path = tmp_path_factory.mktemp("house")
    rng = np.random.default_rng(3)
    documents = artifacts.documents((COUNT,))
    domains = list(map(str, rng.choice(["a", "b", "c"], COUNT, p=[0.6, 0.3, 0.1])))
    nll = np.round(rng.normal(size=COUNT), 1)  # many ties
    second = rng.random(COUNT)
    corpus = artifacts.corpus(path / "corpus", documents, domains=[domains])
    missing = {(0, row): "too_short" for row in range(0, COUNT, 13)}
    columns = {"nll": [nll], "second": [second]}
    scores = artifacts.scores(path / "scores", corpus, columns, missing)
    found = scores.read(0, ["status", "nll", "second"])
    lengths = pa.array([len(tokens) for tokens in documents[0]], pa.int32())
    table = pa.table({"row": np.arange(COUNT), "n_tokens": lengths, "domain": domains})
    for name in found.column_names:
        table = table.append_column(name, found[name])
    directories = {"corpus": str(path / "corpus"), "scores": str(path / "scores")}
    return House(directories, table)


def of_kind(kind: str, table: pa.Table):
    if kind == "pyarrow":
        return table
    module = importlib.import_module(kind) if kind != "pandas" else None
    if kind == "pandas":
        pytest.importorskip("pandas")
        frame = table.to_pandas()
        return frame.set_index(frame["row"].to_numpy()[::-1])  # an index that is not the row
    if kind == "polars":
        return module.from_arrow(table)
    return module.Dataset(table)


RANKED = [
    Top(),
    Bottom(),
    Middle(),
    Softmax(temperature=0.5),
    InversePropensity(),
    InverseFrequency(),
]


@pytest.mark.parametrize("unit", ["tokens", "documents"])
@pytest.mark.parametrize("strategy", RANKED, ids=lambda strategy: type(strategy).__name__)
def test_rows_kept_are_those_of_the_stage(house, tmp_path, strategy, unit):
    terms = (Term("nll_total", -1.0, scale="rank"), Term("column:second"))
    settings = {f"keep_{unit}": 0.3, "seed": 4, "score": terms}
    if isinstance(strategy, InversePropensity):
        settings["score"] = "column:second"
    check(house, tmp_path, strategy, **settings)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (Percentiles(0.2, 0.6), {"score": "nll_total"}),
        (Threshold(low=0.0), {"score": "nll_total"}),
        (Random(), {"keep_tokens": 500}),
        (Split(0.2, 0.7), {}),
        (Top(), {"score": "nll_total", "keep_tokens": 0.5, "keep_unscored": True}),
        (Top(), {"score": "nll_total", "keep_tokens": 0.4, "quotas": Quotas()}),
        (Random(), {"keep_documents": 0.4, "quotas": Quotas(shares={"a": 0.2})}),
    ],
    ids=["percentiles", "threshold", "random", "split", "unscored", "quotas", "shares"],
)
def test_rows_kept_with_further_settings(house, tmp_path, strategy, settings):
    check(house, tmp_path, strategy, **settings)


def check(house: House, tmp_path, strategy, **settings) -> None:
    given = house.settings if "score" in settings else {"corpus": house.settings["corpus"]}
    config = SelectConfig(output=str(tmp_path / "out"), strategy=strategy, **given, **settings)
    selection = stage.run(config)
    expected = selection.read(0, ["doc_id"])["doc_id"].to_pylist()
    kept = pruning.select(house.table, strategy, **settings)
    assert 0 < len(expected) < COUNT
    assert kept["row"].to_pylist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_every_kind_comes_back_as_its_kind(house, kind):
    pytest.importorskip(kind)
    table = of_kind(kind, house.table)
    kept = pruning.select(table, score="second", keep_documents=0.1)
    assert type(kept) is type(table) and tables.columns(kept) == tables.columns(table)
    whole = pruning.select(house.table, score="column:second", keep_documents=0.1)
    assert tables.arrow(kept)["row"].to_pylist() == whole["row"].to_pylist()
    if kind == "pandas":
        assert (kept.index == COUNT - 1 - kept["row"]).all()

    doubled = pa.chunked_array([np.arange(len(kept)) * 2.0])
    added = tables.with_columns(kept, {"twice": doubled})
    assert type(added) is type(table)
    assert tables.arrow(added, ["twice"])["twice"].to_pylist() == doubled.to_pylist()
    with pytest.raises(ValueError, match="has a column 'row' already"):
        tables.with_columns(kept, {"row": doubled})


def test_what_cannot_be_selected_is_refused_by_name(house):
    table = house.table.append_column("lists", pa.array([[1]] * COUNT))
    without = table.drop_columns("n_tokens")
    with pytest.raises(SelectError, match="the table has no column 'n_tokens'; it has: row"):
        pruning.select(without, score="second", keep_tokens=0.1)
    assert pruning.select(without, score="second", keep_documents=2).num_rows == 2
    with pytest.raises(SelectError, match="the table has no column 'n_tokens'"):
        pruning.select(without, Percentiles(0.2, 0.6), score="second")
    for length in (None, 2.5, -1, "three", float("nan")):
        lengths = pa.array(
            [length, *["7"] * (COUNT - 1)]
            if isinstance(length, str)
            else [length, *[7] * (COUNT - 1)]
        )
        odd = without.append_column("n_tokens", lengths)
        with pytest.raises(SelectError, match=r"row 0 has .* tokens in the column 'n_tokens'"):
            pruning.select(odd, score="second", keep_tokens=0.1)
        assert pruning.select(odd, score="second", keep_documents=2).num_rows == 2
        assert pruning.select(odd, Threshold(0.5), score="second").num_rows
    with pytest.raises(SelectError, match="holds no numbers of tokens"):
        pruning.select(table, score="second", keep_tokens=0.1, n_tokens="lists")
    with pytest.raises(TermError, match="there is no value 'secnd'"):
        pruning.select(table, score="secnd", keep_documents=0.1)
    with pytest.raises(TermError, match="no column 'n_scored_tokens'"):
        pruning.select(table, score="nll_mean", keep_documents=0.1)
    with pytest.raises(SelectError, match="there is no strategy 'Best'"):
        pruning.select(table, "Best", score="second", keep_documents=0.1)
    with pytest.raises(SelectError, match="Softmax needs settings"):
        pruning.select(table, "Softmax", score="second", keep_documents=0.1)
    with pytest.raises(SelectError, match="wants a budget"):
        pruning.select(table, score="second")
    with pytest.raises(SelectError, match="the table has no rows"):
        pruning.select(table.slice(0, 0), score="second", keep_documents=0.1)
    with pytest.raises(SelectError, match="join tables by their rows"):
        pruning.select(table, Union(("a", "b")))
    with pytest.raises(TypeError, match="list is no table"):
        pruning.select([1], "Random", keep_documents=0.1)
