"""Recipes: configurations of this project's commands, and their command lines.

command("pruning score", Recipe("configs/score/ask_llm.gin"), {"Score.model": "runs/judge"})
-> python -m pruning score --gin_file=configs/score/ask_llm.gin --gin.Score.model=runs/judge
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

# What --gin.NAME=VALUE takes as a string without quotes.
_BARE = re.compile(r"(?!(?:True|False|None)$)[A-Za-z_/.~][\w/.~+-]*")
_REFERENCE = re.compile(r"@[\w/.]+\(\)")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Configuration of a command.

    Attributes:
      file: gin file.
      settings: macro or parameter -> value, on top of the file.
    """

    file: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Literal(str):
    """A gin expression that is passed on unchanged. Strings like "@JsonlSource()" always are."""


def command(program: str, recipe: Recipe, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command line of a stage: the recipe's file and settings, then the study's.

    Args:
      program: "pruning score" stands for `python -m pruning score`, "train" for `python train.py`.
    """
    module, *arguments = program.split()
    head = ("python", "train.py") if module == "train" else ("python", "-m", module, *arguments)
    values = {**recipe.settings, **settings}
    return (
        *head,
        f"--gin_file={recipe.file}",
        *(f"--gin.{name}={_written(value)}" for name, value in values.items()),
    )


def _written(value: Any) -> str:
    """Return a value in gin's syntax with double quotes, since the shell uses single ones."""
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    return _nested(value)


def _nested(value: Any) -> str:
    if isinstance(value, Literal) or (isinstance(value, str) and _REFERENCE.fullmatch(value)):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_nested(k)}: {_nested(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + "".join(f"{_nested(item)}, " for item in value).rstrip(" ") + ")"
    return repr(value)
