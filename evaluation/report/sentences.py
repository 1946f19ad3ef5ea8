"""Sentences of the report. Each follows from a comparison that was tested.

Choices
- A difference is stated only if it is significant (`Estimate.sign`): the variance of training is
  known, both models are below the unigram floor, the 95% interval excludes zero, and the p-value
  passes Holm's correction over all cells. Otherwise the sentence says which condition fails.
- Orders of selections are given as orders of mean loss, never as winners: pairs within an order are
  not tested.
- An extrapolated winner comes after the share of pairs that two trained sizes rank alike, and is
  named only where that share is surely above one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluation.report.comparison import Cell, Measures, Noise, Sizes
from evaluation.report.results import Cost, Evaluation, Floor, Results, Sampler
from evaluation.statistics.significance import Estimate
from evaluation.study.plan import RANDOM

_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SURE = 0.9  # of the draws, for an extrapolated winner to be named


def headline(
    cells: Sequence[Cell],
    samplers: Sequence[Sampler],
    scorers: Mapping[str, str],
    evaluation: Evaluation,
) -> list[str]:
    """Return the answer in at most four sentences, or why there is none.

    Args:
      scorers: name -> title.
      evaluation: the evaluation set that the answer is about.
    """
    titles = {sampler.name: sampler.title for sampler in samplers}
    pruned = [cell for cell in cells if not cell.is_full]
    if not pruned:
        return ["This study trained on the full data only."]
    if reason := no_verdict(cells, evaluation):
        return [reason, _lowest(cells, titles, evaluation)]
    sentences = [_against_full(pruned, titles, evaluation)]
    smallest = min(cell.keep_rate for cell in pruned)
    if against_random := _against_random(pruned, smallest, titles, evaluation.name):
        sentences.append(against_random)
    sentences += _within_scorers(pruned, smallest, samplers, scorers, evaluation.name)
    return sentences


def no_verdict(cells: Sequence[Cell], evaluation: Evaluation) -> str:
    """Return why no selection can be judged on an evaluation set; "" where some can be."""
    measures = [cell.measures[evaluation.name] for cell in cells]
    differences = [d for found in measures for d in (found.to_full, found.to_random) if d]
    if not differences or any(difference.p is not None for difference in differences):
        return ""
    if not any(found.below_floor in (True, None) for found in measures):
        return (
            f"No conclusion: on {evaluation.title}, no model is better than a table of word "
            "frequencies of the pool (the unigram floor)."
        )
    if all(len(cell.runs) < 2 for cell in cells):
        return (
            "No conclusion: every selection was trained with one seed, so how much a loss varies "
            "from training to training is unknown."
        )
    return (
        "No conclusion: no two models can be compared, because one of them is not below the "
        "unigram floor or the variation between trainings is unknown."
    )


def _lowest(cells: Sequence[Cell], titles: Mapping[str, str], evaluation: Evaluation) -> str:
    cell = min(cells, key=lambda cell: cell.measures[evaluation.name].loss.value)
    found = cell.measures[evaluation.name]
    return (
        f"The lowest perplexity measured on {evaluation.title} is {found.perplexity:.1f}, of "
        f"{_named(cell, titles)}."
    )


def _named(cell: Cell, titles: Mapping[str, str]) -> str:
    if cell.is_full:
        return "the full data"
    return f"{titles[cell.sampler]} at {cell.share_kept:.0%} of the tokens"


def _against_full(pruned: Sequence[Cell], titles: dict[str, str], evaluation: Evaluation) -> str:
    name = evaluation.name
    where = f"on {evaluation.title}"
    tested = [
        cell
        for cell in pruned
        if (d := cell.measures[name].to_full) is not None and d.p is not None
    ]
    if not tested:
        best = min(pruned, key=lambda cell: cell.measures[name].loss.value)
        return (
            f"The lowest loss {where} has {_named(best, titles)}; it is not compared with the full "
            "data."
        )
    best = min(tested, key=lambda cell: cell.measures[name].loss.value)
    difference = best.measures[name].to_full
    assert difference is not None
    what = _named(best, titles)
    if difference.sign < 0:
        return (
            f"At equal compute, {what} beat training on everything {where}, by {nats(difference)}"
            f"{_and_random(best, name)}."
        )
    if difference.sign > 0:
        return (
            f"At equal compute, training on everything was best {where}; {what} came closest, "
            f"{nats(difference)} behind."
        )
    alone = difference.low * difference.high > 0  # its own interval excludes zero
    looks = "after correction for the number of comparisons, " if alone else ""
    return (
        f"At equal compute, the lowest loss of a selection {where} was that of {what}; {looks}it "
        "cannot be distinguished from training on everything "
        f"({difference.value:+.3f} nats per token, {interval(difference)})."
    ).replace("-", "−")


def _and_random(best: Cell, name: str) -> str:
    """Return the caveat to a gain over the full data that random selection also has."""
    difference = best.measures[name].to_random
    if best.sampler == RANDOM:
        return "; a random selection can do so by chance alone"
    if difference is not None and difference.sign >= 0:
        return "; but it is not distinguishable from a random selection of that size"
    return ""


def _against_random(
    pruned: Sequence[Cell], keep_rate: float, titles: dict[str, str], name: str
) -> str:
    found = [
        (cell, difference)
        for cell in pruned
        if cell.keep_rate == keep_rate
        and (difference := cell.measures[name].to_random) is not None
        and difference.p is not None
    ]
    if not found:
        return ""
    better = sorted(((cell, d) for cell, d in found if d.sign < 0), key=lambda pair: pair[1].value)
    worse = [cell for cell, d in found if d.sign > 0]
    many = f"of the {_count(len(found))} other selections" if len(found) > 1 else "of one"
    if not better:
        return f"Keeping {keep_rate:.0%}, none {many} beat a random one of that size" + (
            f", and {_count(len(worse))} did worse." if worse else "."
        )
    cell, difference = better[0]
    others = f" {_count(len(worse)).capitalize()} did worse than random." if worse else ""
    most = " most" if len(better) > 1 else ""
    return (
        f"Keeping {keep_rate:.0%}, {_count(len(better))} {many} beat a random one of that size: "
        f"{titles[cell.sampler]}{most}, by {nats(difference)}.{others}"
    )


def _within_scorers(
    pruned: Sequence[Cell],
    keep_rate: float,
    samplers: Sequence[Sampler],
    scorers: Mapping[str, str],
    name: str,
) -> list[str]:
    """Return the orders of low, middle and high selections by the same score.

    The literature disagrees on which of these is best.
    """
    sentences = []
    for scorer in dict.fromkeys(s.scorer for s in samplers if s.scorer):
        titles = {s.name: s.title for s in samplers if s.scorer == scorer}
        here = [c for c in pruned if c.sampler in titles and c.keep_rate == keep_rate]
        if len(here) < 3:
            continue
        ranked = sorted(here, key=lambda cell: cell.measures[name].loss.value)
        order = ", ".join(titles[cell.sampler] for cell in ranked)
        ways = f"{_count(len(here))} ways to select {keep_rate:.0%} by {_inside(scorers[scorer])}"
        sentences.append(f"In order of mean loss, the {ways}: {order}.")
    return sentences


# --------------------------------------------------------------------------------------------------
# Certainty and floor, beside the answer


def certainty(cells: Sequence[Cell], noise: Noise | None) -> str:
    """Return how many trainings the answer rests on, and how small a difference they can show."""
    seeds = min(len(cell.runs) for cell in cells)
    trained = f"{_count(seeds)} seed{'s' if seeds > 1 else ''} per selection".capitalize()
    if noise is None:
        return f"{trained}: no significance can be stated."
    text = (
        f"{trained}; one training varies by ±{noise.error.variance**0.5:.3f} nats per token, so a "
        f"single comparison can show differences from {noise.detectable(seeds):.3f} on."
    )
    return f"{text} {uneven(noise)}" if noise.uneven else text


def uneven(noise: Noise) -> str:
    """Return which selections are noisier than the rest, and how they are treated."""
    names = ", ".join(f"{name} at {rate:.0%}" for name, rate in noise.uneven)
    return (
        f"Not equally noisy (Cochran's C, p < 0.05): {names}; such selections are judged by the "
        "variance of their own trainings."
    )


def floor(cells: Sequence[Cell], floors: Sequence[Floor], evaluation: Evaluation) -> str:
    """Return the floors' perplexities, and which models are below the unigram floor."""
    known = ", ".join(f"{_inside(item.title)} {item.perplexity:,.1f}" for item in floors)
    measures = [cell.measures[evaluation.name] for cell in cells]
    above = sum(found.below_floor is False for found in measures)
    best = min(measures, key=lambda found: found.loss.value)
    if above == len(measures):
        verdict = f"no model is below the unigram floor (best {best.perplexity:,.1f})"
    elif above:
        verdict = (
            f"{above} of {len(measures)} selections are not below the unigram floor and get no "
            f"verdict; best {best.perplexity:,.1f}"
        )
    else:
        verdict = f"all models are below unigram, best {best.perplexity:,.1f}"
        verdict += _against_higher(best, floors)
    return f"Perplexity of {known}; {verdict}."


def _against_higher(best: Measures, floors: Sequence[Floor]) -> str:
    higher = floors[1:]
    if not higher:
        return ""
    beaten = best.loss.value < higher[-1].per_token
    return f" ({'below' if beaten else 'above'} {_inside(higher[-1].title)})"


# --------------------------------------------------------------------------------------------------
# Other sizes of the model


def sizes(
    found: Mapping[str, Sizes], titles: Mapping[str, str], evaluations: Sequence[Evaluation]
) -> list[str]:
    """Return how well sizes agree, and then the extrapolated winner where that can be believed."""
    sentences = []
    for item in evaluations:
        here = found.get(item.name)
        if here is None:
            continue
        agreed = _agreement(here, item)
        if agreed:
            sentences.append(agreed)
        if here.wins:
            sentences.append(_winner(here, titles, item))
    return sentences


def _agreement(here: Sizes, evaluation: Evaluation) -> str:
    if not here.ranked_alike:
        return ""
    pairs = here.ranked * (here.ranked - 1) // 2
    largest = here.parameters[-1]
    parts = [
        f"{size / 1e6:.3g}M and {largest / 1e6:.3g}M parameters rank {found.value:.0%} alike "
        f"(95%: {found.low:.0%} to {found.high:.0%})"
        for size, found in here.ranked_alike.items()
    ]
    many = f"{pairs} pairs" if pairs > 1 else "one pair"
    return (
        f"Of the {many} of selections on {evaluation.title}, {'; '.join(parts)}. This is how often "
        "the choice made with the smaller model agrees with the larger one's."
    )


def _winner(here: Sizes, titles: Mapping[str, str], evaluation: Evaluation) -> str:
    ranked = sorted(here.wins.items(), key=lambda pair: -pair[1])
    (first, share), (second, rest) = ranked[:2]
    target = (
        f"At {here.target / 1e6:.3g}M parameters, "
        f"{here.target / here.parameters[-1]:.0f} times the largest size trained,"
    )
    agreed = [found.low for found in here.ranked_alike.values()]
    if not agreed or min(agreed) <= 0.5 or share < _SURE:
        why = (
            "the sizes trained do not rank selections alike more often than chance"
            if agreed and min(agreed) <= 0.5
            else "too few selections were trained at every size to tell whether sizes agree"
            if not agreed
            else "the fits do not agree"
        )
        return (
            f"{target} no lowest loss on {evaluation.title} is predicted: {why} "
            f"({titles[first]} in {_of_draws(share)} of the draws, {titles[second]} in "
            f"{_of_draws(rest)})."
        )
    return (
        f"{target} the fits put {titles[first]} lowest on {evaluation.title} in "
        f"{_of_draws(share)} of the draws, {titles[second]} in {_of_draws(rest)}."
    )


def _of_draws(share: float) -> str:
    """Return a share of draws in words; a finite number of draws cannot show all or none."""
    if share > 0.995:
        return "over 99%"
    return "under 1%" if share < 0.005 else f"{share:.0%}"


# --------------------------------------------------------------------------------------------------
# Cost and caveats


def cost(costs: Sequence[Cost], training: Cost) -> str:
    """Return the cost of scoring in training runs."""
    parts = []
    for item in costs:
        if item.flops and training.flops:
            parts.append(f"{item.title} {item.flops / training.flops:.0%}")
    if not parts:
        return ""
    return f"In FLOPs, as a share of one training run: {', '.join(parts)}."


def caveats(
    results: Results, cells: Sequence[Cell], noises: Mapping[str, Noise | None]
) -> list[str]:
    """Return the limits of any study of this form; the study's own caveats come after.

    Args:
      noises: by evaluation set.
    """
    seeds = min(len(cell.runs) for cell in cells)
    pruned = sum(not cell.is_full for cell in cells)
    found = []
    if seeds == 1:
        known = [noise for noise in noises.values() if noise]
        found.append(
            "One seed per selection: the variance of training is that of repeated random and "
            "full-data runs, taken as equal for all selections."
            if known
            else "One seed: intervals cover the evaluation documents only, not the training. "
            "Another seed can change a loss by more than the differences here, so no difference is "
            "marked."
        )
    found += [
        f"On {item.title}: {uneven(noise)}"
        for item in results.evaluations
        if (noise := noises.get(item.name)) and noise.uneven
    ]
    at_other_sizes = {run.seed for run in results.runs if run.size}
    if len(at_other_sizes) == 1 and seeds > 1:
        found.append(
            "The other sizes of the model were trained with one seed, so statements about them are "
            "less certain than their intervals."
        )
    if text := _random_to_full(cells):
        found.append(text)
    found.append(
        f"{pruned} selections were compared. Differences are marked after Holm's correction for "
        "that number; intervals are those of a single comparison, and the best of several equal "
        "selections looks better than it is."
    )
    most = max(cell.epochs for cell in cells)
    if most < 1:
        found.append(
            f"No selection was seen more than {most:.2f} times. The cost of repetition, which "
            "comes with keeping little, does not show at this length of training."
        )
    found.append(
        f"The models have {results.runs[0].parameters / 1e6:.1f}M parameters. Which documents help "
        "can change with the model's size."
    )
    return found


def _random_to_full(cells: Sequence[Cell]) -> str:
    """Return how far random selections are from the full data, a scale for other differences."""
    random = [cell for cell in cells if cell.sampler == RANDOM and cell.epochs <= 2]
    found = [m.to_full.value for cell in random for m in cell.measures.values() if m.to_full]
    if not found:
        return ""
    return (
        "Random selections that are repeated at most twice should be as good as the full data. "
        f"Here they differ from it by {min(found):+.3f} to {max(found):+.3f} nats per token: "
        "differences of that size are the noise of training."
    ).replace("-", "−")


def nats(estimate: Estimate) -> str:
    """Return the size of a difference: "0.021 nats per token (95%: 0.011 to 0.030)"."""
    low, high = sorted((abs(estimate.low), abs(estimate.high)))
    return f"{abs(estimate.value):.3f} nats per token (95%: {low:.3f} to {high:.3f})"


def interval(estimate: Estimate) -> str:
    return f"95%: {estimate.low:.3f} to {estimate.high:.3f}"


def _inside(title: str) -> str:
    """Return a title as written within a sentence; names such as Ask-LLM keep their capitals."""
    return title if title[1:] != title[1:].lower() else title.lower()


def _count(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)
