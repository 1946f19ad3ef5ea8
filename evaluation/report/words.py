"""What the numbers say, in sentences. Every word here follows from a comparison, none from a hope.

Choices
- A difference is spoken of as one only where its 95% interval excludes zero, and still does after
  Holm's correction for looking at all of them.
- Scores of one scorer taken low, in the middle and high are set against each other, since the
  literature contradicts itself on which is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluation.report.comparison import Cell, Sizes
from evaluation.report.results import RANDOM, Cost, Evaluation, Results, Sampler
from evaluation.significance import Estimate

_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def headline(
    cells: Sequence[Cell],
    samplers: Sequence[Sampler],
    scorers: Mapping[str, str],
    evaluation: Evaluation,
) -> list[str]:
    """Two to four sentences: the best against the full data, against random, and within scorers.

    Args:
      scorers: name -> title.
    """
    titles = {sampler.name: sampler.title for sampler in samplers}
    pruned = [cell for cell in cells if not cell.is_full]
    if not pruned:
        return ["This study has trained on the full data only."]
    sentences = [_against_full(pruned, titles, evaluation)]
    smallest = min(cell.keep_rate for cell in pruned)
    if against_random := _against_random(pruned, smallest, titles):
        sentences.append(against_random)
    sentences += _within_scorers(pruned, smallest, samplers, scorers)
    return sentences


def _against_full(pruned: Sequence[Cell], titles: dict[str, str], evaluation: Evaluation) -> str:
    name = evaluation.name
    best = min(pruned, key=lambda cell: cell.measures[name].loss.value)
    difference = best.measures[name].to_full
    what = f"{titles[best.sampler]} at {best.share_kept:.0%} of the tokens"
    where = f"on {evaluation.title}"
    if difference is None:
        return f"The lowest loss {where} has {what}; no model was trained on the full data."
    amount = nats(difference)
    if difference.sign < 0:
        return (
            f"At equal compute, {what} beat training on everything {where}, by {amount}"
            f"{_and_random(best, name)}."
        )
    if difference.sign > 0:
        return (
            f"At equal compute, training on everything was best {where}; {what} came closest, "
            f"{amount} behind."
        )
    alone = difference.low * difference.high > 0  # its own interval excludes zero
    looks = "after correction for all that were looked at, " if alone else ""
    return (
        f"At equal compute, the best selection {where} was {what}; {looks}it cannot be told from "
        f"training on everything ({difference.value:+.3f} nats per token, {interval(difference)})."
    ).replace("-", "−")


def _and_random(best: Cell, name: str) -> str:
    """What becomes of a victory over the full data when random is looked at, too."""
    difference = best.measures[name].to_random
    if best.sampler == RANDOM:
        return "; that a random selection does so shows how far runs differ by chance"
    if difference is not None and difference.sign >= 0:
        return "; but a random selection of that size does as well"
    return ""


def _against_random(pruned: Sequence[Cell], keep_rate: float, titles: dict[str, str]) -> str:
    here = [cell for cell in pruned if cell.keep_rate == keep_rate and cell.sampler != RANDOM]
    name = next(iter(here[0].measures)) if here else ""
    found = [
        (cell, difference)
        for cell in here
        if (difference := cell.measures[name].to_random) is not None
    ]
    if not found:
        return ""
    better = sorted(((cell, d) for cell, d in found if d.sign < 0), key=lambda pair: pair[1].value)
    worse = [cell for cell, d in found if d.sign > 0]
    many = f"of the {_count(len(found))} scored selections" if len(found) > 1 else "of one"
    if not better:
        return f"Keeping {keep_rate:.0%}, none {many} beat a random one of that size" + (
            f", and {_count(len(worse))} did worse." if worse else "."
        )
    cell, difference = better[0]
    others = f" {_count(len(worse)).capitalize()} did worse than random." if worse else ""
    return (
        f"Keeping {keep_rate:.0%}, {_count(len(better))} {many} beat a random one of that size: "
        f"{titles[cell.sampler]} most, by {nats(difference)}.{others}"
    )


def _within_scorers(
    pruned: Sequence[Cell],
    keep_rate: float,
    samplers: Sequence[Sampler],
    scorers: Mapping[str, str],
) -> list[str]:
    sentences = []
    for scorer in dict.fromkeys(s.scorer for s in samplers if s.scorer):
        titles = {s.name: s.title for s in samplers if s.scorer == scorer}
        here = [c for c in pruned if c.sampler in titles and c.keep_rate == keep_rate]
        if len(here) < 3:
            continue
        name = next(iter(here[0].measures))
        ranked = sorted(here, key=lambda cell: cell.measures[name].loss.value)
        order = [titles[cell.sampler] for cell in ranked]
        ways = f"{_count(len(order))} ways to select {keep_rate:.0%} by {_inside(scorers[scorer])}"
        sentences.append(f"Of the {ways}, {order[0]} did best, followed by {_listed(order[1:])}.")
    return sentences


def sizes(
    found: Mapping[str, Sizes], titles: Mapping[str, str], evaluations: Sequence[Evaluation]
) -> list[str]:
    """Which selection the extrapolation sees ahead at a larger size, and how sure it is."""
    sentences = []
    for item in evaluations:
        here = found.get(item.name)
        if here is None or not here.wins:
            continue
        ranked = sorted(here.wins.items(), key=lambda pair: -pair[1])
        (first, share), (second, rest) = ranked[:2]
        sure = "" if share >= 0.9 else ": too little to call it"
        sentences.append(
            f"At {here.target / 1e6:.3g}M parameters, "
            f"{here.target / here.parameters[-1]:.0f} times the largest size trained, the fits put "
            f"{titles[first]} lowest on {item.title} in {_of_draws(share)} of the draws, "
            f"{titles[second]} in {_of_draws(rest)}{sure}."
        )
    return sentences


def _of_draws(share: float) -> str:
    """Never all and never none: nobody has drawn often enough to say so."""
    if share > 0.995:
        return "over 99%"
    return "under 1%" if share < 0.005 else f"{share:.0%}"


def cost(costs: Sequence[Cost], training: Cost) -> str:
    """What scoring cost, in training runs."""
    parts = []
    for item in costs:
        if item.flops and training.flops:
            parts.append(f"{item.title} {item.flops / training.flops:.0%}")
    if not parts:
        return ""
    return f"In FLOPs, as a share of one training run: {', '.join(parts)}."


def caveats(results: Results, cells: Sequence[Cell]) -> list[str]:
    """What any study of this form cannot show; the study's own caveats come after."""
    seeds = min(len(cell.runs) for cell in cells)
    pruned = sum(not cell.is_full for cell in cells)
    found = []
    if seeds == 1:
        found.append(
            "One seed: the intervals hold the uncertainty of the evaluation documents, not that of "
            "training. Another seed can move a loss by as much as the smaller differences here."
        )
    at_other_sizes = {run.seed for run in results.runs if run.size}
    if len(at_other_sizes) == 1 and seeds > 1:
        found.append(
            "The other sizes of the model were trained with one seed: what is said of them is less "
            "sure than its intervals."
        )
    if noise := _noise(cells):
        found.append(noise)
    found.append(
        f"{pruned} selections were compared. Differences are marked after Holm's correction for "
        "that; their intervals are those of one look, and the best of several equal ones looks "
        "better than it is."
    )
    most = max(cell.epochs for cell in cells)
    if most < 1:
        found.append(
            f"No selection was seen more than {most:.2f} times. The price of keeping little, "
            "repetition, does not show at this length of training."
        )
    found.append(
        f"The models have {results.runs[0].parameters / 1e6:.1f}M parameters. Which documents help "
        "can change with the model's size."
    )
    return found


def _noise(cells: Sequence[Cell]) -> str:
    """How far random selections lie from the full data: a yardstick for all other differences."""
    random = [cell for cell in cells if cell.sampler == RANDOM and cell.epochs <= 2]
    found = [m.to_full.value for cell in random for m in cell.measures.values() if m.to_full]
    if not found:
        return ""
    return (
        "Random selections that are hardly repeated should be as good as the full data. Here they "
        f"came out {min(found):+.3f} to {max(found):+.3f} nats per token from it: differences of "
        "that size are the noise of training."
    ).replace("-", "−")


def nats(estimate: Estimate) -> str:
    """The size of a difference, without its sign: "0.021 nats per token (95%: 0.011 to 0.030)"."""
    low, high = sorted((abs(estimate.low), abs(estimate.high)))
    return f"{abs(estimate.value):.3f} nats per token (95%: {low:.3f} to {high:.3f})"


def interval(estimate: Estimate) -> str:
    return f"95%: {estimate.low:.3f} to {estimate.high:.3f}"


def _inside(title: str) -> str:
    """A title as it stands within a sentence; names such as Ask-LLM keep their capitals."""
    return title if title[1:] != title[1:].lower() else title.lower()


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _count(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)
