"""Data sets of the tasks: files in their published formats, or TFDS.

    sources.read("glue/cola", "train", "eval")         # eval/glue/CoLA/*.tsv
    sources.read("super_glue/boolq", "validation", "tfds:~/tensorflow_datasets")

Choices
- Both give dictionaries with TFDS's field names and integer labels, so tasks are independent of the
  source.
- Original files are found by their published names, in `<data>/glue/<task>` and
  `<data>/superglue/<task>`, gzipped or not; several parts of one split are read in order.
- GLUE's tab-separated files hold unescaped quotes, so they are split at tabs, not read as CSV.
- A missing file, or a row that does not fit, is an error that names it.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from pruning.corpus.sources.tfds import libraries

Example = dict[str, Any]

TFDS = "tfds:"
DATA = "WINNOW_EVALUATION_DATA"  # environment variable: directory of the original files


class SourceError(ValueError):
    """A data set cannot be read."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Original files of a data set.

    Attributes:
      directories: candidates of their directory, relative to that of the data.
      splits: split -> names (with glob patterns) of its files, tried in turn.
      rows: (path, text) -> examples.
    """

    directories: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    rows: Callable[[str, str], Iterator[Example]]


def splits(name: str, data: str) -> list[str]:
    """Return the existing splits of a data set."""
    if data.startswith(TFDS):
        return sorted(_builder(name, data).info.splits)
    return [split for split in FILES[name].splits if paths(name, split, data)]


def read(name: str, split: str, data: str) -> list[Example]:
    """Read all examples of a split, in the order of the files.

    Args:
      name: as TFDS has it, without the version: "glue/cola", "squad/v1.1", "cnn_dailymail".
      split: "train", "validation", "test", ...
      data: the directory of original files; or "tfds:DIRECTORY".

    Raises:
      SourceError: no such split or file, or a row that is not of this data set.
    """
    if data.startswith(TFDS):
        return list(_from_tfds(name, split, data))
    files = paths(name, split, data)
    if not files:
        tried = [f"{d}/{p}" for d in FILES[name].directories for p in FILES[name].splits[split]]
        raise SourceError(
            f"{name} has no split {split!r} in {data}: none of {', '.join(tried)} (or those with "
            ".gz) is there. Give the directory of the original files, or tfds:DIRECTORY."
        )
    return [row for file in files for row in FILES[name].rows(os.fspath(file), _text(file))]


def paths(name: str, split: str, data: str) -> list[epath.Path]:
    """Return the files of a split, in order; none if it does not exist.

    Raises SourceError on an unknown data set or split.
    """
    if name not in FILES:
        raise SourceError(f"no original files are known of {name!r}; use tfds:DIRECTORY.")
    known = FILES[name]
    if split not in known.splits:
        raise SourceError(f"{name} has no split {split!r}; it has: {', '.join(known.splits)}.")
    for directory in known.directories:
        for pattern in known.splits[split]:
            found: dict[str, epath.Path] = {}
            for ending in ("", ".gz"):
                for path in (epath.Path(data) / directory).glob(pattern + ending):
                    found.setdefault(path.name.removesuffix(".gz"), path)
            if found:
                return [found[key] for key in sorted(found)]
    return []


def _text(path: epath.Path) -> str:
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is damaged ({error}): fetch it again.") from error


# --------------------------------------------------------------------------------------------------
# GLUE: tab-separated values


def _table(
    columns: Mapping[str, str | int],
    label: str | int | None = "label",
    labels: Sequence[str] | Callable[[str], Any] = ("0", "1"),
    header: bool = True,
) -> Callable[[str, str], Iterator[Example]]:
    """Yield the rows of a table.

    Args:
      columns: field -> name of its column, or its place.
      label: the label's column; test sets have none, and get -1.
      labels: the words that stand for 0, 1, ...; or a function of the word.
    """

    def rows(path: str, text: str) -> Iterator[Example]:
        lines = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
        names = {name: place for place, name in enumerate(lines[0])} if header else {}
        for number, line in enumerate(lines[header:], 1 + header):
            try:
                cells: dict[Any, str] = dict(enumerate(line))
                cells |= {name: line[place] for name, place in names.items() if place < len(line)}
                example: Example = {field: cells[column] for field, column in columns.items()}
                has_label = label is not None and (not header or label in names)
                example["label"] = _label(cells[label], labels) if has_label else -1
            except (KeyError, ValueError) as error:
                raise SourceError(
                    f"{path}, line {number}: not a row of this data set ({error}): {line}."
                ) from error
            yield example | {"idx": number - 1 - header}

    return rows


def _label(word: str, labels: Sequence[str] | Callable[[str], Any]) -> Any:
    if callable(labels):
        return labels(word)
    if word == "-1":
        return -1
    if word not in labels:
        raise ValueError(f"{word!r} is none of the labels {', '.join(labels)}")
    return list(labels).index(word)


_SENTENCES = {"sentence1": "sentence1", "sentence2": "sentence2"}
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")


def _glue_splits(**more: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {
        "train": ("train.tsv", "train_part*.tsv"),
        "validation": ("dev.tsv",),
        "test": ("test.tsv",),
        **more,
    }


def _rte(path: str, text: str) -> Iterator[Example]:
    """Return the label of RTE, written as a word or as 0 for entailment and 1 for none."""
    for example in _table(_SENTENCES, "label", str)(path, text):
        word = example["label"]
        if word not in (-1, "-1", "0", "1", *_ENTAILMENT):
            raise SourceError(f"{path}: {word!r} is none of the labels {', '.join(_ENTAILMENT)}.")
        known = {"entailment": 0, "not_entailment": 1}
        example["label"] = known[word] if word in known else int(word)
        yield example


def _wnli(path: str, text: str) -> Iterator[Example]:
    return _table(_SENTENCES)(path, text)


_MNLI = _table({"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label", _NLI)
_MNLI_DIRECTORIES = ("glue/MNLI", "glue/mnli")

# --------------------------------------------------------------------------------------------------
# SuperGLUE: JSON lines


def _lines(
    convert: Callable[[Example], Iterator[Example]],
) -> Callable[[str, str], Iterator[Example]]:
    def rows(path: str, text: str) -> Iterator[Example]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                yield from convert(json.loads(line))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise SourceError(
                    f"{path}, line {number}: not a row of this data set ({error!r}): {line[:80]}."
                ) from error

    return rows


def _flat(labels: Sequence[Any], *names: str) -> Callable[[Example], Iterator[Example]]:
    def convert(row: Example) -> Iterator[Example]:
        label = row.get("label", -1)
        yield {name: row[name] for name in names} | {
            "label": -1 if label == -1 else list(labels).index(label),
            "idx": row.get("idx", -1),
        }

    return convert


_TRUTH = (False, True)


def _wsc(row: Example) -> Iterator[Example]:
    target = row["target"]
    yield {
        "text": row["text"],
        **{name: target[name] for name in ("span1_text", "span2_text", "span2_index")},
        "label": int(row.get("label", -1)),
        "idx": row.get("idx", -1),
    }


def _multirc(row: Example) -> Iterator[Example]:
    passage = row["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": int(answer.get("label", -1)),
                "idx": {
                    "paragraph": row["idx"],
                    "question": question["idx"],
                    "answer": answer["idx"],
                },
            }


def _record(row: Example) -> Iterator[Example]:
    text = row["passage"]["text"]
    found = {text[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]}
    for query in row["qas"]:
        answers = {answer["text"] for answer in query.get("answers", [])}
        yield {
            "passage": text,
            "query": query["query"],
            "entities": sorted(found),
            "answers": sorted(answers),
            "idx": {"passage": row["idx"], "query": query["idx"]},
        }


def _superglue_splits() -> dict[str, tuple[str, ...]]:
    return {"train": ("train.jsonl",), "validation": ("val.jsonl",), "test": ("test.jsonl",)}


def _superglue(name: str, convert: Callable[[Example], Iterator[Example]]) -> Files:
    return Files((f"superglue/{name}", f"super_glue/{name}"), _superglue_splits(), _lines(convert))


# --------------------------------------------------------------------------------------------------
# SQuAD, CNN/DailyMail


def _squad(path: str, text: str) -> Iterator[Example]:
    try:
        yield from _squad_questions(json.loads(text)["data"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{path}: not a file of SQuAD ({error!r}).") from error


def _squad_questions(articles: Any) -> Iterator[Example]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [answer["text"] for answer in question["answers"]]
                yield {
                    "id": question["id"],
                    "question": question["question"],
                    "context": paragraph["context"],
                    "answers": {"text": answers},
                }


def _pairs(row: Example) -> Iterator[Example]:
    yield {"article": row["article"], "highlights": row["highlights"]}


FILES: dict[str, Files] = {
    "glue/cola": Files(
        ("glue/CoLA", "glue/cola"),
        {
            "train": ("train.tsv", "in_domain_train.tsv"),
            # The development set of GLUE is both domains together, in-domain first.
            "validation": ("dev.tsv", "*_domain_dev.tsv"),
        },
        _table({"sentence": 3}, 1, ("0", "1"), header=False),
    ),
    "glue/sst2": Files(
        ("glue/SST-2", "glue/sst2"), _glue_splits(), _table({"sentence": "sentence"})
    ),
    "glue/mrpc": Files(
        ("glue/MRPC", "glue/mrpc"),
        _glue_splits(),
        _table({"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality"),
    ),
    "glue/qqp": Files(
        ("glue/QQP", "glue/qqp"),
        _glue_splits(),
        _table({"question1": "question1", "question2": "question2"}, "is_duplicate"),
    ),
    "glue/stsb": Files(
        ("glue/STS-B", "glue/stsb"), _glue_splits(), _table(_SENTENCES, "score", float)
    ),
    "glue/mnli": Files(
        _MNLI_DIRECTORIES,
        {
            "train": ("train.tsv",),
            "validation_matched": ("dev_matched.tsv",),
            "validation_mismatched": ("dev_mismatched.tsv",),
            "test_matched": ("test_matched.tsv",),
            "test_mismatched": ("test_mismatched.tsv",),
        },
        _MNLI,
    ),
    "glue/mnli_matched": Files(
        _MNLI_DIRECTORIES,
        {"validation": ("dev_matched.tsv",), "test": ("test_matched.tsv",)},
        _MNLI,
    ),
    "glue/mnli_mismatched": Files(
        _MNLI_DIRECTORIES,
        {"validation": ("dev_mismatched.tsv",), "test": ("test_mismatched.tsv",)},
        _MNLI,
    ),
    "glue/qnli": Files(
        ("glue/QNLI", "glue/qnli"),
        _glue_splits(),
        _table({"question": "question", "sentence": "sentence"}, "label", _ENTAILMENT),
    ),
    "glue/rte": Files(("glue/RTE", "glue/rte"), _glue_splits(), _rte),
    "glue/wnli": Files(("glue/WNLI", "glue/wnli"), _glue_splits(), _wnli),
    "glue/ax": Files(
        ("glue/AX", "glue/diagnostic", "glue/ax"),
        {"test": ("diagnostic.tsv", "test.tsv")},
        _table({"premise": "sentence1", "hypothesis": "sentence2"}, None),
    ),
    "super_glue/boolq": _superglue("BoolQ", _flat(_TRUTH, "passage", "question")),
    "super_glue/cb": _superglue(
        "CB", _flat(("entailment", "contradiction", "neutral"), "premise", "hypothesis")
    ),
    "super_glue/copa": _superglue(
        "COPA", _flat((0, 1), "premise", "choice1", "choice2", "question")
    ),
    "super_glue/multirc": _superglue("MultiRC", _multirc),
    "super_glue/record": _superglue("ReCoRD", _record),
    "super_glue/rte": _superglue("RTE", _flat(_ENTAILMENT, "premise", "hypothesis")),
    "super_glue/wic": _superglue("WiC", _flat(_TRUTH, "sentence1", "sentence2", "word")),
    "super_glue/wsc.fixed": _superglue("WSC", _wsc),
    "super_glue/axb": Files(
        ("superglue/AX-b", "super_glue/AX-b"),
        {"test": ("AX-b.jsonl",)},
        _lines(_flat(_ENTAILMENT, "sentence1", "sentence2")),
    ),
    "super_glue/axg": Files(
        ("superglue/AX-g", "super_glue/AX-g"),
        {"test": ("AX-g.jsonl",)},
        _lines(_flat(_ENTAILMENT, "premise", "hypothesis")),
    ),
    "squad/v1.1": Files(
        ("squad",),
        {
            "train": ("train-v1.1.json",),
            "validation": ("dev-v1.1.json", "xquad.en.json"),
        },
        _squad,
    ),
    "cnn_dailymail": Files(
        ("cnn_dailymail",),
        {
            "train": ("train.jsonl",),
            "validation": ("validation.jsonl", "val.jsonl"),
            "test": ("test.jsonl",),
        },
        _lines(_pairs),
    ),
}


# --------------------------------------------------------------------------------------------------
# TFDS


_VERSIONS = {"glue": "1.0.0", "super_glue": "1.0.2", "squad": "3.0.0", "cnn_dailymail": "3.1.0"}


@functools.lru_cache(maxsize=8)
def _builder(name: str, data: str) -> Any:
    _, tfds = libraries()
    root = epath.Path(data.removeprefix(TFDS)).expanduser() / name
    # T5's version where it is there; else the newest, which TFDS has shown to hold the same rows.
    version = root / _VERSIONS.get(name.split("/")[0], "")
    versions = [version] if version.exists() else sorted(root.glob("*"))
    for directory in reversed(versions):
        if (directory / "dataset_info.json").exists():
            return tfds.builder_from_directory(directory)
    raise SourceError(f"{root} is no prepared data set: prepare {name} with TFDS.")


def version(name: str, data: str) -> str:
    """Return name and version of a prepared data set."""
    return _builder(name, data).info.full_name


def _from_tfds(name: str, split: str, data: str) -> Iterator[Example]:
    builder = _builder(name, data)
    if split not in builder.info.splits:
        raise SourceError(
            f"{name} has no split {split!r}; it has: {', '.join(sorted(builder.info.splits))}."
        )
    dataset = builder.as_dataset(split=split, shuffle_files=False)
    for row in libraries()[1].as_numpy(dataset):
        yield _plain(row)


def _plain(value: Any) -> Any:
    """Convert bytes to text, arrays to lists, NumPy scalars to Python's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
