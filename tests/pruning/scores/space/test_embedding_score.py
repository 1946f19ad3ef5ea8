"""An embedding score of a user's own, in a module of theirs, through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pruning.store.artifact import load_artifact

REPOSITORY = Path(__file__).resolve().parents[4]
EXAMPLES = REPOSITORY / "docs" / "examples"


def test_the_example_is_named_in_gin_and_needs_no_edit(tmp_path, write, column):
    corpus = write.corpus(tmp_path / "corpus", [["a", "b", "c"], ["d", "e"]])
    random = np.random.default_rng(0)
    vectors = [random.normal(size=(n, 4)).astype(np.float32) for n in (3, 2)]
    write.scores(tmp_path / "vectors", corpus, {"embedding": vectors}, {(0, 1): "empty"})
    subprocess.run(
        [
            sys.executable, "-m", "pruning", "embedding_score",
            f"--gin_file={EXAMPLES / 'axis.gin'}", f"--gin.CORPUS={tmp_path / 'corpus'}",
            f"--gin.EMBEDDINGS={tmp_path / 'vectors'}", f"--gin.OUTPUT={tmp_path / 'out'}",
            "--gin.axis.Axis.component=2",
        ],
        check=True, env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{EXAMPLES}"}, cwd=tmp_path,
    )  # fmt: skip
    scores = load_artifact(tmp_path / "out", "scores")
    joined = np.concatenate(vectors)
    expected = joined[:, 2] / np.linalg.norm(joined, axis=1)
    expected[1] = np.nan
    np.testing.assert_allclose(column(scores, "axis"), expected, rtol=1e-5)
    assert scores.manifest.counts["documents"] == {"empty": 1, "ok": 4}
