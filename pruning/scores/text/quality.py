"""Quality of web documents: length, main text, edited language and educational value.

    python -m pruning quality --gin_file=configs/score/quality.gin --gin.CORPUS=... --gin.OUTPUT=...

No label of a document by people is needed. Four scores, each learned from another kind of data (or
from none), are standardized and added:

    length       logarithm of the number of words
    main_text    are the lines like those that people mark as the main text of a page (main_text.py)
    edited       n-grams of edited text (an encyclopedia, news, textbooks) against web documents
    educational  n-grams of documents with high published scores against low ones

Choices
- A weighted sum of standardized scores, not learned weights: the relation between length and
  quality differs so much between sources of labels (docs/quality.md) that weights learned on one
  would not serve another.
- Means and standard deviations are those of the web documents among the examples, out of fold, and
  stored with the model. So the score of a document does not depend on the corpus that it is in.
- A standardized score is clipped to 3: one extreme, such as a list of a million words, does not
  outweigh the others.
- No document is scored by a model that was fitted to it (folds.py).
- The model is stored with the scores and applied to another corpus by `Quality.model`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores import score_set
from pruning.scores.content import content_hashes
from pruning.scores.fitted import fit_once
from pruning.scores.intervals import auc, spearman_interval
from pruning.scores.score_set import Column
from pruning.scores.text import examples, hashing, linear, main_text, passes
from pruning.scores.text.folds import FoldedLinear, Folds
from pruning.scores.text.hashing import SCHEME, Features, hashed_ngrams, segment_sums
from pruning.scores.text.linear import Bags, Linear, LinearError, Loss
from pruning.scores.text.lines import FORMS, LineFeatures, Lines
from pruning.scores.text.main_text import MainText, Pages
from pruning.scores.text.texts import Texts
from pruning.store import late, parallel, progress
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream

NAME = "Quality"
MODEL = "quality.npz"

PARTS = ("length", "main_text", "edited", "educational")
COLUMNS = {
    "quality": Column(pa.float32(), "weighted sum of the others, each standardized"),
    "length": Column(pa.float32(), "natural logarithm of the number of words"),
    "main_text": Column(
        pa.float32(), "mean over the words of the log-odds that their line is main text"
    ),
    "edited": Column(pa.float32(), "log-odds of edited text against web documents, at even odds"),
    "educational": Column(pa.float32(), "published score, as predicted from n-grams"),
}

_CLIP = 3.0
_LEAST_SPREAD = 1e-6  # below it, the standard deviation of a score is rounding


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """Settings of `quality`.

    Attributes:
      corpus: the corpus to score.
      output: directory of the score set.
      directory: directory of the files of examples, put before their names; "" for none.
      pages: files of JSON lines, each with the visible text of a web page and its main text.
      edited: files of JSON lines with edited texts.
      web: files of JSON lines with ordinary web documents.
      scored: files of JSON lines with documents and a published score.
      page_field, main_field: names of the fields of `pages`.
      text_field: name of the field with the text in the other files.
      score_field: name of the field with the published score.
      model: a score set of an earlier `quality`, whose model is applied instead of training.
      within: a selection of the corpus; other documents get the status "not_selected".
      weights: weights of length, main text, edited language and educational value; those of the
        model if one is applied.
      most_pages: largest number of pages to train on.
      examples: largest number of texts of every other kind.
      folds: number of models, each fitted without one part of the examples.
      line_l2: weight of the penalty of the model of lines, in lines.
      l2: weight of the penalty of the models of n-grams, in documents.
      seed: seed of the examples and the folds.
      workers: number of local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    directory: str = ""
    pages: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    web: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()
    page_field: str = "raw_text"
    main_field: str = "gold_text"
    text_field: str = "text"
    score_field: str = "score"
    model: str | None = None
    within: str | None = None
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.5)
    most_pages: int = 3000
    examples: int = 4000
    folds: int = 3
    line_l2: float = 100.0
    l2: float = 0.1
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        parallel.require_processes(self.workers)
        given = [bool(files) for files in (self.pages, self.edited, self.web, self.scored)]
        if not all(given) if self.model is None else any(given):
            raise ValueError(
                "learn from pages, edited, web and scored, or apply a model: set the four, or "
                "model alone."
            )
        if min(self.most_pages, self.examples, self.folds) < 2 or min(self.line_l2, self.l2) <= 0:
            raise ValueError("most_pages, examples and folds are at least 2, l2 is positive.")

    def files(self, name: str) -> tuple[str, ...]:
        """Return the paths of a setting: pages, edited, web or scored."""
        before = f"{self.directory.rstrip('/')}/" if self.directory else ""
        return tuple(f"{before}{file}" for file in getattr(self, name))

    def read(self, name: str, score_field: str | None = None) -> tuple[list[str], np.ndarray]:
        """Return a sample of the texts of a setting, and their scores; see `examples.read`."""
        return examples.read(
            self.files(name), self.text_field, self.examples, self.seed, score_field
        )


CONFIGURABLES: dict[str, type] = {NAME: QualityConfig}

_LEARNED_FROM = ("pages", "edited", "web", "scored")
_SETTINGS = (
    *("page_field", "main_field", "text_field", "score_field", "weights", "most_pages"),
    *("examples", "folds", "line_l2", "l2", "seed"),
)


@late.stage
def run(config: QualityConfig) -> Artifact:
    """Make the score set, or resume an interrupted run.

    Raises:
      ArtifactError: inputs do not belong together, or the examples teach nothing.
      ConfigurationChanged: the output holds work of other settings.
      SourceError: a file of examples is missing, damaged or has other fields.
    """
    texts = Texts.open(config.corpus, config.within)
    inputs = texts.inputs("corpus")
    identity: dict[str, Any] = {"schemes": [LineFeatures.scheme, SCHEME]}
    fitted = None if config.model is None else load_artifact(config.model, score_set.KIND)
    if fitted is not None:
        if MODEL not in fitted.manifest.files:
            raise ArtifactError(f"{fitted.path} holds no {MODEL}: it is no score set of quality.")
        inputs |= {"model": fitted}
    else:
        identity |= {name: getattr(config, name) for name in _SETTINGS}
        for name in _LEARNED_FROM:
            source = JsonlSource(config.files(name))
            identity[name] = [list(source.fingerprint(file)) for file in source.files()]
    build = score_set.begin(config.output, identity, inputs, texts.corpus, COLUMNS)
    if done := passes.finished(build):
        return done
    if fitted is not None:
        content, summary = fitted.file(MODEL), {"fitted_by": fitted.digest}
    else:
        content, summary = fit_once(build, lambda: learn(config))
    build.write_file(MODEL, content)
    passes.score(build, texts, Quality.from_bytes(content), COLUMNS, config.workers)
    scores = score_set.finish(build, "quality", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def learn(config: QualityConfig) -> tuple[Quality, dict]:
    """Return the model, and how well its parts tell examples that they have not seen."""
    folds = Folds(Stream.QUALITY_FOLD, config.seed, config.folds)
    pages = Pages.read(
        config.files("pages"),
        config.page_field,
        config.main_field,
        config.most_pages,
        config.seed,
    )
    lines, of_lines = main_text.learn(pages, folds, config.line_l2)
    edited, _ = config.read("edited")
    web, _ = config.read("web")
    known = set(edited)
    web = [text for text in web if text not in known]
    of_kind = np.repeat([1.0, 0.0], [len(edited), len(web)])
    edited_model, values = _folded(config, folds, [*edited, *web], of_kind, "logistic")
    scored, scores = config.read("scored", config.score_field)
    educational, predicted = _folded(config, folds, scored, scores, "squared")
    agreement = spearman_interval(predicted, scores)
    quality = Quality(
        lines, edited_model, educational, config.weights, np.zeros(len(PARTS)), np.ones(len(PARTS))
    )
    parts = quality.parts(pa.array(web, pa.large_string()))
    some = np.isfinite(parts).all(axis=1)
    if not some.any():
        raise ArtifactError(
            f"the {len(web)} web documents have no words: give others (Quality.web)."
        )
    mean, spread = parts[some].mean(axis=0), parts[some].std(axis=0)
    if (flat := np.flatnonzero(spread < _LEAST_SPREAD)).size:
        raise ArtifactError(
            f"the {len(web)} web documents give no scale for {PARTS[flat[0]]}, which is the same "
            "for all of them: give more (Quality.web)."
        )
    quality = dataclasses.replace(quality, mean=mean, spread=spread)
    return quality, {
        "main_text": of_lines,
        "edited": {
            "edited": len(edited),
            "web": len(web),
            "auc_out_of_fold": auc(values[of_kind > 0], values[of_kind == 0]),
        },
        "educational": {
            "documents": len(scored),
            "spearman_out_of_fold": None if agreement is None else agreement._asdict(),
        },
        "reference": {
            name: {"mean": float(mean), "standard_deviation": float(spread)}
            for name, mean, spread in zip(PARTS, quality.mean, quality.spread, strict=True)
        },
    }


def _folded(
    config: QualityConfig, folds: Folds, texts: list[str], targets: np.ndarray, loss: Loss
) -> tuple[FoldedLinear, np.ndarray]:
    """Return models over n-grams, and their values out of fold, float64 [texts]."""
    column = pa.array(texts, pa.large_string())
    bags = Bags.join([Bags.of(hashed_ngrams(batch, _NGRAMS)) for batch in hashing.batches(column)])
    fold = folds.of(content_hashes(column))
    mean, spread = (targets.mean(), targets.std() or 1.0) if loss == "squared" else (0.0, 1.0)
    models = []
    with progress.track("fit n-grams", folds.count, "folds") as task:
        for k in range(folds.count):
            rows = np.flatnonzero(fold != k)
            found = linear.fit(
                bags.take(rows),
                (targets[rows] - mean) / spread,
                _NGRAMS,
                loss,
                config.l2,
                balanced=loss == "logistic",
            )
            weights = found.weights * np.float32(spread)
            models.append(Linear(_NGRAMS, weights, found.bias * spread + mean))
            task.advance()
    folded = FoldedLinear(folds, tuple(models))
    return folded, folded(bags, fold)


_NGRAMS = Features(n=2, buckets=1 << 18)


@dataclasses.dataclass(frozen=True)
class Quality:
    """A fitted model, callable on batches of texts.

    Attributes:
      lines: the model of lines.
      edited, educational: models of n-grams, with the same folds.
      weights: of the parts.
      mean, spread: float64 [parts], of the web documents among the examples.
    """

    column: ClassVar[str] = "text"

    lines: MainText
    edited: FoldedLinear
    educational: FoldedLinear
    weights: tuple[float, ...]
    mean: np.ndarray
    spread: np.ndarray

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        return hashing.batches(column)

    def __call__(self, documents: pa.Array) -> dict[str, np.ndarray]:
        parts = self.parts(documents)
        scaled = np.clip((parts - self.mean) / self.spread, -_CLIP, _CLIP)
        found = {name: parts[:, i] for i, name in enumerate(PARTS)}
        return {"quality": scaled @ np.asarray(self.weights), **found}

    def parts(self, documents: pa.Array) -> np.ndarray:
        """Return the parts, float64 [documents, parts]; NaN for a document without words."""
        fold = self.edited.folds.of(content_hashes(documents))
        lines = Lines.of(documents.to_pylist())
        words = segment_sums(lines.words, lines.offsets)
        odds = segment_sums(lines.words * self.lines(lines, fold), lines.offsets)
        bags = Bags.of(hashed_ngrams(documents, _NGRAMS))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [np.log(words), odds / words]
        parts += [self.edited(bags, fold), self.educational(bags, fold)]
        found = np.stack(parts, axis=1)
        found[words == 0] = np.nan
        return found

    def to_bytes(self) -> bytes:
        """Return the model as an .npz file."""
        sink = io.BytesIO()
        tables = {
            "lines": self.lines.models,
            "edited": self.edited.models,
            "educational": self.educational.models,
        }
        arrays = {name: np.stack([one.weights for one in own]) for name, own in tables.items()}
        biases = {
            f"{name}_bias": np.array([one.bias for one in own]) for name, own in tables.items()
        }
        np.savez_compressed(
            sink,
            schemes=np.array([LineFeatures.scheme, SCHEME]),
            seed=np.array(self.edited.folds.seed),
            weights=np.array(self.weights),
            mean=self.mean,
            spread=self.spread,
            **arrays,  # type: ignore[arg-type]
            **biases,  # type: ignore[arg-type]
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Quality:
        """Read a model; raise LinearError when it was fitted to other features."""
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if (schemes := found["schemes"].tolist()) != [LineFeatures.scheme, SCHEME]:
            raise LinearError(
                f"the model was fitted to the features {schemes}, this version has "
                f"{[LineFeatures.scheme, SCHEME]}: fit it again."
            )
        folds = Folds(Stream.QUALITY_FOLD, int(found["seed"]), len(found["lines"]))

        def models(name: str, features: linear.Table) -> tuple[Linear, ...]:
            pairs = zip(found[name], found[f"{name}_bias"].tolist(), strict=True)
            return tuple(Linear(features, weights, bias) for weights, bias in pairs)

        of_lines = LineFeatures(Features(n=1, buckets=found["lines"].shape[1] - FORMS))
        return cls(
            MainText(folds, models("lines", of_lines)),
            FoldedLinear(folds, models("edited", _NGRAMS)),
            FoldedLinear(folds, models("educational", _NGRAMS)),
            tuple(found["weights"].tolist()),
            found["mean"],
            found["spread"],
        )
