"""Training data from any registered seqio task or mixture, for train.py.

    Train.data = @Seqio()
    Seqio.mixture_or_task = 'glue_v002_proportional'
    Seqio.modules = ('my_tasks',)
    Seqio.lengths = {'inputs': 512, 'targets': 114}

Choices
- seqio, and TensorFlow with it, are imported when the data are opened, and TensorFlow is kept off
  the accelerators.
- seqio is an iterator, not an index: resuming at step n reads and drops n batches. It is
  deterministic for a given seed, but the order depends on the number of processes, each of which
  reads a shard of its own. The native stream (pruning/data/stream.py) has neither limit.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from pruning.corpus.vocabulary import Vocabulary
from pruning.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class SeqioConfig:
    """A seqio task or mixture.

    Attributes:
      mixture_or_task: its registered name.
      modules: imported first, so that they register it.
      lengths: tokens of each feature of the task, end-of-sequence included.
      batch_size: rows of a global batch.
      converter: "encoder_decoder", or "language_model" for tasks that have targets only.
      pack: put several examples into a row, told apart by segment ids.
    """

    mixture_or_task: str
    lengths: Mapping[str, int]
    batch_size: int
    modules: tuple[str, ...] = ()
    split: str = "train"
    converter: Literal["encoder_decoder", "language_model"] = "encoder_decoder"
    pack: bool = False
    shuffle: bool = True
    seed: int = 0

    def open(self, process_index: int = 0, process_count: int = 1) -> SeqioBatches:
        """Find the task or mixture."""
        if self.batch_size % process_count:
            raise DataError(
                f"batch_size {self.batch_size} does not divide over {process_count} processes"
            )
        return SeqioBatches(self, process_index, process_count)


class SeqioBatches:
    """An open task or mixture, repeated without end.

    Attributes:
      token_bytes: int32 [ids], the bytes of text that each id of the targets stands for; None where
        seqio's vocabulary is neither SentencePiece nor bytes.
      vocabulary: that vocabulary, as a manifest describes it, or None.
    """

    def __init__(self, config: SeqioConfig, process_index: int, process_count: int):
        import seqio
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
        for module in config.modules:
            importlib.import_module(module)
        known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
        if config.mixture_or_task not in known:
            raise DataError(
                f"no seqio task or mixture {config.mixture_or_task!r} is registered: name the "
                f"module that registers it in Seqio.modules (now {list(config.modules)})"
            )
        task = seqio.get_mixture_or_task(config.mixture_or_task)
        same = _vocabulary_of(task.output_features["targets"].vocabulary)
        self.token_bytes = None if same is None else same.token_bytes()
        self.vocabulary = None if same is None else same.describe()
        self._config = config
        self._shard = seqio.ShardInfo(process_index, process_count)
        self._iterator: Iterator[dict[str, Any]] = iter(())
        self._next_step = -1

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return this process's rows of global batch `step`; any but the next step is a seek."""
        if step != self._next_step:
            self._iterator = self._from(step)
        self._next_step = step + 1
        batch = dict(next(self._iterator))
        batch["decoder_loss_weights"] = batch["decoder_loss_weights"].astype(np.float32)
        return batch

    def _from(self, step: int) -> Iterator[dict[str, Any]]:
        # NOTE: built anew for every seek: a tf.data shuffle draws another order, whatever its seed,
        # each time the same dataset object is iterated.
        config = self._config
        dataset = examples(
            config,
            shuffle=config.shuffle,
            num_epochs=None,
            shard_info=self._shard,
            seed=config.seed,
        )
        rows = config.batch_size // self._shard.num_shards
        return dataset.batch(rows, drop_remainder=True).skip(step).prefetch(2).as_numpy_iterator()


def examples(config: SeqioConfig, **how: Any) -> Any:
    """Return the task's or mixture's examples as a model takes them, a tf.data.Dataset.

    Args:
      how: further arguments of seqio.get_dataset: shuffle, num_epochs, shard_info, seed.
    """
    import seqio

    converters = {
        "encoder_decoder": seqio.EncDecFeatureConverter,
        "language_model": seqio.LMFeatureConverter,
    }
    return seqio.get_dataset(
        config.mixture_or_task,
        dict(config.lengths),
        dataset_split=config.split,
        feature_converter=converters[config.converter](pack=config.pack),
        **how,
    )


def _vocabulary_of(vocabulary: Any) -> Vocabulary | None:
    """Return seqio's vocabulary as one of ours, or None."""
    import seqio

    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return Vocabulary("sentencepiece", vocabulary.sp_model, vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return Vocabulary("bytes", b"", vocabulary.extra_ids)
    return None
