"""Registered with seqio, the tasks give the examples and the numbers that they give without it."""

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="seqio is not installed")


@pytest.fixture(scope="module")
def registered(real_data, t5_vocabulary_file):
    from evaluation.tasks import seqio_tasks

    return seqio_tasks.register_all(str(real_data / "eval"), str(t5_vocabulary_file))


def test_what_is_there_is_registered(registered):
    assert {"glue_cola_v002", "super_glue_multirc_v102", "squad_v010_allanswers"} <= set(registered)
    # MNLI's files are not there: neither is the task, nor a mixture that wants it.
    assert not {"glue_mnli_v002", "glue_v002_proportional"} & set(registered)
    task = seqio.get_mixture_or_task("super_glue_record_v102")
    assert task.splits == ["train"] or tuple(task.splits) == ("train",)


@pytest.mark.parametrize(
    ("name", "split"), [("super_glue_cb_v102", "train"), ("super_glue_record_v102", "train")]
)
def test_seqio_serves_the_examples_of_the_native_way(
    registered, name, split, real_data, t5_vocabulary_file, tmp_path
):
    from evaluation.tasks import examples

    made = examples.make(
        examples.TaskExamplesConfig(
            tasks=(name,),
            data=str(real_data / "eval"),
            vocabulary=str(t5_vocabulary_file),
            output=str(tmp_path / "examples"),
            split=split,
            inputs_length=96,
            targets_length=8,
        )
    )
    lengths = {"inputs": 96, "targets": 8}
    dataset = seqio.get_mixture_or_task(name).get_dataset(lengths, split=split, shuffle=False)
    rows = made.read(0).to_pylist()
    found = list(dataset.as_numpy_iterator())
    assert len(found) == len(rows) > 30
    for one, row in zip(found, rows, strict=True):
        assert one["inputs"].tolist() == [*row["inputs"], 1]
        assert one["targets"].tolist() == [*row["targets"], 1]


def test_its_evaluator_calls_our_metrics(registered, real_data):
    from evaluation.tasks.suite import TASKS

    name, data = "super_glue_cb_v102", str(real_data / "eval")
    task = seqio.get_mixture_or_task(name)
    examples = TASKS[name].examples("validation", data)
    dataset = task.get_dataset(None, split="validation", shuffle=False)
    said = ["entailment", "neutral"] * (len(examples) // 2)
    targets = [
        task.postprocess_fn(one["targets_pretokenized"].decode(), example=one, is_target=True)
        for one in dataset.as_numpy_iterator()
    ]
    [metric] = task.metric_fns
    assert metric(targets, said) == TASKS[name].judge(examples, said)


def test_a_mixture_is_proportional_under_its_cap(registered):
    from evaluation.tasks import seqio_tasks

    sizes = {"super_glue_cb_v102": 100, "super_glue_copa_v102": 900}
    mixture = seqio_tasks.register_mixture("capped_for_the_test", sizes, cap=300)
    assert [mixture.get_rate(task) for task in mixture.tasks] == [100.0, 300.0]
    dataset = mixture.get_dataset({"inputs": 64, "targets": 8}, split="train", seed=0)
    heads = [one["inputs"][:1].tolist() for one in dataset.take(400).as_numpy_iterator()]
    share = np.mean([head == heads[0] for head in heads])
    assert min(share, 1 - share) == pytest.approx(0.25, abs=0.07)
