"""Where the real data is, and what is skipped without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real corpora and vocabularies; the tests that want it skip without it."""
    path = Path(os.environ.get("WINNOW_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set WINNOW_DATA to its directory")
    return path


@pytest.fixture(scope="session")
def t5_vocabulary_file(real_data: Path) -> Path:
    return real_data / "tokenizer" / "t5-base.spiece.model"
