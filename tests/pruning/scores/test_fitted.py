"""One model per score set, also of two processes that fit at the same time."""

from __future__ import annotations

import dataclasses
import os

import pyarrow as pa
import pytest

from pruning.scores.fitted import fit_once
from pruning.store.build import Build


@dataclasses.dataclass(frozen=True)
class Content:
    content: bytes

    def to_bytes(self) -> bytes:
        return self.content


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_of_two_that_fit_at_once_both_use_the_model_of_the_first(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError("not supported")

        monkeypatch.setattr(os, "link", refuse)
    schema = pa.schema([("doc_id", pa.int64())])
    first, second = (Build(tmp_path / "a", "scores", {}, {}, 1, schema) for _ in range(2))
    own = b"first\n\x00\nmodel", {"by": "first"}
    found = []

    def slower():
        found.append(fit_once(first, lambda: (Content(own[0]), own[1])))
        return Content(b"second"), {"by": "second"}

    assert fit_once(second, slower) == own
    assert found == [own]

    def never():
        raise AssertionError

    assert fit_once(second, never) == own
    assert not list((tmp_path / "a" / "unfinished").glob("*.tmp"))
