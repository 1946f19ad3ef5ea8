"""Documentation in a Python environment: a corpus that needs no download.

It has tens of megabytes of English of uneven quality, with boilerplate (licenses) and
near-duplicates (vendored packages, families of similar functions), like the corpora that pruning
methods are made for.

Choices
- No module is imported: docstrings are read from the source through `ast`.
- There is one document per top-level function or class (the class with its methods) and one per
  module docstring, about the length of a web page's text. Single docstrings are mostly one line;
  whole modules run to hundreds of kilobytes.
- Every docstring follows its name, as in a manual. Indentation is removed as `help()` does.
- Tests are left out: a third of the code, but a twentieth of the words, mostly "Test that ...".
- Duplicates stay in.
- The files are divided into `parts` by a hash of their names, so that ingest can run in parallel.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gc
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from pruning.corpus.sources.document import (
    Document,
    Fingerprint,
    ReadCallback,
    Reject,
    SourceError,
    invalid_utf8,
)

_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
_TEST_MODULE = re.compile(r"(test_.*|.*_test|conftest)\.py")
_LICENCE = re.compile(r"(?!.*\.pyi?$).*(licen[cs]e|copying|notice).*", re.IGNORECASE)
_MANUAL = re.compile(r"(?!requirements|CMakeLists).*\.(md|rst|txt)", re.IGNORECASE)
_TOPICS = "pydoc_data/topics.py"  # the language reference, as a dictionary of strings
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class PythonDocsSource:
    """Docstrings, package descriptions, manuals and licenses of the running interpreter's packages.

    Fields of a document: `source` (docstring, description, manual or licence), `domain` (the
    package; "python" is the standard library) and `url` (the path of its file there).

    Attributes:
      parts: number of files that this source counts as.
      packages: names of packages to read ("python" is the standard library); empty for all.
    """

    parts: int = 16
    packages: tuple[str, ...] = ()

    def files(self) -> list[str]:
        if unknown := set(self.packages) - {entry.package for entry in _entries()}:
            raise SourceError(
                f"PythonDocsSource.packages: {', '.join(sorted(unknown))} is not installed here."
            )
        return [f"python-docs-{part:05d}-of-{self.parts:05d}" for part in range(self.parts)]

    def fingerprint(self, file: str) -> Fingerprint:
        """Return a fingerprint of names and sizes; an installed version does not change."""
        hasher = xxhash.xxh3_64(sys.version.encode())
        n_bytes = 0
        for entry in self._part(file):
            hasher.update(f"{entry.url}:{entry.n_bytes}\n".encode())
            n_bytes += entry.n_bytes
        return Fingerprint(n_bytes, hasher.hexdigest())

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        for entry in self._part(file):
            yield from _documents(entry)
            on_read(entry.n_bytes)

    def _part(self, file: str) -> Iterator[_Entry]:
        part = self.files().index(file)
        for entry in _entries():
            chosen = not self.packages or entry.package in self.packages
            if chosen and xxhash.xxh3_64_intdigest(entry.url.encode()) % self.parts == part:
                yield entry


class _Entry(NamedTuple):
    path: str
    url: str
    package: str
    source: str
    n_bytes: int


@functools.cache
def _entries() -> tuple[_Entry, ...]:
    """Return every file that holds documentation, sorted; 20,000 files take a second."""
    places = sysconfig.get_paths()
    roots = {places["purelib"]: None, places["platlib"]: None, places["stdlib"]: "python"}
    found = []
    for root, package in roots.items():
        for directory, subdirectories, names in os.walk(root):
            subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED]
            for name in names:
                path = Path(directory, name)
                url = path.relative_to(root).as_posix()
                if source := _kind(url):
                    owner = package or re.split(r"[-./]", url, maxsplit=1)[0]
                    found.append(_Entry(str(path), url, owner, source, path.stat().st_size))
    return tuple(sorted(found))


def _kind(url: str) -> str | None:
    """Return the kind of a file by its name; None for files without documentation."""
    top, name = url.partition("/")[0], url.rpartition("/")[2]
    if _LICENCE.fullmatch(name):
        return "licence"
    if top.endswith((".dist-info", ".egg-info")):
        return "description" if name in ("METADATA", "PKG-INFO") else None
    if name.endswith(".py") and not _TEST_MODULE.fullmatch(name):
        return "docstring"
    return "manual" if _MANUAL.fullmatch(name) else None


def _documents(entry: _Entry) -> Iterator[Document | Reject]:
    fields = {"source": entry.source, "domain": entry.package, "url": entry.url}
    content = Path(entry.path).read_bytes()
    if entry.source == "docstring":
        try:
            texts = (
                _manual_texts(content) if entry.url == _TOPICS else _docstrings(content, entry.url)
            )
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield Reject("not_python", f"{entry.path} cannot be parsed ({error})", malformed=False)
            return
        if entry.url == _TOPICS:
            fields["source"] = "manual"
        yield from (Document(text, fields) for text in texts)
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield invalid_utf8(error)._replace(malformed=False)  # the user cannot correct it
        return
    if entry.source == "description":
        text = text.partition("\n\n")[2]  # the part before it is headers
    yield Document(text, fields)


def _docstrings(content: bytes, url: str) -> list[str]:
    """Return one text per module docstring, top-level function and top-level class."""
    module = url.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with _parsed(content) as tree:
        texts = [_headed(module, tree)]
        for node in _definitions(tree):
            parts = [_headed(f"{module}.{node.name}", node)]
            if isinstance(node, ast.ClassDef):
                parts += [
                    _headed(f"{node.name}.{inner.name}", inner) for inner in _definitions(node)
                ]
            texts.append("\n\n".join(filter(None, parts)))
    return [text for text in texts if text]


def _headed(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> str:
    docstring = ast.get_docstring(node)
    return f"{name}\n\n{docstring.strip()}" if docstring and docstring.strip() else ""


def _definitions(node: ast.AST) -> Iterator[Any]:
    """Yield functions and classes of a module or class, also those in `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(child)


def _manual_texts(content: bytes) -> list[str]:
    """Return the values of the dictionary of `pydoc_data.topics`."""
    with _parsed(content) as tree:
        return [
            ast.literal_eval(text)
            for statement in tree.body
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)
            for text in statement.value.values
        ]


@contextlib.contextmanager
def _parsed(content: bytes) -> Iterator[ast.Module]:
    """Yield a syntax tree; parsing without the garbage collector takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes in third-party strings
            tree = ast.parse(content)
        yield tree
        del tree
    finally:
        if collecting:
            gc.enable()
