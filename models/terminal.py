"""Printing of text from data, files or the network.

Names of files and fields, manifests, heartbeats and external texts may hold control sequences that
a terminal obeys, or marks that reverse the order in which characters are shown. All output of the
command lines passes through this module, which escapes them.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from types import TracebackType
from typing import TextIO


def escaped(text: str) -> str:
    """Return the text in one line, with line ends, control and format characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped_lines(text: str) -> str:
    """Return the text with everything escaped except its line ends."""
    return "\n".join(map(escaped, text.split("\n")))


def say(text: object = "", *, error: bool = False) -> None:
    """Print a text of one or several lines, escaped.

    Args:
      error: print to stderr instead of stdout.
    """
    write(escaped_lines(str(text)) + "\n", sys.stderr if error else sys.stdout)


def write(text: str, stream: TextIO) -> None:
    """Write and flush; characters that the stream cannot encode are written as escapes."""
    try:
        stream.write(text)
    except UnicodeEncodeError as problem:
        stream.write(text.encode(problem.encoding, "backslashreplace").decode(problem.encoding))
    stream.flush()


class Formatter(logging.Formatter):
    """Log formatter that escapes its output."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped_lines(super().format(record))


def guard() -> None:
    """Escape Python's own output in this process: tracebacks, warnings, unhandled log records."""
    sys.excepthook = _show_exception
    warnings.showwarning = _show_warning
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Formatter("%(message)s"))


def _show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    write(escaped_lines(text), sys.stderr if file is None else file)
