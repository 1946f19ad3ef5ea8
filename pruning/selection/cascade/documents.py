"""The documents that a cascade chooses from, as arrays, and selections of them on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.corpus import blocks
from pruning.corpus.layout import doc_ids, rows_of
from pruning.corpus.reader import Corpus
from pruning.corpus.selection_reader import ROW_GROUP, Selection
from pruning.scores.score_set import NOT_SELECTED
from pruning.scores.terms import SCORED, Combination, Term, read_scores
from pruning.selection.select import SCHEMA
from pruning.store.artifact import Artifact
from pruning.store.build import Build, encoding_of_numbers
from pruning.store.manifest import ArtifactError

ENCODING = encoding_of_numbers(SCHEMA)


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a corpus, or of a selection of it, that have tokens.

    Attributes:
      ids: int64 [n], ascending.
      n_tokens: int32 [n].
      starts: int64 [shards + 1], where each shard's documents begin.
      pool: numbers of documents and tokens, those without tokens included.
    """

    corpus: Corpus
    ids: np.ndarray
    n_tokens: np.ndarray
    starts: np.ndarray
    pool: Mapping[str, int]

    @classmethod
    def of(cls, corpus: Corpus, within: Selection | None, judged: Artifact | None) -> Documents:
        """Return the documents of a corpus.

        Args:
          judged: a score set; documents that it was configured to leave out do not count.
        """
        ids, lengths, documents = [], [], 0
        for shard in range(corpus.num_shards):
            n_tokens = corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()
            own = doc_ids(shard, np.arange(len(n_tokens)))
            mine = np.ones(len(own), bool) if within is None else within.mask(shard, len(own))
            if judged is not None:
                status = judged.read(shard, ["status"])["status"].cast(pa.string())
                mine &= np.asarray(status.to_numpy(zero_copy_only=False) != NOT_SELECTED)
            documents += int(mine.sum())
            mine &= n_tokens > 0
            ids.append(own[mine])
            lengths.append(n_tokens[mine])
        starts = np.cumsum([0, *map(len, ids)])
        n_tokens = np.concatenate(lengths)
        tokens = int(n_tokens.sum(dtype=np.int64))
        pool = {"documents": documents, "tokens": tokens}
        return cls(corpus, np.concatenate(ids), n_tokens, starts, pool)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, scores: Artifact | None, score: str) -> np.ndarray:
        """Return a named value of every document, float64 [n]; NaN where there is none.

        Args:
          scores: a score set; None if `score` is a column of the corpus.
        """
        term = Combination((Term(score),))
        sets = {} if scores is None else {"scores": scores}
        parts = []
        for shard in range(self.corpus.num_shards):
            own = self.ids[self.starts[shard] : self.starts[shard + 1]]
            every = doc_ids(shard, np.arange(self.corpus.documents(shard)))
            found = read_scores(term, self.corpus.artifact, sets, shard, every)
            values = np.where(found.reason == SCORED, found.score, np.nan)
            parts.append(values[rows_of(own)])
        return np.concatenate(parts)

    def require_chosen(self, selection: Selection, chosen: np.ndarray) -> None:
        """Raise ArtifactError unless a selection holds the documents of a mask, bool [n]."""
        for shard in range(self.corpus.num_shards):
            own = slice(self.starts[shard], self.starts[shard + 1])
            if not np.array_equal(selection.doc_ids(shard), self.ids[own][chosen[own]]):
                raise ArtifactError(
                    f"{selection.artifact.path} holds other documents than this process would ask "
                    "about: it was made by another version or on another kind of machine. Go on "
                    "there, or begin anew in another directory."
                )

    def write(
        self,
        build: Build,
        chosen: np.ndarray,
        summary: Mapping[str, Any],
        measured: Mapping[str, float] | None = None,
    ) -> Artifact:
        """Write the documents of a mask, bool [n], as a selection.

        Args:
          measured: numbers for measured.json.
        """
        pending, tables = set(build.pending()), []
        for shard in range(self.corpus.num_shards):
            own = slice(self.starts[shard], self.starts[shard + 1])
            mine = chosen[own]
            ids, n_tokens = self.ids[own][mine], self.n_tokens[own][mine]
            tables.append(blocks.cut(shard, n_tokens))
            if shard not in pending:
                continue
            with build.shard(shard) as writer:
                writer.write({"doc_id": ids, "n_tokens": n_tokens}, ROW_GROUP)
                writer.tokens = int(n_tokens.sum(dtype=np.int64))
                writer.measured = dict(measured or {}) if shard == 0 else {}
                documents = {"kept": len(ids), "not_kept": len(mine) - len(ids)}
                rest = self.corpus.documents(shard) - len(mine)
                writer.counts = {"documents": documents | {"outside_of_pool": rest}}
        build.write_file(blocks.FILE, blocks.to_parquet(tables))
        selection = build.finish(summary)
        assert selection is not None  # this process had every shard
        return selection
