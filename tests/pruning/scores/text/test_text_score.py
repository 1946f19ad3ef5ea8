"""A text score of a user's own, in a module of theirs, through the command line."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from pruning.scores.content import content_hashes
from pruning.scores.text import text_score
from pruning.scores.text.text_score import TextScoreConfig
from pruning.store.artifact import load_artifact

REPOSITORY = Path(__file__).resolve().parents[4]
EXAMPLES = REPOSITORY / "docs" / "examples"
TEXTS = [["aaaa aaaa aaaa", "a line of its own", ""], ["The cat sat on the mat."]]


def test_the_example_is_named_in_gin_and_needs_no_edit(tmp_path, write, column):
    write.corpus(tmp_path / "corpus", TEXTS)
    subprocess.run(
        [
            sys.executable, "-m", "pruning", "text_score",
            f"--gin_file={EXAMPLES / 'zlib_ratio.gin'}", f"--gin.CORPUS={tmp_path / 'corpus'}",
            f"--gin.OUTPUT={tmp_path / 'out'}", "--gin.TextScore.workers=2",
            "--gin.zlib_ratio.ZlibRatio.level=9",
        ],
        check=True, env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{EXAMPLES}"}, cwd=tmp_path,
    )  # fmt: skip
    scores = load_artifact(tmp_path / "out", "scores")
    texts = [text for shard in TEXTS for text in shard if text]
    expected = [len(zlib.compress(text.encode(), 9)) / len(text.encode()) for text in texts]
    found = column(scores, "zlib_ratio")
    np.testing.assert_allclose(found[~np.isnan(found)], expected, rtol=1e-6)
    assert scores.manifest.counts["documents"] == {"empty": 1, "ok": 3}
    assert scores.manifest.config["score"] == {"class": "ZlibRatio", "level": 9}
    assert len((EXAMPLES / "zlib_ratio.py").read_text().splitlines()) <= 35


@dataclasses.dataclass(frozen=True)
class Odd:
    """Returns one value too few."""

    columns: ClassVar = {"odd": text_score.Column(pa.float32(), "odd")}

    def __call__(self, texts):
        return {"odd": np.zeros(len(texts) - 1)}


def test_a_score_of_the_wrong_shape_is_named(tmp_path, write):
    write.corpus(tmp_path / "corpus", TEXTS)
    config = TextScoreConfig(str(tmp_path / "corpus"), str(tmp_path / "x"), Odd(), workers=1)
    with pytest.raises(ValueError, match="the score gave the column 'odd'"):
        text_score.run(config)
    with pytest.raises(ValueError, match="with parentheses"):
        TextScoreConfig("corpus", "output", Odd)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.list_(pa.uint16())], ids=str)
def test_equal_content_has_equal_hashes(kind):
    values = [[1, 2], [3], [1, 2], []] if pa.types.is_list(kind) else ["ab", "c", "ab", ""]
    array = pa.array(values, kind)
    hashes = content_hashes(array)
    assert hashes[0] == hashes[2] and len(set(hashes.tolist())) == 3
    np.testing.assert_array_equal(content_hashes(array.slice(1, 2)), hashes[1:3])
