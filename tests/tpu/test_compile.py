"""Compiled programs: parameters are sharded by the rules, and no activations are communicated.

A lost sharding constraint makes a program slow but not wrong. The training step and a scoring step
are compiled for eight CPU devices, and their communication is compared with what their parameters
require.
"""

from __future__ import annotations

import dataclasses

import jax
import pytest

from models import config as models
from models import flops, partitioning, published
from tpu import compile as compiling
from tpu import hlo, programs
from tpu.programs import Variant

TINY = models.T5Config(
    vocab_size=256, d_model=128, d_kv=64, num_heads=2, d_ff=256,
    num_encoder_layers=1, num_decoder_layers=1, attention="xla",
)  # fmt: skip
# Activations of the whole batch [64, 256, 128] are 4 or 8 MB, and 2 or 4 of an fsdp group; the
# largest parameter is 128 kB, the gradient of the relative bias before it is summed up 512 kB.
TRAIN = Variant(
    topology="v5e:2x4", model="tiny", program="train", batch=64, input_length=256,
    target_length=128, fsdp=4,
)  # fmt: skip
SCORE = dataclasses.replace(TRAIN, program="ask_llm", target_length=1, fsdp=8)
LARGEST = 256 * 128 * 4


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(published.NAMED, "tiny", TINY)


@pytest.fixture(scope="module")
def compiled(eight_devices):
    """Return the programs compiled for eight CPU devices, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.NAMED, "tiny", TINY)
        programs_of = {}
        for variant in (TRAIN, SCORE):
            mesh = partitioning.make_mesh(variant.mesh_axes, eight_devices)
            programs_of[variant.program] = programs.trace(variant, mesh).lower().compile()
    return programs_of


def bytes_of_parameters(variant: Variant) -> int:
    return 4 * programs.model_of(variant).parameter_count()


def assert_no_activation_is_sent(cost: hlo.Cost) -> None:
    for collective in cost.collectives:
        kind, source = collective.kind, collective.source
        assert collective.largest <= 4 * LARGEST, f"{kind} of {collective.largest} bytes: {source}"


@pytest.mark.parametrize("program", ["train", "ask_llm"])
def test_parameters_are_sharded_by_the_rules(program, compiled, eight_devices):
    variant = {"train": TRAIN, "ask_llm": SCORE}[program]
    model = programs.model_of(variant)
    mesh = partitioning.make_mesh(variant.mesh_axes, eight_devices)
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
def test_communication_is_explained_by_the_parameters(program, compiled):
    variant = {"train": TRAIN, "ask_llm": SCORE}[program]
    cost = hlo.cost(compiled[program].as_text())
    assert_no_activation_is_sent(cost)
    sent = sum(collective.bytes * collective.count for collective in cost.collectives)
    whole = bytes_of_parameters(variant)
    # Scoring gathers every parameter at most once and a half: some are gathered in float32, the
    # bottom layers' relative biases twice. Training gathers them for both passes, and sums
    # gradients over fsdp and, of a quarter of them, over data.
    low, high = (0.3, 1.5) if program == "ask_llm" else (1.0, 5.0)
    assert low * whole <= sent <= high * whole, f"{sent / whole:.2f} times the parameters"


@pytest.mark.parametrize("attention", ["xla", "pallas"])
@pytest.mark.parametrize("variant", [TRAIN, SCORE], ids=lambda variant: variant.program)
def test_executed_flops_do_not_depend_on_the_mesh(variant, attention, eight_devices):
    executed = []
    for fsdp, tensor in ((1, 1), (4, 1), (2, 2)):
        changed = dataclasses.replace(
            variant, fsdp=fsdp, tensor=tensor, settings=(("attention", attention),)
        )
        mesh = partitioning.make_mesh(changed.mesh_axes, eight_devices)
        executed.append(flops.traced_flops(programs.trace(changed, mesh).jaxpr))
    assert executed[0] == executed[1] == executed[2] > 0
    plain = programs.model_flops(variant)
    if variant.program == "train":  # recomputes what remat="projections" does not save
        assert plain < executed[0] < 4 / 3 * plain
    else:  # absorbs cross-attention
        assert executed[0] < plain


def test_an_optimizer_is_given_by_its_name(eight_devices):
    mesh = partitioning.make_mesh(TRAIN.mesh_axes, eight_devices)
    adamw = programs.trace(dataclasses.replace(TRAIN, train=(("optimizer", "AdamW"),)), mesh)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(adamw.in_avals[0][0]))
    whole = bytes_of_parameters(TRAIN)
    assert 3 * whole <= held < 3.01 * whole  # parameters and the two means
    with pytest.raises(programs.ProgramError, match="AdamW"):
        programs.trace(dataclasses.replace(TRAIN, train=(("optimizer", "Adam"),)), mesh)


@pytest.mark.parametrize(
    ("model", "program", "length", "trips"),
    [
        ("qwen3_0_6b", "train", 2048, 2.5),  # 1, 2, 3 and 4 blocks of 512
        ("qwen3_0_6b", "train", 512, 1.0),
        ("qwen3_0_6b", "ask_llm", 0, 1.0),
        ("tiny", "train", 2048, None),  # the encoder's rows are not causal
    ],
)
def test_attention_loops_are_those_of_one_document(model, program, length, trips):
    variant = Variant(
        topology="v5e:2x4", model=model, program=program, batch=64, target_length=length
    )
    assert programs.attention_trips(variant) == trips


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
        assert compiling.run_variant(SCORE, tmp_path) == kept
        assert key("x = 2") != first
        assert key("x = 1") == first
    finally:
        compiling.versions.cache_clear()
