"""Tasks from files to metrics: examples as token ids, a model's answers, results that resume."""

import dataclasses
import json

import numpy as np
import pytest

from evaluation import inference
from evaluation.inference import InferenceConfig
from evaluation.tasks import examples, judged
from evaluation.tasks.examples import TaskExamplesConfig
from evaluation.tasks.judged import TasksConfig
from evaluation.tasks.suite import TASKS, TaskError
from pruning.corpus.vocabulary import Vocabulary
from pruning.data.examples import ExamplesConfig
from pruning.store.manifest import ConfigurationChanged


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SST-2, COPA and SQuAD in their original formats, a few examples each."""
    root = tmp_path_factory.mktemp("data")
    (root / "glue/SST-2").mkdir(parents=True)
    rows = [f'{"good" if i % 3 else "bad"} film {i} " \t{int(i % 3 > 0)}' for i in range(40)]
    (root / "glue/SST-2/train.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    (root / "glue/SST-2/dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[:12]]))
    (root / "superglue/COPA").mkdir(parents=True)
    copa = [
        {"premise": f"p{i}", "choice1": "a", "choice2": "b", "question": "cause", "label": i % 2}
        for i in range(9)
    ]
    for name in ("train", "val"):
        text = "\n".join(map(json.dumps, copa))
        (root / f"superglue/COPA/{name}.jsonl").write_text(text)
    (root / "squad").mkdir()
    question = {"id": "1", "question": "Who?", "answers": [{"text": "Ann"}]}
    article = {"paragraphs": [{"context": "Ann came.", "qas": [question]}]}
    (root / "squad/dev-v1.1.json").write_text(json.dumps({"data": [article]}))
    return str(root)


def config_of(data, output, **settings):
    given = {"tasks": "glue_sst2_v002, super_glue_copa_v102", "vocabulary": "bytes"}
    return TaskExamplesConfig(data=data, output=str(output), **(given | settings))


def test_examples_are_the_tasks_texts_in_token_ids(data, tmp_path):
    made = examples.make(config_of(data, tmp_path / "examples"))
    vocabulary = Vocabulary.from_file("bytes")
    rows = [row for shard in range(2) for row in made.read(shard).to_pylist()]
    expected = [
        one
        for name in ("glue_sst2_v002", "super_glue_copa_v102")
        for one in TASKS[name].examples("train", data)
    ]
    assert len(rows) == len(expected) == made.manifest.rows == 49
    for row, one in zip(rows, expected, strict=True):
        assert vocabulary.decode(row["inputs"]) == one["inputs"]
        assert vocabulary.decode(row["targets"]) == one["targets"]
    # train.py reads them.
    opened = ExamplesConfig(str(tmp_path / "examples"), 8, 512, 128, shuffle=False).open()
    assert len(opened) == 49
    batch = opened.batch(0)["encoder_input_tokens"]
    assert batch[0, : len(rows[0]["inputs"]) + 1].tolist() == [*rows[0]["inputs"], 1]


def test_a_cap_takes_a_part_and_lengths_cut(data, tmp_path):
    made = examples.make(
        config_of(data, tmp_path / "examples", cap=10, inputs_length=16, targets_length=4)
    )
    counts = made.manifest.counts["tasks"]
    assert counts["glue_sst2_v002"] == {"examples": 10, "left_out": 30, "cut": 10}
    assert counts["super_glue_copa_v102"]["left_out"] == 0
    whole = [one["inputs"] for one in TASKS["glue_sst2_v002"].examples("train", data)]
    for row in made.read(0).to_pylist():
        assert row["inputs"] == [b + 3 for b in whole[row["row"]].encode()[:15]]
    other = examples.make(config_of(data, tmp_path / "other", cap=10, seed=1))
    assert other.read(0)["row"].to_pylist() != made.read(0)["row"].to_pylist()


def test_other_data_are_refused(data, tmp_path):
    examples.make(config_of(data, tmp_path / "out"))
    with pytest.raises(ConfigurationChanged, match="inputs_length"):
        examples.make(config_of(data, tmp_path / "out", inputs_length=64))
    with pytest.raises(ValueError, match="no split 'train'"):
        examples.make(config_of(data, tmp_path / "new", tasks="squad_v010_allanswers"))


@pytest.fixture(scope="module")
def asked(small_model):
    return InferenceConfig(str(small_model), "bytes", 128, 8, compilation_cache=None)


NAMES = ("glue_sst2_v002", "super_glue_copa_v102", "squad_v010_allanswers")


@pytest.fixture(scope="module")
def config(asked, data, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("tasks") / "out")
    return TasksConfig(asked, NAMES, data, output, how="rank")


@pytest.fixture(scope="module")
def result(config):
    return judged.evaluate(config)


def test_the_right_answers_likelihood_is_per_character(result, asked, data):
    from evaluation.inference import Pair

    model = inference.load(asked)
    rows = TASKS["glue_sst2_v002"].examples("validation", data)
    encode = Vocabulary.from_file("bytes").encode
    expected = [
        model.log_likelihoods([Pair(encode(row["inputs"]), encode(row["targets"]))])[0][0]
        / len(row["targets"])
        for row in rows
    ]
    found = result["glue_sst2_v002"]["answer_log_likelihood"]
    assert found == pytest.approx(np.mean(expected), rel=1e-4)
    assert all(one["answer_log_likelihood"] < 0 for one in result.values())


def test_the_likeliest_word_is_the_answer(result, config, asked, data):
    from evaluation.inference import Pair

    model = inference.load(asked)
    task = TASKS["glue_sst2_v002"]
    rows = task.examples("validation", data)
    encode = Vocabulary.from_file("bytes").encode
    sums = np.stack(
        [
            model.log_likelihoods([Pair(encode(row["inputs"]), encode(word)) for row in rows])[0]
            for word in task.words
        ]
    )
    expected = task.judge(rows, [task.words[i] for i in sums.argmax(axis=0)])
    assert result["glue_sst2_v002"]["metrics"] == expected
    found = result["glue_sst2_v002"]
    assert found["majority"] == {"accuracy": pytest.approx(100 * 8 / 12)}
    assert found["examples"] == 12 and found["score"] == expected["accuracy"]


def test_free_answers_are_generated(result, config):
    found = result["squad_v010_allanswers"]
    assert set(found["metrics"]) == {"em", "f1"} and found["majority"] is None
    lines = (config.output, "samples", "squad_v010_allanswers.jsonl")
    from pathlib import Path

    [sample] = map(json.loads, Path(*lines).read_text().splitlines())
    assert sample["answers"] == ["Ann"] and isinstance(sample["said"], str)


def test_finished_once_and_never_mixed(result, config):
    from pathlib import Path

    before = (Path(config.output) / "result.json").read_bytes()
    assert judged.evaluate(config) == result
    assert (Path(config.output) / "result.json").read_bytes() == before
    assert judged.run(config)[-1].startswith("mean of 3 tasks")
    with pytest.raises(ConfigurationChanged, match="how: "):
        judged.evaluate(dataclasses.replace(config, how="generate"))
    with pytest.raises(TaskError, match="glue_ax_v002 has no public labels"):
        judged.evaluate(dataclasses.replace(config, tasks=("glue_ax_v002",)))


def test_a_decoder_learns_a_task_and_is_asked_as_it_was_taught(data, tmp_path):
    """Fine-tuned until it knows: what train.py shows and what is asked here are the same layout."""
    import train
    from models.config import DecoderConfig
    from models.optimizers import AdamW, Constant

    examples.make(config_of(data, tmp_path / "examples", tasks=("glue_sst2_v002",)))
    shape = DecoderConfig(
        vocab_size=384, d_model=32, d_ff=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
    )
    run = train.TrainConfig(
        output=str(tmp_path / "run"),
        model=shape,
        data=ExamplesConfig(str(tmp_path / "examples"), 16, 48, 16, layout="decoder_only"),
        optimizer=AdamW(schedule=Constant(5e-3)),
        steps=60,
    )
    train.train(run)
    model = InferenceConfig(run.output, "bytes", 128, 8, compilation_cache=None)
    for how in ("generate", "rank"):
        config = TasksConfig(model, ("glue_sst2_v002",), data, str(tmp_path / how), how=how)
        assert judged.evaluate(config)["glue_sst2_v002"]["metrics"] == {"accuracy": 100.0}
