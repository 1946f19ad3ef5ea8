"""Scores of texts in memory, computed by the engine.

    import pruning

    judge = pruning.Judge("google/flan-t5-large")
    table = judge.score(["A first text.", "A second text."])    # pyarrow.Table, a row per text
    table["ask_llm_yes"].to_numpy()                              # log P(yes)

Choices
- Texts are packed and scored by the code of `python -m pruning score`. With the same dtype (float32
  by default, here) and lengths of rows, the results are the same.
- Results are Arrow tables: `to_pandas()`, `polars.from_arrow` and `datasets.Dataset` take them.
  `add_to` takes and returns the tables of these libraries.
- A text without a score has a status and nulls, as in a score set.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.corpus.reader import Corpus
from pruning.corpus.tokenizers import Tokenizer
from pruning.scores.in_memory import InMemory
from pruning.scores.model import device, estimate
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.batches import Reader
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.loading import find_tokenizer, require_size
from pruning.scores.model.platform_defaults import choose_batch_rows
from pruning.scores.model.scored_parts import scored
from pruning.scores.model.scorer import Scorer
from pruning.scores.model.scoring_meter import ScoringMeter
from pruning.scores.model.sequence_classifier import SequenceClassifier

# Texts whose lengths choose the lengths of rows. They are tokenized twice.
_SAMPLE = 512


class TextScorer(InMemory):
    """A scorer with a model in the devices' memory.

    Attributes:
      scorer: settings of the scorer.
      tokenizer: the model's tokenizer.
      columns: name -> description of each column of the results.
    """

    def __init__(
        self,
        model: str,
        scorer: Scorer,
        *,
        tokenizer: str | None = None,
        dtype: str = "float32",
        row_length: int | None = None,
        batch_rows: int | None = None,
        fsdp: int = 1,
        tensor: int = 1,
    ):
        """Load the model and prepare the scorer.

        Args:
          model: a path or name that `models.weights.load` takes.
          scorer: such as `AskLLM()`, `Rubric()`, `Likelihood()` or `Embedding()`.
          dtype: of the parameters and the computation.
          tokenizer, row_length, batch_rows, fsdp, tensor: as for `python -m pruning score`.

        Raises:
          ModelError: the model cannot be loaded.
          VocabularyError: the tokenizer is missing or not the model's.
          ScoreError: scorer and model are incompatible.
        """
        if fsdp == tensor == 1:
            device.use_cores(batch_rows)
        self.scorer = scorer
        self.tokenizer = find_tokenizer(model, tokenizer)
        self._loaded = device.load(model, dtype, fsdp, tensor)
        require_size(model, self._loaded.model.config, self.tokenizer)
        self._prepared = scorer.prepare(self._loaded.model, self.tokenizer)
        self._row_length, self._batch_rows = row_length, batch_rows
        self._row_lengths: tuple[int, ...] | None = None
        self._step: device.Step | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """Descriptions of the columns, by name."""
        return {name: column.meaning for name, column in self._prepared.columns.items()}

    def _table(self, texts: Sequence[str]) -> pa.Table:
        corpus = _Texts(types.SimpleNamespace(path="the texts"), self.tokenizer, texts)
        if self._row_lengths is None:
            count = min(len(texts), _SAMPLE)
            rows = np.unique(np.linspace(0, len(texts) - 1, count).astype(int))
            lengths = corpus.lengths_of(0, rows).astype(np.int64)
            platform = self._loaded.mesh.devices.flat[0].platform
            self._row_lengths = estimate.choose_row_lengths(
                self._prepared,
                estimate.Costs.of_scorer(self._loaded.model.config, self._prepared),
                estimate.windows_of(self._prepared, lengths),
                self._row_length,
                platform,
            )
            self._batch_rows = choose_batch_rows(
                self._batch_rows, max(self._row_lengths), platform, self._loaded.mesh.shape
            )
        assert self._batch_rows is not None
        reader = Reader(corpus, None, self._prepared, self._row_lengths, self._batch_rows)
        if self._step is None:
            self._step = device.Step(self._prepared, self._loaded, reader.batch_shapes)
        parts = scored(reader, [0], self._step, ScoringMeter(reader))
        table = pa.concat_tables([part.table for part in parts])
        return table.unify_dictionaries().drop_columns("doc_id")


class Judge(TextScorer):
    """Ask-LLM: log-probabilities of the model's answers yes and no."""

    def __init__(self, model: str, scorer: Scorer | None = None, **settings: Any):
        """Load a judge.

        Args:
          model: a path or name that `models.weights.load` takes.
          scorer: such as `AskLLM(prompt=...)` or `Rubric(...)`; Ask-LLM by default.
          settings: as for `TextScorer`.
        """
        super().__init__(model, AskLLM() if scorer is None else scorer, **settings)


class LogLikelihood(TextScorer):
    """Negative log-likelihood of texts in nats, and their numbers of scored tokens."""

    def __init__(self, model: str, scorer: Scorer | str, **settings: Any):
        """Load a language model.

        Args:
          model: a path or name that `models.weights.load` takes.
          scorer: an estimator, "causal", "prefix" or "span"; or `Likelihood(...)`.
          settings: as for `TextScorer`.
        """
        if isinstance(scorer, str):
            scorer = Likelihood(scorer)  # type: ignore[arg-type]
        super().__init__(model, scorer, **settings)


class Embedder(TextScorer):
    """Embeddings of length 1."""

    def __init__(self, model: str, scorer: Scorer | None = None, **settings: Any):
        """Load an encoder.

        Args:
          model: a path or name that `models.weights.load` takes, such as a Sentence-T5.
          scorer: `Embedding(...)`.
          settings: as for `TextScorer`.
        """
        chosen: Any = Embedding() if scorer is None else scorer
        super().__init__(model, chosen, **settings)


class Classifier(TextScorer):
    """A published classifier: one value, or log-probabilities of classes."""

    def __init__(self, model: str, scorer: SequenceClassifier | None = None, **settings: Any):
        """Load a model with a classification head.

        Args:
          model: a path or name that `models.weights.load` takes.
          scorer: `SequenceClassifier(...)`.
          settings: as for `TextScorer`.
        """
        super().__init__(model, SequenceClassifier() if scorer is None else scorer, **settings)


@dataclasses.dataclass(frozen=True)
class _Texts(Corpus):
    """Texts in memory as a corpus of one shard."""

    artifact: Any  # has a path, for messages
    tokenizer: Tokenizer
    texts: Sequence[str]

    @property
    def vocabulary(self) -> Tokenizer:  # type: ignore[override]
        """The model's tokenizer."""
        return self.tokenizer

    def documents(self, shard: int) -> int:
        return len(self.texts)

    def iter_batches(
        self, shard: int, names: Sequence[str], batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield row numbers and texts or tokens, `batch_size` texts at a time."""
        for begin in range(0, len(self.texts), batch_size):
            some = list(self.texts[begin : begin + batch_size])
            columns: dict[str, Any] = {"doc_id": np.arange(begin, begin + len(some))}
            if "text" in names:
                columns["text"] = pa.array(some, pa.large_string())
            if "tokens" in names:
                columns["tokens"] = _lists(self.tokenizer.encode_batch(some))
            yield pa.RecordBatch.from_pydict({name: columns[name] for name in names})

    def lengths_of(self, shard: int, rows: np.ndarray) -> np.ndarray:
        some = [self.texts[row] for row in rows]
        return np.array([len(ids) for ids in self.tokenizer.encode_batch(some)], np.int32)


def _lists(ids: Sequence[Sequence[int]]) -> pa.ListArray:
    """Return lists of token ids as an array; ten times as fast as `pa.array`."""
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, offsets[-1])
    return pa.ListArray.from_arrays(offsets, flat)
