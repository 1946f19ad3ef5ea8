"""The page of running work that `winnow status --serve` shows, as HTML.

It loads nothing, runs no script and reloads itself. Names and messages are of files that others may
have written: control characters are replaced, markup is escaped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from models.terminal import escaped, escaped_lines
from pruning.store import status, watch
from pruning.store.manifest import size_in_words
from pruning.store.progress import duration

_RELOAD = 5  # seconds
_POINTS = 200  # of a curve


def rendered(paths: Sequence[str], now: float | None = None) -> str:
    """Return the page on the work below some directories.

    Args:
      now: reference time of ages, in seconds since 1970; None for the current time.
    """
    now = time.time() if now is None else now
    found = [item for path in paths for item in watch.find(path, now)]
    if len(paths) == 1:  # below several, names of the same work would be equal
        found = [_below(item, paths[0]) for item in found]
    studies = [item for item in found if isinstance(item, watch.Study)]
    runs = [item for item in found if isinstance(item, watch.Run)]
    artifacts = [item for item in found if isinstance(item, watch.Artifact)]
    problems = [item for item in found if isinstance(item, watch.Problem)]
    title = ", ".join(paths)
    style = (Path(__file__).parent / "status_page.css").read_text(encoding="utf-8")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="refresh" content="{_RELOAD}">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(_in_short(studies, runs, artifacts))}: {_text(title)}</title>",
        f"<style>{style}</style>\n</head>\n<body>",
        f"<header><h1>{_text(title)}</h1>",
        f'<p class="note">As of {time.strftime("%H:%M:%S", time.localtime(now))}; read again every '
        f"{_RELOAD} s.</p></header>\n<main>",
        *(f'<p class="bad">{_text(item.path)}: {_text(item.message)}</p>' for item in problems),
    ]
    for study in studies:
        parts += _study(study)
    unfinished = [(item.path, item.unfinished) for item in artifacts if item.unfinished is not None]
    if unfinished:
        parts.append("<section><h2>Unfinished stages</h2>")
        for path, state in unfinished:
            parts += _unfinished(path, state)
        parts.append("</section>")
    if runs:
        parts += _runs(runs)
    finished = [item for item in artifacts if item.unfinished is None]
    if finished:
        opened = " open" if len(finished) <= 12 else ""
        parts.append(
            f"<section><h2>Finished</h2><details{opened}><summary>artifacts: "
            f"{len(finished):,}</summary>"
        )
        parts += (f"<pre>{_text_lines(chr(10).join(item.lines))}</pre>" for item in finished)
        parts.append("</details></section>")
    if not found:
        parts.append("<p>Nothing has been started here yet.</p>")
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _below(item: watch.Found, root: str) -> watch.Found:
    """Return the item with its path relative to the directory that was asked for."""
    with contextlib.suppress(ValueError):
        inner = str(Path(item.path).relative_to(root))
        return dataclasses.replace(item, path=root if inner == "." else inner)
    return item


def _in_short(
    studies: Sequence[watch.Study], runs: Sequence[watch.Run], artifacts: Sequence[watch.Artifact]
) -> str:
    """Return the state in a few words, for the title of the window."""
    failed = sum(len(study.of("failed")) for study in studies)
    failed += sum(len(item.unfinished.of("failed")) for item in artifacts if item.unfinished)
    if failed:
        return f"{failed:,} failed"
    if lost := sum(len(study.of("lost")) for study in studies):
        return f"{lost:,} lost"
    if studies:
        done = sum(len(study.of("finished")) for study in studies)
        total = sum(len(study.stages) for study in studies)
        return "finished" if done == total else f"{done:,} of {total:,} stages"
    if states := [item.unfinished for item in artifacts if item.unfinished]:
        return f"{sum(s.done for s in states):,} of {sum(s.num_shards for s in states):,} shards"
    if running := [run for run in runs if not run.finished]:
        return f"{len(running):,} runs"
    return "finished" if runs or artifacts else "nothing yet"


def _text(text: object) -> str:
    return html.escape(escaped(str(text)))


def _text_lines(text: str) -> str:
    return html.escape(escaped_lines(text))


def _bar(done: float | None, total: float | None, label: str) -> str:
    if done is None or not total:
        return ""
    value = min(max(done / total, 0.0), 1.0)
    return f'<progress value="{value:.4f}" max="1" aria-label="{_text(label)}"></progress>'


def _numbers(counts: dict[str, int]) -> str:
    """Return counts in a line, failures marked; those of zero are left out."""
    words = []
    for name, n in counts.items():
        if n:
            mark = ' class="bad"' if name in ("failed", "lost") else ""
            words.append(f"<span{mark}>{n:,} {_text(name)}</span>")
    return ", ".join(words) or "nothing yet"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table; its cells are HTML, the first of each row is its header."""
    yield '<div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{name}</th>" for name in head) + "</tr></thead><tbody>"
    for first, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        yield f'<tr><th scope="row">{first}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _study(study: watch.Study) -> Iterator[str]:
    states = ("finished", "running", "failed", "lost", "waiting")
    counts = {state: len(study.of(state)) for state in states}
    yield f"<section><h2>Study {_text(study.path)}</h2>"
    left = "" if study.seconds_left is None else f"; about {duration(study.seconds_left)} left"
    left = left if counts["finished"] < len(study.stages) else ""
    yield f"<p>{_numbers(counts)} of {len(study.stages):,} stages{left}</p>"
    yield _bar(counts["finished"], len(study.stages), "stages finished")
    for stage in study.of("failed"):
        yield f'<h3 class="bad">{_text(stage.name)} failed</h3>'
        yield f"<pre>{_text_lines(stage.message)}</pre>"
    if running := study.of("running"):
        head = ("running", "", "done", "rate", "left", "loss", "reported")
        yield from _table(head, map(_stage_row, running))
    if lost := study.of("lost"):
        yield '<p class="bad">No report for long, so the processes of these stages were probably '
        yield "killed. Run the study's command again.</p>"
        head = ("lost", "", "done", "rate", "left", "loss", "reported")
        yield from _table(head, map(_stage_row, lost))
    if finished := study.of("finished"):
        yield f"<details><summary>finished stages: {len(finished):,}</summary>"
        rows = ((_text(s.name), duration(s.seconds or 0.0)) for s in finished)
        yield from _table(("stage", "took"), rows)
        yield "</details>"
    if waiting := study.of("waiting"):
        yield f"<details><summary>waiting stages: {len(waiting):,}</summary>"
        yield f"<p>{', '.join(_text(stage.name) for stage in waiting)}</p></details>"
    yield "</section>"


def _stage_row(stage: watch.Stage) -> Sequence[str]:
    report = stage.progress
    done, total, rate, left = (report.get(n) for n in ("done", "total", "rate", "seconds_left"))
    unit = report.get("unit", "")
    name = f"<br><small>{_text(report['name'])}</small>" if "name" in report else ""
    of_total = f" of {total:,.0f}" if total is not None else ""
    start = "starting" if stage.state == "running" else ""
    return (
        f"{_text(stage.name)}{name}",
        _bar(done, total, stage.name),
        start if done is None else f"{done:,.0f}{of_total} {_text(unit)}",
        "" if not rate else f"{rate:,.3g} {_text(unit)}/s",
        "" if left is None else duration(left),
        "" if report.get("loss") is None else f"{report['loss']:.4g}",
        f"{duration(stage.seconds_ago)} ago",
    )


def _unfinished(path: str, state: status.Status) -> Iterator[str]:
    names = ("running", "failed", "stopped", "lost")
    counts = {"done": state.done} | {name: len(state.of(name)) for name in names}
    counts["waiting"] = len(state.waiting)
    yield f"<h3>{_text(path)} <small>{_text(state.kind)}</small></h3>"
    words = [_numbers(counts) + f" of {state.num_shards:,} shards"]
    if state.rows:
        words.append(f"so far {_text(size_in_words(state.rows, state.tokens))}")
    rate = status.rates(state)
    words += (f"{value:,.3g} {_text(unit)}/s" for unit, value in rate.items())
    if state.seconds_left is not None:
        words.append(f"about {duration(state.seconds_left)} left")
    yield f"<p>{'; '.join(words)}</p>"
    yield _bar(state.done, state.num_shards, "shards done")
    for name, (count, total) in state.parts.items():
        yield f"<p>{_text(name)}: {count:,} of {total:,} parts</p>"
    if not state.of("running"):
        yield '<p class="bad">No worker is running: run the command that makes it again.</p>'
    if state.workers:
        yield from _table(("shard", "state", "", "done", "rate", "who"), _workers(state.workers))


def _workers(workers: Sequence[status.Worker]) -> Iterator[Sequence[str]]:
    order = {"failed": 0, "lost": 1, "stopped": 2, "running": 3}
    for worker in sorted(workers, key=lambda worker: (order[worker.state], worker.shard))[:100]:
        report = worker.progress
        done, total, unit = report.get("done"), report.get("total"), report.get("unit") or ""
        of_total = f" of {total:,.0f}" if total else ""
        mark = ' class="bad"' if worker.state in ("failed", "lost") else ""
        error = f"<br><small>{_text(worker.error)}</small>" if worker.error else ""
        yield (
            f"{worker.shard:,}",
            f"<span{mark}>{_text(worker.state)}</span><br>"
            f"<small>{duration(worker.seconds_ago)} ago</small>",
            _bar(done, total, f"shard {worker.shard}"),
            "" if done is None else f"{done:,.0f}{of_total} {_text(unit)}",
            f"{report['rate']:,.3g} {_text(unit)}/s" if report.get("rate") else "",
            f"{_text(worker.who)}, {_text(worker.phase)}{error}",
        )


def _runs(runs: Sequence[watch.Run]) -> Iterator[str]:
    yield "<section><h2>Training runs</h2>"
    head = ("run", "training loss", "", "step", "tokens", "evaluations", "left")
    yield from _table(head, map(_run_row, sorted(runs, key=lambda run: run.finished)))
    yield "</section>"


def _run_row(run: watch.Run) -> Sequence[str]:
    of_steps = f" of {run.steps:,}" if run.steps is not None else ""
    speed = f"<br><small>{run.tokens_per_second:,.0f}/s</small>" if run.tokens_per_second else ""
    if run.finished:
        left = '<span class="good">finished</span>'
    else:
        known = "" if run.seconds_left is None else duration(run.seconds_left)
        left = f"{known}<br><small>last step {duration(run.seconds_ago)} ago</small>"
    evaluations = "<br>".join(
        f"{_text(name)} {loss:.4g}" for name, loss in sorted(run.evaluations.items())
    )
    return (
        _text(run.path),
        f"{run.losses[-1][1]:.4g}",
        _curve(run.losses),
        f"{run.step:,}{of_steps}{_bar(run.step, run.steps, 'steps')}",
        f"{run.tokens:,}{speed}",
        evaluations,
        left,
    )


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    """Return a loss curve as SVG, of at most `_POINTS` points."""
    stride = -(-len(losses) // _POINTS)
    points = [*losses[::stride], losses[-1]]
    steps, values = zip(*points, strict=True)
    width, height = max(steps[-1] - steps[0], 1), (max(values) - min(values)) or 1.0
    drawn = " ".join(
        f"{100 * (step - steps[0]) / width:.1f},{1 + 18 * (max(values) - value) / height:.1f}"
        for step, value in points
    )
    label = f"training loss, {values[0]:.4g} at step {steps[0]:,} to {values[-1]:.4g}"
    return (
        f'<svg viewBox="0 0 100 20" preserveAspectRatio="none" role="img"><title>{label}</title>'
        f'<polyline points="{drawn}"/></svg>'
    )
