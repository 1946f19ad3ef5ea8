"""Recipes: the configurations that come with Winnow, and their macros as flags.

    winnow score --recipe=likelihood --corpus=runs/c4/corpus --max-tokens=512
    winnow recipes score

Choices
- A recipe is a gin file of configs/ whose header gives a command. Its name is its path below its
  directory, without the suffix: "ask_llm", "data_efficient/ask_llm_xl".
- Every macro of a recipe is a flag: --max-tokens sets MAX_TOKENS. So is every setting of the
  command's own dataclass: --workers sets Score.workers. `--gin.NAME=VALUE` sets anything else.
- Files are read as text, so that help imports neither gin nor the command's module.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pruning.cli.values import ConfigurationError, nearest

# Directory of the repository, or of the installed packages: both hold configs/. Files are looked up
# in the current directory first.
INSTALLED = Path(__file__).resolve().parents[2]

_GIN_FLAG = re.compile(r"--gin\.([\w./]+)=(.*)", re.DOTALL)
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
_COMMAND = re.compile(r"python (?:-m \w+ (\w+)|(train)\.py)((?: +--?\S+)*)")
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=\s*", re.MULTILINE)
_PLACE = re.compile(r"^(?:[\w/]+/)?(\w+)\.(\w+)\s*=\s*%(\w+)\s*$", re.MULTILINE)
_INCLUDE = re.compile(r"""^include\s+(['"])(.+?)\1""", re.MULTILINE)


class Recipe(NamedTuple):
    """A configuration file for a command.

    Attributes:
      command: such as "score" or "train".
      name: of the recipe.
      file: its path, from the directory that holds configs/.
      summary: the first sentence of its header.
    """

    command: str
    name: str
    file: str
    summary: str


class Macro(NamedTuple):
    """A macro of a gin file.

    Attributes:
      value: gin source of its value; None where a user has to set it.
      comment: on its line.
      place: the parameter that it sets, (class, parameter); None if it is used within a value.
    """

    value: str | None
    comment: str
    place: tuple[str, str] | None


@functools.cache
def recipes() -> tuple[Recipe, ...]:
    """Return all recipes, in order of command and name."""
    found = []
    for path in sorted((INSTALLED / "configs").rglob("*.gin")):
        file = path.relative_to(INSTALLED).as_posix()
        header = re.sub(r"^# ?", "", _header(path.read_text()), flags=re.MULTILINE)
        for module, train, flags in _COMMAND.findall(re.sub(r"\\\n\s*", " ", header)):
            if f"--gin_file={file}" in flags.split():
                name = file.removesuffix(".gin").split("/", 2 if file.count("/") > 1 else 1)[-1]
                found.append(Recipe(module or train, name, file, _first_sentence(header)))
                break
    return tuple(sorted(found))


def located(file: str) -> Path:
    """Return the path of a gin file: in the current directory, or else among the installed ones."""
    return Path(file) if Path(file).is_file() else INSTALLED / file


def find(command: str, name: str) -> str:
    """Return the file of a recipe.

    Raises:
      ConfigurationError: the command has no recipe of this name.
    """
    own = {recipe.name: recipe.file for recipe in recipes() if recipe.command == command}
    if name not in own:
        listed = f"; it has: {', '.join(own)}." if own else "."
        raise ConfigurationError(f"{command} has no recipe {name!r}{nearest(name, own)}{listed}")
    return own[name]


def default_of(command: str, stated: str | None) -> str | None:
    """Return the recipe of flags without a name: the stated one, or else the namesake, if any."""
    names = {recipe.name for recipe in recipes() if recipe.command == command}
    return stated or (command if command in names else None)


def lines(command: str | None = None) -> Iterator[str]:
    """Yield a line for every recipe, or for those of one command.

    Raises:
      ConfigurationError: no recipe is for this command.
    """
    own = [recipe for recipe in recipes() if command in (None, recipe.command)]
    if not own:
        commands = {recipe.command for recipe in recipes()}
        raise ConfigurationError(f"no recipe is for {command!r}{nearest(command or '', commands)}.")
    first, second = (max(len(recipe[column]) for recipe in own) for column in (0, 1))
    for recipe in own:
        yield f"{recipe.command:<{first}}  {recipe.name:<{second}}  {recipe.summary}"


def macros(file: str) -> dict[str, Macro]:
    """Return the macros of a gin file and of the files that it includes, by name.

    Raises:
      ConfigurationError: there is no such file.
    """
    path = located(file)
    if not path.is_file():
        raise ConfigurationError(f"the gin file {file} does not exist.")
    text = path.read_text()
    found: dict[str, Macro] = {}
    for _, included in _INCLUDE.findall(text):
        found |= macros(included)
    places = {macro: (cls, parameter) for cls, parameter, macro in _PLACE.findall(text)}
    for match in _MACRO.finditer(text):
        value, comment = _value_at(text, match.end())
        earlier = found.get(match[1], Macro(None, "", None))
        place = places.get(match[1], earlier.place)
        found[match[1]] = Macro(value, comment or earlier.comment, place)
    for name in re.findall(r"%([A-Z][A-Z0-9_]*)", text):
        found.setdefault(name, Macro(None, "", places.get(name)))
    return found


def bindings(
    arguments: Sequence[str],
    known: Collection[str] = (),
    cls: str = "",
    settings: Mapping[str, str | None] = types.MappingProxyType({}),
) -> list[str]:
    """Turn `--gin.NAME=VALUE`, `--name=VALUE` and `--name VALUE` into gin bindings, "NAME = VALUE".

    Args:
      arguments: of the command line.
      known: names of macros.
      cls: gin name of the command's dataclass.
      settings: its settings -> source of the default.

    Raises:
      ConfigurationError: an argument is of another form, or names nothing.
    """
    made, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if found := _GIN_FLAG.fullmatch(argument):
            made.append(f"{found[1]} = {found[2]}")
            continue
        if not (found := _FLAG.fullmatch(argument)) or argument.startswith("--gin."):
            raise ConfigurationError(
                f"unknown argument {argument!r}: a setting is written --name=VALUE or "
                "--gin.NAME=VALUE; patterns of files need quotes."
            )
        value = found[2]
        if value is None and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        made.append(_binding(found[1], value, known, cls, settings))
    return made


def uses_flags(arguments: Sequence[str]) -> bool:
    """Return whether an argument is a flag of a recipe, not `--gin.NAME=VALUE`."""
    return any(_FLAG.fullmatch(a) and not a.startswith("--gin.") for a in arguments)


def flag(name: str) -> str:
    """Return the flag of a macro or setting: "--max-tokens" for "MAX_TOKENS"."""
    return f"--{name.lower().replace('_', '-')}"


def _binding(
    name: str,
    value: str | None,
    known: Collection[str],
    cls: str,
    settings: Mapping[str, str | None],
) -> str:
    macro, setting = name.replace("-", "_").upper(), name.replace("-", "_").lower()
    if macro in known:
        target = macro
    elif setting in settings:
        target = f"{cls}.{setting}"
        if value is None and settings[setting] == "False":
            value = "True"
    else:
        flags = [flag(each) for each in (*known, *settings)]
        raise ConfigurationError(
            f"unknown flag --{name}{nearest(f'--{name}', flags)}: --help lists the flags."
        )
    if value is None:
        raise ConfigurationError(f"--{name} needs a value: --{name}=VALUE.")
    return f"{target} = {value}"


def _header(text: str) -> str:
    return text.partition("\n\n")[0]


def _first_sentence(header: str) -> str:
    """Return the first sentence of a header, without citations in parentheses."""
    paragraph = " ".join(re.split(r"\n\s*\n|\n\s+python ", header, maxsplit=1)[0].split())
    paragraph = re.sub(r" \([^()]*(?:et al|arXiv)[^()]*\)", "", paragraph)
    return re.split(r"(?<!et al)[.:](?=\s|$)", paragraph, maxsplit=1)[0]


def _value_at(text: str, start: int) -> tuple[str, str]:
    """Return the gin source of the value that begins at `start`, and the comment behind it."""
    depth, quote, end = 0, "", start
    while end < len(text):
        character = text[end]
        if quote:
            end += character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "#" or (character == "\n" and depth == 0):
            break
        end += 1
    comment = re.match(r"#\s*(.*)", text[end:])
    return " ".join(text[start:end].split()), comment[1].strip() if comment else ""
