"""Row length, batch and dtype by platform."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from pruning.scores.model import engine, platform_defaults
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.platform_defaults import PLATFORMS, choose_batch_rows, choose_row_length
from pruning.store.manifest import ConfigurationChanged


def test_a_batch_has_the_platforms_tokens_on_every_device():
    sizes = itertools.product(PLATFORMS, (1, 2, 8), (1, 4), (1, 2), (128, 512, 1000, 1024, 4096))
    for platform, data, fsdp, tensor, row_length in sizes:
        axes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        rows = choose_batch_rows(None, row_length, platform, axes)
        sharded = fsdp * tensor > 1
        wanted = PLATFORMS[platform].sharded_tokens if sharded else PLATFORMS[platform].tokens
        assert rows % (data * fsdp) == 0
        each = rows * row_length / (data * fsdp * tensor)
        assert wanted - row_length / tensor < each <= max(wanted, row_length / tensor)
        assert choose_batch_rows(24, row_length, platform, axes) == 24


def test_a_host_of_eight_v5e_chips_gets_the_rows_of_the_table():
    """8 rows of 512 a chip, 16 with sharded parameters: the fastest of docs/tpu.md."""
    copied, sharded = {"data": 8, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 8, "tensor": 1}
    assert choose_batch_rows(None, 512, "tpu", copied) == 64
    assert choose_batch_rows(None, 512, "tpu", sharded) == 128
    assert choose_batch_rows(None, 1024, "gpu", {"data": 1, "fsdp": 1, "tensor": 1}) == 16


def test_rows_hold_the_longest_window():
    assert choose_row_length(None, 300, "cpu") == 512
    assert choose_row_length(None, 592, "cpu") == 640
    assert choose_row_length(None, 592, "gpu") == 1024
    assert choose_row_length(2048, 592, "cpu") == 2048


@pytest.mark.parametrize(
    "line, found",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_instructions_are_read_from_the_cpus_flags(tmp_path, monkeypatch, line, found):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nbugs\t\t: bf16\n{line}\n")
    monkeypatch.setattr(platform_defaults, "_CPUINFO", file)
    assert platform_defaults.cpu_has_bfloat16.__wrapped__() is found
    monkeypatch.setattr(platform_defaults, "_CPUINFO", tmp_path / "none")
    assert not platform_defaults.cpu_has_bfloat16.__wrapped__()


@pytest.fixture
def on(monkeypatch):
    """A function that makes this CPU a platform with other defaults."""

    def platform(row_length: int, tokens: int, bfloat16: bool) -> None:
        defaults = platform_defaults.Platform(row_length, tokens, tokens)
        monkeypatch.setitem(PLATFORMS, "cpu", defaults)
        monkeypatch.setattr(platform_defaults, "cpu_has_bfloat16", lambda: bfloat16)

    return platform


def test_a_run_continues_on_another_platform_as_it_began(
    corpus_path, model_path, tmp_path, on, capsys
):
    """Row length and dtype are those that the run began with; the batch is the new platform's."""
    given = ScoreConfig(
        corpus=str(corpus_path),
        output=str(tmp_path / "alone"),
        scorer=Likelihood("causal", window=24, overlap=10),
        model=str(model_path),
        tokenizer="corpus",
        compilation_cache=str(tmp_path.parent / "compiled"),
    )
    explicit = dataclasses.replace(given, row_length=64, batch_rows=8, dtype="float32")
    alone = engine.run(explicit)
    assert alone is not None
    shared = dataclasses.replace(given, output=str(tmp_path / "shared"), workers=2)
    on(64, 64, bfloat16=False)
    assert engine.run(dataclasses.replace(shared, worker=1)) is None
    on(128, 128, bfloat16=True)
    scores = engine.run(dataclasses.replace(shared, worker=0))
    assert scores is not None

    # The first worker's batches were those of the explicit settings, on which the last bits depend.
    file = scores.manifest.shards[1].file
    assert (Path(explicit.output) / file).read_bytes() == (tmp_path / "shared" / file).read_bytes()
    for shard in range(scores.num_shards):
        a, b = (x.read(shard)["nll"].to_numpy() for x in (alone, scores))
        np.testing.assert_allclose(b, a, rtol=1e-5)
    assert scores.manifest.config == alone.manifest.config
    assert scores.manifest.config["dtype"] == "float32"
    assert 64 in scores.manifest.config["row_lengths"].values()
    measured = json.loads((tmp_path / "shared" / "measured.json").read_text())
    assert measured["run"] in capsys.readouterr().err.replace("\n", " ")
    assert "float32, batches of" in measured["run"]

    other = dataclasses.replace(shared, dtype="bfloat16")
    with pytest.raises(ConfigurationChanged, match="dtype"):
        engine.run(other)
