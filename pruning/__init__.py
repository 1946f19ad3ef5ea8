"""Decisions about data: sources to a corpus, scores, a selection, a stream of examples.

    cli/        commands, options and gin
    store/      artifacts: manifests, atomic files, progress, processes, random streams
    corpus/     documents, tokenized once; sources, vocabularies, readers of selections
    scores/     one value or vector per document: by a model, by text, in embedding space, distilled
    selection/  scores to a set of documents, by a strategy and a budget
    data/       selections to training examples and exported datasets

In a program, without files:

    judge = pruning.Judge("google/flan-t5-large")    # also LogLikelihood, Embedder, Classifier
    table = judge.score(texts)                       # an Arrow table
    scored = judge.add_to(frame)                     # or a DataFrame or Dataset, with its scores
    kept = pruning.select(scored, score="ask_llm", keep_documents=0.2)

Imports point down this list's dependencies only: cli -> data -> selection -> scores -> corpus ->
store. This file imports nothing before it is needed, so that `python -m pruning --help` answers at
once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pruning.scores.model.in_memory import (
        Classifier,
        Embedder,
        Judge,
        LogLikelihood,
        TextScorer,
    )
    from pruning.scores.text.in_memory import NgramClassifier, TextFunction
    from pruning.selection.in_memory import select

_MODULES = {
    "Classifier": "pruning.scores.model.in_memory",
    "Embedder": "pruning.scores.model.in_memory",
    "Judge": "pruning.scores.model.in_memory",
    "LogLikelihood": "pruning.scores.model.in_memory",
    "NgramClassifier": "pruning.scores.text.in_memory",
    "TextFunction": "pruning.scores.text.in_memory",
    "TextScorer": "pruning.scores.model.in_memory",
    "select": "pruning.selection.in_memory",
}

__all__ = [
    "Classifier",
    "Embedder",
    "Judge",
    "LogLikelihood",
    "NgramClassifier",
    "TextFunction",
    "TextScorer",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
