"""The lock file: it holds every package that the project asks for, in a version that it allows."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests import documented

requirements = pytest.importorskip("packaging.requirements")


def test_the_lock_satisfies_the_project():
    project = tomllib.loads((documented.REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (documented.REPOSITORY / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hf"], *extras["dev"]]
    checked = 0
    while wanted:
        found = requirements.Requirement(wanted.pop())
        if found.name == project["name"]:
            wanted += [item for extra in found.extras for item in extras[extra]]
            continue
        version = locked[re.sub(r"[-_.]+", "-", found.name).lower()]
        assert found.specifier.contains(version, prereleases=True), (found, version)
        checked += 1
    assert checked > 30
