"""gin in, dataclasses out; every slip of the pen is an error that names its neighbour."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from pruning import configuration
from pruning.configuration import ConfigurationError


@dataclasses.dataclass(frozen=True)
class Probe:
    temperature: float = 1.0
    answers: tuple[str, ...] = ("yes",)


@dataclasses.dataclass(frozen=True)
class Job:
    corpus: str
    probe: Probe = dataclasses.field(default_factory=Probe)
    rows: int = 8
    order: typing.Literal["top", "bottom"] = "top"
    evals: typing.Mapping[str, Probe] = dataclasses.field(default_factory=dict)
    within: str | None = None


CLASSES = {"Job": Job, "Probe": Probe}
FILE = """
CORPUS = 'a'
Job.corpus = %CORPUS
Job.probe = @Probe()
Probe.temperature = 2
Job.evals = {'hot': @hot/Probe()}
hot/Probe.temperature = 9
"""


@pytest.fixture
def build(tmp_path):
    file = tmp_path / "job.gin"
    file.write_text(FILE)

    def make(*arguments: str) -> Job:
        bindings = configuration.split_bindings(arguments)
        return configuration.build("Job", CLASSES, [str(file)], bindings)

    return make


def test_files_macros_scopes_and_flags(build):
    job = build("--gin.CORPUS=runs/c4-en", "--gin.Job.rows=16", "--gin.Probe.answers=('oui','si')")
    assert job == Job(
        corpus="runs/c4-en",
        probe=Probe(2.0, ("oui", "si")),
        rows=16,
        evals={"hot": Probe(9.0, ("oui", "si"))},
    )
    assert type(job) is Job


def test_a_flag_may_replace_a_parameter_that_used_a_macro(build):
    assert build("--gin.Job.corpus=elsewhere").corpus == "elsewhere"


@pytest.mark.parametrize("value", ["None", "'x y'", "x y", "gs://bucket/a-b.c"])
def test_bare_words_are_strings_and_literals_stay_literals(build, value):
    expected = {"None": None, "'x y'": "x y"}.get(value, value)
    assert build(f"--gin.Job.within={value}").within == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin.CORPSE=1", "nothing uses the macro 'CORPSE'.*did you mean 'CORPUS'"),
        ("--gin.Job.corpus=%CORPSE", "'CORPSE' is used but not set.*did you mean 'CORPUS'"),
        ("--gin.Job.row=1", "doesn't have a parameter named 'row'"),
        ("--gin.Jobb.rows=1", "Jobb"),
        ("--gin.Job.rows=many", "Job.rows must be int, not 'many'"),
        ("--gin.Job.rows=True", "Job.rows must be int, not True"),
        ("--gin.Job.order=tpo", "must be one of bottom, top, not 'tpo'.*did you mean 'top'"),
        ("--gin.hot/Probe.temperature=cold", "Probe.temperature must be float, not 'cold'"),
        ("--gin.Job.within=3", "Job.within must be .*, not 3"),
        ("--corpus=x", "unknown argument '--corpus=x'.*--gin.NAME=VALUE"),
        ("--gin.CORPUS", "unknown argument"),
    ],
)
def test_slips_are_errors(build, argument, message):
    with pytest.raises(ConfigurationError, match=message):
        build(argument)


def test_a_required_value_is_asked_for():
    with pytest.raises(ConfigurationError, match="It needs: corpus"):
        configuration.build("Job", CLASSES)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigurationError, match=r"nowhere\.gin"):
        configuration.build("Job", CLASSES, ["nowhere.gin"])
