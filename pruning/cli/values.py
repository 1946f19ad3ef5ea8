"""Values of settings: what a flag's text stands for, and whether it fits the setting's type."""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import re
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_PERCENT = re.compile(r"(\d{1,9}(\.\d*)?|\.\d+)%")
# NOTE: SystemError is what the parser of Python 3.11 raises for some deep nesting.
_UNREADABLE = (
    *(SyntaxError, ValueError, RecursionError, MemoryError, SystemError),
    tokenize.TokenError,
)


class ConfigurationError(ValueError):
    """A configuration file or a --gin flag is wrong."""


class Place(NamedTuple):
    """A parameter that takes a value, "Train.steps", and the type that it has there."""

    name: str
    hint: Any


class Reference(NamedTuple):
    """`%NAME` or `@NAME` in a value."""

    sign: str
    name: str


def source_of(name: str, text: str, places: Sequence[Place]) -> str:
    """Return the gin source of the value that a flag gives.

    The value is what gin reads, if that fits all places; else a percentage ("20%") as a share, and
    else the text itself, whatever characters it has.

    Args:
      name: of the macro or parameter.
      text: as it was given.
      places: where the value goes; none if that is not known.

    Raises:
      ConfigurationError: it fits none of these ways.
    """
    readable, value = read(text)
    references = list(_references(value)) if readable else []
    if any(reference.sign == "%" for reference in references):
        return text
    if references and not (places and _takes_text_alone(places)):
        return text
    shares = [float(text[:-1]) / 100] if _PERCENT.fullmatch(text) else []
    literal = [value] if readable and not references else []
    first: ConfigurationError | None = None
    for candidate in (*literal, *shares, text):
        try:
            for place in places:
                label = name if place.name == name else f"{name} (of {place.name})"
                fit(candidate, place.hint, label)
        except ConfigurationError as error:
            first = first or error
        else:
            return text if literal and candidate is value else repr(candidate)
    assert first is not None
    raise first


def read(text: str) -> tuple[bool, Any]:
    """Return whether gin reads all of the text as one value, and that value.

    References come as `Reference`.
    """
    from gin import config_parser

    class Delegate(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
            return Reference("@", scoped_configurable_name)

        def macro(self, scoped_name: str) -> Any:
            return Reference("%", scoped_name)

    try:
        parser = config_parser.ConfigParser(text, Delegate())
        value = parser.parse_value()
        rest = parser.current_token
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except _UNREADABLE:
        return False, None
    # NOTE: gin takes what follows "#" for a comment.
    cut = "\n" in text.strip() or any(token.type == tokenize.COMMENT for token in tokens)
    return rest.type in (tokenize.NEWLINE, tokenize.ENDMARKER) and not cut, value


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _takes_text_alone(places: Sequence[Place]) -> bool:
    return all(set(options(place.hint)) <= {str, type(None)} for place in places)


def options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def parts(value: Any, hint: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (element, type) of the elements of a list, tuple or dictionary that has this type."""
    for option in options(hint):
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping):
            yield from ((item, inner[1]) for item in value.values())
            return
        if isinstance(value, list | tuple) and origin in (tuple, list, Sequence):
            every = inner[:1] * len(value) if inner[1:] in ((), (Ellipsis,)) else inner
            yield from zip(value, every, strict=False)
            return


def checked(value: Any, name: str) -> Any:
    """Return the dataclass with its values checked against the annotations, nested ones too."""
    hints = typing.get_type_hints(type(value))
    changed = {}
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        found = fit(given, hints[field.name], f"{name}.{field.name}")
        if found is not given:
            changed[field.name] = found
    return dataclasses.replace(value, **changed) if changed else value


def fit(value: Any, hint: Any, name: str) -> Any:
    """Return the value as the type has it: lists and single texts as tuples, integers as floats.

    Raises:
      ConfigurationError: it is of another type; `name` is that of the setting.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = checked(value, type(value).__name__)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return fit(value, option, name)
            except ConfigurationError:
                continue
        raise ConfigurationError(f"{name} must be {say_type(hint)}, not {value!r}.")
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        choices = {str(choice) for choice in typing.get_args(hint)}
        raise ConfigurationError(
            f"{name} must be one of {', '.join(sorted(choices))}, not {value!r}"
            f"{nearest(str(value), choices)}."
        )
    if origin is tuple:
        inner = typing.get_args(hint)
        any_number = len(inner) == 2 and inner[1] is Ellipsis
        if isinstance(value, str) and any_number and str in options(inner[0]):
            return (value,)
        if isinstance(value, list | tuple) and (any_number or len(value) == len(inner)):
            kinds = inner[:1] * len(value) if any_number else inner
            each = enumerate(zip(value, kinds, strict=True))
            return tuple(fit(item, kind, f"{name}[{i}]") for i, (item, kind) in each)
        raise ConfigurationError(f"{name} must be {say_type(hint)}, not {value!r}.")
    if origin is not None and isinstance(value, Mapping) and issubclass(origin, Mapping):
        _, inner_hint = typing.get_args(hint)
        return {key: fit(item, inner_hint, f"{name}[{key!r}]") for key, item in value.items()}
    if origin is not None:
        if isinstance(origin, type) and not isinstance(value, origin):
            raise ConfigurationError(f"{name} must be {say_type(hint)}, not {value!r}.")
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ConfigurationError(f"{name} is too large: {len(str(value))} digits.") from None
    if hint is Any or not isinstance(hint, type):
        return value
    # NOTE: the class of a protocol's instances (@Name without parentheses) has its methods, too.
    instance = isinstance(value, hint) and not isinstance(value, type)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{name} must be a finite number, not {value!r}.")
    if instance and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigurationError(f"{name} must be {say_type(hint)}, not {value!r}.")


def say_type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the candidate that resembles the name, or nothing."""
    near = difflib.get_close_matches(name, sorted(candidates), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
