"""Log-probabilities of tokens as servers list them: request bodies, and answers.

    /completions        "logprobs": 20                         a prompt as text or as token ids
    /chat/completions   "logprobs": true, "top_logprobs": 20   messages, for its template

Choices
- One token is generated, at temperature 1, so that the log-probabilities are those of the model
  also where a server gives them after its sampler.
- Tokens are known by their ids where the server names these: llama.cpp's server does, vLLM is asked
  to. Otherwise they are known by their text.
- vLLM lists the token that it drew, too, wherever it ranks: beside the `top` most probable ones in
  completions, in place of the last of them in chats. Its probability therefore bounds no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_NUMBERED = re.compile(r"token_id:(\d+)")
_ROUNDING = 1e-3  # by which a logarithm of a probability may be above 0


class Token(NamedTuple):
    """A token among the most probable ones.

    Attributes:
      id: None if the server does not say.
      text: its bytes; None if the server gives its id only.
      log_probability: natural logarithm.
      drawn: True for the token that the server drew, which may rank below tokens that are not
        listed.
    """

    id: int | None
    text: bytes | None
    log_probability: float
    drawn: bool = False


def completion(
    model: str, prompt: str | Sequence[int], top: int, further: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request for the token after a prompt."""
    asked = prompt if isinstance(prompt, str) else list(prompt)
    return "/completions", {**_common(model), "prompt": asked, "logprobs": top, **further}


def chat(
    model: str, messages: Sequence[Mapping[str, str]], top: int, further: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request for the first token of the reply to some messages."""
    body = {**_common(model), "messages": list(messages), "logprobs": True, "top_logprobs": top}
    return "/chat/completions", {**body, **further}


def _common(model: str) -> dict[str, Any]:
    return {"model": model, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}


def listed(answer: Mapping[str, Any]) -> list[Token]:
    """Return the most probable tokens at the first position; none if the server lists none."""
    try:
        found = answer["choices"][0].get("logprobs")
        if not found:
            return []
        if found.get("content"):  # of chats, and of llama.cpp's completions
            first = found["content"][0]
            return [_token(entry, first.get("token")) for entry in first.get("top_logprobs") or ()]
        if found.get("top_logprobs"):  # of completions
            drawn = (found.get("tokens") or [None])[0]
            likely = found["top_logprobs"][0] or {}
            return [_token({"token": k, "logprob": v}, drawn) for k, v in likely.items()]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        pass  # of another form
    return []


def _token(entry: Mapping[str, Any], drawn: str | None) -> Token:
    text, value = entry["token"], float(entry["logprob"])
    if not value <= _ROUNDING:
        raise ValueError("no logarithm of a probability")
    value = min(value, 0.0)
    is_drawn = text == drawn
    if numbered := _NUMBERED.fullmatch(text):
        return Token(int(numbered[1]), None, value, is_drawn)
    content = entry.get("bytes")
    encoded = bytes(content) if content else text.encode(errors="replace")
    number = entry.get("id")
    return Token(number if isinstance(number, int) else None, encoded, value, is_drawn)


def prompt_tokens(answer: Mapping[str, Any]) -> int:
    """Return the number of tokens of the prompt, as the server counts; 0 if it does not."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) else 0


class Candidate(NamedTuple):
    """A token whose probability is wanted: its id, if a tokenizer is known, and its bytes."""

    id: int | None
    text: bytes


class Read(NamedTuple):
    """Log-probabilities of candidates at a position.

    Attributes:
      log_probabilities: for a candidate that is not listed, an upper bound.
      listed: whether the server listed each candidate.
    """

    log_probabilities: list[float]
    listed: list[bool]


def read(tokens: Sequence[Token], candidates: Sequence[Candidate]) -> Read:
    """Return the log-probabilities of candidates: by their ids, or by their bytes without ids.

    A token that is not listed has at most the probability of the least probable listed token, apart
    from the drawn one, and at most what the listed ones leave of 1.
    """
    known: dict[int | bytes | None, float] = {}
    by_id = all(token.id is not None for token in tokens) and all(
        candidate.id is not None for candidate in candidates
    )
    for token in tokens:  # of several tokens of one text, the most probable counts
        name = token.id if by_id else token.text
        known[name] = max(token.log_probability, known.get(name, -math.inf))
    left = max(1 - math.fsum(math.exp(token.log_probability) for token in tokens), 1e-12)
    ranked = [token.log_probability for token in tokens if not token.drawn]
    bound = min([*ranked, math.log(left)])
    found = [known.get(c.id if by_id else c.text) for c in candidates]
    return Read([bound if v is None else v for v in found], [v is not None for v in found])
