"""A command line says to gin exactly what the study meant."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.study.recipes import Literal, Recipe, command
from pruning.cli.recipes import bindings

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple), st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(values)
def test_gin_reads_back_what_was_written(value):
    from gin import config_parser

    class Reader(config_parser.ParserDelegate):
        def configurable_reference(self, name, evaluate):
            raise AssertionError(name)

        def macro(self, name):
            raise AssertionError(name)

    *_, argument = shlex.split(shlex.join(command("train", Recipe("a.gin"), {"A.b": value})))
    (binding,) = bindings([argument])
    name, _, written = binding.partition(" = ")
    (statement,) = config_parser.ConfigParser(f"a.b = {written}\n", Reader())
    assert name == "A.b" and statement.value == value


def test_the_whole_line():
    recipe = Recipe("configs/score/ask_llm.gin", {"MODEL": "none", "MAX_TOKENS": 256})
    study = {"MODEL": "runs/a b", "Train.eval_data": {"hq": Literal("@hq/Stream()")}}
    assert shlex.join(command("pruning score", recipe, study)) == (
        "python -m pruning score --gin_file=configs/score/ask_llm.gin '--gin.MODEL=\"runs/a b\"' "
        "--gin.MAX_TOKENS=256 '--gin.Train.eval_data={\"hq\": @hq/Stream()}'"
    )
    assert command("train", recipe, {})[:2] == ("python", "train.py")


@pytest.mark.parametrize("word", ["True", "None", "1e3", "-5", "7"])
def test_strings_that_look_like_values_are_quoted(word):
    assert command("train", Recipe("a.gin"), {"A": word})[-1] == f'--gin.A="{word}"'
