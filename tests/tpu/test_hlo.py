"""Costs of HLO programs: operations count as often as they run; unknown counts are errors."""

from __future__ import annotations

import pytest

from tpu import hlo
from tpu.chips import CHIPS, Topology, TopologyError

# A loop of 3 trips around a loop of `inner`, in the TPU compiler's own dialect.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%fused_inner (p.0: f32[8,128]) -> f32[8,128] {{
  %p.0 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %tanh.1 = f32[8,128]{{1,0:T(8,128)}} tanh(%p.0), backend_config={{"estimated_cycles":"999"}}
}}

%inner_condition (c.0: (s32[], f32[8,128])) -> pred[] {{
  %c.0 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %c.1 = s32[]{{:T(128)}} get-tuple-element(%c.0), index=0
  %c.2 = s32[]{{:T(128)}} {bound}
  ROOT %c.3 = pred[]{{:T(512)}} compare(%c.1, %c.2), direction=LT
}}

%inner_body (b.0: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %b.0 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %b.1 = s32[]{{:T(128)}} get-tuple-element(%b.0), index=0
  %b.2 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%b.0), index=1
  %b.3 = s32[]{{:T(128)}} constant({step})
  %b.4 = s32[]{{:T(128)}} add(%b.1, %b.3)
  %b.5 = f32[8,128]{{1,0:T(8,128)}} fusion(%b.2), kind=kLoop, calls=%fused_inner, \
metadata={{op_name="jit(step)/while/body/tanh"}}, backend_config={{"estimated_cycles":"100"}}
  ROOT %b.6 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%b.4, %b.5)
}}

%outer_condition (o.0: (s32[], f32[8,128])) -> pred[] {{
  %o.0 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %o.1 = s32[]{{:T(128)}} get-tuple-element(%o.0), index=0
  %o.2 = s32[]{{:T(128)}} constant(3)
  ROOT %o.3 = pred[]{{:T(512)}} compare(%o.1, %o.2), direction=LT
}}

%outer_body (u.0: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %u.0 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %u.1 = s32[]{{:T(128)}} get-tuple-element(%u.0), index=0
  %u.2 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%u.0), index=1
  %u.3 = s32[]{{:T(128)}} constant(1)
  %u.4 = s32[]{{:T(128)}} add(%u.1, %u.3)
  %u.5 = s32[]{{:T(128)}} constant({first})
  %u.6 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%u.5, %u.2)
  %u.7 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) while(%u.6), \
condition=%inner_condition, body=%inner_body, metadata={{op_name="jit(step)/inner"}}
  %u.8 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%u.7), index=1
  %u.9 = f32[8,128]{{1,0:T(8,128)}} custom-call(%u.8), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(step)/while/body/my_kernel"}}
  ROOT %u.10 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%u.4, %u.9)
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %m.1 = s32[]{{:T(128)}} constant(0)
  %m.2 = s32[]{{:T(128)}} copy(%m.1)
  %m.3 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%m.2, %x)
  %m.4 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) while(%m.3), \
condition=%outer_condition, body=%outer_body
  %m.5 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%m.4), index=1
  ROOT %m.6 = f32[8,128]{{1,0:T(8,128)S(1)}} copy(%m.5), backend_config={{"estimated_cycles":"7"}}
}}
"""


def program(bound="constant(5)", step=1, first=0):
    return PROGRAM.format(bound=bound, step=step, first=first)


@pytest.mark.parametrize(
    ("first", "bound", "step", "trips"), [(0, 5, 1, 5), (2, 5, 1, 3), (0, 5, 2, 3), (5, 5, 1, 0)]
)
def test_operations_in_loops_are_counted_by_their_trips(first, bound, step, trips):
    cost = hlo.cost(program(f"constant({bound})", step, first))
    assert cost.cycles == 3 * trips * 100 + 7  # the cycles inside the fusion are not counted again
    assert cost.kernels == (hlo.Kernel("my_kernel", ("u.9",), 3),)
    # A fusion reads and writes 4 kB; the last copy writes to on-chip memory, and only reads.
    assert cost.bytes == 3 * trips * 2 * 4096 + 4096


@pytest.mark.parametrize(
    "change",
    [
        {"bound": "get-tuple-element(%c.0), index=0"},  # the counter itself
        {"step": 0},
        {"bound": 'custom-call(), custom_call_target="Bound"'},
    ],
)
def test_an_unknown_trip_count_is_an_error_that_names_the_loop(change):
    with pytest.raises(hlo.HloError, match=r"u\.7.*jit\(step\)/inner.*trip count"):
        hlo.cost(program(**change))


def test_metadata_of_a_kernel_may_span_lines():
    said = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block\\": 512}"\n}}, '
    text = program()
    named = 'metadata={op_name="jit(step)/while/body/my_kernel"}'
    spread = text.replace(named, said + named)
    assert "\n}}, metadata" in spread
    assert hlo.cost(spread) == hlo.cost(text)


COLLECTIVES = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (s.0: bf16[16,128]) -> bf16[128,128] {
  %s.0 = bf16[16,128]{1,0} parameter(0)
  ROOT %gather.1 = bf16[128,128]{1,0} all-gather(%s.0), channel_id=1, dimensions={0}
}

%beside (t.0: bf16[16,128]) -> bf16[128,128] {
  %t.0 = bf16[16,128]{1,0} parameter(0)
  ROOT %gather.2 = bf16[128,128]{1,0} all-gather(%t.0), channel_id=1, dimensions={0}
}

%all-reduce-scatter.3 (r.0: f32[128,128]) -> f32[16,128] {
  %r.0 = f32[128,128]{1,0} parameter(0)
  %reduce.1 = f32[128,128]{1,0} all-reduce(%r.0), channel_id=2, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[16,128]{1,0} dynamic-slice(%reduce.1, %zero, %zero)
}

ENTRY %main (x: bf16[16,128], y: f32[128,128]) -> f32[16,128] {
  %x = bf16[16,128]{1,0} parameter(0)
  %y = f32[128,128]{1,0} parameter(1)
  %async-collective-start = bf16[128,128]{1,0} fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = bf16[128,128]{1,0} fusion(%x), kind=kCustom, calls=%beside
  %scatter = f32[16,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  %both = (f32[128,128]{1,0}, f32[128,128]{1,0}) all-reduce(%y, %y), channel_id=3, \
replica_groups={{0,1},{2,3}}, to_apply=%add
  %begun = (f32[16,128]{1,0}, f32[128,128]{1,0}) all-gather-start(%scatter), channel_id=4
  %done = f32[128,128]{1,0} all-gather-done(%begun)
  %alone = f32[128,128]{1,0} all-reduce(%y), channel_id=5, replica_groups={{0},{1}}, to_apply=%add
  %too = f32[128,128]{1,0} all-reduce(%y), channel_id=6, replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %result = f32[16,128]{1,0} copy(%scatter)
}
"""


def test_collectives_count_once_per_channel_and_by_whether_they_overlap():
    totals = hlo.totals(hlo.cost(COLLECTIVES).collectives)
    half, whole = 128 * 128 * 2, 128 * 128 * 4
    assert totals == {
        "all-gather": {"synchronous": 0, "asynchronous": half + whole},
        "reduce-scatter": {"synchronous": whole, "asynchronous": 0},
        "all-reduce": {"synchronous": 2 * whole, "asynchronous": 0},
    }


SLICED = """HloModule jit_step, is_scheduled=true

%slice_of_layer (s.0: f32[9,8,128], s.1: s32[]) -> f32[8,128] {
  %s.0 = f32[9,8,128]{2,1,0} parameter(0)
  %s.1 = s32[] parameter(1)
  %s.2 = f32[1,8,128]{2,1,0} dynamic-slice(%s.0, %s.1, %s.1, %s.1)
  ROOT %s.3 = f32[8,128]{1,0} bitcast(%s.2)
}

%layer (l.0: f32[9,8,128], l.1: s32[]) -> f32[8,128] {
  %l.0 = f32[9,8,128]{2,1,0} parameter(0)
  %l.1 = s32[] parameter(1)
  %l.2 = f32[8,128]{1,0} fusion(%l.0, %l.1), kind=kLoop, calls=%slice_of_layer
  ROOT %l.3 = f32[8,128]{1,0} USE
}

ENTRY %main (x: f32[9,8,128], i: s32[]) -> f32[8,128] {
  %x = f32[9,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[8,128]{1,0} fusion(%x, %i), calls=%layer, backend_config={"estimated_cycles":"1"}
}
"""


@pytest.mark.parametrize(
    ("use", "layers"), [("negate(%l.2)", 1), ("fusion(%l.2, %l.0), calls=%negated", 9)]
)
def test_a_slice_inside_of_nested_fusions_reads_only_that_part(use, layers):
    negated = """%negated (n.0: f32[8,128], n.1: f32[9,8,128]) -> f32[8,128] {
  %n.0 = f32[8,128]{1,0} parameter(0)
  %n.1 = f32[9,8,128]{2,1,0} parameter(1)
  ROOT %n.2 = f32[8,128]{1,0} custom-call(%n.0, %n.1)
}

"""
    text = SLICED.replace("USE", use).replace("%layer (", negated + "%layer (")
    assert hlo.cost(text).bytes == (layers + 1) * 4096 + 4  # and the index


@pytest.mark.parametrize(
    ("shape", "size", "in_hbm"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 4096),
        ("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=2*/pred[4]{0})", 20, 8),
        ("u32[]{:S(2)}", 4, 0),
        ("s4[10]{0}", 5, 5),
        ("f8e4m3fn[16]{0}", 16, 16),
    ],
)
def test_sizes_of_shapes(shape, size, in_hbm):
    assert (hlo.size_of(shape), hlo.size_of(shape, "hbm")) == (size, in_hbm)


@pytest.mark.parametrize(
    ("name", "accelerator", "hosts"),
    [
        ("v5e:2x4", "v5litepod-8", 1),
        ("v5e:16x16", "v5litepod-256", 64),
        ("v5p:2x2x1", "v5p-8", 1),
        ("v5p:4x4x4", "v5p-128", 16),
        ("v6e:2x2", "v6e-4", 1),
    ],
)
def test_names_of_slices(name, accelerator, hosts):
    topology = Topology.parse(name)
    assert (topology.accelerator_type, topology.hosts, str(topology)) == (accelerator, hosts, name)


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5p:4x4", "h100:8x8", "v5e:0x4", "v5e:2xx"])
def test_topologies_that_do_not_exist_are_refused(name):
    with pytest.raises(TopologyError, match="v5e:16x16"):
        Topology.parse(name)


def test_the_clocks_are_those_of_the_data_sheets():
    # Peak over FLOPs per cycle: 1.5 GHz for v5e, 1.75 GHz for the others.
    assert [round(chip.clock / 1e9, 2) for chip in CHIPS.values()] == [1.5, 1.75, 1.75]
