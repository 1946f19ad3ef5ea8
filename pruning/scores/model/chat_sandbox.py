"""Rendering of a chat template in a separate process: JSON on standard input and standard output.

chat.py runs it as a script; it imports nothing of this project.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

_MEMORY = 4 << 30  # bytes of address space
_MOST_CHARACTERS = 1 << 20

# A date in a prompt would make scores depend on the day, so templates get a fixed one, the default
# of Llama 3.1.
_DATES = {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26"}


def main() -> None:
    """Render once per message and write {"texts": [...]} or {"error": "..."}."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    given = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {
            "texts": [_rendered(given, message) for message in given["messages"]]
        }
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


def _rendered(given: dict[str, Any], message: str) -> str:
    system = given["system"]
    turns: list[dict[str, Any]] = []
    if system is not None:
        turns.append({"role": "system", "content": system})
    parts = (
        _environment()
        .from_string(given["template"])
        .generate(
            messages=[*turns, {"role": "user", "content": message}],
            add_generation_prompt=True,
            enable_thinking=given["thinking"],
            tools=None,
            documents=None,
            **{f"{role}_token": token for role, token in given["special"].items()},
        )
    )
    text = ""
    for part in parts:
        text += part
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"it writes more than {_MOST_CHARACTERS:,} characters")
    return text


def _environment() -> Any:
    """Return the environment in which transformers renders chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The `{% generation %}` block, which marks text and changes nothing."""

        tags: set[str] = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: _DATES.get(form, "26 Jul 2024")
    return environment


if __name__ == "__main__":
    main()
