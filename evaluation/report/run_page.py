"""The page of a single training run: its losses, gradients and evaluations, from its metrics.

    winnow report --run=runs/c4/tiny

    report/index.html     the page; needs no network, runs no script
    report/*.svg, *.png   its charts

The run may be unfinished: the page then shows the steps so far.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report import charts, document_text, templates
from evaluation.report.charts import INK, Chart
from models.errors import ModelError, reading
from pruning.store.atomic import write_text
from pruning.store.manifest import ArtifactError

_NUMBERS = {"train": ("step", "loss", "tokens"), "eval": ("step", "loss"), "event": ("step",)}
_FEW = 30  # logged steps that are drawn as dots, too
_SMOOTHED = 20  # windows of logged steps in which the training loss is averaged
_COLORS = ("#2f7fc4", "#cf6a1a", "#1f9a78", "#c2417c", "#8a63c9")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Metrics of a run.

    Attributes:
      train: name -> values at the logged steps, float64 [steps]; "step" is one of the names.
      evaluations: name of an evaluation set -> the same.
      events: lines of loss spikes and the like.
    """

    train: Mapping[str, np.ndarray]
    evaluations: Mapping[str, Mapping[str, np.ndarray]]
    events: Sequence[Mapping[str, Any]]


def read(run: Path) -> Metrics:
    """Read the metrics of a training run.

    Raises:
      ArtifactError: the directory holds no run, or its metrics are damaged.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        raise ArtifactError(f"{run} holds no training run: it has no {file.name}.")
    try:  # a killed process may have left a partial last line
        with reading(file):
            content = file.read_text()
        lines = [json.loads(line) for line in content.split("\n")[:-1]]
        by_kind: dict[str, list[dict]] = {"train": [], "eval": [], "event": []}
        for line in lines:
            _check(line)
            by_kind[line["kind"]].append(line)
        names = dict.fromkeys(line["name"] for line in by_kind["eval"])
        evaluations = {
            name: _columns([line for line in by_kind["eval"] if line["name"] == name])
            for name in names
        }
        return Metrics(_columns(by_kind["train"]), evaluations, by_kind["event"])
    except ModelError:
        raise
    except KeyError as error:
        raise ArtifactError(f"{file} is damaged: a line has no {error}. Copy it again.") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged ({error}). Copy it again.") from error


def _check(line: dict[str, Any]) -> None:
    """Raise an error if a line lacks what the page shows.

    Raises:
      KeyError: it lacks a value.
      ValueError, TypeError, OverflowError: a value is of another kind, or too large.
    """
    kind = line["kind"]
    if kind not in _NUMBERS:
        raise ValueError(f"kind is {kind!r:.40}")
    for name in _NUMBERS[kind]:
        value = line[name]
        if not isinstance(value, int | float) or (name != "loss" and not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r:.40}")
    if kind == "eval" and not isinstance(line["name"], str):
        raise ValueError(f"name is {line['name']!r:.40}")


def write(run: Path, output: Path) -> Path:
    """Write the page and its charts; return its path."""
    metrics = read(run)
    if not len(metrics.train.get("step", ())):
        raise ArtifactError(f"{run} has no logged steps yet.")
    page = templates.render(
        "run_page.html",
        {"number": lambda value: f"{value:.4g}"},
        run=str(run),
        finished=(run / "result.json").exists(),
        steps=int(metrics.train["step"][-1]),
        tokens=int(metrics.train["tokens"][-1]),
        charts=_charts(metrics, output),
        evaluations=[_summary(name, found) for name, found in metrics.evaluations.items()],
        events=[
            {"step": event["step"], "text": f"{event.get('event')}: loss {event.get('loss')}"}
            for event in metrics.events
        ],
    )
    write_text(output / "index.html", page)
    return output / "index.html"


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the numbers of lines as columns; NaN where a line lacks one."""
    names = dict.fromkeys(
        name for line in lines for name, value in line.items() if isinstance(value, int | float)
    )
    return {name: np.array([float(line.get(name, np.nan)) for line in lines]) for name in names}


def _summary(name: str, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    best = int(np.argmin(found["loss"]))
    return {
        "name": name,
        "last": found["loss"][-1],
        "bits_per_byte": found["bits_per_byte"][-1] if "bits_per_byte" in found else None,
        "best": found["loss"][best],
        "best_step": int(found["step"][best]),
    }


def _charts(metrics: Metrics, output: Path) -> list[Chart]:
    last = metrics.train["loss"][-1]
    drawn = [
        charts.draw(
            "loss",
            f"Training loss by step, ending at {last:.3g}{_evaluated(len(metrics.evaluations))}.",
            output,
            _losses(metrics),
        )
    ]
    for name, label in (
        ("gradient_norm", "norm of the gradient"),
        ("tokens_per_second", "tokens per second"),
    ):
        if name in metrics.train:
            drawn.append(
                charts.draw(name, f"{label.capitalize()} by step.", output, _line(metrics, name))
            )
    return drawn


def _evaluated(sets: int) -> str:
    return f", and loss on {sets} evaluation set{'s' if sets > 1 else ''}" if sets else ""


def _marker(step: np.ndarray) -> str:
    """Return the marker of logged steps: dots where there are few, as a single one has no line."""
    return "." if len(step) <= _FEW else ""


def _label_steps(axes: Any) -> None:
    axes.set_xlabel("training steps")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _losses(metrics: Metrics) -> Callable[[Any], None]:
    def paint(axes: Any) -> None:
        step, loss = metrics.train["step"], metrics.train["loss"]
        axes.plot(
            step, loss, marker=_marker(step), color=INK, alpha=0.35, linewidth=0.8, label="training"
        )
        if len(step) > 2 * _SMOOTHED:
            parts = np.array_split(np.arange(len(step)), _SMOOTHED)
            middle = [step[part].mean() for part in parts]
            axes.plot(middle, [loss[part].mean() for part in parts], color=INK, linewidth=1.2)
        for place, (name, found) in enumerate(metrics.evaluations.items()):
            color = _COLORS[place % len(_COLORS)]
            shown = document_text.printable(name).replace("$", r"\$")  # no formula
            axes.plot(found["step"], found["loss"], ".-", color=color, label=shown)
        axes.legend(frameon=False)
        _label_steps(axes)
        axes.set_ylabel("loss, nats per target token")

    return paint


def _line(metrics: Metrics, name: str) -> Callable[[Any], None]:
    def paint(axes: Any) -> None:
        step = metrics.train["step"]
        values = metrics.train[name]
        axes.plot(step, values, marker=_marker(step), color=_COLORS[0], linewidth=1)
        _label_steps(axes)
        axes.set_ylabel(name.replace("_", " "))
        axes.set_ylim(bottom=0)

    return paint
