"""What the command lines of this project share: how a command is added, what its help says, how it
ends.

Choices
- Help answers at once: nothing heavy is imported for it. What a command can be told is read from
  its module's source, where the dataclass's docstring says it.
- An error that a user can mend is one line; any other keeps its traceback.
- The exit status: 0 done, 1 an error, 130 interrupted. A reader that has gone (`| head`) is no
  error.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pruning import configuration

_OURS = ("__main__", "evaluation", "pruning", "models")  # packages whose errors say all


class Command(NamedTuple):
    """A command: a module with NAME, CONFIGURABLES and run(config).

    Attributes:
      module: its name.
      summary: a line for the help.
      example: arguments that could be given.
    """

    module: str
    summary: str
    example: str

    def load(self, given: argparse.Namespace, rest: Sequence[str]) -> tuple[Any, Any]:
        """The module, and its configuration as the command line has it.

        Raises:
          ConfigurationError: something is wrong with it; known before anything slow is imported,
            where the arguments themselves are wrong.
        """
        bindings = configuration.split_bindings(rest)
        module = importlib.import_module(self.module)
        return module, configuration.build(
            module.NAME, module.CONFIGURABLES, given.gin_file, bindings
        )


def status(work: Callable[[], int]) -> int:
    """Does the work and says how the process ends: its exit status."""
    try:
        return work()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be written there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_mendable(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _is_mendable(error: Exception) -> bool:
    """Whether the message says all: an error of our own kinds, or of the system, naming a file."""
    ours = type(error).__module__.partition(".")[0] in _OURS
    return ours or isinstance(error, OSError | FloatingPointError)


# --------------------------------------------------------------------------------------------------
# Arguments and help


def add(
    commands: Any, program: str, name: str, command: Command, explained: bool
) -> argparse.ArgumentParser:
    """Adds a command to a program's parser.

    Args:
      commands: what `add_subparsers` gave.
      program: such as "python -m pruning".
      explained: whether its settings are wanted, for the help.
    """
    example = f"example:\n  {program} {name} {command.example}"
    settings = settings_of(command.module) if explained else ()
    parser = commands.add_parser(
        name,
        help=command.summary,
        description=command.summary,
        epilog="\n\n".join([example, *settings]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    configuration.add_arguments(parser)
    return parser


def explained(arguments: Sequence[str]) -> str | None:
    """The command whose settings the help will show."""
    wants_help = not {"-h", "--help"}.isdisjoint(arguments)
    return arguments[0] if wants_help else None


def settings_of(module: str) -> Iterator[str]:
    """What the docstrings of a stage's dataclasses say of its settings, without importing it."""
    for name, cls in configurables(module):
        attributes = (ast.get_docstring(cls) or "").partition("Attributes:\n")[2]
        if attributes:
            defaults = _defaults(cls)
            described = re.sub(
                r"^  (\w+(?:, \w+)*):",
                lambda match: f"  {match[1]}{_shown(match[1], defaults)}:",  # noqa: B023
                attributes.partition("\n\n")[0],
                flags=re.MULTILINE,
            )
            yield f"settings [and defaults] of --gin.{name}.SETTING=VALUE:\n{described}"


def configurables(module: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """gin names and dataclasses, from the module's CONFIGURABLES and those that it takes in.

    What is not written out as a dictionary is passed over: this is for the help alone.
    """
    tree = _source(module)
    constants = dict(_constants(tree))
    origins = {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = constants.get("CONFIGURABLES")
    if not isinstance(table, ast.Dict):
        return
    for key, item in zip(table.keys, table.values, strict=True):
        if key is None and isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name):
            yield from configurables(".".join(origins[item.value.id]))  # **sources.CONFIGURABLES
        elif isinstance(item, ast.Name):
            place, original = origins.get(item.id, (module, item.id))
            named: Any = constants.get(key.id) if isinstance(key, ast.Name) else key
            for node in _source(place).body:
                if isinstance(node, ast.ClassDef) and node.name == original:
                    yield ast.literal_eval(named), node


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names of the module and the expressions that they stand for."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


@functools.cache
def _source(module: str) -> ast.Module:
    path = Path(__file__).parent.parent / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_bytes())


def _defaults(cls: ast.ClassDef) -> dict[str, str]:
    """Settings whose default is a plain value."""
    return {
        node.target.id: ast.unparse(node.value)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        if not any(isinstance(part, ast.Call) for part in ast.walk(node.value))
    }


def _shown(names: str, defaults: dict[str, str]) -> str:
    values = [defaults[name] for name in names.split(", ") if name in defaults]
    return f" [{', '.join(values)}]" if values else ""
