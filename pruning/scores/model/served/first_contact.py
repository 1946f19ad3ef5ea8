"""The first requests to a server: its models, and what its answers hold."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.terminal import say
from pruning.scores.model.inquiry import Wording
from pruning.scores.model.served.asking import Judge
from pruning.scores.model.served.prompts import IdPrompts
from pruning.scores.model.served.server import Connection, Refused, ServerError, Unanswered

_AS_IDS = "return_tokens_as_token_ids"  # in place of their texts
_THINKING = "chat_template_kwargs"
_NO_THINKING = {_THINKING: {"enable_thinking": False}}
# Further entries of a request, the most wanted first. A server that knows none of them gets none.
_OF_COMPLETIONS: tuple[dict[str, Any], ...] = (
    {_AS_IDS: True, "ignore_eos": True},
    {"ignore_eos": True},
    {},
)
_OF_CHATS: tuple[dict[str, Any], ...] = (
    {**_NO_THINKING, "ignore_eos": True},
    _NO_THINKING,
    {},
)


def model_at(connection: Connection, name: str) -> str:
    """Return the model's name at the server; raise ServerError if there is none such."""
    address = connection.server.address
    first = dataclasses.replace(connection.server, attempts=min(connection.server.attempts, 4))
    try:
        answer = Connection(first).get("/models")
    except Unanswered as error:
        raise ServerError(
            f"no server answers at {address} ({error}): start it, or correct Server.endpoint."
        ) from error
    except Refused as error:
        if error.status == 404:  # a server that does not list its models
            return name
        raise ServerError(f"the server at {address} does not list its models: {error}") from error
    entries = answer.get("data")
    found = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    served = [str(entry.get("id")) for entry in found]
    known = {*served, *(str(alias) for entry in found for alias in entry.get("aliases") or ())}
    if served and name not in known:
        shown = ", ".join(served[:8])
        raise ServerError(f"the server at {address} has no model {name!r}; it serves: {shown}.")
    return name


def first_answer(judge: Judge, wording: Wording) -> Judge:
    """Return the judge with the further entries of requests that its server understands.

    Raises:
      ServerError: the server answers none of the requests, or reads other tokens.
    """
    options = _OF_CHATS if judge.prompts.chats else _OF_COMPLETIONS
    unwanted = {_THINKING} if wording.thinking else set()
    if not isinstance(judge.prompts, IdPrompts):  # answers are known by their texts
        unwanted.add(_AS_IDS)
    options = tuple({k: v for k, v in o.items() if k not in unwanted} for o in options)
    prompt = judge.prompts.windows("A short document about rivers.")[0][0].prompts[0]
    address = judge.connection.server.address
    refused: Refused | None = None
    for further in options:
        tried = dataclasses.replace(judge, further=further)
        try:
            tokens = tried.tokens(prompt, ())
        except Refused as error:
            refused = error
            if error.status == 200:
                break
            continue
        except Unanswered as error:
            raise ServerError(f"the server at {address} does not answer: {error}.") from error
        if isinstance(judge.prompts, IdPrompts):
            with_texts = tokens
            if all(token.text is None for token in tokens):  # ids in place of texts
                with_texts = judge.tokens(prompt, ())
            ids = [token.id for token in tokens if token.id is not None]
            if not ids:
                say(
                    f"the server at {address} names no ids of tokens: it is not checked that "
                    "Score.tokenizer is the model's",
                    error=True,
                )
            texts = {token.text for token in with_texts}
            judge.prompts.require_same_tokens(ids, texts, address)
        return tried
    if refused is not None and refused.status == 200:
        raise ServerError(
            f"the server at {address} gives no log-probabilities of tokens for {judge.model}: "
            "servers of vLLM and llama.cpp give them, `transformers serve` does not."
        ) from refused
    raise ServerError(f"the server at {address} refuses a question: {refused}") from refused
