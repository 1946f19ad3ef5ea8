"""The tutorials, followed by the letter in an empty directory, with smaller sizes.

The commands of a page run in its order in one shell; a block with a title is the file that the
reader saves. A sweep: some minutes of CPU time.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub_stand_ins

REPOSITORY = Path(__file__).resolve().parent.parent
TUTORIALS = REPOSITORY / "docs" / "tutorials"
# Commands that are not run here, and why.
ELSEWHERE = {
    "python3 -m venv": "the environment of the tests",
    ". .venv": "likewise",
    "pip install": ".ci/run and .ci/wheel",
    "hf download": "needs a network",
}
T5 = (
    "--gin.T5Config.d_model=32 --gin.T5Config.d_ff=64 --gin.T5Config.num_heads=2 "
    "--gin.Stream.batch_size=4 --gin.Train.eval_batches=1"
)
STUDY = "--gin.examples/Recipe.settings=\"{'EXAMPLES': 64, 'MAX_TOKENS': 165, 'Judge.workers': 1}\""
# The beginning of a command -> what makes it smaller.
SIZES = {
    "winnow study": "--scoring-steps=2 --steps=2 " + STUDY,
    "winnow train --recipe=t5_tiny": f"--steps=2 {T5}",
    "winnow train --recipe=quickstart": f"--steps=2 {T5}",
    "winnow perplexity": "--window=24 --overlap=8 --max-tokens=24 --row-length=128",
    "winnow score --recipe=ask_llm": "--max-tokens=160",
    "winnow vocabulary": "--sample-bytes=500000",
}


def blocks(page: Path) -> Iterator[tuple[str | None, str]]:
    """Yield (file, text) of every file that a page shows, and (None, command) of its commands."""
    text = page.read_text()
    found = re.compile(r'(?ms)^```\w+ title="([^"]+)"\n(.*?)^```$|^    ((?:[^\n]*\\\n)*[^\n]*)$')
    for match in found.finditer(text):
        if match[1]:
            yield match[1], match[2]
        else:
            yield None, re.sub(r"\\\n\s*", "", match[3])


def smaller(command: str) -> str:
    """Return a command with the sizes appended that make it quick."""
    command = re.sub(r"\s{2,}#.*$", "", command)
    for start, sizes in SIZES.items():
        if command.startswith(start):
            return f"{command} {sizes}"
    return command


def script(page: Path) -> str:
    """Return the page as a shell script."""
    lines = ["set -e"]
    for file, text in blocks(page):
        if file is not None:
            lines.append(f"cat >{file} <<'THE_END'\n{text}\nTHE_END")
        elif not any(text.startswith(name) for name in ELSEWHERE):
            lines += [f"echo + {shlex.quote(text)}", smaller(text)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def followed(tmp_path):
    def follow(page: str, **variables: str) -> Path:
        binaries = tmp_path / "bin"
        binaries.mkdir()
        for name, run in {"python": "", "winnow": "-m winnow"}.items():
            (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {run} "$@"\n')
            (binaries / name).chmod(0o755)
        done = subprocess.run(
            ["bash", "-c", script(TUTORIALS / page)], cwd=tmp_path, capture_output=True, text=True,
            timeout=1800, env=os.environ | variables | {
                "HOME": str(tmp_path),
                "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY),
                "HF_HUB_OFFLINE": "1",
                "JAX_NUM_CPU_DEVICES": "1",
            },
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return tmp_path

    return follow


def test_every_tutorial_states_its_time_and_shows_commands():
    pages = sorted(TUTORIALS.glob("*.md"))
    assert len(pages) == 3
    for page in pages:
        assert re.search(r"\*\*Time:\*\*[^#]*?\b\d+ (CPU )?min", page.read_text()), page
        assert sum(file is None for file, _ in blocks(page)) >= 8, page


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_json_lines(followed):
    home = followed("json_lines.md")
    assert (home / "runs" / "study" / "report" / "index.html").is_file()


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_c4(followed, tmp_path, real_data):
    for module in ("seqio", "tensorflow_datasets", "transformers", "torch"):
        pytest.importorskip(module)
    spiece = real_data / "tokenizer" / "t5-base.spiece.model"
    (tmp_path / "spiece.model").symlink_to(spiece)
    hub_stand_ins.write_t5(tmp_path / "huggingface", "google/flan-t5-small", spiece)
    home = followed("c4.md", HF_HOME=str(tmp_path / "huggingface"))
    for page in ("scores_report", "tiny/report"):
        assert (home / "runs" / "c4" / page / "index.html").is_file()


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_cluster(followed):
    home = followed("cluster.md")
    assert (home / "bucket" / "dataset" / "README.md").is_file()
