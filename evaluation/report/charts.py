"""Charts: matplotlib figures, inlined as SVG in the page and saved as SVG and PNG files.

Choices
- Every panel is a figure of a phone's width. The page puts panels side by side where there is room,
  so text is never scaled down.
- A sampler has one color and one marker in all charts (`Palette`). The full data is a dashed line
  in the text color, random is gray. The other colors suit color-blind readers (Okabe and Ito 2008,
  slightly darkened), on white and on black.
- In the page, text and rules take the page's colors, so a dark page has light letters. Text stays
  text: it can be searched, and read by screen readers.
- The same input gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath

from evaluation.report.comparison import Cell, Sizes, pareto
from evaluation.statistics.rank_agreement import Agreement
from evaluation.study.plan import FULL, RANDOM

INK, RULE, PAPER = "#23272e", "#c9ccd1", "#fefefe"
_GREY = "#868c96"
_COLOURS = ("#2f7fc4", "#cf6a1a", "#c2417c", "#1f9a78", "#8a63c9", "#b08a00", "#4fa9d8", "#7a5c46")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<")
_WIDTH = 4.3  # inches


@dataclasses.dataclass(frozen=True)
class Palette:
    """Colors and markers of the samplers, and their titles."""

    titles: Mapping[str, str]  # sampler -> title, in order

    def _place(self, sampler: str) -> int:
        others = [name for name in self.titles if name not in (FULL, RANDOM)]
        return others.index(sampler)

    def colour(self, sampler: str) -> str:
        fixed = {FULL: INK, RANDOM: _GREY}
        return fixed.get(sampler) or _COLOURS[self._place(sampler) % len(_COLOURS)]

    def marker(self, sampler: str) -> str:
        if sampler in (FULL, RANDOM):
            return {FULL: "*", RANDOM: "o"}[sampler]
        again, place = divmod(self._place(sampler), len(_COLOURS))
        return _MARKERS[
            (place + 3 * again) % len(_MARKERS)
        ]  # colors repeat, pairs of color and marker do not


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawn panel: its file name without suffix, a sentence that describes it, its inline SVG."""

    name: str
    description: str
    svg: str


def draw(
    name: str,
    description: str,
    directory: epath.PathLike,
    paint: Callable[[Any], None],
    height: float = 3.1,
    width: float = _WIDTH,
) -> Chart:
    """Draw one panel and save it as <directory>/<name>.svg and .png.

    Args:
      paint: draws on the matplotlib axes that it is given.
      height, width: inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = epath.Path(directory)
    style: Any = _STYLE | {"svg.hashsalt": name}  # rc_context lists its keys as literals
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.svg").write_text(drawn.getvalue())
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=200, facecolor=PAPER, metadata={"Software": None})
        (directory / f"{name}.png").write_bytes(pixels.getvalue())
    return Chart(name, description, inlined(drawn.getvalue(), name, description))


_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
}


def inlined(svg: str, name: str, description: str) -> str:
    """Return a matplotlib SVG that can be inlined in a page beside others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Element ids are global in a document: two charts must not share one.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)  # the page's letters
    svg = (
        svg.replace(INK, "currentColor").replace(RULE, "var(--rule)").replace(PAPER, "var(--paper)")
    )
    head, body = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(description)}">{body}'


# --------------------------------------------------------------------------------------------------
# Panels. Each returns a function for `draw`'s argument `paint`.


def quality(cells: Sequence[Cell], evaluation: str, palette: Palette) -> Callable[[Any], None]:
    """Return a plot of loss against share of tokens kept, with the Pareto front as a broad line.

    Intervals are those of the difference to the full data, if there is one: the variance between
    documents is common to all.
    """

    def paint(axes: Any) -> None:
        full = next((cell for cell in cells if cell.is_full), None)
        base = full.measures[evaluation].loss.value if full is not None else 0.0
        if full is not None:
            axes.axhline(base, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        front = pareto(cells, evaluation)
        axes.plot(
            [100 * cell.share_kept for cell in front],
            [cell.measures[evaluation].loss.value for cell in front],
            color=RULE,
            linewidth=5,
            solid_capstyle="round",
            drawstyle="steps-post",
            zorder=0,
        )
        for sampler in palette.titles:
            line = sorted(
                (c for c in cells if c.sampler == sampler and not c.is_full),
                key=lambda cell: cell.share_kept,
            )
            if not line:
                continue
            shares = [100 * cell.share_kept for cell in line]
            values = [cell.measures[evaluation].loss.value for cell in line]
            if full is not None:  # every line ends in the full data
                shares.append(100.0)
                values.append(base)
            colour = palette.colour(sampler)
            for cell, share in zip(line, shares, strict=False):
                if found := cell.measures[evaluation].to_full:
                    ends = [base + found.low, base + found.high]
                    axes.plot([share, share], ends, color=colour, linewidth=0.9)
            axes.plot(shares, values, color=colour)
            axes.plot(
                shares[: len(line)], values[: len(line)], palette.marker(sampler), color=colour
            )
        axes.set_xscale("log")
        ticks = sorted({round(100 * cell.keep_rate) for cell in cells} | {100})
        axes.set_xticks(ticks, [f"{tick}%" for tick in ticks])
        axes.xaxis.set_minor_locator(_nothing())
        axes.set_xlabel("share of the pool's tokens kept")
        axes.set_ylabel("loss, nats per token")

    return paint


def differences(
    cells: Sequence[Cell], evaluation: str, palette: Palette, label: Callable[[Cell], str]
) -> Callable[[Any], None]:
    """Return a plot of differences to the full data with intervals, best at the top."""

    def paint(axes: Any) -> None:
        rows = sorted(
            (cell for cell in cells if cell.measures[evaluation].to_full is not None),
            key=lambda cell: -cell.measures[evaluation].to_full.value,  # type: ignore[union-attr]
        )
        for y, cell in enumerate(rows):
            found, colour = cell.measures[evaluation].to_full, palette.colour(cell.sampler)
            assert found is not None
            axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.6)
            axes.plot([found.value], [y], palette.marker(cell.sampler), color=colour)
        axes.axvline(0, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_yticks(range(len(rows)), [label(cell) for cell in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("nats per token worse than the full data")

    return paint


def curves(
    cells: Sequence[Cell], evaluation: str, keep_rate: float, palette: Palette
) -> Callable[[Any], None]:
    """Return a plot of evaluation loss during training at one keep-rate, first seeds only."""

    def paint(axes: Any) -> None:
        lowest, highest = np.inf, -np.inf
        shown = [c for c in cells if c.keep_rate == keep_rate and not c.is_full]
        for cell in [*shown, *(c for c in cells if c.is_full)]:
            curve = cell.runs[0].curves.get(evaluation)
            if curve is None:
                continue
            style: dict[str, Any] = {"marker": "." if len(curve.step) < 3 else ""}
            if cell.is_full:
                style |= {"linestyle": (0, (4, 3)), "linewidth": 1.2}
            axes.plot(curve.step, curve.loss, color=palette.colour(cell.sampler), **style)
            lowest = min(lowest, curve.loss.min())
            highest = max(highest, curve.loss[len(curve.loss) // 4])
        if np.isfinite(lowest):
            room = 0.06 * (highest - lowest)
            axes.set_ylim(lowest - room, highest + room)  # the first quarter runs off the top
        axes.set_xlabel("training steps")
        axes.set_ylabel("loss, nats per target token")

    return paint


def sizes(found: Sizes, palette: Palette) -> Callable[[Any], None]:
    """Return a plot of loss against model size, with extrapolated points."""

    def paint(axes: Any) -> None:
        for name, losses in found.losses.items():
            points = [(n, y) for n, y in zip(found.parameters, losses, strict=True) if y == y]
            if len(points) < 2:
                continue
            style = {"linestyle": (0, (4, 3))} if name == FULL else {}
            axes.plot(*zip(*points, strict=True), color=palette.colour(name), **style)
            axes.plot(*zip(*points, strict=True), palette.marker(name), color=palette.colour(name))
        for name, estimate in found.predicted.items():
            at, colour = [found.target] * 2, palette.colour(name)
            axes.plot(at, [estimate.low, estimate.high], color=colour, linewidth=0.9, alpha=0.6)
            axes.plot(at[:1], [estimate.value], palette.marker(name), color=colour, mfc=PAPER)
        axes.set_xscale("log")
        ticks = [*found.parameters, *([found.target] if found.predicted else [])]
        axes.set_xticks(ticks, [f"{tick / 1e6:.3g}M" for tick in ticks])
        axes.xaxis.set_minor_locator(_nothing())
        axes.set_xlabel("parameters; open markers are extrapolated")
        axes.set_ylabel("loss, nats per token")

    return paint


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a score that a selection kept, for a strip above the histogram."""

    label: str
    low: float
    high: float
    colour: str


def histogram(values: np.ndarray, label: str, windows: Sequence[Window]) -> Callable[[Any], None]:
    """Return a histogram of a score, with the intervals that selections kept.

    Args:
      values: [documents], without NaN.
      label: of the axis.
    """

    def paint(axes: Any) -> None:
        low, high = np.quantile(values, [0.002, 0.998])
        bins = np.linspace(low, high if high > low else low + 1, 49)
        counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
        axes.bar(
            bins[:-1], counts, np.diff(bins), align="edge", color=_GREY, alpha=0.55, linewidth=0
        )
        axes.set_xlim(bins[0], bins[-1])
        axes.set_xlabel(label)
        axes.set_ylabel("documents")
        axes.grid(visible=False, axis="x")
        if not windows:
            return
        strip = axes.inset_axes((0, 1.03, 1, 0.085 * len(windows)), sharex=axes)
        for y, window in enumerate(reversed(windows)):
            start, stop = np.clip([window.low, window.high], bins[0], bins[-1])
            strip.plot([start, stop], [y, y], color=window.colour, linewidth=3.2)
        strip.set_ylim(-0.6, len(windows) - 0.4)
        strip.set_yticks(range(len(windows)), [window.label for window in reversed(windows)])
        strip.tick_params(length=0, labelbottom=False)
        strip.spines[:].set_visible(False)
        strip.grid(visible=False)

    return paint


def matrix(
    values: np.ndarray, titles: Sequence[str], lowest: float = -1.0
) -> Callable[[Any], None]:
    """Return a plot of a symmetric matrix of agreement in [lowest, 1] with its values."""

    def paint(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = [_COLOURS[1], PAPER, _COLOURS[0]] if lowest < 0 else [PAPER, _COLOURS[0]]
        scale = LinearSegmentedColormap.from_list("agreement", colours, bad=RULE)
        edges = np.arange(len(titles) + 1) - 0.5
        axes.pcolormesh(  # paths, where an image would be a picture inside the SVG
            edges, edges, np.ma.masked_invalid(values), cmap=scale, vmin=lowest, vmax=1, alpha=0.75
        )
        for (row, column), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
            axes.text(column, row, text, ha="center", va="center")
        places = range(len(titles))
        axes.set_xticks(places, titles, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, titles)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_aspect("equal")

    return paint


def agreement_panels(table: Agreement) -> list[tuple[str, str, np.ndarray, float]]:
    """Return name, title, matrix and lowest value of the agreement panels."""
    return [
        ("kendall", "Kendall's tau-b", table.kendall, -1.0),
        ("spearman", "Spearman's rho", table.spearman, -1.0),
        ("overlap", f"Overlap of the top {table.share:.0%}", table.overlap, 0.0),
    ]


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
