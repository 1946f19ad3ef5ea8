"""A hook of MkDocs that builds the site from the pages of the repository, where they are.

    mkdocs build --strict

Choices
- The site has the layout of the repository, so that a relative link means the same on a git host
  and on the site. Copies and included snippets would need other links.
- A linked file that is not a page, such as a configuration or an example, becomes a page that shows
  it, and a linked directory a list of its files. The site needs no address of a git host.
- The notebook becomes a page of its cells. Its outputs are not stored.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "tpu/README.md",
    "configs/score/data_efficient/README.md",
    "evaluation/harness_tasks/README.md",
)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")
_LANGUAGES = {".py": "python", ".gin": "python", ".sh": "shell", ".yaml": "yaml", ".yml": "yaml"}


def on_files(files: Files, config) -> Files:
    """Replace the files of docs/ by the pages of the repository and the files that they link to."""
    kept = Files([file for file in files if file.src_dir != config.docs_dir])
    docs = Path(config.docs_dir)
    pages = [*PAGES, *(str(f.relative_to(REPOSITORY)) for f in sorted(docs.rglob("*.md")))]
    texts = {name: (REPOSITORY / name).read_text() for name in pages}
    for notebook in sorted(docs.rglob("*.ipynb")):
        texts[str(notebook.relative_to(REPOSITORY))] = _cells(notebook)
    shown = {target for name, text in texts.items() for target in _targets(name, text)}
    texts |= {name: _shown(name) for name in shown if name not in texts}
    for name, text in texts.items():
        kept.append(File.generated(config, _page(name), content=_linked(name, text)))
    for other in (f for f in sorted(docs.rglob("*")) if f.suffix in (".css", ".png", ".svg")):
        name = str(other.relative_to(REPOSITORY))
        kept.append(File.generated(config, name, abs_src_path=str(other)))
    return kept


def _page(name: str) -> str:
    """Return the name of the page that shows a file or directory of the repository."""
    if name.endswith(".md"):
        return name
    return f"{name}/README.md" if (REPOSITORY / name).is_dir() else f"{name}.md"


def _target(name: str, link: str) -> str | None:
    """Return the path in the repository that a link of the page `name` leads to, if it exists."""
    target = os.path.normpath(PurePosixPath(name).parent / link)
    if target.startswith("..") or not _exists(target):
        return None
    readme = f"{target}/README.md"
    return readme if _exists(readme) else target


@functools.cache
def _exists(name: str) -> bool:
    return (REPOSITORY / name).exists()


def _targets(name: str, text: str) -> list[str]:
    found = (_target(name, match[2]) for match in _LINK.finditer(text))
    return [target for target in found if target is not None]


def _linked(name: str, text: str) -> str:
    """Return the page's text with its links to files of the repository turned to their pages."""

    def turned(match: re.Match[str]) -> str:
        target = _target(name, match[2])
        if target is None:
            return match[0]
        link = os.path.relpath(_page(target), PurePosixPath(_page(name)).parent)
        return f"[{match[1]}]({link}{match[3] or ''})"

    return _LINK.sub(turned, text)


def _shown(name: str) -> str:
    """Return a page that shows a file, or lists the files of a directory."""
    path = REPOSITORY / name
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        rows = [f"    {f.relative_to(path)}" for f in files]
        return "\n".join([f"# {name}/", "", *rows, ""])
    language = _LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text()}\n````\n"


def _cells(notebook: Path) -> str:
    """Return the cells of a notebook as Markdown."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
