"""The score of a document: a weighted sum of columns of score artifacts, or of the corpus itself.

    "nll_mean"                                                 one named value
    "nll_mean"                                                 one named value
    "corpus:score"                                             a metadata column, such as a score
                                                               in the source
    (Term("column:edu", scale="quantile"), Term("column:dclm", scale="quantile"))    combined by
                                                        "maximum": buckets as Nemotron-CC's

Choices
- A score is a list of terms, not a parsed expression. Negation, sums and differences (Rho, CoLoR,
  H_q + H_f) are weights, and every part has a type. Each term is put on its scale (scales.py),
  multiplied by its weight, and all are summed, or combined in another named way.
- Values are read as the scorers wrote them. A document has a score only if its status is `ok` in
  every score set and the sum is finite. All other documents are counted by their reason.
- A column of the corpus is read in place, without a copy: the corpus counts as one more score set,
  in which a document is "no_value" where the column is null.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from pruning.corpus.reader import require_own_documents
from pruning.scores import numbers, scales
from pruning.scores.scales import Scale
from pruning.scores.score_set import NO_VALUE
from pruning.store.artifact import Artifact, require_same_documents
from pruning.store.manifest import ArtifactError, added_setting

SCORED = 0  # index of "ok" among the reasons
NO_NUMBER = "no_number"

CORPUS = "corpus:"  # prefix of terms that read the corpus; reserved


class TermError(ValueError):
    """Error for a score that the score sets do not hold."""


@dataclasses.dataclass(frozen=True)
class Value:
    """Computation of a named value from columns of a score set, float64 [n] each."""

    columns: tuple[str, ...]
    of: Callable[..., np.ndarray]


VALUES: Mapping[str, Value] = {
    # Negative log-likelihood per scored token: the logarithm of the perplexity.
    "nll_mean": Value(("nll", "n_scored_tokens"), lambda nll, count: nll / count),
    # Of the whole document, its description length in nats; grows with the length.
    "nll_total": Value(("nll",), lambda nll: nll),
    # log P("yes") (Sachdeva et al. 2024), and the log-odds against "no".
    "ask_llm": Value(("ask_llm_yes",), lambda yes: yes),
    "ask_llm_ratio": Value(("ask_llm_yes", "ask_llm_no"), lambda yes, no: yes - no),
    # Cosine distance to the nearest twin of higher precedence: SemDeDup drops values below epsilon.
    "twin_distance": Value(("twin_similarity",), lambda cosine: 1 - cosine),
    # Minus the logarithm of a density: the term by which a weight falls with density.
    "rarity": Value(("density",), lambda density: -np.log(density)),
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of a score.

    Attributes:
      value: a name of `VALUES`, "column:NAME" for any numeric column of the score set, or
        "corpus:NAME" for a metadata column of the corpus ("corpus:score"), "corpus:n_tokens" or
        "corpus:n_bytes".
      weight: factor of the scaled value; -1 negates.
      scores: name of its score set, when the selection reads several.
      scale: "none", "log", "standardize", "rank" or "quantile" (scales.py), applied before the
        weight.
      buckets: number of buckets of "quantile".
    """

    value: str
    weight: float = 1.0
    scores: str = "scores"
    scale: scales.Kind = added_setting("none")  # noqa: RUF009
    buckets: int = added_setting(20)

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"buckets is at least 1, not {self.buckets}.")

    @property
    def source(self) -> str:
        """Name of the score set that is read; `CORPUS` for the corpus."""
        return CORPUS if self.value.startswith(CORPUS) else self.scores

    @property
    def definition(self) -> Value:
        kind, _, column = self.value.partition(":")
        if kind in ("column", "corpus") and column:
            return Value((column,), lambda values: values)
        if self.value not in VALUES:
            raise TermError(
                f"there is no value {self.value!r}: name one of {', '.join(VALUES)}, a column of "
                "the score set as column:NAME, or one of the corpus as corpus:NAME."
            )
        return VALUES[self.value]


Operation = Literal["sum", "mean", "maximum", "minimum", "product"]

_COMBINE: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": np.add,
    "mean": np.add,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "product": np.multiply,
}


@dataclasses.dataclass(frozen=True)
class Combination:
    """Terms and how they are combined.

    Attributes:
      terms: in any order; an empty tuple gives zeros.
      combine: the way of combining the weighted terms.
      scales: fitted scales of the terms; empty before `fitted`.
    """

    terms: tuple[Term, ...]
    combine: Operation = "sum"
    scales: tuple[Scale, ...] = ()

    @property
    def needs_fit(self) -> bool:
        """True if a term's scale depends on the distribution of scores."""
        return any(term.scale in scales.FITTED for term in self.terms)

    def fitted(self, samples: Sequence[np.ndarray]) -> Combination:
        """Return the score with its scales fitted to a sample of every term, float64 [n] each."""
        found = []
        for term, sample in zip(self.terms, samples, strict=True):
            try:
                known = sample[np.isfinite(sample)]
                found.append(Scale.fit(term.scale, term.buckets, known))
            except scales.ScaleError as error:
                raise TermError(f"the term {term.value!r}: {error}") from error
        return dataclasses.replace(self, scales=tuple(found))

    def of(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the score of every document, float64 [n].

        Args:
          values: float64 [n] of every term, unscaled.

        Raises:
          TermError: a scale was not fitted.
        """
        if self.needs_fit and not self.scales:
            raise TermError(
                "standardize, rank and quantile are fitted by `select`: they cannot be used here."
            )
        found: np.ndarray | None = None
        for term, scale, value in zip(self.terms, self._scales(), values, strict=True):
            part = term.weight * scale(value)
            found = part if found is None else _COMBINE[self.combine](found, part)
        assert found is not None
        return found / len(self.terms) if self.combine == "mean" else found

    def _scales(self) -> Sequence[Scale]:
        return self.scales or [Scale.fit(term.scale, 1, np.zeros(0)) for term in self.terms]


@dataclasses.dataclass(frozen=True)
class TermValues:
    """The values of the terms for the documents of one shard, before scales and weights.

    Attributes:
      values: float64 [n] of every term.
      reason: int [n]; 0 where every score set that is read says "ok", else an index of `reasons`.
      reasons: names; the first is "ok".
    """

    values: tuple[np.ndarray, ...]
    reason: np.ndarray
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardScores:
    """The scores of one shard.

    Attributes:
      score: float64 [n]; not finite where there is none.
      reason: int [n]; 0 where there is a score, else an index of `reasons`.
      reasons: names; the first is "ok".
    """

    score: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]


def read_scores(
    score: Combination,
    corpus: Artifact,
    sets: Mapping[str, Artifact],
    shard: int,
    doc_ids: np.ndarray,
) -> ShardScores:
    """Return the scores of one shard, joined to the corpus by `doc_id`.

    Args:
      score: its terms and scales.
      corpus: read where a term names a column of it.
      sets: the score sets by name.
      shard: index of the shard of the corpus.
      doc_ids: int64 [n], of the corpus shard.

    Raises:
      ArtifactError: a score set has other documents than the corpus, or lacks a column.
      TermError: a scale was not fitted.
    """
    return combined(score, read_terms(score.terms, corpus, sets, shard, doc_ids))


def combined(score: Combination, found: TermValues) -> ShardScores:
    """Return the scores of documents from the values of the terms.

    Raises:
      TermError: a scale was not fitted.
    """
    values = score.of(found.values) if score.terms else np.zeros(len(found.reason))
    reason, reasons = found.reason, list(found.reasons)
    without = (reason == SCORED) & ~np.isfinite(values)
    if without.any():
        reason[without] = _index(reasons, NO_NUMBER)
    return ShardScores(values, reason, tuple(reasons))


def terms_of_table(terms: Sequence[Term], table: pa.Table) -> TermValues:
    """Return the value of every term for the rows of a table.

    Args:
      terms: "corpus:NAME" and "column:NAME" both read the table's column NAME.
      table: with a column `status`, as score sets have it, rows of another status than "ok" have
        no score.

    Raises:
      TermError: a column is missing, or holds no numbers.
    """
    reason = np.zeros(table.num_rows, np.int32)
    reasons = ["ok"]
    if terms and "status" in table.column_names:
        _merge(reason, reasons, table["status"])
    found = []
    for term in terms:
        values = []
        for column in term.definition.columns:
            if column not in table.column_names:
                names = ", ".join(table.column_names)
                raise TermError(f"the table has no column {column!r}; it has: {names}.")
            try:
                values.append(numbers.parsed(table[column].combine_chunks()))
            except TypeError as error:
                raise TermError(f"column {column}: {error}, so it cannot be a score.") from error
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(term.definition.of(*values))
    return TermValues(tuple(found), reason, tuple(reasons))


def read_terms(
    terms: Sequence[Term],
    corpus: Artifact,
    sets: Mapping[str, Artifact],
    shard: int,
    doc_ids: np.ndarray,
) -> TermValues:
    """Return the value of every term for the documents of one shard, as `read_scores` does."""
    found: list[np.ndarray] = [np.zeros(0)] * len(terms)
    reason = np.zeros(len(doc_ids), np.int32)
    reasons = ["ok"]
    own_columns = any(term.source == CORPUS for term in terms)
    for name, scores in ({**sets, CORPUS: corpus} if own_columns else sets).items():
        own = [i for i, term in enumerate(terms) if term.source == name]
        columns = sorted({column for i in own for column in terms[i].definition.columns})
        if name == CORPUS:
            values, status = _corpus_columns(corpus, shard, columns)
        else:
            values, status = _score_columns(scores, shard, columns, doc_ids)
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in own:
                definition = terms[i].definition
                found[i] = definition.of(*(values[column] for column in definition.columns))
        _merge(reason, reasons, status)
    return TermValues(tuple(found), reason, tuple(reasons))


def _score_columns(
    scores: Artifact, shard: int, columns: Sequence[str], doc_ids: np.ndarray
) -> tuple[dict[str, np.ndarray], pa.ChunkedArray]:
    """Return columns of a score set, float64 [n] each, and the documents' statuses."""
    table = scores.read(shard, ["doc_id", "status", *columns], use_threads=False)
    where = f"{scores.path}/{scores.manifest.shards[shard].file}"
    require_same_documents(doc_ids, table["doc_id"].to_numpy(), where)
    values = {column: _float64(table[column], f"{where}, column {column}") for column in columns}
    return values, table["status"]


def _corpus_columns(
    corpus: Artifact, shard: int, columns: Sequence[str]
) -> tuple[dict[str, np.ndarray], pa.ChunkedArray]:
    """Return columns of the corpus, likewise; a document with a null has the status "no_value"."""
    require_own_documents(corpus, shard)
    table = corpus.read(shard, columns, columns, use_threads=False)
    values = {}
    absent = np.zeros(table.num_rows, bool)
    for column in columns:
        whole = table[column].combine_chunks()
        try:
            values[column] = numbers.parsed(whole)
        except TypeError as error:
            where = f"{corpus.path}/{corpus.manifest.shards[shard].file}, column {column}"
            raise ArtifactError(f"{where}: {error}, so it cannot be a score.") from error
        absent |= whole.is_null().to_numpy(zero_copy_only=False)
    codes = pa.array(absent.astype(np.int8))
    status = pa.DictionaryArray.from_arrays(codes, pa.array(["ok", NO_VALUE]))
    return values, pa.chunked_array([status])


def _float64(column: pa.ChunkedArray, where: str) -> np.ndarray:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise ArtifactError(f"{where} is {column.type}, not a number: it cannot be a score.")
    return column.to_numpy().astype(np.float64)  # null is NaN


def _merge(reason: np.ndarray, reasons: list[str], status: pa.ChunkedArray) -> None:
    """Add the statuses of one score set for documents without an earlier reason."""
    start = 0
    for chunk in status.chunks:
        if not pa.types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_encode()
        names = ["(missing)" if name is None else name for name in chunk.dictionary.to_pylist()]
        table = np.asarray([_index(reasons, name) for name in [*names, "(missing)"]], np.int32)
        codes = chunk.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
        part = reason[start : start + len(chunk)]
        part[:] = np.where(part == SCORED, table[codes], part)
        start += len(chunk)


def _index(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
