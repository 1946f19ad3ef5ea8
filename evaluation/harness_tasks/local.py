"""Local files as the documents of a harness task: `custom_dataset: !function local.documents`.

The harness calls it with the task's `dataset_kwargs` and the metadata, of which `data` is the
directory that paths are relative to. A document is a JSON object, a row of a CSV file, or a problem
of ASDiv's XML; a file may be gzipped, or a member of a tar archive (`mmlu.tar.gz::MMLU/dev/x.csv`).
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from evaluation.errors import EvaluationError

Document = dict[str, Any]


def documents(
    files: Mapping[str, str],
    data: str = "",
    columns: Sequence[str] | None = None,
    hold_out: int = 0,
    **unused: Any,
) -> dict[str, Any]:
    """Read the splits of a task.

    Args:
      files: split -> path, absolute or relative to `data`.
      data: the directory; where empty, the environment variable WINNOW_EVALUATION_DATA.
      columns: names of a CSV file's columns, where it has no header.
      hold_out: so many first documents of "test" become the split "fewshot", and are not evaluated.

    Returns:
      split -> datasets.Dataset.

    Raises:
      FileNotFoundError: naming the file, and how to say where it is.
      EvaluationError: a file that cannot be read.
    """
    import datasets

    root = Path(data or os.environ.get("WINNOW_EVALUATION_DATA", ""))
    found = {split: read(root / file, columns) for split, file in files.items()}
    if hold_out:
        found["fewshot"], found["test"] = found["test"][:hold_out], found["test"][hold_out:]
    return {split: datasets.Dataset.from_list(list(rows)) for split, rows in found.items()}


@functools.lru_cache(maxsize=256)
def _content(path: Path) -> tuple[str, bytes]:
    """Return name and bytes of a file or of an archive's member."""
    archive, _, member = str(path).partition("::")
    if not Path(archive).is_file():
        raise FileNotFoundError(
            f"{archive} is not there: say where the evaluation sets are, with Harness.data, with "
            "`--metadata '{\"data\": ...}'` of lm-eval, or in WINNOW_EVALUATION_DATA."
        )
    if member:
        try:
            return member, _members(archive)[member]
        except KeyError as error:
            raise FileNotFoundError(f"{archive} has no member {member}.") from error
    content = Path(archive).read_bytes()
    if archive.endswith(".gz"):
        return archive.removesuffix(".gz"), gzip.decompress(content)
    return archive, content


@functools.lru_cache(maxsize=2)
def _members(archive: str) -> dict[str, bytes]:
    """Return all files of an archive, which is read once for all its members."""
    with tarfile.open(archive) as tar:
        opened = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in opened if file is not None}


def read(path: Path, columns: Sequence[str] | None = None) -> list[Document]:
    """Return the documents of one file, in order."""
    name, content = _content(path)
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        if name.endswith(".json"):
            found = json.loads(text)
            return found["examples"] if isinstance(found, dict) else found
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text), columns))
        if name.endswith(".xml"):
            return [_asdiv(problem) for problem in ElementTree.fromstring(text).iter("Problem")]
    except (ValueError, KeyError, RecursionError, ElementTree.ParseError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}.") from error
    raise EvaluationError(f"{path}: not one of .jsonl, .json, .csv, .xml (or those with .gz).")


def _asdiv(problem: ElementTree.Element) -> Document:
    """Return a word problem: text, formula as chain of thought, answer without unit."""

    def text(tag: str) -> str:
        return (problem.findtext(tag) or "").strip()

    answer = re.sub(r"\s*\(.*\)$", "", text("Answer"))
    question = f"{text('Body')} {text('Question')}".strip()
    return {"context": question, "chain_of_thought": text("Formula"), "answer": answer}
