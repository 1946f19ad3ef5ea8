"""Rendering of the pages: templates beside this file, all from base.html, with one style sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation.report import document_text

HERE = Path(__file__).parent


def render(name: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Return the page of a template. Markup in values is escaped.

    Args:
      name: file of the template.
      filters: its filters, besides `count` (thousands are separated) and `printable`.
      values: what it shows; functions can be called.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    common = {"count": lambda number: f"{number:,}", "printable": document_text.printable}
    environment.filters |= {**common, **filters}
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template(name).render(style=style, **values)
