"""gin in, dataclasses out; every slip of the pen is an error that names its neighbor."""

from __future__ import annotations

import ast
import dataclasses
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pruning.cli import configuration, recipes
from pruning.cli.configuration import ConfigurationError


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
ROWS = 8
Job.rows = %ROWS
Probe.temperature = 2
Job.evals = {'hot': @hot/Probe()}
hot/Probe.temperature = 9
"""


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gin") / "job.gin"
    file.write_text(FILE)
    return str(file)


@pytest.fixture(scope="module")
def build(gin_file):
    def make(*arguments: str) -> Job:
        bindings = recipes.bindings(arguments)
        return configuration.build("Job", CLASSES, [gin_file], bindings)

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


def test_a_setting_of_what_nothing_uses_is_an_error():
    bindings = recipes.bindings(["--gin.Job.corpus=a", "--gin.Probe.temperature=3"])
    with pytest.raises(ConfigurationError, match=r"no effect.*--gin\.Job\.probe=@Probe\(\)"):
        configuration.build("Job", CLASSES, [], bindings)
    used = ["Job.probe = @Probe()", *bindings]
    assert configuration.build("Job", CLASSES, [], used).probe == Probe(3.0)


def test_a_flag_may_replace_a_parameter_that_used_a_macro(build):
    assert build("--gin.Job.corpus=elsewhere").corpus == "elsewhere"


@pytest.mark.parametrize("value", ["None", "'x y'", "x y", "gs://bucket/a-b.c"])
def test_bare_words_are_strings_and_literals_stay_literals(build, value):
    expected = {"None": None, "'x y'": "x y"}.get(value, value)
    assert build(f"--gin.Job.within={value}").within == expected


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text("[](){}'\"%@=,#\\\n x1/*.", min_size=1)))
@example("data[1]/*,a=b.txt")
@example("it's 50% (new).txt")
@example("1#b")
@example("3")
@example("@home")
@example("None")
@example('#\n""')
@example('""#')
@example("[" * 3000)
def test_the_value_of_what_takes_text_is_text(gin_file, value):
    """Unless it is written as gin writes text or a macro, or as None where that is allowed."""
    for name in ("CORPUS", "Job.within"):
        (binding,) = recipes.bindings([f"--gin.{name}={value}"])
        try:
            job = configuration.build("Job", CLASSES, [gin_file], [binding])
        except ConfigurationError as error:
            refused = ("null character", "is used but not set", "places are local paths")
            assert any(reason in str(error) for reason in refused), error
            continue
        found = job.corpus if name == "CORPUS" else job.within
        try:  # in parentheses, because text with a comment is no value of gin's
            plain = ast.literal_eval(f"({value.strip()})") if "\n" not in value.strip() else 0
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            plain = 0
        allowed = str if name == "CORPUS" else str | None
        expected = plain if isinstance(plain, allowed) else value.strip()
        assert found == expected


def test_a_single_text_is_a_list_of_one(build):
    assert build("--gin.Probe.answers=yes").probe.answers == ("yes",)


@pytest.mark.parametrize("value", ["20%", "0.2", "2e-1"])
def test_a_percentage_is_a_share(build, value):
    assert build(f"--gin.Probe.temperature={value}").probe.temperature == 0.2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin.CORPSE=1", "nothing uses the macro 'CORPSE'.*did you mean 'CORPUS'"),
        ("--gin.Job.corpus=%CORPSE", "'CORPSE' is used but not set.*did you mean 'CORPUS'"),
        ("--gin.Job.row=1", "doesn't have a parameter named 'row'.*did you mean 'rows'"),
        ("--gin.Jobb.rows=1", "Jobb.*did you mean 'Job'"),
        ("--gin.Job.probe=@Prob()", "@Prob.*did you mean 'Probe'"),
        ("--gin.CORPUS=%CORPUS", "'CORPUS' stands for itself"),
        ("--gin.ROWS=many", r"ROWS \(of Job.rows\) must be int, not 'many'"),
        ("--gin.Job.rows=1e999", "Job.rows must be int, not inf"),
        ("--gin.a b=1", "unknown argument"),
        ("--gin.=1", "unknown argument"),
        ("--gin.CORPUS=hf://owner/name", "Job.corpus is 'hf://owner/name': places are local paths"),
        ("--gin.Job.within=https://x.org/a", "Job.within is 'https://x.org/a': places are local"),
        ("--gin.CORPUS=hf://owner/name", "Job.corpus is 'hf://owner/name': places are local paths"),
        ("--gin.Job.within=https://x.org/a", "Job.within is 'https://x.org/a': places are local"),
        ("--gin.Job.rows=many", "Job.rows must be int, not 'many'"),
        ("--gin.Job.rows=True", "Job.rows must be int, not True"),
        ("--gin.Job.order=tpo", "must be one of bottom, top, not 'tpo'.*did you mean 'top'"),
        ("--gin.hot/Probe.temperature=cold", "Probe.temperature must be float, not 'cold'"),
        ("--gin.Job.probe=3", "Job.probe must be Probe, not 3"),
        ("--corpus=x", "unknown flag --corpus"),
        ("corpus=x", "unknown argument 'corpus=x'.*--gin.NAME=VALUE"),
        ("--gin.CORPUS", "unknown argument"),
        ("--gin.Probe.temperature=1e999", "Probe.temperature must be a finite number, not inf"),
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
