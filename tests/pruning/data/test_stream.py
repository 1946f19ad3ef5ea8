"""The stream: every token once an epoch, any example at once, the same for any number of hosts."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pruning.corpus.blocks import DOCUMENTS, Blocks
from pruning.corpus.reader import load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.data.objectives import CausalLM, ObjectiveError, PrefixLM, SpanCorruption
from pruning.data.stream import Stream, StreamConfig, StreamError
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import All, Random, Split
from pruning.store.manifest import ArtifactError

COUNTS = (700, 0, 1000, 3)
SMALL = {"input_length": 64, "target_length": 14, "window_blocks": 3}  # chunks of 70


@pytest.fixture(scope="module")
def places(tmp_path_factory, artifacts):
    path = tmp_path_factory.mktemp("stream")
    artifacts.corpus(path / "corpus", artifacts.documents(COUNTS), row_group=50)
    corpus = str(path / "corpus")
    select.run(SelectConfig(corpus, str(path / "some"), Random(), keep_tokens=0.3))
    select.run(SelectConfig(corpus, str(path / "all"), All()))
    return path


def config_at(path, selection=None, **settings) -> StreamConfig:
    chosen = str(path / selection) if selection else None
    return StreamConfig(
        **(
            {"corpus": str(path / "corpus"), "batch_size": 8, "selection": chosen}
            | SMALL
            | settings
        )
    )


def text_of_blocks(stream: Stream, epoch: int) -> dict[int, np.ndarray]:
    """Every block's text, put together from the chunks of an epoch's examples."""
    size = stream.examples_per_epoch
    indices = np.arange(epoch * size, (epoch + 1) * size)
    epochs, blocks, places = stream.locate(indices)
    assert (epochs == epoch).all()
    found: dict[int, dict[int, np.ndarray]] = {}
    for block, place, chunk in zip(blocks, places, stream.chunks(indices), strict=True):
        assert place not in found.setdefault(int(block), {})
        found[int(block)][int(place)] = chunk
    return {
        block: np.concatenate([parts[k] for k in range(len(parts))])
        for block, parts in found.items()
    }


@pytest.mark.parametrize("selection", [None, "some", "all"])
@pytest.mark.parametrize("objective", [SpanCorruption(), CausalLM()])
def test_an_epoch_holds_every_document_once(places, selection, objective):
    stream = config_at(places, selection, objective=objective).stream()
    for epoch in (0, 3):
        text = text_of_blocks(stream, epoch)
        assert set(text) == set(range(len(stream.blocks)))
        for block, tokens in text.items():
            _, documents = stream.blocks.read(block)
            left = [[*part, *[1] * objective.separates] for part in documents]
            rest = tokens.tolist()
            while rest:  # whole documents, one after the other, in some order
                match = [part for part in left if rest[: len(part)] == part]
                part = max(match, key=len)
                left.remove(part)
                rest = rest[len(part) :]
            assert not left


def test_documents_are_those_of_the_selection(places):
    stream = config_at(places, "some").stream()
    selection = load_selection(places / "some")
    read = np.concatenate([stream.blocks.read(block)[0] for block in range(len(stream.blocks))])
    kept = np.concatenate([selection.doc_ids(shard) for shard in range(selection.num_shards)])
    np.testing.assert_array_equal(np.sort(read), kept)
    assert stream.blocks.n_tokens.sum() == selection.tokens


def test_the_blocks_of_a_whole_corpus_are_those_of_a_selection_of_all(places):
    corpus = load_corpus(places / "corpus")
    whole, selected = (
        Blocks.open(corpus, selection) for selection in (None, load_selection(places / "all"))
    )
    for name in ("shard", "first_row", "n_documents", "n_tokens"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(selected, name))
    assert whole.n_documents.max() == DOCUMENTS
    batches = [config_at(places, selection).open().batch(7) for selection in (None, "all")]
    for name in batches[0]:
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


@pytest.mark.parametrize("objective", [SpanCorruption(), PrefixLM(), CausalLM(), CausalLM(True)])
@pytest.mark.parametrize("hosts", [2, 8])
def test_batches_do_not_depend_on_the_number_of_hosts(places, objective, hosts):
    config = config_at(places, "some", objective=objective)
    for step in (0, 1, 40, 100_000):
        alone = config.open().batch(step)
        parts = [config.open(host, hosts).batch(step) for host in range(hosts)]
        for name, value in alone.items():
            np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


def test_any_batch_is_the_same_at_once_and_in_passing(places):
    config = config_at(places, batch_size=16)
    running = config.open()
    steps = 3 * running.num_batches
    passed = [running.batch(step) for step in range(steps)]
    for step in (steps - 1, 0, steps // 2):
        for opened in (config.open(), running):
            for name, value in opened.batch(step).items():
                np.testing.assert_array_equal(value, passed[step][name])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_examples_in_any_order_and_company(places, data):
    stream = config_at(places, "some").stream()
    size = stream.examples_per_epoch
    indices = data.draw(st.lists(st.integers(0, 3 * size), min_size=1, max_size=6))
    for index, example in zip(indices, stream.examples(indices), strict=True):
        [alone] = config_at(places, "some").stream().examples([index])
        np.testing.assert_array_equal(alone["inputs"], example["inputs"])
        np.testing.assert_array_equal(alone["targets"], example["targets"])


def test_lengths_never_exceed_and_fill_up(places):
    stream = config_at(places).stream()
    examples = stream.examples(np.arange(stream.examples_per_epoch))
    assert max(len(example["inputs"]) for example in examples) == 64
    assert max(len(example["targets"]) for example in examples) == 14
    short = sum(len(example["inputs"]) < 64 for example in examples)
    assert short <= len(stream.blocks)  # only a block's last chunk


def test_epochs_seeds_and_windows_shuffle(places):
    stream = config_at(places).stream()
    size = stream.examples_per_epoch

    def order(stream, epoch):
        _, blocks, chunks = stream.locate(np.arange(epoch * size, (epoch + 1) * size))
        return blocks * 10_000 + chunks

    orders = [order(stream, 0), order(stream, 1), order(config_at(places, seed=1).stream(), 0)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            np.testing.assert_array_equal(np.sort(one), np.sort(other))
            assert np.mean(one == other) < 0.02
    # A window is three blocks, taken in the order of the epoch; its chunks are well mixed.
    _, blocks, chunks = stream.locate(np.arange(size))
    window = int(np.isin(blocks, np.unique(blocks[:40])).sum())
    assert len(np.unique(blocks[:window])) == 3
    place = blocks[:window] * 10_000 + chunks[:window]
    assert abs(stats.spearmanr(np.arange(window), place).statistic) < 4 / np.sqrt(window)


def test_an_example_reads_one_block_and_a_batch_its_window(places, monkeypatch):
    config = config_at(places, "some")
    read = []
    original = Blocks.read
    monkeypatch.setattr(Blocks, "read", lambda self, i: read.append(i) or original(self, i))
    config.stream().examples([777])
    assert len(read) == 1
    read.clear()
    opened = config.open()
    opened.batch(1000)
    assert len(read) <= 2 * config.window_blocks
    before = len(read)
    opened.batch(1000)
    assert len(read) == before  # from the cache


def test_resuming_at_step_100_000_reads_little_and_gives_the_same_bits(places, monkeypatch):
    """As benchmarks/stream.py does with 10 million documents."""
    step, config = 100_000, config_at(places, "some", batch_size=16)
    running = config.open()
    for before in range(step - 5, step):
        running.batch(before)
    expected = running.batch(step)
    read = []
    original = Blocks.read
    monkeypatch.setattr(Blocks, "read", lambda self, i: read.append(i) or original(self, i))
    for hosts in (1, 2, 8):
        parts = []
        for host in range(hosts):
            read.clear()
            resumed = config.open(host, hosts)
            assert not read  # opening looks at no document
            parts.append(resumed.batch(step))
            assert len(read) == len(set(read)) <= 2 * config.window_blocks
        for name, value in expected.items():
            np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


def test_bytes_of_tokens_add_up_to_those_of_the_text(places):
    opened = config_at(places).open()
    batch = opened.batch(3)
    real = (batch["decoder_target_tokens"] >= 3) & (batch["decoder_target_tokens"] < 259)
    assert opened.token_bytes[batch["decoder_target_tokens"]].sum() == real.sum()  # a byte a token
    assert len(opened.token_bytes) == opened.stream.corpus.vocabulary.size


def test_a_corpus_smaller_than_a_batch_goes_round(tmp_path, artifacts):
    artifacts.corpus(tmp_path / "corpus", [[[5, 6, 7, 8], [9, 10]]])
    opened = config_at(tmp_path, batch_size=4).open()
    assert opened.stream.examples_per_epoch == 1 and opened.num_batches == 1
    batch = opened.batch(0)
    assert batch["encoder_input_tokens"].shape == (4, 64)
    assert (batch["decoder_loss_weights"].sum(axis=1) > 0).all()


def test_what_cannot_be_is_refused(places, tmp_path, artifacts):
    with pytest.raises(StreamError, match="multiple"):
        config_at(places, batch_size=9).open(0, 2)
    with pytest.raises(StreamError, match="no process 2 of 2"):
        config_at(places).open(2, 2)
    with pytest.raises(ObjectiveError, match="raise target_length"):
        config_at(places, target_length=13).open()
    with pytest.raises(IndexError):
        config_at(places).stream().examples([-1])
    artifacts.corpus(tmp_path / "corpus", artifacts.documents([50], seed=5))
    with pytest.raises(ArtifactError, match="was made from the corpus at"):
        StreamConfig(str(tmp_path / "corpus"), 8, str(places / "some")).open()
    select.run(SelectConfig(str(tmp_path / "corpus"), str(tmp_path / "half"), Split(0, 0.5)))
    artifacts.corpus(tmp_path / "empty", [[]])
    with pytest.raises(StreamError, match="no text"):
        StreamConfig(str(tmp_path / "empty"), 8).open()


def test_golden_batch(tmp_path, artifacts):
    """Another digest means other examples for the same seed: no running training could go on."""
    documents = [[(np.arange(3 + 7 * d % 50) * (d + 1) % 250 + 3).tolist() for d in range(300)]]
    artifacts.corpus(tmp_path / "corpus", documents)
    digest = hashlib.sha256()
    for name, value in sorted(config_at(tmp_path).open().batch(123).items()):
        digest.update(name.encode() + value.tobytes())
    assert digest.hexdigest()[:16] == "a11ca9f99f50f8be"


def test_the_stream_does_not_import_tensorflow():
    code = (
        "import sys, pruning.data.stream, pruning.selection.select\n"
        "print([m for m in ('tensorflow', 'seqio', 'torch', 'jax', 'gin') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
