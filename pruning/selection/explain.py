"""Explanation of why a selection kept or dropped a document.

    python -m pruning explain runs/c4/top 4294967303

Everything is recomputed from the inputs in the selection's manifest: corpus, score sets, terms,
strategy, seed. The ranking is that of `select`, so a document's rank and the cut are those of the
selection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pruning.corpus.layout import rows_of, shards_of
from pruning.corpus.selection_reader import load_selection
from pruning.scores.terms import CORPUS, Term, read_terms
from pruning.selection import cut, strategies
from pruning.selection.config import Quotas, SelectConfig, SelectError
from pruning.selection.ranking import Pool, Ranked, rank
from pruning.selection.strategies import Filter, Ranking, SetOperation
from pruning.store import progress, randomness
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.randomness import Stream

_TEXT = 200  # characters shown


def lines(path: str, documents: Sequence[int]) -> Iterator[str]:
    """Yield the explanation of some documents of a corpus, line by line.

    Args:
      path: directory of the selection.
      documents: ids of the documents.

    Raises:
      SelectError: a document is not in the corpus, or the strategy is user-defined.
      ArtifactError: an input of the selection is missing or has changed.
    """
    selection = load_artifact(path, "selection")
    config = config_of(selection)
    pool = Pool.open(config)
    for name, given in pool.inputs.items():
        require_input(selection, name, given)
    for document in documents:
        shard, row = _place(pool, document)
        if row >= pool.corpus.manifest.shards[shard].rows:
            raise SelectError(f"{pool.corpus.path} has no document {document}.")
    pool = pool.fitted()
    with progress.track("rank", len(pool.shards), "shards") as task:
        ranked = rank(pool, task.advance)
    for document in documents:
        yield from _Explained.of(selection, pool, ranked, document).lines()


def config_of(selection: Artifact) -> SelectConfig:
    """Return the configuration of a selection.

    Raises:
      SelectError: its strategy is user-defined.
    """
    settings = dict(selection.manifest.config)
    inputs = {name: one["path"] for name, one in selection.manifest.inputs.items()}
    if "strategy" not in settings:
        answers = inputs.get("judged", selection.path / "rounds")
        raise SelectError(
            f"{selection.path} was made by a cascade, which explains no single document: the "
            f"judge's answers are in {answers}."
        )
    settings.pop("class")
    strategy = dict(settings.pop("strategy"))
    name = strategy.pop("class")
    if name not in strategies.CONFIGURABLES:
        raise SelectError(
            f"{selection.path} was made by the strategy {name}, which is not one of "
            f"{', '.join(strategies.CONFIGURABLES)}: it cannot be explained here."
        )
    kind = strategies.CONFIGURABLES[name]
    if issubclass(kind, SetOperation):
        joined = [path for key, path in sorted(inputs.items(), key=_number) if _number((key, ""))]
        strategy["selections"] = tuple(joined)
    score = settings.pop("score", None)
    if not isinstance(score, str | None):
        score = tuple(Term(**_without_class(term)) for term in score)
    quotas = settings.pop("quotas", None)
    sets = {
        key.removeprefix("scores_"): path
        for key, path in inputs.items()
        if key == "scores" or key.startswith("scores_")
    }
    return SelectConfig(
        corpus=inputs["corpus"],
        output=str(selection.path),
        strategy=kind(**strategy),
        scores=sets or None,
        score=score,
        within=inputs.get("within"),
        quotas=None if quotas is None else Quotas(**_without_class(quotas)),
        **settings,
    )


def _number(item: tuple[str, str]) -> int:
    """Return 1 + the number of a joined selection; 0 for other inputs."""
    kind, _, number = item[0].partition("_")
    return int(number) + 1 if kind == "selection" and number.isdigit() else 0


def _without_class(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != "class"}


def _place(pool: Pool, document: int) -> tuple[int, int]:
    known = 0 <= document < 1 << 63
    ids = np.asarray([document if known else 0], np.int64)
    shard, row = int(shards_of(ids)[0]), int(rows_of(ids)[0])
    if not known or not 0 <= shard < pool.corpus.num_shards:
        raise SelectError(
            f"{pool.corpus.path} has no document {document}: ids are shard * 2^32 + row, and it "
            f"has {pool.corpus.num_shards} shards."
        )
    return shard, row


@dataclasses.dataclass(frozen=True)
class _Explained:
    """A document and the values that decided about it.

    Attributes:
      shard, row: its location in the corpus.
      record: its text and metadata.
      kept: True if the selection kept it.
      values: values of the terms, raw and scaled.
      status: "ok", or the reason for a missing score.
      score: NaN without a score.
      considered: True if it belongs to the pool.
      key: its key of the ranking, EXCLUDED or INCLUDED.
      before: numbers of documents and tokens of its group that are ranked before it.
      group: index of its group in the ranking's groups.
      draw: its random number.
    """

    selection: Artifact
    pool: Pool
    ranked: Ranked
    document: int
    shard: int
    row: int
    record: Mapping[str, Any]
    kept: bool
    values: Sequence[tuple[Term, float, float]]
    status: str
    score: float
    considered: bool
    key: np.uint64
    before: tuple[int, int]
    group: int
    draw: float

    @classmethod
    def of(cls, selection: Artifact, pool: Pool, ranked: Ranked, document: int) -> _Explained:
        shard, row = _place(pool, document)
        with pool.corpus.parquet(shard) as file:
            names = [name for name in file.schema_arrow.names if name not in ("doc_id", "tokens")]
            first = 0
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                if row < first + count:
                    table = file.read_row_groups([number], names)
                    record = table.slice(row - first, 1).to_pylist()[0]
                    break
                first += count
        documents = pool.documents(shard)
        terms = read_terms(
            pool.score.terms, pool.corpus, pool.score_sets, shard, documents.ids
        ).values
        scales = pool.score.scales or [None] * len(terms)
        values = [
            (term, float(value[row]), float(value[row] if scale is None else scale(value)[row]))
            for term, scale, value in zip(pool.score.terms, scales, terms, strict=True)
        ]
        own = ranked.shard(shard)
        key = own.values[row]
        group = 0 if own.groups is None else int(own.groups[row])
        ids = documents.ids[row : row + 1]
        return cls(
            selection=selection,
            pool=pool,
            ranked=ranked,
            document=document,
            shard=shard,
            row=row,
            record=record,
            kept=bool(load_selection(selection.path).mask(shard, len(documents.ids))[row]),
            values=values,
            status=documents.found.reasons[documents.found.reason[row]],
            score=float(documents.found.score[row]),
            considered=bool(documents.considered[row]),
            key=key,
            before=_ranked_before(pool, ranked, ids, key, group),
            group=group,
            draw=float(randomness.uniform(_stream(pool), pool.config.seed, ids)[0]),
        )

    def lines(self) -> Iterator[str]:
        verdict = "kept" if self.kept else "not kept"
        yield f"document {self.document} (shard {self.shard}, row {self.row}): {verdict}"
        text = str(self.record.get("text", ""))
        others = (f"{name} {value}" for name, value in self.record.items() if name != "text")
        yield "  " + ", ".join(others)
        yield f"  {' '.join(text[:_TEXT].split())}{' [...]' if len(text) > _TEXT else ''}"
        for term, value, scaled in self.values:
            of = "the corpus" if term.source == CORPUS else term.source
            on = f", {term.scale} {scaled:.6g}" if term.scale != "none" else ""
            weight = f", weight {term.weight:g}" if term.weight != 1 else ""
            yield f"  {term.value} of {of}: {value:.6g}{on}{weight}"
        if self.values:
            how = self.pool.config.combine if len(self.values) > 1 else "its only term"
            shown = f"{self.score:.6g} ({how})" if self.status == "ok" else f"none ({self.status})"
            yield f"  score: {shown}"
        yield from self._ranks()
        yield f"  {self._reason()}"

    def _ranks(self) -> Iterator[str]:
        strategy = self.pool.config.strategy
        if not isinstance(strategy, Ranking) or not self._is_ranked:
            return
        documents, tokens = self.before
        total = _ranked_documents(self.pool, self.ranked, self.group)
        name = type(strategy).__name__
        of = f" of {self.ranked.groups[self.group]}" if self.pool.config.quotas else ""
        yield (
            f"  rank by {name}: {documents + 1:,} of {total:,} documents{of} "
            f"(best {(documents + 1) / total:.2%}), {tokens:,} tokens before it, "
            f"key {float(cut.unordered(np.asarray([self.key]))[0]):.6g}"
        )
        for threshold in self.selection.manifest.summary["thresholds"]:
            if threshold["group"] == self.ranked.groups[self.group]:
                unit = self.pool.config.unit
                yield (
                    f"  budget {threshold['budget']:,} {unit}, kept {threshold['kept']:,}: "
                    f"from {_edge(threshold['from'], 'the first document')} "
                    f"to {_edge(threshold['to'], 'the last document')}"
                )

    @property
    def _is_ranked(self) -> bool:
        return bool(self.key not in (cut.EXCLUDED, cut.INCLUDED))

    def _reason(self) -> str:
        strategy, name = self.pool.config.strategy, type(self.pool.config.strategy).__name__
        if not self.considered:
            outside = self.status == "not_selected"
            return "reason: outside of the pool: " + (
                "the scorer was told to leave it out" if outside else "`within` does not hold it"
            )
        if isinstance(strategy, Filter):
            verb = "keeps" if self.kept else "leaves out"
            return f"reason: {name} {verb} it, draw {self.draw:.6f}"
        if self.status != "ok":
            done = "kept by keep_unscored" if self.kept else "without a score it is not kept"
            return f"reason: {done} (status {self.status})"
        if not self._is_ranked:
            return f"reason: {name} keeps its score by no budget"
        if self.kept:
            return "reason: it is ranked within what the budget holds"
        return "reason: it is ranked outside of what the budget holds"


def _edge(threshold: Mapping[str, float | None] | None, end: str) -> str:
    if threshold is None:
        return end
    score = threshold["score"]
    return f"key {threshold['key']:.6g}" + ("" if score is None else f" (score {score:.6g})")


def _stream(pool: Pool) -> Stream:
    split = isinstance(pool.config.strategy, Filter)
    return Stream.SELECTION_SPLIT if split else Stream.SELECTION_DRAW


def _ranked_before(
    pool: Pool, ranked: Ranked, ids: np.ndarray, key: np.uint64, group: int
) -> tuple[int, int]:
    """Return numbers of documents and tokens of the group that are ranked before a document."""
    own = randomness.hashed(Stream.SELECTION_TIE, pool.config.seed, ids)[0]
    documents = tokens = 0
    for number in pool.shards:
        shard = ranked.shard(number)
        chunk = shard.chunk(pool.config)
        before = (shard.values > key) & (shard.values != cut.INCLUDED)
        tied = np.flatnonzero((shard.values == key) & (key != cut.EXCLUDED))
        if len(tied):
            before[tied] = chunk.hashes(tied) > own
        if shard.groups is not None:
            before &= shard.groups == group
        documents += int(np.count_nonzero(before))
        tokens += int(shard.n_tokens[before].sum(dtype=np.int64))
    return documents, tokens


def _ranked_documents(pool: Pool, ranked: Ranked, group: int) -> int:
    total = 0
    for number in pool.shards:
        shard = ranked.shard(number)
        inside = (shard.values != cut.EXCLUDED) & (shard.values != cut.INCLUDED)
        if shard.groups is not None:
            inside &= shard.groups == group
        total += int(np.count_nonzero(inside))
    return total
