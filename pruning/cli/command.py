"""Skeleton of the command lines of this project: adding commands, their help, their exit status.

Choices
- Help imports nothing heavy. The settings of a command are read from the source of its module: from
  the docstrings of its dataclasses.
- An error that a user can correct is one line; any other keeps its traceback.
- Exit status: 0 done, 1 an error, 75 terminated (SIGTERM), 130 interrupted. A closed standard
  output (`| head`) is not an error.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.runtime import RESTART
from models.terminal import guard, say
from pruning.cli import configuration, recipes
from pruning.cli.places import storage_words
from pruning.store import progress

_OURS = ("__main__", "train", "evaluation", "pruning", "models")  # packages whose errors say all


class Command(NamedTuple):
    """A command: a module with NAME, CONFIGURABLES and run(config).

    Attributes:
      module: its name.
      summary: a line for the help.
      example: arguments for the help.
      recipe: the recipe that flags belong to unless one is named; None for the namesake, if any.
    """

    module: str
    summary: str
    example: str
    recipe: str | None = None

    def load(self, name: str, given: argparse.Namespace, rest: Sequence[str]) -> tuple[Any, Any]:
        """Return the module, and its configuration as the command line has it.

        Raises:
          ConfigurationError: the configuration is wrong. Errors in the arguments themselves are
            raised before slow imports.
        """
        cls, settings = main_settings(self.module)
        files, bindings = configuration.read_arguments(
            name, self.recipe, cls, settings, given, rest
        )
        with progress.Phase(f"{name}: importing its modules"):
            module = importlib.import_module(self.module)
            config = configuration.build(module.NAME, module.CONFIGURABLES, files, bindings)
        return module, config


class Terminated(BaseException):
    """SIGTERM as an exception, so that stages end as on Ctrl-C."""


def exit_status(work: Callable[[], int]) -> int:
    """Call the function and return the exit status of the process."""

    def terminate(*_: object) -> None:
        raise Terminated

    guard()

    # Not in a process that already handles it, such as one of jax.distributed.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    try:
        return work()
    except Terminated:
        say("terminated: the same command goes on where it stopped", error=True)
        return RESTART
    except KeyboardInterrupt:
        say("interrupted: the same command goes on where it stopped", error=True)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be written there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        words = str(error) if _is_mendable(error) else _absent(error) or storage_words(error)
        if words is None:
            raise
        say(f"error: {words}", error=True)
        return 1


def _absent(error: Exception) -> str | None:
    """Return a line for an optional package that is not installed; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").startswith(_OURS):
        return None
    return f"the package {error.name!r} is not installed: install it, or the extra that brings it"


def _is_mendable(error: Exception) -> bool:
    """Return whether the message suffices without a traceback."""
    ours = type(error).__module__.partition(".")[0] in _OURS
    return ours or isinstance(error, OSError | FloatingPointError)


# --------------------------------------------------------------------------------------------------
# Arguments and help


class Program(NamedTuple):
    """The parser of a program of commands.

    Attributes:
      parser: of the whole program.
      subparsers: to which further commands can be added.
      commands: name -> its parser, to which further options can be added.
    """

    parser: argparse.ArgumentParser
    subparsers: Any
    commands: Mapping[str, argparse.ArgumentParser]


def program(
    name: str,
    description: str,
    epilog: str,
    table: Mapping[str, Command],
    arguments: Sequence[str],
) -> Program:
    """Build the parser of a program.

    Args:
      name: such as "python -m pruning".
      description, epilog: of its help.
      table: the commands by name.
      arguments: of the command line; the help of the command in them shows its settings.
    """
    parser = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wants_help = not {"-h", "--help"}.isdisjoint(arguments)
    explained = arguments[0] if wants_help else None
    commands = {
        item: _add(subparsers, name, item, command, arguments if item == explained else None)
        for item, command in table.items()
    }
    return Program(parser, subparsers, commands)


def _add(
    commands: Any, program: str, name: str, command: Command, explained: Sequence[str] | None
) -> argparse.ArgumentParser:
    """Add a command to a program's parser, with its settings in the help if arguments are given."""
    example = [f"example:\n  {program} {name} {command.example}"]
    if explained is not None:
        example += flags_of(name, command.recipe, command.module, explained)
        example += settings_of(command.module)
    parser = commands.add_parser(
        name,
        help=command.summary,
        description=command.summary,
        epilog="\n\n".join(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    configuration.add_arguments(parser)
    return parser


def flags_of(
    command: str, default: str | None, module: str, arguments: Sequence[str]
) -> Iterator[str]:
    """Yield the flags of the recipes and files that the arguments name, with their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    configuration.add_arguments(parser)
    given = parser.parse_known_args([*arguments])[0]
    try:
        named = given.recipe or (None if given.gin_file else recipes.default_of(command, default))
        files = [*([recipes.find(command, named)] if named else []), *given.gin_file]
        described = {name: dict(_attributes(classes)) for name, classes in configurables(module)}
        for file in files:
            lines = [_flag_line(*item, described) for item in recipes.macros(file).items()]
            yield f"flags [and defaults] of {file}:\n" + "\n".join(lines)
    except configuration.ConfigurationError as error:
        yield f"error: {error}"
    others = [recipe.name for recipe in recipes.recipes() if recipe.command == command]
    if others:
        yield "recipes: " + ", ".join(others)


def _flag_line(name: str, macro: recipes.Macro, described: Mapping[str, Mapping[str, str]]) -> str:
    cls, parameter = macro.place or ("", "")
    text = macro.comment or described.get(cls, {}).get(parameter, "")
    return f"  {recipes.flag(name)} [{macro.value or 'required'}]{f': {text}' if text else ''}"


def main_settings(module: str) -> tuple[str, dict[str, str | None]]:
    """Return the gin name of a module's configuration, and its settings with their defaults."""
    constants = dict(_constants(_source(module)))
    name = ast.literal_eval(constants["NAME"])
    return name, _fields(dict(configurables(module))[name])


def _attributes(classes: Sequence[ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """Yield the settings of a dataclass and their descriptions, from its docstrings."""
    text = "\n".join(_described(cls) for cls in classes)
    for names, description in re.findall(
        r"^  (\w+(?:, \w+)*): (.*?)(?=^  \w|\Z)", text, flags=re.MULTILINE | re.DOTALL
    ):
        for name in names.split(", "):
            yield name, " ".join(description.split())


def settings_of(module: str) -> Iterator[str]:
    """Yield the settings of a stage's dataclasses, read from its source."""
    bare = []
    for name, classes in configurables(module):
        fields = _fields(classes)
        if not fields:
            bare.append(f"  @{name}(): {(ast.get_docstring(classes[-1]) or '').splitlines()[0]}")
            continue
        described = re.sub(
            r"^  (\w+(?:, \w+)*):",
            lambda match: f"  {match[1]}{_shown(match[1], fields)}:",  # noqa: B023
            "\n".join(filter(None, map(_described, classes))),
            flags=re.MULTILINE,
        )
        known = dict(_attributes(classes))
        others = [f"  {field}{_shown(field, fields)}" for field in fields if field not in known]
        lines = [line for line in (described, *others) if line]
        yield f"settings [and defaults] of --gin.{name}.SETTING=VALUE:\n" + "\n".join(lines)
    if bare:
        yield "without settings:\n" + "\n".join(bare)


def configurables(module: str) -> Iterator[tuple[str, Sequence[ast.ClassDef]]]:
    """Yield gin names and dataclasses of the module's CONFIGURABLES and of those it includes.

    Each dataclass comes behind its bases. Anything that is not a literal dictionary is skipped,
    because this is for the help alone.
    """
    constants, origins = dict(_constants(_source(module))), _origins(module)
    table = constants.get("CONFIGURABLES")
    if not isinstance(table, ast.Dict):
        return
    for key, item in zip(table.keys, table.values, strict=True):
        if key is None and isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name):
            yield from configurables(".".join(origins[item.value.id]))  # **sources.CONFIGURABLES
        elif isinstance(item, ast.Name):
            named: Any = constants.get(key.id) if isinstance(key, ast.Name) else key
            if classes := _with_bases(module, item.id):
                yield ast.literal_eval(named), classes


def _with_bases(module: str, name: str) -> list[ast.ClassDef]:
    """Return a class behind its bases, as far as they are of this project; none if it is not."""
    place, original = _origins(module).get(name, (module, name))
    if place.partition(".")[0] not in _OURS:
        return []
    for node in _source(place).body:
        if isinstance(node, ast.ClassDef) and node.name == original:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return [cls for base in bases for cls in _with_bases(place, base)] + [node]
    return []


@functools.cache
def _origins(module: str) -> dict[str, tuple[str, str]]:
    """Return the names that a module imports from others -> (module, name there)."""
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in _source(module).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield names of the module and the expressions that they stand for."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


@functools.cache
def _source(module: str) -> ast.Module:
    path = Path(__file__).parents[2] / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_bytes())


def _fields(classes: Sequence[ast.ClassDef]) -> dict[str, str | None]:
    """Return the fields of a dataclass and its bases -> source of the default, if it is plain."""
    return {
        node.target.id: _plain(node.value)
        for cls in classes
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not _is_of_class(node.annotation)
    }


def _is_of_class(annotation: ast.expr) -> bool:
    named = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return isinstance(named, ast.Name) and named.id == "ClassVar"


def _described(cls: ast.ClassDef) -> str:
    """Return the part of a class's docstring that describes its settings."""
    return (ast.get_docstring(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]


def _plain(default: ast.expr | None) -> str | None:
    """Return the source of a default if it is a value without calls."""
    if default is None or any(isinstance(part, ast.Call) for part in ast.walk(default)):
        return None
    return ast.unparse(default)


def _shown(names: str, defaults: Mapping[str, str | None]) -> str:
    values = [value for name in names.split(", ") if (value := defaults.get(name)) is not None]
    return f" [{', '.join(values)}]" if values else ""
