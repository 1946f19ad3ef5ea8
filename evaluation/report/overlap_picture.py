"""The overlap of any number of sets as a picture: bars of intersections over a matrix of dots.

After Lex et al. 2014, "UpSet: Visualization of Intersecting Sets". Venn diagrams end at three sets.
Every column is a combination of selections, marked by filled dots; its bar counts the documents
that exactly these kept. The picture is SVG in the colors of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.report import document_text

_COLUMN, _ROW = 26, 22
_BARS = 150  # height of the highest bar
_TOP = 34
_SIZES = 70  # width of the bar of the largest selection
_LETTER = 6.6
_LONGEST_NAME = 28


def drawn(kept: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    """Return the picture.

    Args:
      kept: name and documents of each selection.
      found: members and documents of each intersection, in the order of the columns.
    """
    names = [_short(item["name"]) for item in kept]
    label = 14 + _LETTER * max(map(len, names)) + _SIZES + 46
    width = label + _COLUMN * len(found) + 30
    base = _TOP + _BARS
    height = base + 16 + _ROW * len(kept) + 6
    highest = max((item["documents"] for item in found), default=1) or 1
    widest = max((item["documents"] for item in kept), default=1) or 1
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" ',
        'role="img">',
        "<title>Documents by the combination of selections that kept them</title>",
    ]
    for row, (name, item) in enumerate(zip(names, kept, strict=True)):
        y = base + 16 + _ROW * row
        if row % 2 == 0:
            parts.append(_rect(0, y, width, _ROW, "stripe"))
        size = _SIZES * item["documents"] / widest
        number = _compact(item["documents"])
        middle = y + _ROW / 2 + 4
        parts += [
            f'<text x="4" y="{middle}">{name}</text>',
            _rect(label - 40 - size, y + 5, size, _ROW - 10, "bar"),
            f'<text x="{label - 36}" y="{middle}" class="soft">{number}</text>',
        ]
    for column, item in enumerate(found):
        x = label + _COLUMN * (column + 0.5)
        top = _BARS * item["documents"] / highest
        words = " and ".join(document_text.printable(name) for name in item["names"])
        kept_by = f"{escape(words)} alone" if item["members"] else "none"
        parts.append(f"<g><title>{item['documents']:,} documents kept by {kept_by}</title>")
        parts.append(
            _rect(x - 8, base - top, 16, max(top, 0.5), "bar" if item["members"] else "rest")
        )
        number = _compact(item["documents"])
        place = f'x="{x}" y="{base - top - 5:.1f}"'
        parts.append(f'<text {place} class="soft" text-anchor="middle">{number}</text>')
        for row in range(len(kept)):
            center = base + 16 + _ROW * (row + 0.5)
            kind = "on" if row in item["members"] else "off"
            parts.append(f'<circle cx="{x}" cy="{center}" r="5" class="{kind}"/>')
        if len(item["members"]) > 1:
            low, high = min(item["members"]), max(item["members"])
            ends = (base + 16 + _ROW * (row + 0.5) for row in (low, high))
            y1, y2 = ends
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y1}" y2="{y2}" class="link"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"/>'
    )


def _short(name: str) -> str:
    text = document_text.printable(name)
    return escape(text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…")


def _compact(number: int) -> str:
    """Return a number in four characters or so: 950, 1.2k, 36M."""
    value = float(number)
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 10 or not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"
