"""Planted overlaps are found, all and nothing else; a plain search in sets is the reference."""

import json
import random
import re

import numpy as np
import pytest

from evaluation import contamination
from evaluation.contamination import ContaminationConfig, ContaminationError
from pruning.corpus import ingest
from pruning.corpus.reader import load_corpus
from pruning.corpus.sources import JsonlSource
from pruning.selection import select
from pruning.selection.strategies import Threshold
from pruning.store.artifact import load_artifact

WORDS = [f"w{i}" for i in range(400)]
EXAMPLES = 30


def words_of(text):
    return re.findall(r"\w+", text.lower())


def ngrams(text, n):
    words = words_of(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of random words in three shards, some documents with a piece of an example."""
    root = tmp_path_factory.mktemp("contamination")
    draw = random.Random(0)
    sets = {}
    for name in ("quiz", "story"):
        rows = [
            {
                "question": " ".join(draw.choices(WORDS, k=draw.choice([5, 20, 40]))),
                "more": {"choices": [" ".join(draw.choices(WORDS, k=15)), "yes"]},
                "label": 1,
            }
            for _ in range(EXAMPLES)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sets[name] = rows
    texts = []
    for i in range(120):
        words = draw.choices(WORDS, k=draw.randint(0, 60))
        if i % 4 == 0:  # in capitals, with punctuation in between
            row = draw.choice(sets["quiz" if i % 8 else "story"])
            piece = row["question"].split()[: draw.randint(8, 30)]
            words[5:5] = [", ".join(piece).upper() + "!"]
        texts.append(" ".join(words) or "x")
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in texts[part::3]]
        (root / f"part-{part}.jsonl").write_text("\n".join(lines))
    source = JsonlSource(paths=(str(root / "part-*.jsonl"),))
    ingest.run(
        ingest.IngestConfig(
            source=source, vocabulary="bytes", output=str(root / "corpus"), workers=1
        )
    )
    return root, sets


def config_of(root, output, **settings):
    files = {name: str(root / f"{name}.jsonl") for name in ("quiz", "story")}
    given = {"sets": files, "n": 8, "workers": 1} | settings
    return ContaminationConfig(str(root / "corpus"), str(root / output), **given)


def rows_of(root, output):
    scores = load_artifact(str(root / output), "scores")
    opened = load_corpus(str(root / "corpus"))
    for shard in range(opened.num_shards):
        texts = opened.columns(shard, ["text"])["text"].to_pylist()
        yield from zip(texts, scores.read(shard).to_pylist(), strict=True)


def strings(row):
    return [row["question"], *row["more"]["choices"]]


@pytest.fixture(scope="module")
def scores(made):
    root, _ = made
    return contamination.make(config_of(root, "scores"))


def test_every_ngram_is_found_and_nothing_else(made, scores):
    root, sets = made
    known = {
        name: {gram for row in rows for text in strings(row) for gram in ngrams(text, 8)}
        for name, rows in sets.items()
    }
    hit = 0
    for text, row in rows_of(root, "scores"):
        grams = ngrams(text, 8)
        assert row["ngrams"] == len(grams) and row["status"] == "ok"
        for name, of_set in known.items():
            assert row[f"contaminated_{name}"] == sum(gram in of_set for gram in grams)
        either = known["quiz"] | known["story"]
        assert row["contaminated_ngrams"] == sum(gram in either for gram in grams)
        hit += row["contaminated_ngrams"] > 0
    assert 5 < hit < 40


def test_what_was_found_of_every_set(made, scores):
    root, sets = made
    texts = [text for text, _ in rows_of(root, "scores")]
    corpus_grams = {gram for text in texts for gram in ngrams(text, 8)}
    for name, found in scores.manifest.summary["sets"].items():
        grams = [{g for text in strings(row) for g in ngrams(text, 8)} for row in sets[name]]
        assert found["examples"] == EXAMPLES
        assert found["contaminated"] == sum(bool(one & corpus_grams) for one in grams)
        assert found["ngrams"] == len(set.union(*grams))
        assert found["ngrams_found"] == len(set.union(*grams) & corpus_grams)
        assert found["documents"] == sum(
            bool(set(ngrams(text, 8)) & set.union(*grams)) for text in texts
        )


def test_fields_narrow_a_set_and_short_texts_are_counted(made):
    root, sets = made
    fields = {"quiz": ("question",)}
    found = contamination.make(config_of(root, "fields", fields=fields)).manifest.summary["sets"]
    short = sum(len(row["question"].split()) < 8 for row in sets["quiz"])
    assert found["quiz"]["too_short"] == short > 0 and found["story"]["too_short"] == 0
    with pytest.raises(ContaminationError, match="no field 'text'"):
        contamination.make(config_of(root, "wrong", fields={"quiz": ("text",)}))
    with pytest.raises(ContaminationError, match=r"none\.jsonl does not exist"):
        contamination.make(config_of(root, "wrong", sets={"a": str(root / "none.jsonl")}))


def test_processes_share_the_work_and_end_with_the_same_bytes(made, scores):
    root, _ = made
    again = contamination.make(config_of(root, "parallel", workers=2))
    assert again.manifest.digest == scores.manifest.digest
    assert again.manifest.summary == scores.manifest.summary


def test_a_selection_drops_what_is_contaminated(made, scores):
    root, _ = made
    clean = select.run(
        select.SelectConfig(
            corpus=str(root / "corpus"),
            output=str(root / "clean"),
            scores=str(root / "scores"),
            score="column:contaminated_ngrams",
            strategy=Threshold(high=0),
        )
    )
    rows = [row for _, row in rows_of(root, "scores")]
    wanted = [row["doc_id"] for row in rows if row["contaminated_ngrams"] == 0]
    kept = [clean.read(shard)["doc_id"].to_numpy() for shard in range(3)]
    assert np.concatenate(kept).tolist() == wanted
    left = contamination.make(config_of(root, "left", within=str(root / "clean")))
    assert all(one["documents"] == 0 for one in left.manifest.summary["sets"].values())


def test_a_real_evaluation_set_is_found_where_it_was_planted(real_data, tmp_path):
    from evaluation.tasks import sources

    data = str(real_data / "eval")
    rows = sources.read("super_glue/boolq", "validation", data)[:40]
    lines = [json.dumps({"text": f"Read this. {row['passage']} And so on."}) for row in rows[::2]]
    lines += [
        json.dumps({"text": f"Nothing of the kind stands here, number {i}."}) for i in range(9)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    source = JsonlSource(paths=(str(tmp_path / "c.jsonl"),))
    ingest.run(
        ingest.IngestConfig(
            source=source, vocabulary="bytes", output=str(tmp_path / "corpus"), workers=1
        )
    )
    sets = {"boolq": "task:super_glue_boolq_v102/validation"}
    made = contamination.make(
        ContaminationConfig(str(tmp_path / "corpus"), str(tmp_path / "out"), sets, data=data)
    )
    values = made.read(0)["contaminated_ngrams"].to_pylist()
    assert all(v > 0 for v in values[:20]) and not any(values[20:])
    assert made.manifest.summary["sets"]["boolq"]["documents"] == 20
