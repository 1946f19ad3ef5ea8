"""All output of the programs passes through models/terminal.py, which escapes control sequences."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import terminal

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202etxt.exe\u2066\u2028\x00"


@given(st.text())
def test_escaping_leaves_what_can_be_shown(text):
    shown = terminal.escaped(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
    elif "\\" not in text:
        back = shown.encode("raw_unicode_escape", "surrogatepass").decode("unicode_escape")
        assert back == text
    lines = terminal.escaped_lines(text)
    assert lines.count("\n") == text.count("\n")
    assert lines.replace("\n", "").isprintable()


def test_a_stream_without_unicode_gets_escapes():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.write("\u4e2d\n", stream)
    assert stream.buffer.getvalue() == b"\\u4e2d\n"


def test_tracebacks_warnings_and_log_records_are_escaped():
    code = (
        "import logging, warnings; from models import terminal; terminal.guard()\n"
        f"text = {HOSTILE!r}\n"
        "warnings.warn(text); logging.getLogger('x').warning(text); raise RuntimeError(text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.stderr.count(r"\x1b]0;owned") >= 3
    assert done.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize("package", ["models", "pruning", "evaluation", "tpu", "train.py"])
def test_nothing_prints_past_the_escaping(package):
    """No `print`, nor `write` to the standard streams, but the drawing of progress bars."""
    root = REPOSITORY / package
    for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
        if file.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), (
                    f"{file}:{node.lineno}"
                )
