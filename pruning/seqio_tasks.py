"""Selections as seqio Tasks and Mixtures, for any program that trains through seqio.

    from pruning import seqio_tasks

    seqio_tasks.register("c4_ask_llm", "runs/c4/corpus", "runs/c4/ask_llm_top_20", epochs=None)
    seqio_tasks.register("c4_random", "runs/c4/corpus", "runs/c4/random_20", epochs=None)
    seqio_tasks.register_mixture("half_and_half", {"c4_ask_llm": 1.0, "c4_random": 1.0})

    dataset = seqio.get_mixture_or_task("c4_ask_llm").get_dataset(
        {"inputs": 512, "targets": 114}, split="train", shuffle=False
    )

Choices
- A task serves the examples of the native stream, chunked, corrupted and with EOS: number i of the
  dataset is `Stream.examples([i])`. There is one implementation, so both give the same examples.
- seqio repeats a dataset unchanged. The stream shuffles and corrupts every epoch anew. For training
  over several epochs, `epochs=None` makes the task itself endless.
- The examples come shuffled. `shuffle=True` and a seed given to seqio change nothing: the seed of
  the task is the one it was registered with.
- Sharding is by example: of n readers, reader k gets every n-th example from the k-th on.
- Importing this module imports seqio, and TensorFlow with it, which is kept off the accelerators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.corpus.tokenizers import require_sentencepiece
from pruning.corpus.vocabulary import FILE as VOCABULARY_FILE
from pruning.data.objectives import CausalLM, Objective, SpanCorruption
from pruning.data.stream import Stream, StreamConfig

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

_AT_ONCE = 128  # examples that are made together


class StreamSource(seqio.DataSource):
    """The examples of streams, one stream per split."""

    def __init__(self, splits: Mapping[str, StreamConfig], epochs: int | None = 1):
        """Arg: splits: their streams; epochs: how many a dataset has, None for no end."""
        super().__init__(
            splits=tuple(splits), caching_permitted=False, performs_internal_shuffling=True
        )
        self._configs = dict(splits)
        self._epochs = epochs
        self.stream = functools.cache(self._open)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def num_input_examples(self, split: str) -> int | None:
        return self._epochs and self._epochs * self.stream(split).examples_per_epoch

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        stream, shard = self.stream(split), shard_info or seqio.ShardInfo(0, 1)
        total = self.num_input_examples(split)

        def examples() -> Iterator[dict[str, np.ndarray]]:
            first = shard.index
            while total is None or first < total:
                indices = first + shard.num_shards * np.arange(_AT_ONCE)
                yield from stream.examples(indices if total is None else indices[indices < total])
                first += shard.num_shards * _AT_ONCE

        names = _features(stream.objective)
        vector = tf.TensorSpec([None], tf.int32)
        return tf.data.Dataset.from_generator(
            examples, output_signature=dict.fromkeys(names, vector)
        )

    def _open(self, split: str) -> Stream:
        if split not in self._configs:
            raise ValueError(f"there is no split {split!r}; there are: {', '.join(self.splits)}.")
        return self._configs[split].stream()


class DocumentSource(seqio.DataSource):
    """Whole documents of a corpus, or of a selection: `text`, and its tokens as `targets`."""

    def __init__(self, corpus: str, splits: Mapping[str, str | None]):
        """Arg: splits: the selection of each, or None for all documents."""
        super().__init__(splits=tuple(splits), caching_permitted=False)
        self._corpus = load_corpus(corpus)
        self._selections = {
            split: path and load_selection(path, self._corpus.artifact)
            for split, path in splits.items()
        }

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [shard.file for shard in self._corpus.artifact.manifest.shards]

    def num_input_examples(self, split: str) -> int:
        selection = self._selections[split]
        return selection.documents if selection else self._corpus.artifact.manifest.rows

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        info = shard_info or seqio.ShardInfo(0, 1)
        shards = np.arange(info.index, self._corpus.num_shards, info.num_shards)
        if shuffle:
            shards = np.random.default_rng(seed).permutation(shards)
        signature = {
            "text": tf.TensorSpec([], tf.string),
            "targets": tf.TensorSpec([None], tf.int32),
        }
        return tf.data.Dataset.from_generator(
            lambda: self._documents(split, shards), output_signature=signature
        )

    def _documents(self, split: str, shards: np.ndarray) -> Iterator[dict[str, Any]]:
        selection = self._selections[split]
        for shard in shards.tolist():
            documents = self._corpus.documents(shard)
            kept = selection.mask(shard, documents) if selection else np.ones(documents, bool)
            row = 0
            for batch in self._corpus.iter_batches(shard, ["text", "tokens"], 1024):
                for i in np.flatnonzero(kept[row : row + len(batch)]):
                    tokens = batch["tokens"][i].values.to_numpy().astype(np.int32)
                    yield {"text": batch["text"][i].as_py(), "targets": tokens}
                row += len(batch)


def register(
    name: str,
    corpus: str,
    selection: str | None = None,
    *,
    splits: Mapping[str, str | None] | None = None,
    objective: Objective | None = None,
    input_length: int = 512,
    target_length: int = 114,
    seed: int = 0,
    window_blocks: int = 64,
    epochs: int | None = 1,
    metric_fns: Sequence[Callable[..., Any]] = (),
) -> seqio.Task:
    """Register a stream as a Task.

    Args:
      name: of the task.
      corpus: its directory.
      selection: of the split "train"; None for all documents.
      splits: further splits, such as {"validation": "runs/c4/held_out"}.
      objective: SpanCorruption() unless given.
      input_length, target_length: fixed here, since they determine the chunks; `sequence_length` in
        `get_dataset` must not be shorter.
      seed, window_blocks: of the stream, see StreamConfig.
      epochs: how many a dataset has; None makes it endless, every epoch shuffled anew.
      metric_fns: for seqio.Evaluator.

    Returns:
      The task; its features are `inputs` and `targets` (CausalLM: `targets`), with EOS.
    """
    objective = objective or SpanCorruption()
    streams = {
        split: StreamConfig(
            corpus=corpus,
            batch_size=1,
            selection=path,
            objective=objective,
            input_length=input_length,
            target_length=target_length,
            seed=seed,
            window_blocks=window_blocks,
        )
        for split, path in ({"train": selection} | dict(splits or {})).items()
    }
    lengths = {"inputs": input_length, "targets": target_length}
    # The examples have their EOS: with add_eos another might be appended.
    feature = seqio.Feature(vocabulary(load_corpus(corpus)), add_eos=False, dtype=tf.int32)
    return seqio.TaskRegistry.add(
        name,
        source=StreamSource(streams, epochs),
        preprocessors=[functools.partial(_require_lengths, lengths=lengths)],
        output_features=dict.fromkeys(_features(objective), feature),
        metric_fns=list(metric_fns),
        shuffle_buffer_size=None,
    )


def register_documents(
    name: str,
    corpus: str,
    selection: str | None = None,
    *,
    splits: Mapping[str, str | None] | None = None,
    preprocessors: Sequence[Callable[..., Any]] | None = None,
    features: Sequence[str] = ("targets",),
) -> seqio.Task:
    """Register whole documents as a Task, for a preprocessing of your own.

    Args:
      selection, splits: as in `register`.
      preprocessors: of examples with `text` and `targets` (its tokens). By default the examples are
        the `targets` with an EOS.
      features: the features after the preprocessors.
    """
    own = seqio.Feature(vocabulary(load_corpus(corpus)), add_eos=True, dtype=tf.int32)
    return seqio.TaskRegistry.add(
        name,
        source=DocumentSource(corpus, {"train": selection} | dict(splits or {})),
        preprocessors=[_only_targets, seqio.preprocessors.append_eos_after_trim]
        if preprocessors is None
        else list(preprocessors),
        output_features=dict.fromkeys(features, own),
        metric_fns=[],
    )


def register_mixture(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
    """Register a Mixture: an example is of a task with probability rate / sum of rates."""
    return seqio.MixtureRegistry.add(name, list(rates.items()))


def vocabulary(corpus: Corpus) -> seqio.Vocabulary:
    """Return the corpus's own vocabulary, as seqio has it: sentinels at the end, counting down."""
    own = require_sentencepiece(corpus.vocabulary, "seqio")
    if own.kind == "bytes":
        return seqio.ByteVocabulary(own.extra_ids)
    path = corpus.artifact.path / VOCABULARY_FILE
    return seqio.SentencePieceVocabulary(str(path), own.extra_ids)


def _features(objective: Objective) -> tuple[str, ...]:
    return ("targets",) if isinstance(objective, CausalLM) else ("inputs", "targets")


def _require_lengths(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Mapping[str, seqio.Feature],
    lengths: Mapping[str, int],
) -> tf.data.Dataset:
    """Raise ValueError where seqio would cut the examples."""
    for feature in output_features:
        given = (sequence_length or {}).get(feature)
        if given is not None and given < lengths[feature]:
            raise ValueError(
                f"{feature} are wanted with {given} tokens, the task makes {lengths[feature]}: "
                "register it with the lengths that you train with."
            )
    return dataset


def _only_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: {"targets": example["targets"]})
