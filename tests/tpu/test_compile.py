"""Compiling the real programs: shardings as the rules say, and no activation on the wire.

A lost sharding constraint gives right numbers, slowly. Here the training step and a scoring step
are compiled for eight CPU devices, and what each sends is held against what the parameters explain.
"""

from __future__ import annotations

import dataclasses

import jax
import pytest

from models import config as models
from models import partitioning
from tpu import compile as compiling
from tpu import hlo, programs
from tpu.programs import Cell

TINY = models.T5Config(
    vocab_size=256, d_model=128, d_kv=64, num_heads=2, d_ff=256,
    num_encoder_layers=1, num_decoder_layers=1, attention="xla",
)  # fmt: skip
# Activations of the whole batch [64, 256, 128] are 4 or 8 MB, and 2 or 4 of an fsdp group; the
# largest parameter is 128 kB, the gradient of the relative bias before it is summed up 512 kB.
TRAIN = Cell(
    topology="v5e:2x4", model="tiny", program="train", batch=64, input_length=256,
    target_length=128, fsdp=4,
)  # fmt: skip
SCORE = dataclasses.replace(TRAIN, program="ask_llm", target_length=1, fsdp=8)
LARGEST = 256 * 128 * 4


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.NAMED, "tiny", TINY)


@pytest.fixture(scope="module")
def compiled(eight_devices):
    """(program, devices) -> compiled, on eight CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NAMED, "tiny", TINY)
        programs_of = {}
        for cell in (TRAIN, SCORE):
            mesh = partitioning.make_mesh(cell.mesh_axes, eight_devices)
            programs_of[cell.program] = programs.lower(cell, mesh).compile()
    return programs_of


def bytes_of_parameters(cell: Cell) -> int:
    return 4 * programs.model_of(cell).parameter_count()


def assert_no_activation_is_sent(cost: hlo.Cost) -> None:
    for collective in cost.collectives:
        kind, source = collective.kind, collective.source
        assert collective.largest <= 4 * LARGEST, f"{kind} of {collective.largest} bytes: {source}"


@pytest.mark.parametrize("program", ["train", "ask_llm"])
def test_parameters_lie_where_the_rules_say(program, compiled, eight_devices):
    cell = {"train": TRAIN, "ask_llm": SCORE}[program]
    model = programs.model_of(cell)
    mesh = partitioning.make_mesh(cell.mesh_axes, eight_devices)
    expected = partitioning.param_shardings(model, mesh)
    arguments = compiled[program].input_shardings[0][0]
    found = arguments.params if program == "train" else arguments
    jax.tree.map(
        lambda shape, want, have: have.is_equivalent_to(want, len(shape.shape)) or pytest.fail(
            f"{shape.shape}: {have.spec} instead of {want.spec}"
        ),
        model.shapes(), expected, found,
    )  # fmt: skip
    if program == "train":  # and come back there
        after = compiled[program].output_shardings[0].params
        jax.tree.map(lambda a, b: a.is_equivalent_to(b, 3) or pytest.fail(f"{a} {b}"), found, after)


@pytest.mark.parametrize("program", ["train", "ask_llm"])
def test_what_eight_devices_send_is_explained_by_the_parameters(program, compiled):
    cell = {"train": TRAIN, "ask_llm": SCORE}[program]
    cost = hlo.cost(compiled[program].as_text())
    assert_no_activation_is_sent(cost)
    sent = sum(collective.bytes * collective.count for collective in cost.collectives)
    whole = bytes_of_parameters(cell)
    # Scoring gathers every parameter at most once and a half: some are gathered in float32, the
    # bottom layers' relative biases twice. Training gathers them for both passes, and sums
    # gradients over fsdp and, of a quarter of them, over data.
    low, high = (0.3, 1.5) if program == "ask_llm" else (1.0, 5.0)
    assert low * whole <= sent <= high * whole, f"{sent / whole:.2f} times the parameters"


def test_results_are_kept_for_the_code_that_was_compiled(tmp_path, monkeypatch):
    pytest.importorskip("libtpu")
    source = tmp_path / "code" / "model.py"
    source.parent.mkdir()
    monkeypatch.setattr(compiling, "_SOURCES", (str(source.parent),))

    def key(code: str) -> str:
        source.write_text(code)
        compiling.versions.cache_clear()
        return compiling.key_of(SCORE)

    try:
        kept = compiling.Result(SCORE, {}, error="as it was")
        first = key("x = 1")
        (tmp_path / f"{first}.json").write_text(kept.to_json())
        assert compiling.run_cell(SCORE, tmp_path) == kept
        assert key("x = 2") != first
        assert key("x = 1") == first
    finally:
        compiling.versions.cache_clear()
