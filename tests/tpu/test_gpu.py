"""GPUs as targets: what an HLO text says that a program moves, and real programs if CUDA's
compiler is installed."""

# ruff: noqa: E501 - lines of HLO

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpu import gpu_hlo, targets
from tpu.chips import Topology, TopologyError
from tpu.gpus import GPUS, Machine

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100"]
HLO = """\
HloModule jit_f, is_scheduled=true

%sliced (p0: bf16[4,256,512], p1: s32[]) -> bf16[256,512] {
  %p0 = bf16[4,256,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,256,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,512}
  ROOT %layer = bf16[256,512]{1,0} bitcast(%cut)
}

%looked_up (table: bf16[1000,256], ids: s32[64,1]) -> f32[64,256] {
  %table = bf16[1000,256]{1,0} parameter(0)
  %ids = s32[64,1]{1,0} parameter(1)
  %rows = bf16[64,256]{1,0} gather(%table, %ids), offset_dims={1}
  ROOT %wide = f32[64,256]{1,0} convert(%rows)
}

%written (stack: f32[8,64,512], new: f32[1,64,512], at: s32[]) -> f32[8,64,512] {
  %stack = f32[8,64,512]{2,1,0} parameter(0)
  %new = f32[1,64,512]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %update = f32[8,64,512]{2,1,0} dynamic-update-slice(%stack, %new, %at, %none, %none)
}

%multiplied (x: bf16[64,256], y: bf16[256,512]) -> bf16[64,512] {
  %x = bf16[64,256]{1,0} parameter(0)
  %y = bf16[256,512]{1,0} parameter(1)
  ROOT %dot = bf16[64,512]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (weights: bf16[4,256,512], i: s32[], a: bf16[64,256], t: bf16[1000,256], n: s32[64,1], s: f32[8,64,512], u: f32[1,64,512], shard: bf16[32,512], q: bf16[2,128,4,64]) -> bf16[64,512] {
  %weights = bf16[4,256,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %a = bf16[64,256]{1,0} parameter(2)
  %t = bf16[1000,256]{1,0} parameter(3)
  %n = s32[64,1]{1,0} parameter(4)
  %s = f32[8,64,512]{2,1,0} parameter(5)
  %u = f32[1,64,512]{2,1,0} parameter(6)
  %shard = bf16[32,512]{1,0} parameter(7)
  %q = bf16[2,128,4,64]{3,2,1,0} parameter(8)
  %gather-start = (bf16[32,512]{1,0}, bf16[256,512]{1,0}) all-gather-start(%shard), replica_groups=[1,8]<=[8], dimensions={0}
  %layer_fusion = bf16[256,512]{1,0} fusion(%weights, %i), kind=kLoop, calls=%sliced
  %rows_fusion = f32[64,256]{1,0} fusion(%t, %n), kind=kLoop, calls=%looked_up
  %gather-done = bf16[256,512]{1,0} all-gather-done(%gather-start)
  %stacked = f32[8,64,512]{2,1,0} fusion(%s, %u, %i), kind=kLoop, calls=%written
  %sum = bf16[64,256]{1,0} all-reduce(%a), replica_groups=[1,8]<=[8]
  %alone = bf16[64,256]{1,0} all-reduce(%a), replica_groups=[8,1]<=[8]
  %attended = (bf16[2,128,4,64]{3,2,1,0}, f32[2,4,128]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/fused_attention/pallas_call"}
  %lt = (bf16[64,512]{1,0}, s8[33554432]{0}) custom-call(%a, %gather-done), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[64,512]{1,0} fusion(%a, %layer_fusion), kind=kCustom, calls=%multiplied
}
"""


def test_bytes_flops_and_kinds_of_operations():
    found = {each.name: each for each in gpu_hlo.operations(HLO, H100)}
    layer, rows = 256 * 512 * 2, 64 * 256
    assert (found["layer_fusion"].kind, found["layer_fusion"].bytes) == ("copies", 2 * layer + 4)
    # Of a table the rows that are looked up, of a stack the part that is written.
    assert found["rows_fusion"].bytes == rows * 2 + 64 * 4 + rows * 4
    assert found["stacked"].bytes == 2 * 64 * 512 * 4 + 4
    for product in ("out", "lt"):
        assert found[product].kind == "products"
        assert found[product].flops == 2 * 64 * 256 * 512
        assert found[product].bytes == 64 * 256 * 2 + layer + 64 * 512 * 2
    attended = found["attended"]
    assert attended.kind == "attention"
    assert attended.flops == 2 * 2 * 2 * 4 * 128 * 128 * 64
    assert attended.bytes == 4 * 2 * 128 * 4 * 64 * 2 + 2 * 4 * 128 * 4
    assert sum(gpu_hlo.traffic(list(found.values())).values()) == sum(
        each.bytes for each in found.values() if not each.is_collective
    )


def test_a_collective_overlaps_with_what_runs_between_its_start_and_end():
    found = {each.name: each for each in gpu_hlo.operations(HLO, H100)}
    gather = found["gather-start"]
    assert gather.bytes == 256 * 512 * 2
    between = found["layer_fusion"].seconds + found["rows_fusion"].seconds
    assert gather.exposed == pytest.approx(gather.seconds - between)
    assert found["sum"].exposed == found["sum"].seconds > 0
    assert "alone" not in found
    total = gpu_hlo.roofline(list(found.values()))
    assert total["communication"] == pytest.approx(gather.exposed + found["sum"].seconds)
    ways = gpu_hlo.collectives(list(found.values()))["all-gather"]
    assert sum(ways.values()) == pytest.approx(gather.bytes, abs=2)


def test_a_roofline_is_the_slower_of_memory_and_arithmetic():
    for each in gpu_hlo.operations(HLO, H100):
        if not each.is_collective:
            assert each.seconds >= each.bytes / (H100.bandwidth * H100.stream)
    slow = dataclasses.replace(H100, peak=1e9)
    out = next(each for each in gpu_hlo.operations(HLO, slow) if each.name == "out")
    assert out.seconds == pytest.approx(2 * 64 * 256 * 512 / (1e9 * slow.product))


def test_targets_by_name():
    assert targets.parse("h100:8") == Machine("h100", 8)
    assert targets.parse("v5e:2x4") == Topology.parse("v5e:2x4")
    for wrong in ("h100", "h100:0", "h100:16", "h100:2x4", "a200:8", "gpu"):
        with pytest.raises(TopologyError, match="h100:8"):
            targets.parse(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:2", "a100:1"])
def test_programs_compile_without_spills_and_without_quadratic_arrays(topology, tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the extra gpu_compile is not installed")
    command = [
        sys.executable, "-m", "tpu.compile", "--topology", topology, "--model", "t5_v1_1_small",
        "--program", "train", "--batch", "16", "--input_length", "512", "--target_length", "128",
        "--results", str(tmp_path), "--json",
    ]  # fmt: skip
    told = subprocess.run(
        [*command, "--set", "num_encoder_layers=2", "--set", "num_decoder_layers=2"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    result = json.loads(told.stdout)
    assert set(result["kernels"]) == set(gpu_hlo.KERNELS)
    assert all(kernel["spilled"] == 0 for kernel in result["kernels"].values())
    assert result["traffic"]["attention"] < result["traffic"]["products"]
    assert result["estimate"]["step_seconds"] == pytest.approx(sum(result["roofline"].values()))
