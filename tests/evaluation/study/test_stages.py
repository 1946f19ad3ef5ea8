"""Order, urgency, time left, and what counts as finished."""

import pytest

from evaluation.study import stages
from evaluation.study.stages import Note, Stage, StageDirectory


def stage(name, needs=(), cost=1.0, slots=1, argv=("true",), result="none"):
    return Stage(name, tuple(argv), str(result), tuple(needs), cost, slots)


DIAMOND = [stage("d", "bc", 1), stage("b", "a", 5), stage("c", "a", 2), stage("a", cost=3)]


def test_needs_come_first():
    names = [found.name for found in stages.ordered(DIAMOND)]
    assert sorted(names) == list("abcd")
    assert all(names.index(need) < names.index(s.name) for s in DIAMOND for need in s.needs)


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(stages.StudyError, match="'b' needs 'z'"):
        stages.ordered([stage("b", "z")])
    with pytest.raises(stages.StudyError, match="two stages are called 'b'"):
        stages.ordered([stage("b"), stage("b")])
    with pytest.raises(stages.StudyError, match="a -> b -> a"):
        stages.ordered([stage("a", "b"), stage("b", "a")])


def test_urgency_is_the_longest_chain_behind():
    found = stages.urgency(stages.ordered(DIAMOND), lambda s: s.cost)
    assert found == {"a": 9, "b": 6, "c": 3, "d": 1}


@pytest.mark.parametrize(("workers", "expected"), [(1, 11), (2, 9)])
def test_the_schedule_played_through(workers, expected):
    order = stages.ordered(DIAMOND)
    assert stages.seconds_left(order, lambda s: s.cost, {}, workers) == expected


def test_running_stages_and_wide_stages_in_the_schedule():
    left = [stage("b"), stage("c", "b", cost=4), stage("d", cost=2, slots=2)]
    # b still runs for 3 s; d takes both slots, so it waits for c: 3 + 4 + 2.
    assert stages.seconds_left(left, lambda s: s.cost, {"b": 3.0}, workers=2) == 9
    # A stage wider than all workers takes all of them.
    assert stages.seconds_left([stage("d", slots=9, cost=2)], lambda s: s.cost, {}, 2) == 2


def test_what_makes_a_stage_current(tmp_path):
    need = stage("need", result=tmp_path / "need.json")
    (tmp_path / "need.json").write_text("1")
    (tmp_path / "inner.gin").write_text("A = 1")
    (tmp_path / "a.gin").write_text(f"include '{tmp_path / 'inner.gin'}'")
    file = f"--gin_file={tmp_path / 'a.gin'}"
    made = stage("made", ["need"], argv=["true", file], result=tmp_path / "made.json")
    (tmp_path / "made.json").write_text("2")
    records = StageDirectory(tmp_path / "records")
    records.directory.mkdir()

    def note():
        key = stages.key_of(made, [need])
        records.write(made, Note(made.command, key, stages.checksum(made.result), 1.0, 1.0, 1))

    assert records.current(made, [need]) is None  # no note
    note()
    assert records.current(made, [need]).seconds == 1.0

    for change in (
        lambda: (tmp_path / "made.json").write_text("other result"),
        lambda: (tmp_path / "need.json").write_text("other input"),
        lambda: (tmp_path / "inner.gin").write_text("A = 2"),
    ):
        change()
        assert records.current(made, [need]) is None
        note()
        assert records.current(made, [need]) is not None
    other = stage("made", ["need"], argv=["true", file, "x"], result=made.result)
    assert records.current(other, [need]) is None
    (tmp_path / "made.json").unlink()
    assert records.current(made, [need]) is None
