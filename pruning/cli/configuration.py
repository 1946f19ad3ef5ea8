"""gin at the entry points: files and `--gin.NAME=VALUE` are made into frozen dataclasses.

Choices
- All other code takes dataclasses and does not import gin. A command line registers the dataclasses
  that it needs, parses, and builds one of them.
- gin rejects an unknown parameter but takes a misspelled macro in silence: here a macro that nobody
  refers to, or that nobody defines, is an error that names its nearest neighbor.
- gin does not check types: values are checked against the annotations of the dataclasses before
  any of these is made, and a wrong one is reported by the name of its macro (values.py).
- `--gin.CORPUS=runs/c4` needs no inner quotes: a value is text where gin cannot read it, and where
  the setting takes text and what gin reads is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tokenize
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pruning.cli import recipes
from pruning.cli.places import require_places
from pruning.cli.recipes import INSTALLED
from pruning.cli.values import (
    ConfigurationError,
    Place,
    checked,
    fit,
    nearest,
    options,
    parts,
    source_of,
)

__all__ = ["ConfigurationError", "add_arguments", "build", "read_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and `--gin_file` to a parser and explain `--gin.NAME=VALUE` in its help."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a configuration of Winnow's own (`winnow recipes` lists them); its macros are flags",
    )
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


def read_arguments(
    command: str,
    default: str | None,
    cls: str,
    settings: Mapping[str, str | None],
    given: argparse.Namespace,
    rest: Sequence[str],
) -> tuple[list[str], list[str]]:
    """Return the gin files and bindings of a command line.

    Args:
      command: such as "score".
      default: the recipe that flags belong to if neither a recipe nor a file is given; None for
        the command's namesake.
      cls, settings: the command's dataclass, see `recipes.bindings`.
      given, rest: what `argparse` parsed and left.

    Raises:
      ConfigurationError: an argument is wrong.
    """
    files = list(given.gin_file)
    recipe = given.recipe
    if recipe is None and not files and recipes.uses_flags(rest):
        recipe = recipes.default_of(command, default)
    if recipe is not None:
        files.insert(0, recipes.find(command, recipe))
    known = {name for file in files for name in recipes.macros(file)}
    return files, recipes.bindings(rest, known, cls, settings)


def build(
    name: str,
    configurables: Mapping[str, type],
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
) -> Any:
    """Read gin files and bindings and build the dataclass registered as `name`.

    Args:
      name: the configurable to make, a key of `configurables`.
      configurables: gin name -> dataclass; the ones that the files may speak of.
      files: gin files.
      bindings: "NAME = VALUE", as `read_arguments` returns them, or other gin statements; they
        override the files.

    Raises:
      ConfigurationError: an unknown parameter or macro, a wrong type, a missing file or value.
    """
    import importlib.util  # noqa: F401  gin 0.5 uses it without importing it

    import gin
    from gin import config as gin_config

    for file in files:
        if not Path(file).is_file() and not _is_installed(file):
            raise ConfigurationError(f"the gin file {file} does not exist.")
    # NOTE: for included files, too. The second reader of gin itself looks for missing files inside
    # packages and fails there in its own words.
    gin_config._FILE_READERS[:] = [(open, os.path.isfile), (_open_installed, _is_installed)]
    gin.clear_config()
    wrapped = {key: _register(key, value) for key, value in configurables.items()}
    try:
        gin.parse_config_files_and_bindings(list(files), [], finalize_config=False)
        in_files = _macro_references()
        gin.parse_config([_statement(binding, configurables) for binding in bindings])
    except ConfigurationError:
        raise
    except _PARSE_ERRORS as error:
        raise ConfigurationError(_in_words(error, configurables)) from error
    _check_macros(in_files)
    _fit_values()
    try:
        value = wrapped[name]()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(_missing(configurables[name], error)) from error
    value = checked(value, name)
    require_places(value, name)
    _require_effect(bindings, configurables)
    return value


def _require_effect(bindings: Sequence[str], configurables: Mapping[str, type]) -> None:
    """Raise ConfigurationError if a setting was given of a class of which no object was made."""
    from gin import config as gin_config

    made = {selector.rpartition(".")[2] for _, selector in gin_config._OPERATIVE_CONFIG}
    for binding in bindings:
        setting, equals, _ = (part.strip() for part in binding.partition("="))
        cls = setting.rpartition("/")[2].rpartition(".")[0].rpartition(".")[2]
        if not equals or cls not in configurables or cls in made:
            continue
        takers = [
            f"{owner}.{parameter}=@{cls}()"
            for owner, kind in configurables.items()
            for parameter, hint in _hints(kind).items()
            if owner in made and configurables[cls] in options(hint)
        ]
        example = f", such as --gin.{takers[0]}" if takers else ""
        raise ConfigurationError(
            f"{setting} has no effect, because nothing uses @{cls}(): remove it, or set a "
            f"parameter to @{cls}(){example}."
        )


_PARSE_ERRORS = (
    *(ValueError, OSError, SyntaxError, NameError, TypeError, ImportError, RecursionError),
    tokenize.TokenError,
)


def _statement(binding: str, configurables: Mapping[str, type]) -> str:
    """Return the gin statement of a binding, its value quoted where it is text."""
    name, equals, value = (part.strip() for part in binding.partition("="))
    if not equals:
        return binding
    cls, dot, parameter = name.rpartition("/")[2].rpartition(".")
    if not dot:
        places = _macro_places().get(name, [])
    elif cls in configurables and parameter in (hints := _hints(configurables[cls])):
        places = [Place(name, hints[parameter])]
    else:
        places = []
    return f"{name} = {source_of(name, value, places)}"


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}


_NO_PARAMETER = re.compile(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'")
_NO_CONFIGURABLE = re.compile(r"No configurable matching (?:reference )?'@?([^'()]+)")


def _in_words(error: Exception, configurables: Mapping[str, type]) -> str:
    """Return gin's message in one line, with the nearest name where one is unknown."""
    if isinstance(error, RecursionError):
        return "a value or an include is nested too deeply."
    if isinstance(error, tokenize.TokenError):
        return f"a bracket or quote is not closed ({error.args[0]}, line {error.args[1][0]})."
    message = str(error)
    near = ""
    if found := _NO_PARAMETER.search(message):
        cls = configurables.get(found[1].rpartition(".")[2])
        near = nearest(found[2], _hints(cls)) if cls else ""
    elif found := _NO_CONFIGURABLE.search(message):
        near = nearest(found[1].rpartition("/")[2], configurables)
    first, *rest = (line.strip() for line in message.splitlines())
    where = ", ".join(line for line in rest if line.strip("^ ")).replace(" line ", ", line ", 1)
    return f"{first.rstrip('.')}{near}{f' ({where})' if where else ''}"


def _is_installed(file: str) -> bool:
    return (INSTALLED / file).is_file()


def _open_installed(file: str) -> IO[str]:
    return (INSTALLED / file).open()


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
    """Return the macros that the current gin configuration refers to."""
    return {macro for value in _parameters() for macro in _macros_in(value)}


def _parameters() -> Iterator[Any]:
    from gin import config as gin_config

    for parameters in gin_config._CONFIG.values():
        yield from parameters.values()


def _macros_in(value: Any) -> Iterator[str]:
    if (macro := _macro_of(value)) is not None:
        yield macro
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _macros_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _macros_in(item)


def _macro_of(value: Any) -> str | None:
    """Return the name of the macro that the value is a reference to."""
    from gin import config as gin_config

    reference = isinstance(value, gin_config.ConfigurableReference)
    return value.config_key[0] if reference and value.selector == "gin.macro" else None


def _typed_parameters() -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Yield (name, parameters, parameter, type) of what is set of a dataclass."""
    from gin import config as gin_config

    for (scope, selector), parameters in gin_config._CONFIG.items():
        known = gin_config._REGISTRY.get(selector)
        hints = _hints(known.wrapped) if known is not None else {}
        prefix = f"{scope}/" if scope else ""
        for parameter in [*parameters]:
            if parameter in hints:
                name = f"{prefix}{selector.rpartition('.')[2]}.{parameter}"
                yield name, parameters, parameter, hints[parameter]


def _macro_places() -> dict[str, list[Place]]:
    """Return the parameters in which each macro stands."""
    places: dict[str, list[Place]] = {}

    def walk(value: Any, place: Place) -> None:
        if (macro := _macro_of(value)) is not None:
            places.setdefault(macro, []).append(place)
        else:
            for item, hint in parts(value, place.hint):
                walk(item, Place(place.name, hint))

    for name, parameters, parameter, hint in _typed_parameters():
        walk(parameters[parameter], Place(name, hint))
    return places


def _check_macros(in_files: set[str]) -> None:
    """Arg: in_files: what the files refer to, before a flag overrides a parameter that did."""
    from gin import config as gin_config

    defined = {scope for scope, selector in gin_config._CONFIG if selector == "gin.macro"}
    referred = _macro_references()
    for macro in sorted(defined - referred - in_files):
        raise ConfigurationError(
            f"nothing uses the macro {macro!r}{nearest(macro, referred | in_files)}."
        )
    for macro in sorted(referred - defined):
        raise ConfigurationError(
            f"the macro {macro!r} is used but not set{nearest(macro, defined)}: "
            f"set it with {recipes.flag(macro)}=VALUE or --gin.{macro}=VALUE."
        )


def _fit_values() -> None:
    """Put plain values in place of macros, as the types of their parameters have them.

    Raises:
      ConfigurationError: a value is of another type, or a macro stands for itself.
    """
    for name, parameters, parameter, hint in [*_typed_parameters()]:
        given = parameters[parameter]
        value = _resolved(given, ())
        if not _has_reference(value):
            macro = _macro_of(given)
            label = name if macro is None else f"{macro} (of {name})"
            parameters[parameter] = fit(value, hint, label)


def _resolved(value: Any, within: tuple[str, ...]) -> Any:
    """Return the value with macros replaced by what they stand for."""
    from gin import config as gin_config

    if (macro := _macro_of(value)) is not None:
        if macro in within:
            raise ConfigurationError(f"the macro {macro!r} stands for itself.")
        meant = gin_config._CONFIG[macro, "gin.macro"]["value"]
        return _resolved(meant, (*within, macro))
    if isinstance(value, Mapping):
        return {_resolved(k, within): _resolved(v, within) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_resolved(item, within) for item in value)
    return value


def _has_reference(value: Any) -> bool:
    """Return whether an object that gin still has to make is part of the value."""
    from gin import config as gin_config

    if isinstance(value, Mapping):
        return any(map(_has_reference, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple):
        return any(map(_has_reference, value))
    return isinstance(value, gin_config.ConfigurableReference)


def _missing(cls: type, error: Exception) -> str:
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    needs = f" It needs: {', '.join(required)}." if "required" in str(error) else ""
    own = str(error).partition("\n  In call to configurable")[0]  # gin adds where it was
    return f"{own}{needs}"
