"""The site is built strictly, without a network, and asks readers' browsers for no other host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# MkDocs with every connection refused.
PROGRAM = """
import socket, sys

def refuse(*_):
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli

cli(["build", "--strict", "--quiet", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: the extra `docs`")
    made = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(made)], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_every_page_of_docs_is_in_the_navigation(site):
    listed = re.findall(r": (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / "docs").rglob("*.md")}
    pages |= {f"{f.relative_to(REPOSITORY)}.md" for f in (REPOSITORY / "docs").rglob("*.ipynb")}
    assert pages <= set(listed)
    for name in listed:
        folder = name.removesuffix(".md").removesuffix("README")
        assert (site / folder / "index.html").is_file(), name


def test_the_site_loads_nothing_from_elsewhere(site):
    loaded = re.compile(r"""<(?:script|img|iframe|link rel="?stylesheet)[^>]*?https?://[^>]*>""")
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?https?://", style.read_text()), style


def test_links_lead_to_pages_that_show_files_and_docstrings_are_there(site):
    samplers = (site / "docs" / "samplers" / "index.html").read_text()
    assert 'href="../examples/zlib_ratio.py/"' in samplers
    shown = (site / "docs" / "examples" / "zlib_ratio.py" / "index.html").read_text()
    assert "ZlibRatio" in shown
    memory = (site / "docs" / "api" / "in_memory" / "index.html").read_text()
    for name in ("Judge", "LogLikelihood", "Embedder", "Classifier", "select", "TextScorer.add_to"):
        assert f'id="pruning.{name}"' in memory, name
    stages = (site / "docs" / "api" / "stages" / "index.html").read_text()
    assert "keep_tokens" in stages and "ScoreConfig" in stages
