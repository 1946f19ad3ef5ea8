"""gin at the entry points: files and `--gin.NAME=VALUE` in, frozen dataclasses out.

Choices
- Everything inside takes dataclasses and knows no gin. A command line registers the dataclasses
  that it needs, parses, and asks for one of them.
- gin rejects an unknown parameter but takes a misspelled macro in silence: here a macro that nobody
  refers to, or that nobody defines, is an error that names its nearest neighbour.
- gin does not check types: the values are checked against the dataclass's annotations.
- `--gin.CORPUS=runs/c4` needs no inner quotes: a bare word is a string.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BARE = re.compile(r"[^\s@%\"'\[\]{}()=,][^@%\"'\[\]{}()=,\n]*")
_LITERAL = re.compile(r"(True|False|None|[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)$")


class ConfigurationError(ValueError):
    """A configuration file or a --gin flag is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--gin_file` to a command's parser and explains `--gin.NAME=VALUE` in its help."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; may be given several times, later ones win",
    )
    parser.add_argument(
        "--gin.NAME",
        dest="gin_example",
        metavar="VALUE",
        help="set a macro or a parameter, e.g. --gin.CORPUS=runs/c4 or --gin.Score.batch_rows=32",
    )


def split_bindings(unknown: Sequence[str]) -> list[str]:
    """Turns leftover `--gin.NAME=VALUE` arguments into gin bindings.

    Raises:
      ConfigurationError: an argument is not of this form.
    """
    bindings = []
    for argument in unknown:
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not argument.startswith("--gin.") or not equals:
            raise ConfigurationError(
                f"unknown argument {argument!r}: a setting is written --gin.NAME=VALUE."
            )
        if _BARE.fullmatch(value) and not _LITERAL.match(value):
            value = repr(value)
        bindings.append(f"{name} = {value}")
    return bindings


def build(
    name: str,
    configurables: Mapping[str, type],
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
) -> Any:
    """Reads gin files and bindings and makes the dataclass registered as `name`.

    Args:
      name: the configurable to make, a key of `configurables`.
      configurables: gin name -> dataclass; the ones that the files may speak of.
      files: gin files.
      bindings: gin statements that override the files.

    Raises:
      ConfigurationError: an unknown parameter or macro, a wrong type, a missing file or value.
    """
    import importlib.util  # noqa: F401  gin 0.5 uses it without importing it

    import gin

    # NOTE: gin would look for a missing file inside packages, and fail there in its own words.
    for file in files:
        if not Path(file).is_file():
            raise ConfigurationError(f"the gin file {file} does not exist.")
    gin.clear_config()
    wrapped = {key: _register(key, value) for key, value in configurables.items()}
    try:
        gin.parse_config_files_and_bindings(list(files), [], finalize_config=False)
        in_files = _macro_references()
        gin.parse_config(list(bindings))
    except (ValueError, OSError, SyntaxError, NameError, TypeError) as error:
        raise ConfigurationError(str(error)) from error
    _check_macros(in_files)
    try:
        value = wrapped[name]()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(_missing(configurables[name], error)) from error
    return _checked(value, name)


def _register(name: str, cls: type) -> Any:
    import gin

    try:  # a process may build several configurations
        known = gin.get_configurable(name)
    except ValueError:
        return gin.external_configurable(cls, name=name)
    if not issubclass(known, cls):
        raise TypeError(f"two classes are configured as {name!r}: {known.__mro__[1]} and {cls}.")
    return known


def _macro_references() -> set[str]:
    """The macros that the current gin configuration refers to."""
    from gin import config as gin_config

    referred: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, gin_config.ConfigurableReference):
            if value.selector == "gin.macro":
                referred.add(value.config_key[0])
        elif isinstance(value, Mapping):
            for item in (*value.keys(), *value.values()):
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    for parameters in gin_config._CONFIG.values():
        walk(parameters)
    return referred


def _check_macros(in_files: set[str]) -> None:
    """Args: in_files: what the files refer to, before a flag overrides a parameter that did."""
    from gin import config as gin_config

    defined = {scope for scope, selector in gin_config._CONFIG if selector == "gin.macro"}
    referred = _macro_references()
    for macro in sorted(defined - referred - in_files):
        raise ConfigurationError(
            f"nothing uses the macro {macro!r}{_nearest(macro, referred | in_files)}."
        )
    for macro in sorted(referred - defined):
        raise ConfigurationError(
            f"the macro {macro!r} is used but not set{_nearest(macro, defined)}: "
            f"set it with --gin.{macro}=VALUE."
        )


def _nearest(name: str, candidates: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(candidates), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _missing(cls: type, error: Exception) -> str:
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    needs = f" It needs: {', '.join(required)}." if "required" in str(error) else ""
    return f"{error}{needs}"


def _checked(value: Any, name: str) -> Any:
    """The dataclass with its values checked against the annotations, nested ones too."""
    hints = typing.get_type_hints(type(value))
    changed = {}
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        found = _fit(given, hints[field.name], f"{name}.{field.name}")
        if found is not given:
            changed[field.name] = found
    return dataclasses.replace(value, **changed) if changed else value


def _fit(value: Any, hint: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = _checked(value, type(value).__name__)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _fit(value, option, name)
            except ConfigurationError:
                continue
        raise ConfigurationError(f"{name} must be {_say(hint)}, not {value!r}.")
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        choices = {str(choice) for choice in typing.get_args(hint)}
        raise ConfigurationError(
            f"{name} must be one of {', '.join(sorted(choices))}, not {value!r}"
            f"{_nearest(str(value), choices)}."
        )
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_fit(item, inner[0], f"{name}[{i}]") for i, item in enumerate(value))
        return tuple(value)
    if origin is not None and isinstance(value, Mapping) and issubclass(origin, Mapping):
        _, inner_hint = typing.get_args(hint)
        return {key: _fit(item, inner_hint, f"{name}[{key!r}]") for key, item in value.items()}
    if origin is not None:
        if isinstance(origin, type) and not isinstance(value, origin):
            raise ConfigurationError(f"{name} must be {_say(hint)}, not {value!r}.")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or not isinstance(hint, type):
        return value
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigurationError(f"{name} must be {_say(hint)}, not {value!r}.")


def _say(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
