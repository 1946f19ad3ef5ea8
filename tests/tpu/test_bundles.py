"""Cycle counts of kernel schedules."""

from __future__ import annotations

import pytest

from tpu import bundles

SCHEDULE = """
LE: loop exit
     0   :  { %s1 = smov 0 }
   0x1   :  { %s2 = smov 0 }
   0x2 LB: > { %s3_s4 = sphi %s1, %s5 } /* Start region 7 :: Start region 8 */
   0x3   : > { %p9_p0 = scmp.ge.s32.totalorder %s3_s4, 99 }
   0x4   : > { %20 = sbr.rel (%p9_p0) target = $region6 }
   0x5 LB: >> { %v1 = vld [vmem:[%s2] sm:$0xf] } /* Start region 30 :: Start region 31 */
   0x6   : >> { %p9_p1 = scmp.ge.s32.totalorder %s6_s7, 3 }
   0x7   : >> { %21 = sbr.rel (!%p9_p1) target = $region30 }
   0x8   : > { %p10_p2 = scmp.ge.s32.totalorder %s5_s8, 10 /* loop exit test */ }
   0x9   : > { %22 = sbr.rel (!%p10_p2) target = $region7 }
   0xa   :  { %s11 = smov 0 }
"""


def test_bundles_are_counted_by_the_trips_of_their_loops():
    assert bundles.cycles(SCHEDULE) == 3 + 10 * (5 + 3 * 3)


def test_a_backward_branch_may_be_listed_outside_its_loop():
    branch = "{ %21 = sbr.rel (!%p9_p1) target = $region30 }"
    text = SCHEDULE.replace(f">> {branch}", f"> {branch}")
    assert bundles.cycles(text) == 3 + 10 * (6 + 3 * 2)


@pytest.mark.parametrize(
    "change",
    [
        (" 3 }", " %s99 }"),  # a bound that depends on data
        ("(!%p9_p1) target = $region30", "(!%p9_p1) target = $region5"),  # no branch back
    ],
)
def test_a_loop_without_a_bound_is_refused(change):
    with pytest.raises(bundles.BundleError, match=r"loop 1 around bundle 5 has no constant bound"):
        bundles.cycles(SCHEDULE.replace(*change))


def test_a_loop_whose_bound_depends_on_data_runs_as_often_as_given():
    text = SCHEDULE.replace(" 3 }", " %s99 }")
    assert bundles.cycles(text, trips=2.5) == 3 + 10 * (5 + 2.5 * 3)
    assert bundles.cycles(SCHEDULE, trips=2.5) == bundles.cycles(SCHEDULE)
    nested = text.replace(", 10 /* loop exit test */", ", %s98")
    with pytest.raises(bundles.BundleError, match=r"loop 1 around bundle 5 has no constant bound"):
        bundles.cycles(nested, trips=2.5)


def test_code_for_the_first_row_counts_once_per_batch():
    index = "%s3_s4 = sphi %s1, %s5 /* phi copy :: iteration index, stage = 1 */ ;; %s0_s0 = smov 0"
    text = SCHEDULE.replace("%s3_s4 = sphi %s1, %s5", index)
    text = text.replace(
        "%p9_p0 = scmp.ge.s32.totalorder %s3_s4, 99", "%p9_p0 = scmp.eq.s32.totalorder %s3_s4, 0 "
    )
    text = text.replace("(%p9_p0) target = $region6", "(!%p9_p0) target = $region9")
    text = text.replace(
        "10 /* loop exit test */ }", "10 /* loop exit test */ } /* Start/End empty region 9 */"
    )
    assert bundles.cycles(text) == 3 + 10 * (5 + 3 * 3)
    assert bundles.cycles(text, rows=5) == 3 + 10 * 5 + 10 // 5 * 3 * 3
    spilled = text.replace(
        "%p9_p0 = scmp.eq.s32.totalorder %s3_s4,",
        "%8 = sst [smem:[#allocation4_spill]] %s3_s4 ;; %s8_s8 = sld [smem:[#allocation4_spill]] "
        ";; %p9_p0 = scmp.eq.s32.totalorder %s8_s8,",
    )
    assert spilled != text
    assert bundles.cycles(spilled, rows=5) == bundles.cycles(text, rows=5)
    elsewhere = text.replace("scmp.eq.s32.totalorder %s3_s4, 0", "scmp.eq.s32.totalorder %s3_s5, 0")
    assert bundles.cycles(elsewhere, rows=5) == bundles.cycles(text)


def test_text_without_a_schedule_is_refused():
    with pytest.raises(bundles.BundleError, match="no bundles"):
        bundles.cycles("HloModule jit_step\n")


def test_the_kernel_is_found_among_the_files(tmp_path):
    (tmp_path / "1-my_kernel.4-00-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / "1-my_kernel.4-01-final_bundles.txt").write_text(SCHEDULE)
    assert bundles.of_kernel(tmp_path, ["my_kernel.2", "my_kernel.4"]) == 143
    with pytest.raises(bundles.BundleError, match=r"my_kernel\.5"):
        bundles.of_kernel(tmp_path, ["my_kernel.5"])
