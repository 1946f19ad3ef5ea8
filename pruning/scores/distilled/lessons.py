"""Documents and teacher's scores that a student is trained on, and rank agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pruning.corpus.layout import doc_ids, rows_of, shards_of
from pruning.corpus.reader import Corpus
from pruning.scores.intervals import spearman_interval
from pruning.scores.terms import SCORED, Combination, Term, read_scores
from pruning.scores.text.texts import Texts, sample
from pruning.store import randomness
from pruning.store.artifact import Artifact, require_same_documents
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream

HELD_OUT = 0.1  # of the examples, on which the penalty is chosen

_BEST = 0.1


@dataclasses.dataclass(frozen=True)
class Lessons:
    """The teacher's documents and scores, in corpus order.

    Attributes:
      rows: int64, ascending, for every shard.
      targets: float64 [documents].
      ids: int64 [documents].
      tokens: largest number of tokens that the teacher read of a document; None where it read all.
    """

    rows: list[np.ndarray]
    targets: np.ndarray
    ids: np.ndarray
    tokens: int | None

    @classmethod
    def of(
        cls, corpus: Corpus, teacher: Artifact | None, score: str, most: int, seed: int
    ) -> Lessons:
        """Return a sample of at most `most` documents.

        Args:
          teacher: a score set; None if `score` is a column of the corpus.

        Raises:
          ArtifactError: the teacher has scored fewer than 20 documents.
        """
        values: dict[int, np.ndarray] = {}
        sets = {} if teacher is None else {"scores": teacher}

        def of_shard(shard: int) -> np.ndarray:
            if shard not in values:
                ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
                found = read_scores(Combination((Term(score),)), corpus.artifact, sets, shard, ids)
                values[shard] = np.where(found.reason == SCORED, found.score, np.nan)
            return values[shard]

        def draws(ids: np.ndarray) -> np.ndarray:
            if not len(ids):
                return np.zeros(0)
            known = np.isfinite(of_shard(int(shards_of(ids[0])))[rows_of(ids)])
            return np.where(known, randomness.uniform(Stream.STUDENT_SAMPLE, seed, ids), np.inf)

        rows = sample(Texts(corpus), most, draws)
        if sum(map(len, rows)) < 20:
            raise ArtifactError(
                f"{(teacher or corpus.artifact).path} has {sum(map(len, rows))} scores to learn "
                "from: let the teacher score more documents."
            )
        ids = np.concatenate([doc_ids(shard, r) for shard, r in enumerate(rows)])
        targets = np.concatenate([of_shard(shard)[r] for shard, r in enumerate(rows) if len(r)])
        tokens = None if teacher is None else tokens_read(corpus, teacher)
        return cls(rows, targets, ids, tokens)


def tokens_read(corpus: Corpus, teacher: Artifact) -> int | None:
    """Return the highest number of tokens that the teacher read of a truncated document."""
    most = 0
    for shard in range(corpus.num_shards):
        with teacher.parquet(shard) as file:
            if "truncated_tokens" not in file.schema_arrow.names:
                return None
        read = teacher.read(shard, ["doc_id", "truncated_tokens"])
        cut, documents = read["truncated_tokens"], corpus.columns(shard, ["doc_id", "n_tokens"])
        where = f"{teacher.path}/{teacher.manifest.shards[shard].file}"
        expected, found = (table["doc_id"].to_numpy() for table in (documents, read))
        require_same_documents(expected, found, where)
        lengths = documents["n_tokens"].to_numpy()
        missing = cut.fill_null(0).to_numpy()
        most = max(most, int(np.where(missing > 0, lengths - missing, 0).max(initial=0)))
    return most or None


def agreement(student: np.ndarray, teacher: np.ndarray) -> Mapping[str, Any]:
    """Return the rank agreement of two scores of the same documents [n]."""
    best = max(round(_BEST * len(teacher)), 1)
    shared = np.intersect1d(np.argsort(-student)[:best], np.argsort(-teacher)[:best])
    found = spearman_interval(student, teacher)
    return {
        "held_out": len(teacher),
        "spearman": None if found is None else found.value,
        "spearman_interval": None if found is None else [found.low, found.high],
        "best_tenth_overlap": len(shared) / best,
    }


def beside(
    lengths: np.ndarray, ids: np.ndarray, teacher: np.ndarray, stream: Stream, seed: int
) -> Mapping[str, Any]:
    """Return the rank agreement of length and of a random score with the teacher.

    Args:
      lengths: tokens of the documents [n].
      ids: int64 [n].
      teacher: float64 [n].
      stream, seed: of the random score.
    """
    others = {
        "length": lengths.astype(np.float64),
        "random": randomness.uniform(stream, seed, ids),
    }
    found = {name: spearman_interval(values, teacher) for name, values in others.items()}
    return {name: None if one is None else one._asdict() for name, one in found.items()}
