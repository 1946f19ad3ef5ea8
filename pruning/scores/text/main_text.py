"""Main text of web pages: a linear model of lines, taught by pages whose main text people marked.

Choices
- People who marked the main text of a page have labeled every line of it. The model sees lines
  alone, so it learns nothing about which documents, sources or topics are good.
- A page that a model was fitted to is scored by another one, whether a corpus holds its visible
  text or its main text: folds by content, as in folds.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pruning.corpus.sources.document import Document, SourceError, lookup
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores.intervals import auc
from pruning.scores.text import examples, linear
from pruning.scores.text.examples import hashes_of, lowest
from pruning.scores.text.folds import Folds
from pruning.scores.text.linear import Linear
from pruning.scores.text.lines import LineFeatures, Lines, words_of
from pruning.store import progress, randomness
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream


@dataclasses.dataclass(frozen=True)
class Pages:
    """Visible and main texts of web pages, [pages] each."""

    visible: list[str]
    main: list[str]

    @classmethod
    def read(
        cls, files: Sequence[str], page_field: str, main_field: str, most: int, seed: int
    ) -> Pages:
        """Return a random sample of at most `most` pages of JSON lines.

        Raises:
          SourceError: no page has both fields.
        """
        source = JsonlSource(tuple(files), page_field)
        pages = cls([], [])
        for file in source.files():
            for item in source.read(file, [main_field], lambda size: None):
                if not isinstance(item, Document):
                    continue
                marked = lookup(item.fields, main_field)
                if marked and marked.strip() and item.text.strip():
                    pages.visible.append(item.text)
                    pages.main.append(marked)
                if len(pages.visible) >= examples.HELD * most:
                    pages = pages._sampled(most, seed)
        if not pages.visible:
            raise SourceError(
                f"no line of {', '.join(files)} has texts under {page_field!r} and "
                f"{main_field!r}: set Quality.page_field and main_field."
            )
        return pages._sampled(most, seed)

    def _sampled(self, most: int, seed: int) -> Pages:
        """Return at most `most` pages, those with the lowest draws, in their order."""
        rows = lowest(randomness.hashed(Stream.QUALITY_PAGES, seed, hashes_of(self.visible)), most)
        return Pages([self.visible[i] for i in rows], [self.main[i] for i in rows])

    def labels(self, lines: Lines) -> np.ndarray:
        """Return which lines of the visible texts are in the main text, bool [lines]."""
        found = np.zeros(len(lines.texts), bool)
        for page, main in enumerate(self.main):
            whole = words_of(main)
            for line in range(lines.offsets[page], lines.offsets[page + 1]):
                found[line] = words_of(lines.texts[line]) in whole
        return found


@dataclasses.dataclass(frozen=True)
class MainText:
    """A linear model of lines for each fold."""

    folds: Folds
    models: tuple[Linear, ...]

    def __call__(self, lines: Lines, fold: np.ndarray) -> np.ndarray:
        """Return log-odds of each line that it is main text, float64 [lines].

        Args:
          fold: of each document, int64 [documents].
        """
        features = self.models[0].features
        assert isinstance(features, LineFeatures)
        bags = lines.bags(features)
        of_line = np.repeat(fold, np.diff(lines.offsets))
        values = np.zeros(len(of_line))
        for k in np.unique(of_line):
            rows = np.flatnonzero(of_line == k)
            values[rows] = self.models[k](bags.take(rows))
        return values


def learn(pages: Pages, folds: Folds, l2: float) -> tuple[MainText, dict]:
    """Return the models of all folds, and how well they tell lines of pages they have not seen.

    Raises:
      ArtifactError: a fold has lines of one kind only.
    """
    features = LineFeatures()
    lines = Lines.of(pages.visible)
    good, bags = pages.labels(lines), lines.bags(features)
    page = np.repeat(np.arange(len(pages.main)), np.diff(lines.offsets))
    # A corpus may hold a page as its main text, which has a fold of its own.
    own, other = folds.of(hashes_of(pages.visible)), folds.of(hashes_of(pages.main))
    models = []
    values = np.zeros(len(good))
    with progress.track("fit main text", folds.count, "folds") as task:
        for k in range(folds.count):
            known = np.flatnonzero(((own != k) & (other != k))[page])
            if not len(known) or good[known].all() or not good[known].any():
                raise ArtifactError(
                    f"the {len(known)} lines outside of fold {k} are of one kind: give more pages."
                )
            model = linear.fit(
                bags.take(known), good[known], features, "logistic", l2, balanced=True
            )
            models.append(model)
            asked = np.flatnonzero((own == k)[page])
            values[asked] = model(bags.take(asked))
            task.advance()
    return MainText(folds, tuple(models)), {
        "pages": len(pages.main),
        "lines": {"main": int(good.sum()), "others": int((~good).sum())},
        "line_auc_out_of_fold": auc(values[good], values[~good]),
    }
