"""Commands of the pages and of the headers of configuration files, as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "tpu/README.md", "configs/score/data_efficient/README.md")
VARIABLES = {
    "GKE": "--name judge --project p --zone z --cluster c --image i --topology v5e:2x4 --slices 8",
    "SLURM": "--name judge --partition gpu --directory /shared/winnow --nodes 8 --gpus 8",
    "V": "t5-base.spiece.model",
    "PROJECT": "p",
    "ZONE": "z",
    "BUCKET": "b",
    "size": "xl",
    "PLACE": "bucket",
    "PWD": ".",
}


def pages() -> list[str]:
    """Return the paths of all Markdown pages that show commands."""
    docs = (REPOSITORY / "docs").rglob("*.md")
    return [*PAGES, *sorted(str(file.relative_to(REPOSITORY)) for file in docs)]


def configs() -> list[str]:
    """Return the paths of all gin files with a command of their own."""
    return sorted(
        str(file.relative_to(REPOSITORY))
        for file in (REPOSITORY / "configs").rglob("*.gin")
        if file.parent.name != "models"  # included by others
    )


def commands(file: str) -> list[str]:
    """Return the commands of a page or of a header, in order, with continued lines joined.

    Comments at their ends are removed. In Markdown, commands are lines of indented blocks.
    """
    lines = (REPOSITORY / file).read_text().splitlines()
    if file.endswith(".gin"):
        lines = [re.sub(r"^# ?", "", line) for line in lines if line.startswith("#")]
    found: list[str] = []
    joined = ""
    for line in lines:
        text = line.strip()
        begins = line.startswith((" ", "\t")) and text.startswith(("python ", "winnow "))
        if joined or begins:
            joined += text.removesuffix("\\")
            if not text.endswith("\\"):
                found.append(re.sub(r"\s{2,}#.*$", "", joined))
                joined = ""
    return found


def documented() -> list[tuple[str, str]]:
    """Return (file, command) of all pages and headers."""
    return [(file, command) for file in (*pages(), *configs()) for command in commands(file)]


def words_of(command: str) -> list[str]:
    """Return the words of a command after the shell has expanded its variables."""
    for name, value in VARIABLES.items():
        command = re.sub(rf"\$(?:{name}\b|\{{{name}\}})", value, command)
    return shlex.split(command)
