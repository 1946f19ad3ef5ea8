"""seqio's examples are the stream's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="wants the extra winnow-lm[seqio]")

from pruning import seqio_tasks  # noqa: E402
from pruning.corpus.selection_reader import load_selection  # noqa: E402
from pruning.corpus.vocabulary import Vocabulary  # noqa: E402
from pruning.data.objectives import CausalLM, PrefixLM, SpanCorruption  # noqa: E402
from pruning.data.stream import StreamConfig  # noqa: E402
from pruning.selection import select  # noqa: E402
from pruning.selection.config import SelectConfig  # noqa: E402
from pruning.selection.strategies import Random, Split  # noqa: E402

LENGTHS = {"input_length": 64, "target_length": 14}
SEQUENCE = {"inputs": 64, "targets": 14}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, artifacts) -> str:
    path = tmp_path_factory.mktemp("seqio")
    artifacts.corpus(path / "corpus", artifacts.documents([300, 200]))
    select.run(SelectConfig(str(path / "corpus"), str(path / "train"), Split(0, 0.8)))
    select.run(SelectConfig(str(path / "corpus"), str(path / "held_out"), Split(0.8, 1)))
    return str(path / "corpus")


@pytest.fixture
def name(request):
    yield (name := f"test_{abs(hash(request.node.name))}")
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for registered in list(registry.names()):
            if registered.startswith(name):
                registry.remove(registered)


def selection_of(corpus: str, which: str = "train") -> str:
    return corpus.replace("/corpus", f"/{which}")


def as_numpy(dataset, count=None):
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for feature in one:
            np.testing.assert_array_equal(one[feature], other[feature])


@pytest.mark.parametrize("objective", [SpanCorruption(), PrefixLM(), CausalLM()])
def test_a_task_gives_the_examples_of_the_stream(corpus, name, objective):
    selection = selection_of(corpus)
    seqio_tasks.register(
        name,
        corpus,
        selection,
        splits={"validation": selection_of(corpus, "held_out")},
        objective=objective,
        seed=3,
        **LENGTHS,
    )
    for split, chosen in (("train", selection), ("validation", selection_of(corpus, "held_out"))):
        native = StreamConfig(corpus, 1, chosen, objective, seed=3, **LENGTHS).stream()
        found = as_numpy(
            seqio.get_mixture_or_task(name).get_dataset(
                SEQUENCE, split=split, shuffle=False, seed=11
            )
        )
        assert_same(found, native.examples(np.arange(native.examples_per_epoch)))


def test_an_endless_task_goes_on_as_the_stream_does(corpus, name):
    seqio_tasks.register(name, corpus, epochs=None, **LENGTHS)
    native = StreamConfig(corpus, 1, **LENGTHS).stream()
    count = native.examples_per_epoch + 200
    dataset = seqio.get_mixture_or_task(name).get_dataset(SEQUENCE, "train", shuffle=True, seed=5)
    assert_same(as_numpy(dataset, count), native.examples(np.arange(count)))


def test_shards_take_turns(corpus, name):
    seqio_tasks.register(name, corpus, **LENGTHS)
    task = seqio.get_mixture_or_task(name)
    whole = as_numpy(task.get_dataset(SEQUENCE, "train", shuffle=False))
    for k in range(3):
        part = task.get_dataset(SEQUENCE, "train", shuffle=False, shard_info=seqio.ShardInfo(k, 3))
        assert_same(as_numpy(part), whole[k::3])


def test_seqio_makes_the_batch_of_the_stream(corpus, name):
    seqio_tasks.register(name, corpus, **LENGTHS)
    dataset = seqio.get_dataset(
        name,
        SEQUENCE,
        seqio.EncDecFeatureConverter(pack=False),
        "train",
        shuffle=False,
    ).batch(16)
    [found] = as_numpy(dataset, 1)
    expected = StreamConfig(corpus, 16, **LENGTHS).open().batch(0)
    assert set(found) == set(expected)
    for feature, value in expected.items():
        np.testing.assert_array_equal(found[feature], value, err_msg=feature)


def test_a_mixture_has_its_rates(corpus, name):
    seqio_tasks.register(f"{name}_a", corpus, selection_of(corpus), epochs=None, **LENGTHS)
    held_out = selection_of(corpus, "held_out")
    seqio_tasks.register(f"{name}_b", corpus, held_out, epochs=None, **LENGTHS)
    seqio_tasks.register_mixture(name, {f"{name}_a": 3.0, f"{name}_b": 1.0})
    dataset = seqio.get_mixture_or_task(name).get_dataset(SEQUENCE, "train", shuffle=False, seed=0)
    found = {example["inputs"].tobytes() for example in as_numpy(dataset, 400)}
    native = StreamConfig(corpus, 1, held_out, **LENGTHS).stream()
    own = {example["inputs"].tobytes() for example in native.examples(np.arange(400))}
    assert len(found & own) / len(found) == pytest.approx(0.25, abs=0.07)


def test_shorter_lengths_are_refused(corpus, name):
    seqio_tasks.register(name, corpus, **LENGTHS)
    with pytest.raises(ValueError, match="inputs are wanted with 32 tokens, the task makes 64"):
        seqio.get_mixture_or_task(name).get_dataset({"inputs": 32, "targets": 14}, "train")


def test_documents_of_a_selection(corpus, name):
    seqio_tasks.register_documents(name, corpus, selection_of(corpus))
    selection = load_selection(selection_of(corpus))
    task = seqio.get_mixture_or_task(name)
    found = as_numpy(task.get_dataset({"targets": 100}, "train", shuffle=False))
    from pruning.corpus.reader import load_corpus

    opened = load_corpus(corpus)
    expected = [
        {"targets": np.append(tokens, 1).astype(np.int32)}
        for shard in range(selection.num_shards)
        for tokens in opened.tokens_of(shard, selection.rows(shard))
    ]
    assert_same(found, expected)
    parts = [
        as_numpy(
            task.get_dataset(
                {"targets": 100}, "train", shuffle=False, shard_info=seqio.ShardInfo(k, 2)
            )
        )
        for k in range(2)
    ]
    assert_same(parts[0] + parts[1], expected)


def test_documents_through_a_chain_of_ones_own(corpus, name):
    preprocessors = [
        lambda dataset: dataset.map(lambda example: {"targets": example["text"]}),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos_after_trim,
    ]
    seqio_tasks.register_documents(name, corpus, preprocessors=preprocessors)
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, "train", shuffle=False)
    assert all(example["targets"][-1] == 1 for example in as_numpy(dataset, 20))


def test_the_vocabulary_is_the_corpus_s(tmp_path, artifacts, t5_vocabulary_file, name):
    t5 = Vocabulary.from_file(t5_vocabulary_file)
    text = "Winnow keeps the grain and lets the chaff go."
    artifacts.corpus(tmp_path / "corpus", [[t5.encode(text)]], vocabulary=t5)
    task = seqio_tasks.register(name, str(tmp_path / "corpus"))
    own = task.output_features["targets"].vocabulary
    assert own.vocab_size == t5.size == 32_100
    assert own.encode(text) == t5.encode(text)
    assert own.decode([t5.sentinel(0)]) == "<extra_id_0>"
    [example] = as_numpy(task.get_dataset({"inputs": 512, "targets": 114}, "train", shuffle=False))
    assert "<extra_id_0>" in own.decode(example["targets"].tolist())
    assert example["inputs"].tolist().count(1) == 1  # one EOS


def test_a_selection_of_another_corpus_is_refused(corpus, tmp_path, artifacts, name):
    artifacts.corpus(tmp_path / "corpus", artifacts.documents([50], seed=5))
    select.run(
        SelectConfig(str(tmp_path / "corpus"), str(tmp_path / "r"), Random(), keep_tokens=0.5)
    )
    task = seqio_tasks.register(name, corpus, str(tmp_path / "r"), **LENGTHS)
    with pytest.raises(ValueError, match="was made from the corpus at"):
        task.get_dataset(SEQUENCE, "train")
