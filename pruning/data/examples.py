"""Supervised examples for fine-tuning: fixed-shape batches from Parquet files of token ids.

    examples/*.parquet, columns:
        inputs   list<int>   input of the model, e.g. [363, 19, 8, 1784, 13, 1410, 58]
        targets  list<int>   its answer,         e.g. [1919]

Choices
- A batch is a pure function of (seed, step). Each epoch has its own permutation, and batches
  continue across epochs. Resuming needs the step alone, and the global batch does not depend on the
  number of processes that read it.
- An example that does not fit is an error that names its file and row, unless `truncate` is set.
- Files of an artifact are compared with its digests as they are read; those of a directory without
  a manifest have none.
- All token ids are held in memory, 4 bytes each: these are sets of thousands to millions of
  examples, not corpora.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
from etils import epath

from pruning.data.errors import DataError
from pruning.store import randomness
from pruning.store.artifact import Artifact, load_artifact, open_parquet
from pruning.store.atomic import entries
from pruning.store.manifest import MANIFEST, ArtifactError
from pruning.store.randomness import Stream
from pruning.store.verified import VerifiedParquet

_Files = Mapping[epath.Path, Callable[[], VerifiedParquet]]


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Examples from a directory of Parquet files.

    Attributes:
      path: the directory; its *.parquet files are read in the order of their names.
      batch_size: rows of a global batch.
      inputs_length, targets_length: tokens, end-of-sequence included.
      seed: of the epochs' permutations.
      shuffle: False keeps the order of the files.
      repeat: False serves every example once; rows beyond the last are padding, of weight 0.
      layout: "encoder_decoder"; or "decoder_only": inputs and targets in one row of
        inputs_length + targets_length, with the loss on the targets alone.
      truncate: cut examples that are too long, instead of refusing them.
      eos_id, pad_id, start_id: inputs (of an encoder) and targets end with `eos_id`, which is added
        if missing; decoder inputs begin with `start_id`.
    """

    path: str
    batch_size: int
    inputs_length: int
    targets_length: int
    seed: int = 0
    shuffle: bool = True
    repeat: bool = True
    layout: Literal["encoder_decoder", "decoder_only"] = "encoder_decoder"
    truncate: bool = False
    eos_id: int = 1
    pad_id: int = 0
    start_id: int = 0

    def open(self, process_index: int = 0, process_count: int = 1) -> Examples:
        """Read the examples; the batches hold this process's rows of each global batch.

        Raises:
          ArtifactError: no files, a missing column, an empty or too long example.
        """
        if self.batch_size % process_count:
            raise DataError(
                f"batch_size {self.batch_size} does not divide over {process_count} processes"
            )
        return Examples(self, process_index, process_count)


class Examples:
    """Open examples. `len()` is their number.

    Attributes:
      vocabulary: the tokenizer that made the ids, as the manifest describes it; None for files
        that no stage of ours wrote.
    """

    def __init__(self, config: ExamplesConfig, process_index: int, process_count: int):
        self.config = config
        share = config.batch_size // process_count
        self._rows = np.arange(process_index * share, (process_index + 1) * share)
        path = epath.Path(config.path)
        made = load_artifact(path) if (path / MANIFEST).exists() else None
        files = _files(path, made)
        self.vocabulary = made.manifest.summary.get("vocabulary") if made else None
        inputs_end = config.eos_id if config.layout == "encoder_decoder" else None
        self._inputs = _Tokens(files, "inputs", config.inputs_length, inputs_end, config.truncate)
        self._targets = _Tokens(
            files, "targets", config.targets_length, config.eos_id, config.truncate
        )
        self._permutation = functools.lru_cache(maxsize=2)(self._permutation_of)

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def num_batches(self) -> int | None:
        """Number of batches; None when they never end."""
        return None if self.config.repeat else -(-len(self) // self.config.batch_size)

    def _permutation_of(self, epoch: int) -> np.ndarray:
        if not self.config.shuffle:
            return np.arange(len(self))
        return randomness.generator(Stream.EXAMPLE_ORDER, self.config.seed, epoch).permutation(
            len(self)
        )

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return this process's rows of global batch `step`, int32 (weights: float32)."""
        places = step * self.config.batch_size + self._rows
        chosen = [
            int(self._permutation(place // len(self))[place % len(self)])
            if self.config.repeat or place < len(self)
            else None
            for place in places.tolist()
        ]
        pairs = [
            ((), ()) if index is None else (self._inputs[index], self._targets[index])
            for index in chosen
        ]
        if self.config.layout == "decoder_only":
            return self._in_one_row(pairs)
        targets = self._padded([target for _, target in pairs], self.config.targets_length)
        return {
            "encoder_input_tokens": self._padded(
                [given for given, _ in pairs], self.config.inputs_length
            ),
            "decoder_input_tokens": self._shifted(targets),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": _weights(pairs, self.config.targets_length, offset=False),
        }

    def _in_one_row(self, pairs: list) -> dict[str, np.ndarray]:
        length = self.config.inputs_length + self.config.targets_length
        rows = [np.concatenate((given, target)) for given, target in pairs]
        targets = self._padded(rows, length)
        return {
            "decoder_input_tokens": self._shifted(targets),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": _weights(pairs, length, offset=True),
        }

    def _padded(self, rows: list, length: int) -> np.ndarray:
        padded = np.full((len(rows), length), self.config.pad_id, np.int32)
        for row, tokens in zip(padded, rows, strict=True):
            row[: len(tokens)] = tokens
        return padded

    def _shifted(self, targets: np.ndarray) -> np.ndarray:
        """Return decoder inputs: [start, a, b] for targets [a, b, eos]."""
        return np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=self.config.start_id)


def _weights(pairs: list, length: int, offset: bool) -> np.ndarray:
    """Return 1 on target tokens, 0 elsewhere. With `offset`, targets follow their inputs."""
    weights = np.zeros((len(pairs), length), np.float32)
    for row, (given, target) in zip(weights, pairs, strict=True):
        start = len(given) if offset else 0
        row[start : start + len(target)] = 1.0
    return weights


class _Tokens:
    """One column of all files: token ids end to end, and where each example begins."""

    def __init__(
        self,
        files: _Files,
        column: str,
        length: int,
        eos_id: int | None,
        truncate: bool,
    ) -> None:
        self._length, self._eos_id = length, eos_id
        values, counts = [], []
        for file, opened in files.items():
            tokens = _read_column(file, opened, column)
            sizes = np.diff(tokens.offsets.to_numpy())
            flat = tokens.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
            if len(empty := np.flatnonzero(sizes == 0)):
                raise ArtifactError(f"{file}, row {empty[0]}: {column} is empty: drop the row")
            ends = flat[np.cumsum(sizes) - 1]
            with_eos = sizes + (0 if eos_id is None else (ends != eos_id))
            if not truncate and len(long := np.flatnonzero(with_eos > length)):
                raise ArtifactError(
                    f"{file}, row {long[0]}: {column} has {with_eos[long[0]]} tokens, more than "
                    f"{length} ({len(long)} such rows in this file): raise {column}_length to "
                    f"{with_eos.max()}, or set truncate"
                )
            values.append(flat)
            counts.append(sizes)
        self._values = np.concatenate(values)
        self._offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts), dtype=np.int64)))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the token ids of one example, cut to `length` with its EOS kept."""
        tokens = self._values[self._offsets[index] : self._offsets[index + 1]]
        if self._eos_id is None:
            return tokens[: self._length]
        if tokens[-1] == self._eos_id:
            tokens = tokens[:-1]
        return np.append(tokens[: self._length - 1], np.int32(self._eos_id))


def _files(
    path: epath.Path, made: Artifact | None
) -> dict[epath.Path, Callable[[], VerifiedParquet]]:
    """Return the files of a directory, each with a function that opens it.

    Args:
      made: the artifact in the directory, whose files are compared with its digests; None for files
        of other programs.
    """
    if made is not None:
        shards = made.manifest.shards
        return {
            path / shard.file: functools.partial(made.parquet, number)
            for number, shard in enumerate(shards)
            if shard.file.endswith(".parquet")
        }
    files = entries(path, "", ".parquet")
    if not files:
        raise ArtifactError(f"{path} holds no Parquet files")
    return {file: functools.partial(open_parquet, file) for file in files}


def _read_column(
    file: epath.Path, opened: Callable[[], VerifiedParquet], column: str
) -> pa.ListArray:
    with opened() as source:
        if column not in source.schema_arrow.names:
            raise ArtifactError(
                f"{file} has no column {column!r}; it has: {', '.join(source.schema_arrow.names)}"
            )
        chunks = source.read(columns=[column]).column(0)
    if not (pa.types.is_list(chunks.type) or pa.types.is_large_list(chunks.type)):
        raise ArtifactError(f"{file}: {column} is {chunks.type}, not a list of token ids")
    if not pa.types.is_integer(chunks.type.value_type):
        raise ArtifactError(f"{file}: {column} is {chunks.type}, not a list of token ids")
    return chunks.combine_chunks()
