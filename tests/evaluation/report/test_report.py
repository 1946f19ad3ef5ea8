"""The report: from a real small study, and what it makes of numbers and of hostile text."""

import csv
import dataclasses
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from evaluation.perplexity import Losses
from evaluation.report import ReportConfig, charts, comparison, reading, sentences
from evaluation.report import run as write_report
from evaluation.report.document_text import printable
from evaluation.report.results import Cost, Curve, Evaluation, Floor, Run, Sampler
from evaluation.results_directory import ResultsDirectory
from evaluation.study import run as study

# --------------------------------------------------------------------------------------------------
# Comparisons


def run_of(sampler, keep_rate, per_token, seed=0, curve=((10, 5.0), (20, 4.0)), epochs=0.5):
    """A run whose documents have these losses per token."""
    per_token = np.asarray(per_token, float)
    tokens = np.full(len(per_token), 10)
    losses = Losses(np.arange(len(tokens)), per_token * tokens, tokens, tokens * 4.0)
    steps, values = zip(*curve, strict=True)
    return Run(
        sampler=sampler,
        keep_rate=keep_rate,
        seed=seed,
        size="",
        documents=10,
        tokens=100,
        share_kept=keep_rate,
        epochs=epochs,
        steps=20,
        parameters=1000,
        seconds=1.0,
        flops=1e9,
        losses={"hq": losses},
        curves={"hq": Curve(np.asarray(steps), np.asarray(values))},
    )


def test_differences_are_paired():
    """Documents of very different difficulty, models that differ by exactly 0.1 on each."""
    hard = np.linspace(1, 9, 50)
    cells = comparison.compare(
        [
            run_of("full", 1.0, hard),
            run_of("random", 0.5, hard + 0.2),
            run_of("a", 0.5, hard + 0.1),
        ],
        ["hq"],
    )
    full, random, a = (cell.measures["hq"] for cell in cells)
    assert full.to_full is None and random.to_random is None
    assert a.to_full.value == pytest.approx(0.1) and a.to_random.value == pytest.approx(-0.1)
    assert a.to_full.high - a.to_full.low == pytest.approx(0, abs=1e-9)
    assert a.loss.high - a.loss.low > 0.5
    assert (a.to_full.p, a.to_full.sign, a.to_random.sign) == (None, 0, 0), "one seed: no verdict"
    assert a.perplexity == pytest.approx(math.exp(hard.mean() + 0.1))
    assert a.bits_per_byte.value == pytest.approx((hard.mean() + 0.1) / math.log(2) / 4)


def test_seeds_are_averaged_and_shown():
    base = np.linspace(2, 4, 20)
    cells = comparison.compare(
        [run_of("full", 1.0, base), run_of("a", 0.5, base, 0), run_of("a", 0.5, base + 1, 1)],
        ["hq"],
    )
    found = cells[1].measures["hq"]
    assert found.loss.value == pytest.approx(3.5)
    assert found.by_seed == pytest.approx((3.0, 4.0))


def test_runs_evaluated_on_different_documents_are_refused():
    one, other = run_of("full", 1.0, [1, 2]), run_of("a", 0.5, [1, 2])
    moved = dataclasses.replace(other.losses["hq"], doc_id=np.array([0, 7]))
    with pytest.raises(ValueError, match="different documents of hq"):
        comparison.compare([one, dataclasses.replace(other, losses={"hq": moved})], ["hq"])


@pytest.mark.parametrize(
    ("goal", "expected"), [(5.0, 10), (4.5, 15), (4.0, 20), (3.5, 25), (2.9, None)]
)
def test_steps_to_reach(goal, expected):
    curve = Curve(np.array([10, 20, 30]), np.array([5.0, 4.0, 3.0]))
    found = comparison.steps_to_reach(curve, goal)
    assert found == pytest.approx(expected) if expected else found is None


def test_steps_to_reach_is_where_it_first_comes_down():
    assert comparison.steps_to_reach(Curve(np.arange(4), np.array([5.0, 3, 4, 2])), 3.5) == 0.75


def test_the_front_is_what_nothing_beats():
    base = np.linspace(2, 4, 20)
    offsets = {
        ("full", 1.0): 0.0,
        ("a", 0.5): 0.1,
        ("b", 0.5): 0.3,
        ("c", 0.2): 0.2,
        ("d", 0.8): 0.15,
    }
    runs = [run_of(name, rate, base + by) for (name, rate), by in offsets.items()]
    cells = comparison.compare(runs, ["hq"])
    front = comparison.pareto(cells, "hq")
    assert [cell.sampler for cell in front] == ["c", "a", "full"]


def test_a_difference_must_survive_many_looks_and_many_seeds():
    rng = np.random.default_rng(0)
    base = np.linspace(2, 4, 40)

    def runs(sampler, offsets):
        noise = rng.normal(0, 0.02, 40)
        return [run_of(sampler, 0.5, base + by + noise, seed) for seed, by in enumerate(offsets)]

    def compared(**offsets):
        full = [run_of("full", 1.0, base, seed) for seed in range(3)]
        made = [run for name, by in offsets.items() for run in runs(name, by)]
        cells = comparison.compare([*full, *made], ["hq"])
        return {cell.sampler: cell.measures["hq"].to_full for cell in cells[1:]}

    calm = compared(a=(0.3, 0.31, 0.29), b=(0.02, 0.03, 0.0))
    assert calm["a"].sign == 1 and calm["b"].sign in (0, 1)
    assert calm["a"].adjusted == pytest.approx(2 * calm["a"].p)
    # Trainings of one selection that differ far more than the others' are not pooled with them.
    wild = compared(a=(0.3, 0.31, 0.29), b=(0.9, -0.3, 0.3))
    assert wild["a"].value == pytest.approx(calm["a"].value, abs=0.02)
    assert wild["a"].sign == 1 and wild["a"].low > 0.25
    assert wild["b"].sign == 0 and wild["b"].low < 0 < wild["b"].high


def test_no_verdict_comes_from_one_seed_unless_the_noise_was_measured():
    base = np.linspace(2, 4, 40)
    runs = [run_of("full", 1.0, base), run_of("random", 0.5, base), run_of("a", 0.5, base - 0.3)]
    cells = comparison.compare(runs, ["hq"])
    assert all(not d or d.sign == 0 for cell in cells for d in [cell.measures["hq"].to_full])
    assert comparison.noise(runs, "hq") is None
    (reason, lowest) = sentences.headline(cells, [*SAMPLERS, A], {}, EVALUATION)
    assert "one seed" in reason and "A at 50% of the tokens" in lowest
    assert "no significance can be stated" in sentences.certainty(cells, None)

    rng = np.random.default_rng(0)
    runs += [
        run_of(name, rate, base + rng.normal(0, 0.01), seed)
        for name, rate in (("full", 1.0), ("random", 0.5))
        for seed in range(1, 6)
    ]
    cells = comparison.compare(runs, ["hq"])
    noise = comparison.noise(runs, "hq")
    assert (noise.cells, noise.seeds, noise.error.freedom) == (2, 6, 5)
    assert {c.sampler: c.measures["hq"].to_full.sign for c in cells[1:]} == {"random": 0, "a": -1}
    assert (
        "beat training on everything"
        in sentences.headline(cells, [*SAMPLERS, A], {}, EVALUATION)[0]
    )


def floor_of(per_token):
    tokens = np.full(len(per_token), 10)
    return Floor("Unigram", np.asarray(per_token) * tokens, tokens, 1000)


def test_a_model_above_the_unigram_floor_gets_no_verdict():
    base = np.linspace(2, 4, 40)

    def compared(floor):
        runs = [
            run_of(name, rate, base + by + 0.001 * seed**2 * (name == "a"), seed)
            for name, rate, by in (("full", 1.0, 0.0), ("random", 0.5, 0.0), ("a", 0.5, -0.3))
            for seed in range(3)
        ]
        floors = [floor_of(base + floor)]
        cells = comparison.compare(runs, ["hq"], {"hq": floors})
        said = sentences.headline(cells, [*SAMPLERS, A], {}, EVALUATION)
        found = {c.sampler: c.measures["hq"] for c in cells}
        return found, said, sentences.floor(cells, floors, EVALUATION)

    found, said, floor = compared(0.5)
    assert all(m.below_floor for m in found.values()) and found["a"].to_full.sign == -1
    assert "all models are below unigram" in floor and "beat training on everything" in said[0]
    found, said, floor = compared(-0.1)  # only a is below
    assert [m.below_floor for m in found.values()] == [False, False, True]
    assert found["a"].to_full.sign == 0 and found["a"].to_random.p is None
    assert "2 of 3 selections are not below the unigram floor" in floor
    found, said, floor = compared(-0.5)
    assert "no model is better than a table of word" in said[0] and "no model is below" in floor


def test_an_extrapolated_winner_needs_sizes_that_agree():
    """Sizes that rank selections in opposite orders predict nothing, whatever the fits say."""
    order = {"full": 0.0, "a": -0.2, "b": -0.1, "c": 0.1, "d": 0.2}
    sizes = {"small": (1_000_000, 1), "": (2_000_000, -1), "large": (4_000_000, -1)}
    runs = [
        sized(name, n, 4 + way * by - 0.1 * n / 1e6, size)
        for name, by in order.items()
        for size, (n, way) in sizes.items()
    ]
    found = comparison.sizes(runs, "hq", 0.5)
    assert found.ranked == 4
    assert found.ranked_alike[1_000_000].value == 0 and found.ranked_alike[2_000_000].value == 1
    said = sentences.sizes({"hq": found}, dict.fromkeys(order, "T"), [EVALUATION])
    assert "Of the 6 pairs" in said[0] and "rank 0% alike" in said[0]
    assert (
        "no lowest loss on good text is predicted" in said[1]
        and "more often than chance" in said[1]
    )


def sized(sampler, parameters, loss, size, seed=0):
    made = run_of(sampler, 1.0 if sampler == "full" else 0.5, np.linspace(-1, 1, 40) + loss, seed)
    return dataclasses.replace(made, size=size, parameters=parameters)


def test_sizes_of_the_model():
    """Exact power laws: a selection worth as much as a model of twice the size."""
    laws = {"full": (2.0, 30.0), "good": (2.0, 30.0 * 2**-0.3), "bad": (2.4, 30.0)}
    sizes = {"small": 1_000_000, "": 2_000_000, "large": 4_000_000}
    runs = [
        sized(name, n, floor + scale * n**-0.3, size)
        for name, (floor, scale) in laws.items()
        for size, n in sizes.items()
    ]
    found = comparison.sizes(runs, "hq", 0.5)
    assert found.parameters == (1_000_000, 2_000_000, 4_000_000)
    assert found.over_scaling["good"].value == pytest.approx(100)
    assert found.over_scaling["full"].value == 0 and found.over_scaling["bad"].value < 0
    assert found.effective_size["good"].value == pytest.approx(4e6, rel=0.02)
    assert found.effective_size["full"].value == pytest.approx(2e6, rel=0.02)
    assert found.target == 4e7
    for name, (floor, scale) in laws.items():
        assert found.predicted[name].value == pytest.approx(floor + scale * 4e7**-0.3, abs=0.01)
    assert found.wins == {"full": 0.0, "good": 1.0, "bad": 0.0}
    said = sentences.sizes(
        {"hq": found}, {"good": "Good", "full": "Full", "bad": "Bad"}, [EVALUATION]
    )
    assert said[0].startswith(
        "Of the one pair of selections on good text, 1M and 4M parameters rank 100% alike"
    )
    assert said[1].startswith(
        "At 40M parameters, 10 times the largest size trained, the fits put Good"
    )
    mean = comparison.mean_over_scaling([found, found])["good"]
    assert mean.value == pytest.approx(100)
    assert comparison.sizes([run for run in runs if not run.size], "hq", 0.5) is None


@pytest.mark.parametrize("together, low, high", [(False, 0.2, 0.8), (True, 0.99, 1.0)])
def test_how_trainings_go_makes_the_extrapolation_unsure(together, low, high):
    """But not where a seed moves all selections alike: at one size all have the same seeds."""
    laws = {"full": 30.0, "good": 29.5}
    sizes = {"small": 1_000_000, "": 2_000_000, "large": 4_000_000}
    runs = [
        sized(
            name,
            n,
            2 + scale * n**-0.3 + (way * 0.05 * (seed - 1) if not size else 0),
            size,
            seed,
        )
        for (name, scale), way in zip(laws.items(), (1, 1 if together else -1), strict=True)
        for size, n in sizes.items()
        for seed in ((0, 1, 2) if not size else (1,))
    ]
    wins = comparison.sizes(runs, "hq", 0.5).wins
    assert low < wins["good"] <= high


# --------------------------------------------------------------------------------------------------
# Words


EVALUATION = Evaluation("hq", "good text", "By hand.", 50, 500, 2000)
SAMPLERS = [
    Sampler("full", "Full data", "", None),
    Sampler("random", "Random", "", None),
    Sampler("low", "Low", "", "likelihood"),
    Sampler("middle", "Middle", "", "likelihood"),
    Sampler("high", "High", "", "likelihood"),
]


A = Sampler("a", "A", "", None)


def headline_of(**offsets) -> str:
    """The headline where each sampler's documents are worse than the full data's by its offset."""
    hard = np.linspace(2, 6, 50)
    noise = np.random.default_rng(0).normal(0, 0.05, 50)
    rng = np.random.default_rng(1)
    runs = []
    for name, by in {"full": 0.0, **offsets}.items():
        of_documents = noise if name != "full" and by == 0 else 0.0
        for seed in range(3):
            losses = hard + by + of_documents + rng.normal(0, 0.002)
            runs.append(run_of(name, 1.0 if name == "full" else 0.2, losses, seed))
    cells = comparison.compare(runs, ["hq"])
    return " ".join(
        sentences.headline(cells, SAMPLERS, {"likelihood": "Log-likelihood"}, EVALUATION)
    )


def test_the_headline_says_who_won_only_where_someone_did():
    assert "Low at 20% of the tokens beat training on everything on good text, by 0.1" in (
        headline_of(random=0.1, low=-0.1)
    )
    assert "training on everything was best on good text; Low at 20%" in (
        headline_of(random=0.3, low=0.2)
    )
    assert "cannot be distinguished from training on everything" in headline_of(random=0.3, low=0.0)


def test_what_many_looks_take_away_is_said():
    hard = np.linspace(2, 6, 50)
    cells = comparison.compare([run_of("full", 1.0, hard), run_of("low", 0.2, hard - 0.1)], ["hq"])
    found = cells[1].measures["hq"]
    doubtful = dataclasses.replace(found.to_full, p=0.02, adjusted=0.2)
    cells[1].measures["hq"] = dataclasses.replace(found, to_full=doubtful)
    text = " ".join(
        sentences.headline(cells, SAMPLERS, {"likelihood": "Log-likelihood"}, EVALUATION)
    )
    assert "after correction for the number of comparisons, it cannot be distinguished from" in text


def test_a_victory_of_the_random_selection_shows_chance():
    assert "a random selection can do so by chance alone" in headline_of(random=-0.2, low=-0.1)


def test_the_headline_counts_against_random_and_ranks_within_a_score():
    text = headline_of(random=0.1, low=0.05, middle=0.2, high=0.3)
    assert "one of the three other selections beat a random one of that size: Low, by" in text
    assert "Two did worse than random" in text
    order = "the three ways to select 20% by log-likelihood: Low, Middle, High."
    assert f"In order of mean loss, {order}" in text


def test_noise_is_measured_by_what_should_be_equal():
    hard = np.linspace(2, 6, 50)
    runs = [run_of("full", 1.0, hard), run_of("random", 0.5, hard - 0.04)]
    (noise,) = [
        line
        for line in sentences.caveats(
            dataclasses.make_dataclass("R", ["runs", "evaluations"])(runs, [EVALUATION]),
            comparison.compare(runs, ["hq"]),
            {"hq": None},
        )
        if "noise of training" in line
    ]
    assert "−0.040 to −0.040" in noise


def test_cost_is_in_training_runs():
    training = Cost("one training run", 10.0, 2e12, None)
    costs = [Cost("Scoring by A", 5.0, 1e12, 7), Cost("By hand", 1.0, None, None)]
    assert "Scoring by A 50%" in sentences.cost(costs, training)
    assert sentences.cost([costs[1]], training) == ""


# --------------------------------------------------------------------------------------------------
# Charts and text


def test_an_inlined_chart_shares_nothing_with_its_neighbors(tmp_path):
    def paint(axes):
        axes.plot([0, 1], [0, 1])
        axes.set_xlabel("steps")

    one = charts.draw("one", "first & foremost", tmp_path, paint)
    two = charts.draw("two", "second", tmp_path, paint)
    ids = [set(re.findall(r'\bid="([^"]+)"', chart.svg)) for chart in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for chart, own in zip((one, two), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', chart.svg)) <= own
        assert "<style" not in chart.svg and "font-family" not in chart.svg
        assert charts.INK not in chart.svg and "currentColor" in chart.svg
    assert 'aria-label="first &amp; foremost"' in one.svg and ">steps</text>" in one.svg
    assert one == charts.draw("one", "first & foremost", tmp_path, paint), "the same bytes"
    assert (tmp_path / "one.svg").exists() and (tmp_path / "one.png").exists()


def test_text_that_plays_tricks_is_marked():
    assert printable("a\tb\nc\u202edone\x00\x1b[31m") == "a\tb\nc\ufffddone\ufffd\ufffd[31m"


# --------------------------------------------------------------------------------------------------
# A whole small study, by the stages' own functions


class Tags(HTMLParser):
    """Collects what a browser would see as tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def small_study(small_corpus, small_model, tmp_path_factory) -> Path:
    """A scorer, three selections and the runs on them, made by the stages' own functions."""
    import json

    import train
    from evaluation import perplexity
    from models.optimizers import AdamW
    from pruning.data.stream import StreamConfig
    from pruning.scores.model import engine
    from pruning.scores.model.likelihood import Likelihood
    from pruning.selection import select, strategies

    root = tmp_path_factory.mktemp("study")
    corpus, compiled = str(small_corpus), str(tmp_path_factory.mktemp("compiled"))

    def selected(name, strategy, **settings):
        output = str(root / name)
        select.run(select.SelectConfig(corpus=corpus, output=output, strategy=strategy, **settings))
        return output

    pool = selected("splits/pool", strategies.Split(0.0, 0.7))
    held_out = selected("splits/held_out", strategies.Split(0.7, 1.0))
    likelihood = Likelihood("causal", window=192, overlap=32)
    scores = str(root / "scores/likelihood")
    engine.run(
        engine.ScoreConfig(
            corpus=corpus,
            output=scores,
            scorer=likelihood,
            model=str(small_model),
            tokenizer="corpus",
            within=pool,
            row_length=256,
            batch_rows=8,
            dtype="float32",
            compilation_cache=compiled,
        )
    )
    chosen = {"within": pool, "keep_tokens": 0.5}
    selections = {
        "full": pool,
        "random": selected("runs/random/selection", strategies.Random(), **chosen),
        "low": selected(
            "runs/low/selection", strategies.Top(), scores=scores, score="nll_mean", **chosen
        ),
    }
    runs = []
    for name, selection in selections.items():
        stream = StreamConfig(corpus, 8, selection, input_length=32, target_length=12)
        held = dataclasses.replace(stream, selection=held_out)
        trained = str(root / "runs" / name / "train")
        train.train(
            train.TrainConfig(
                output=trained,
                initial_weights=str(small_model),
                tokenizer="corpus",
                data=stream,
                eval_data={"held_out": held},
                optimizer=AdamW(),
                steps=4,
                eval_every=2,
                eval_batches=1,
                compilation_cache=compiled,
            )
        )
        judged = str(root / "runs" / name / "perplexity")
        perplexity.evaluate(
            perplexity.PerplexityConfig(
                tokenizer="corpus",
                model=trained,
                output=judged,
                corpora={"held_out": corpus},
                within={"held_out": held_out},
                likelihood=likelihood,
                row_length=256,
                batch_rows=8,
                compilation_cache=compiled,
            )
        )
        rate = 1.0 if name == "full" else 0.5
        places = {"selection": selection, "train": trained, "perplexity": judged}
        answers = root / "runs" / name / "tasks"
        answers.mkdir()
        scores_of_tasks = {
            "cola": {"score": 10.0, "answer_log_likelihood": -2.0},
            "sst2": {"score": 60.0 + len(runs)},  # as earlier versions wrote it
        }
        ResultsDirectory(answers, {}).each(list(scores_of_tasks), scores_of_tasks.__getitem__)
        places["tasks"] = {"glue": str(answers)}
        runs.append({"sampler": name, "keep_rate": rate, "seed": 0, "size": ""} | places)
        if name != "low":  # as if it had been trained at another size, too
            double = root / "runs" / f"{name}-double" / "train"
            shutil.copytree(trained, double)
            result = json.loads((double / "result.json").read_text())
            result["parameters"] *= 2
            (double / "result.json").write_text(json.dumps(result))
            runs.append(runs[-1] | {"size": "double", "train": str(double)})
    terms = [["likelihood", "nll_mean", -1.0]]
    scorer = {"title": "Log-likelihood", "axis": "nats", "terms": terms}
    sampler = {"title": "Low <b>", "rule": "Low.", "scorer": "likelihood"}
    places = {
        "corpus": corpus,
        "pool": pool,
        "evaluations": {"held_out": {"corpus": corpus, "within": held_out}},
        "models": {},
        "stages": {"likelihood": scores},
        "runs": runs,
        "made": {
            "corpus": f"{corpus}/manifest.json",
            "score/likelihood": f"{scores}/manifest.json",
            "train/full-100-seed0": f"{runs[0]['train']}/result.json",
            **{
                f"select/{run['sampler']}-50-seed0": f"{run['selection']}/manifest.json"
                for run in runs
                if run["sampler"] != "full"
            },
        },
        "needs": {
            "score/likelihood": ["corpus"],
            "select/random-50-seed0": ["corpus"],
            "select/low-50-seed0": ["corpus", "score/likelihood"],
        },
        "commands": ["python -m pruning ingest"],
        "study": {
            "title": "A study of <i>grain</i>",
            "description": "",
            "caveats": ["Small."],
            "evaluations": {"held_out": {"title": "held-out grain", "rule": "By hash."}},
            "scorers": {"likelihood": scorer},
            "stages": {},
            "sizes": {"double": {"title": "twice as many parameters"}},
            "tasks": {"glue": {"title": "GLUE"}},
            "samplers": {"random": sampler | {"title": "Random", "scorer": None}, "low": sampler},
        },
    }
    (root / study.PLAN).write_text(json.dumps(places))
    return root


@pytest.fixture(scope="module")
def html(small_study) -> str:
    (index,) = write_report(ReportConfig(str(small_study)))
    return Path(index).read_text()


def test_hostile_text_stays_text(html):
    found = Tags(html)
    assert not {"iframe", "img", "object", "embed", "form", "link", "base"} & set(found.tags)
    assert found.tags.count("script") == 2, "the data, and the page's own"
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [v for n, v in found.attributes if n in ("href", "src") and not v.startswith("#")]
    assert "i" not in found.tags, "titles are text, too"
    assert "<script>alert('hostile')</script> <img src=x onerror=alert(1)> & more" in "".join(
        found.text
    )
    policy = dict(found.attributes)["content"]
    assert "default-src 'none'" in html and policy is not None


def test_no_two_elements_have_one_id(html):
    """The script finds its controls by their ids."""
    ids = re.findall(r'<[^>]* id="([^"]+)"', html)
    assert len(ids) > 10 and len(set(ids)) == len(ids)


def test_the_page_needs_no_network(html):
    outside = re.sub(r'xmlns(?::xlink)?="[^"]*"', "", html)
    tags = re.findall(r"<[^>]*https?://[^>]*>", outside)
    assert tags == []
    assert not re.search(r"@import|url\((?!#)", outside)


def test_the_tables_say_what_the_artifacts_say(small_study, html):
    results = reading.read(small_study)
    rows = list(csv.DictReader((small_study / "report" / "runs.csv").open()))
    assert len(rows) == 3
    own = [run for run in results.runs if not run.size]
    for row, run in zip(rows, own, strict=True):
        losses = run.losses["held_out"]
        assert float(row["loss"]) == pytest.approx(losses.nats.sum() / losses.tokens.sum())
        assert f"{float(row['loss']):.3f}" in html
    assert own[1].share_kept == pytest.approx(0.5, abs=0.1)
    assert own[0].tokens == results.pool.n_tokens.sum()
    kept = results.kept["low", 0.5, 0]
    assert results.pool.n_tokens[kept].sum() == own[2].tokens
    headline = list(csv.DictReader((small_study / "report" / "headline.csv").open()))
    assert [float(row["glue"]) for row in headline] == [35.0, 36.0, 37.0]
    tasks = list(csv.DictReader((small_study / "report" / "tasks.csv").open()))
    assert {(row["task"], row["answer_log_likelihood"]) for row in tasks} == {
        ("cola", "-2.0"),
        ("sst2", ""),
    }
    values = results.scores[0].values  # minus the loss, so that "low" keeps the lowest
    assert values[kept].max() <= values[~kept].min()


def test_floors_are_of_the_pools_tokens_on_the_tokens_that_are_evaluated(small_study, html):
    from pruning.corpus.reader import load_corpus
    from pruning.corpus.selection_reader import load_selection

    results = reading.read(small_study)
    losses = results.runs[0].losses["held_out"]
    unigram, trigram = results.floors["held_out"]
    np.testing.assert_array_equal(unigram.tokens, losses.tokens)
    assert trigram.per_token < unigram.per_token and "Unigram floor" in html

    corpus = load_corpus(results.provenance[0]["path"])
    pool = load_selection(small_study / "splits/pool", corpus.artifact)
    documents = [t for k in range(corpus.num_shards) for t in corpus.tokens_of(k, pool.rows(k))]
    counts = np.bincount(np.concatenate(documents), minlength=corpus.vocabulary.size)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = min(max(once / (once + 2 * twice), 0.1), 0.95) if once else 0.5
    rest = discount * (counts > 0).sum() / corpus.vocabulary.size
    probability = (np.maximum(counts - discount, 0) + rest) / counts.sum()
    for doc_id, nats in zip(losses.doc_id, unigram.nats, strict=True):
        (tokens,) = corpus.tokens_of(int(doc_id >> 32), np.array([doc_id & 0xFFFFFFFF]))
        assert nats == pytest.approx(-np.log(probability[tokens]).sum())


def test_other_sizes_of_the_model_have_a_section_of_their_own(small_study, html):
    rows = list(csv.DictReader((small_study / "report" / "sizes.csv").open()))
    sizes = {run.size: run.parameters for run in reading.read(small_study).runs}
    assert sizes["double"] == 2 * sizes[""]
    found = {(row["sampler"], int(row["parameters"])): float(row["loss"]) for row in rows}
    # What was trained at no other size has its one point; what was stands there twice.
    assert set(found) == {
        *((name, sizes[""]) for name in ("full", "random", "low")),
        *((name, sizes["double"]) for name in ("full", "random")),
    }
    assert '<section id="sizes">' in html and "twice as many parameters" in html


def test_epochs_follow_from_the_stream(small_study):
    from pruning.data.stream import StreamConfig

    results = reading.read(small_study)
    corpus = str(results.provenance[0]["path"])
    stream = StreamConfig(
        corpus, 8, str(small_study / "splits/pool"), None or StreamConfig("", 1).objective, 32, 12
    ).stream()
    assert results.runs[0].epochs == pytest.approx(4 * 8 / stream.examples_per_epoch)
    assert results.runs[0].curves["held_out"].step.tolist() == [2, 4]


def test_the_same_study_gives_the_same_page(small_study, html, tmp_path):
    (index,) = write_report(ReportConfig(str(small_study), str(tmp_path / "again")))
    assert Path(index).read_text() == html


def test_examples_rise_with_the_score(small_study):
    results = reading.read(small_study)
    examples = results.examples["likelihood"]
    scores = [example.score for example in examples]
    assert scores == sorted(scores)
    assert {example.decile for example in examples} == set(range(10))
    assert all(example.domain.endswith(".example") for example in examples)
