"""The judge's examples: the scorer's own prompts, a fair half spoilt, each document once."""

from __future__ import annotations

import numpy as np
import pytest

from pruning.corpus.selection_reader import load_selection
from pruning.corpus.vocabulary import EOS_ID
from pruning.scores.distilled import judge
from pruning.scores.distilled.damage import KINDS, damaged
from pruning.scores.distilled.judge import JudgeConfig
from pruning.scores.model.ask_llm import AskLLM
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Random, Split
from pruning.store.manifest import ArtifactError

PROMPT = "### {document} ### Is it very like the river? yes or no"


@pytest.fixture(scope="module")
def corpus(make_corpus, records, tmp_path_factory):
    shards = [records(400, 1, words=90), records(300, 2, words=90), []]
    for number, record in enumerate(shards[1]):
        record["domain"] = "law" if number % 4 == 0 else "prose"
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards)


def make(corpus, output, **settings):
    settings = {"scorer": AskLLM(prompt=PROMPT, max_tokens=200), "workers": 1} | settings
    return judge.run(JudgeConfig(corpus=str(corpus.artifact.path), output=str(output), **settings))


def rows_of(examples) -> list[dict]:
    return [row for k in range(examples.num_shards) for row in examples.read(k).to_pylist()]


def documents_of(corpus) -> dict[int, dict]:
    columns = ["doc_id", "text", "n_tokens", "domain"]
    return {
        row["doc_id"]: row
        for shard in range(corpus.num_shards)
        for row in corpus.columns(shard, columns).to_pylist()
    }


def test_intact_examples_are_the_prompts_of_the_scorer(corpus, tmp_path):
    """The ids of an intact document's example are those of the whole prompt, tokenized at once."""
    vocabulary, documents = corpus.vocabulary, documents_of(corpus)
    yes, no = vocabulary.token("yes"), vocabulary.token("no")
    rows = rows_of(make(corpus, tmp_path / "examples"))
    intact = 0
    for row in rows:
        assert row["targets"] == [yes if row["label"] == "yes" else no, EOS_ID]
        assert (row["label"] == "yes") == (row["kind"] == "intact")
        whole = vocabulary.encode(PROMPT.format(document=documents[row["doc_id"]]["text"]))
        if row["kind"] == "intact" and len(whole) < 200:
            assert row["inputs"] == [*whole, EOS_ID]
            intact += 1
        assert len(row["inputs"]) <= 200
        suffix = vocabulary.encode(PROMPT.partition("{document}")[2])
        assert row["inputs"][-len(suffix) - 1 :] == [*suffix, EOS_ID]
    assert intact > 50


def test_damaged_examples_are_what_damage_makes_of_the_document(corpus, tmp_path):
    vocabulary, documents = corpus.vocabulary, documents_of(corpus)
    rows = rows_of(make(corpus, tmp_path / "examples", seed=5))
    checked = set()
    for row in rows:
        document = documents[row["doc_id"]]
        if row["kind"] in ("intact", "mixed_sentences") or document["n_tokens"] > 120:
            continue
        text = damaged(document["text"], row["kind"], row["strength"], 5, row["doc_id"])
        assert text != document["text"]
        if len(whole := vocabulary.encode(PROMPT.format(document=text))) < 200:
            assert row["inputs"] == [*whole, EOS_ID]
            checked.add(row["kind"])
    assert checked == set(KINDS) - {"mixed_sentences"}


def test_labels_kinds_and_strengths_are_shared_out(corpus, tmp_path):
    examples = make(corpus, tmp_path / "examples", min_tokens=2, damaged_share=0.6)
    rows = rows_of(examples)
    usable = [row for row in documents_of(corpus).values() if row["n_tokens"] >= 2]
    assert sorted(row["doc_id"] for row in rows) == sorted(row["doc_id"] for row in usable)
    share = np.mean([row["label"] == "no" for row in rows])
    assert abs(share - 0.6) < 0.06
    spoilt = [row for row in rows if row["label"] == "no"]
    for name, values in (("kind", KINDS), ("strength", (0.25, 0.5, 1.0))):
        counts = [sum(row[name] == value for row in spoilt) for value in values]
        assert sum(counts) == len(spoilt)
        assert min(counts) > 0.6 * len(spoilt) / len(values)
    assert examples.manifest.counts["labels"] == {"no": len(spoilt), "yes": len(rows) - len(spoilt)}


def test_fewer_examples_are_a_random_part_and_workers_change_nothing(corpus, tmp_path):
    everything = {row["doc_id"]: row for row in rows_of(make(corpus, tmp_path / "all"))}
    some = make(corpus, tmp_path / "some", examples=100)
    rows = rows_of(some)
    assert len(rows) == some.manifest.rows == 100
    # What is mixed into a document depends on its neighbor among the examples.
    for row in rows:
        if row["kind"] != "mixed_sentences":
            assert row == everything[row["doc_id"]]
    again = make(corpus, tmp_path / "again", examples=100, workers=2)
    assert again.digest == some.digest
    other = {row["doc_id"] for row in rows_of(make(corpus, tmp_path / "b", examples=100, seed=1))}
    assert other != {row["doc_id"] for row in rows}


def test_only_the_selection_is_used_and_poor_documents_are_no(corpus, tmp_path):
    select.run(
        SelectConfig(
            corpus=str(corpus.artifact.path),
            output=str(tmp_path / "half"),
            strategy=Random(),
            keep_documents=0.5,
        )
    )
    kept = load_selection(tmp_path / "half", corpus.artifact)
    examples = make(
        corpus, tmp_path / "examples", within=str(tmp_path / "half"), poor={"domain": "law"}
    )
    rows, documents = rows_of(examples), documents_of(corpus)
    for shard in range(corpus.num_shards):
        allowed = set(kept.doc_ids(shard).tolist())
        assert {row["doc_id"] for row in rows if row["doc_id"] >> 32 == shard} <= allowed
    law = [row for row in rows if documents[row["doc_id"]]["domain"] == "law"]
    assert law and all(row["label"] == "no" and row["kind"] == "poor" for row in law)
    assert not any(row["kind"] == "poor" for row in rows if row not in law)


@pytest.mark.parametrize(
    "strategy, budget",
    [(Random(), {"keep_documents": 0.3}), (Split(0.0, 0.3), {}), (Split(0.7, 1.0), {})],
    ids=["random", "first split", "last split"],
)
def test_labels_and_strengths_within_a_selection_are_as_intended(
    make_corpus, records, tmp_path, strategy, budget
):
    """Draws of the selection and of the labels are independent, though the seed is the same."""
    shards = [records(1500, 3, words=60), records(1500, 4, words=60)]
    corpus = make_corpus(tmp_path / "corpus", shards)
    path = str(corpus.artifact.path)
    select.run(
        SelectConfig(corpus=path, output=str(tmp_path / "part"), strategy=strategy, **budget)
    )
    kept = load_selection(tmp_path / "part", corpus.artifact).documents
    rows = rows_of(make(corpus, tmp_path / "examples", within=str(tmp_path / "part"), min_tokens=2))
    assert kept > 700 and len(rows) == kept
    damaged_rows = [row for row in rows if row["label"] == "no"]
    assert abs(len(damaged_rows) - len(rows) / 2) < 4 * np.sqrt(len(rows) / 4)  # 4 sigma
    for name, values in (("kind", tuple(KINDS)), ("strength", (0.25, 0.5, 1.0))):
        counts = np.array([sum(row[name] == value for row in damaged_rows) for value in values])
        expected = len(damaged_rows) / len(values)
        assert counts.sum() == len(damaged_rows)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all(), (name, counts)


def test_what_cannot_be_is_said(corpus, tmp_path):
    with pytest.raises(ArtifactError, match=r"no document of .* can be an example"):
        make(corpus, tmp_path / "a", min_tokens=10_000)
    with pytest.raises(ArtifactError, match="has no metadata column 'lang'"):
        make(corpus, tmp_path / "b", poor={"lang": "en"})
    with pytest.raises(ValueError, match="no damage is called 'acid'"):
        make(corpus, tmp_path / "c", kinds=("acid",))


def test_the_trainer_reads_the_examples(corpus, tmp_path):
    from pruning.data.examples import ExamplesConfig

    made = make(corpus, tmp_path / "examples")
    examples = ExamplesConfig(
        path=str(tmp_path / "examples"), batch_size=4, inputs_length=200, targets_length=2
    ).open()
    assert len(examples) == made.manifest.rows
    batch = examples.batch(0)
    assert batch["encoder_input_tokens"].shape == (4, 200)
    answers = {corpus.vocabulary.token("yes"), corpus.vocabulary.token("no")}
    assert set(batch["decoder_target_tokens"][:, 0].tolist()) <= answers
    assert (batch["decoder_target_tokens"][:, 1] == EOS_ID).all()
