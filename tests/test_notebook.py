"""The notebook, executed cell by cell with a tiny judge in the place of the published one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from tests import documented, hub_stand_ins

NOTEBOOK = documented.REPOSITORY / "docs" / "notebooks" / "scores_in_python.ipynb"


def test_the_notebook_runs(tmp_path, real_data, monkeypatch):
    for module in ("pandas", "torch", "transformers", "huggingface_hub"):
        pytest.importorskip(module)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    hub_stand_ins.write_t5(tmp_path, "google/flan-t5-small", spiece_of(real_data))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names: dict = {"__name__": "__main__"}
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: figures.append(save(tmp_path, figures)))
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).replace(
            '"statistics", "numpy", "pyarrow", "optax", "scipy.stats"', '"statistics"'
        )
        with contextlib.redirect_stdout(None):
            exec(compile(source, str(NOTEBOOK), "exec", dont_inherit=True), names)
    assert names["total"] == len(names["documents"]) == len(names["scored"]) > 20
    assert len(names["kept"]) == round(0.2 * len(names["scored"])) and len(names["best"]) == 10
    assert names["scored"]["p_yes"].between(0, 1).all() and len(figures) == 2


def spiece_of(data: Path) -> Path:
    return data / "tokenizer" / "t5-base.spiece.model"


def save(directory: Path, figures: list) -> Path:
    import matplotlib.pyplot as plt

    path = directory / f"figure-{len(figures)}.png"
    plt.savefig(path)
    plt.close("all")
    return path
