"""Answers of servers as they list tokens: forms, bounds, and what is no list."""

from __future__ import annotations

import json
import math

import pytest

from pruning.scores.model.served import listing
from pruning.scores.model.served.listing import Candidate, Token, listed, read


def completions(drawn: str, **likely: float) -> dict:
    """Return vLLM's answer: the drawn token first, whatever its rank."""
    return {"choices": [{"logprobs": {"tokens": [drawn], "top_logprobs": [likely]}}]}


def chats(drawn: str, **likely: float) -> dict:
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in likely.items()]
    return {"choices": [{"logprobs": {"content": [{"token": drawn, "top_logprobs": entries}]}}]}


@pytest.mark.parametrize("form", [completions, chats])
def test_the_drawn_token_is_no_bound_of_others(form):
    # The three most probable are a, b, c; "rare" was drawn; "no" lies between c and rare.
    p = {"rare": 1e-6, "a": 0.5, "b": 0.3, "c": 0.1}
    tokens = listed(form("rare", **{name: math.log(value) for name, value in p.items()}))
    assert [token.drawn for token in tokens] == [True, False, False, False]
    found = read(tokens, [Candidate(None, b"a"), Candidate(None, b"no"), Candidate(None, b"rare")])
    assert found.listed == [True, False, True]
    assert found.log_probabilities[0] == math.log(0.5)
    assert found.log_probabilities[1] == pytest.approx(math.log(1 - sum(p.values())), abs=1e-9)
    assert found.log_probabilities[2] == math.log(1e-6)


def test_a_token_that_is_not_listed_is_less_probable_than_the_listed_and_than_the_rest():
    few = [Token(1, b"a", math.log(0.5)), Token(2, b"b", math.log(0.1))]
    assert read(few, [Candidate(3, b"c")]).log_probabilities == [math.log(0.1)]
    most = [Token(1, b"a", math.log(0.55)), Token(2, b"b", math.log(0.4))]
    assert read(most, [Candidate(3, b"c")]).log_probabilities == [pytest.approx(math.log(0.05))]


def test_of_tokens_of_one_text_the_most_probable_counts():
    tokens = [Token(None, b"a", -5.0, drawn=True), Token(None, b"a", -1.0)]
    assert read(tokens, [Candidate(None, b"a")]).log_probabilities == [-1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 800.0, 0.5, "x", None])
def test_what_is_no_logarithm_of_a_probability_is_no_list(value):
    assert listed(completions("a", a=-0.5, b=value)) == []
    assert listed(chats("a", a=-0.5, b=value)) == []


@pytest.mark.parametrize(
    "answer", ["{}", '{"choices": []}', '{"choices": [{"logprobs": {"content": [{}]}}]}', "[]"]
)
def test_answers_of_other_forms_list_nothing(answer):
    assert listed(json.loads(answer)) == []


def test_numbered_tokens_are_known_by_their_ids():
    (token,) = listed(completions("token_id:17", **{"token_id:17": 0.0}))
    assert token == Token(17, None, 0.0, drawn=True)
    path, body = listing.completion("m", [1, 2], 20, {"return_tokens_as_token_ids": True})
    assert path == "/completions" and body["prompt"] == [1, 2] and body["logprobs"] == 20
