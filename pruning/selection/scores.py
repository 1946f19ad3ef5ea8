"""The score of a document: a weighted sum of columns of score artefacts.

    "nll_mean"                                                 one named value
    (Term("nll_mean", scores="prior"), Term("nll_mean", -1.0, scores="reference"))   a difference

Choices
- A score is a list of terms, not an expression to be parsed: negation, sums and differences (Rho,
  CoLoR, H_q + H_f) are weights, and every part of it has a type.
- What comes in is as the scorers left it; a document has a score only if every score set that is
  read says `ok` and the sum is finite. Anything else is counted by its reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from pruning import artefact
from pruning.artefact import Artefact

OK = 0
NOT_SELECTED = (
    "not_selected"  # a score set that was made within a selection says this of the others
)
NO_NUMBER = "no_number"


class ScoreError(ValueError):
    """A score is named that the score sets do not hold."""


@dataclasses.dataclass(frozen=True)
class Value:
    """How a named value is had from the columns of a score set: float64 [n] each."""

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
    # Cosine distance to the nearest twin that is kept first: SemDeDup drops what is below epsilon.
    "twin_distance": Value(("twin_similarity",), lambda cosine: 1 - cosine),
    # Minus the logarithm of a density: the summand by which a weight falls with crowding.
    "rarity": Value(("density",), lambda density: -np.log(density)),
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of a score.

    Attributes:
      value: a name of `VALUES`, or "column:NAME" for any numeric column.
      weight: what it is multiplied by; -1 negates.
      scores: the score set it comes from, when the selection is given several by name.
    """

    value: str
    weight: float = 1.0
    scores: str = "scores"

    @property
    def definition(self) -> Value:
        if self.value.startswith("column:"):
            return Value((self.value.removeprefix("column:"),), lambda column: column)
        if self.value not in VALUES:
            raise ScoreError(
                f"there is no value {self.value!r}: name one of {', '.join(VALUES)}, or a column "
                "of the score set as column:NAME."
            )
        return VALUES[self.value]


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


def read(
    terms: Sequence[Term], sets: Mapping[str, Artefact], shard: int, doc_ids: np.ndarray
) -> ShardScores:
    """The scores of one shard, joined to the corpus by `doc_id`.

    Args:
      terms: to be summed; none gives zeros.
      sets: the score sets by name.
      shard: of the corpus.
      doc_ids: int64 [n], of the corpus shard.

    Raises:
      ArtefactError: a score set has other documents than the corpus, or lacks a column.
    """
    score = np.zeros(len(doc_ids))
    reason = np.zeros(len(doc_ids), np.int32)
    reasons = ["ok"]
    for name, scores in sets.items():
        own = [term for term in terms if term.scores == name]
        columns = sorted({column for term in own for column in term.definition.columns})
        table = scores.read(shard, ["doc_id", "status", *columns], use_threads=False)
        where = f"{scores.path}/{scores.manifest.shards[shard].file}"
        artefact.require_same_documents(doc_ids, table["doc_id"].to_numpy(), where)
        values = {
            column: _float64(table[column], f"{where}, column {column}") for column in columns
        }
        with np.errstate(divide="ignore", invalid="ignore"):
            for term in own:
                inputs = (values[column] for column in term.definition.columns)
                score += term.weight * term.definition.of(*inputs)
        _merge(reason, reasons, table["status"])
    without = (reason == OK) & ~np.isfinite(score)
    if without.any():
        reason[without] = _index(reasons, NO_NUMBER)
    return ShardScores(score, reason, tuple(reasons))


def _float64(column: pa.ChunkedArray, where: str) -> np.ndarray:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise artefact.ArtefactError(
            f"{where} is {column.type}, not a number: it cannot be a score."
        )
    return column.to_numpy().astype(np.float64)  # null is NaN


def _merge(reason: np.ndarray, reasons: list[str], status: pa.ChunkedArray) -> None:
    """Enters the statuses of one score set where no earlier one had a reason."""
    start = 0
    for chunk in status.chunks:
        if not pa.types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_encode()
        names = ["(missing)" if name is None else name for name in chunk.dictionary.to_pylist()]
        table = np.asarray([_index(reasons, name) for name in [*names, "(missing)"]], np.int32)
        codes = chunk.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
        part = reason[start : start + len(chunk)]
        part[:] = np.where(part == OK, table[codes], part)
        start += len(chunk)


def _index(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
