"""The Dockerfile: what it names exists, and is what docs/how_to/images.md and the lock file say."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = (REPOSITORY / "tpu" / "templates" / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
BUILD = re.compile(r"docker build --file (\S+) --build-arg EXTRAS=(\S+) --tag winnow:(\w+) \.")


def test_documented_builds_name_the_file_and_extras_that_exist():
    builds = BUILD.findall((REPOSITORY / "docs" / "how_to" / "images.md").read_text())
    assert builds == BUILD.findall(DOCKERFILE)
    assert [tag for _, _, tag in builds] == ["cpu", "gpu", "tpu"]
    (default,) = re.findall(r"^ARG EXTRAS=(\w+)$", DOCKERFILE, re.MULTILINE)
    for file, extra, _ in [*builds, ("tpu/templates/Dockerfile", default, "")]:
        assert (REPOSITORY / file).is_file()
        assert extra in PROJECT["optional-dependencies"]


def test_copied_files_exist_and_reach_the_build():
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    for name in [name for line in copied for name in line.split()]:
        assert (REPOSITORY / name).exists(), name
        assert name == "." or not any(fnmatch(name, pattern) for pattern in ignored), name
    for name in ("configs", "evaluation", "models", "pruning", "tpu"):
        assert not any(fnmatch(name, pattern) for pattern in ignored), name


def test_what_the_build_of_the_package_needs_is_copied_before_it():
    first = DOCKERFILE[: DOCKERFILE.index("RUN pip")]
    needed = ["pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "requirements.lock"]
    assert all(name in first.split() for name in needed)


def test_python_is_that_of_the_lock_file():
    (version,) = re.findall(r"^FROM python:([\d.]+)-slim$", DOCKERFILE, re.MULTILINE)
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert f"on Python {version}:" in lock
    assert "--constraint requirements.lock" in DOCKERFILE
