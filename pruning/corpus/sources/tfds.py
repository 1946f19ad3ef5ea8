"""Prepared TFDS datasets, such as c4/en: each shard file of the split is one input file.

Choices
- The dataset is opened from its directory alone (`builder_from_directory`), without the code that
  made it and without the network.
- TensorFlow is imported when a file is read, with accelerators hidden. Its startup messages
  (instruction sets, missing CUDA libraries, plugins registered twice) do not concern the reader of
  a dataset and are suppressed, unless the user's environment sets a log level.
- Shard files are read one at a time, unshuffled, so that rows come in their stored order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from pruning.corpus.sources import files
from pruning.corpus.sources.document import (
    Document,
    Fingerprint,
    ReadCallback,
    Reject,
    SourceError,
    from_record,
)
from pruning.store.manifest import added_setting

_INFO = "dataset_info.json"
_FATAL = "3"  # TensorFlow's log level for fatal errors alone


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A dataset prepared by TFDS.

    Attributes:
      name: with configuration and version, "c4/en:3.0.1"; without a version the highest is taken.
      split: "train", "validation", ...
      text_field: name of the feature with the text; dotted when it is nested.
      data_dir: where TFDS keeps its datasets; may be on object storage.
      shards: read only so many shard files of the split, the first ones. None for all.
    """

    name: str = ""
    split: str = "train"
    text_field: str = "text"
    data_dir: str = "~/tensorflow_datasets"
    shards: int | None = added_setting(None)

    def __post_init__(self) -> None:
        if self.shards is not None and self.shards < 1:
            raise SourceError(f"TfdsSource.shards is at least 1, not {self.shards}.")

    def files(self) -> list[str]:
        splits = _builder(self._directory()).info.splits
        if self.split not in splits:
            raise SourceError(
                f"{self.name} has no split {self.split!r}; it has: {', '.join(sorted(splits))}. "
                "A part of a split is chosen by TfdsSource.shards."
            )
        paths = [os.fspath(path) for path in splits[self.split].filepaths][: self.shards]
        if absent := [path for path in paths if not epath.Path(path).exists()]:
            raise SourceError(f"{absent[0]} is missing: prepare {self.name} with TFDS again.")
        return paths

    def fingerprint(self, file: str) -> Fingerprint:
        return files.fingerprint(file)

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        tf, tfds = libraries()
        builder = _builder(self._directory())
        index = self.files().index(file)
        rows = builder.info.splits[self.split].shard_lengths[index]
        if not rows:
            return
        dataset = builder.as_dataset(
            split=tfds.core.ReadInstruction(self.split, from_=index, to=index + 1, unit="shard"),
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
            shuffle_files=False,
        )
        n_bytes = epath.Path(file).stat().length
        taken = 0
        try:
            for row, record in enumerate(tfds.as_numpy(dataset), 1):
                yield from_record(record, self.text_field, "TfdsSource.text_field")
                on_read(n_bytes * row // rows - taken)
                taken = n_bytes * row // rows
        except tf.errors.OpError as error:
            raise SourceError(
                f"{file} is damaged ({error.message}): prepare {self.name} with TFDS again."
            ) from error

    def _directory(self) -> epath.Path:
        name, _, version = self.name.partition(":")
        root = epath.Path(self.data_dir).expanduser() / name
        versions = [child.name for child in root.iterdir()] if root.is_dir() else []
        versions = [child for child in versions if (root / child / _INFO).exists()]
        if not versions or (version and version not in versions):
            found = (
                f"it holds the versions {', '.join(sorted(versions))}"
                if versions
                else ("it is no prepared dataset")
            )
            raise SourceError(
                f"{root / version} is not there: {found}. Set TfdsSource.data_dir and "
                'TfdsSource.name, such as "c4/en:3.0.1".'
            )
        return root / (version or max(versions, key=_ordered))


@functools.cache
def _builder(directory: epath.Path) -> Any:
    return libraries()[1].builder_from_directory(directory)


@functools.cache
def libraries() -> tuple[Any, Any]:
    """Import TensorFlow and TFDS, with accelerators hidden from TensorFlow."""
    try:
        with _hushed():
            import tensorflow as tf
            import tensorflow_datasets as tfds

            tf.config.set_visible_devices([], "GPU")
            tf.zeros(())  # initialize the runtime
    except ImportError as error:
        raise SourceError(
            f"TensorFlow Datasets is not there ({error}): install winnow-lm[seqio]."
        ) from error
    return tf, tfds


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Suppress standard error, unless the block fails or the user set another log level.

    NOTE: TensorFlow's log level does not apply to its startup messages, and these bypass Python's
    streams. So the file descriptor itself is redirected.
    """
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", _FATAL) != _FATAL:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _ordered(version: str) -> list[int]:
    return [int(number) if number.isdecimal() else -1 for number in version.split(".")]
