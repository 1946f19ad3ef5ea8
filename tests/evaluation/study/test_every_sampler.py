"""Every sampler's configuration runs in a study's grid by being named there."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest

from evaluation.study import run as study
from evaluation.study.plan import plan
from evaluation.study.recipes import Recipe
from pruning.cli import configuration, recipes
from pruning.selection import select
from pruning.store.artifact import load_artifact

SELECT = Path(__file__).parents[3] / "configs" / "select"

# Those of the grid have a budget; the others make the parts and selections that chains are within.
SAMPLERS = sorted(
    recipe.name
    for recipe in recipes.recipes()
    if recipe.command == "select"
    and re.search(r"^(KEEP =|include)", recipes.located(recipe.file).read_text(), re.MULTILINE)
)
INPUTS = {
    "random": {},
    "top": {"SCORES": "quality"},
    "ask_llm_sample": {"SCORES": "judged"},
    "buckets": {"FIRST": "quality", "SECOND": "likelihood"},
    "classifier": {"SCORES": "quality"},
    "distilled": {"SCORES": "student"},
    "domain_quotas": {"SCORES": "likelihood"},
    "dsir": {"SCORES": "dsir"},
    "entropy": {"PROBE": "likelihood", "WORDS": "words"},
    "inverse_propensity": {"SCORES": "density"},
    "likelihood_flat": {"SCORES": "likelihood"},
    "likelihood_high": {"SCORES": "likelihood"},
    "likelihood_low": {"SCORES": "likelihood"},
    "likelihood_middle": {"SCORES": "likelihood"},
    "prototypes": {"SCORES": "clusters"},
    "quality_coverage": {"SCORES": "likelihood", "DENSITY": "density"},
    "reference_minus_prior": {"REFERENCE": "likelihood", "PRIOR": "prior"},
    "semdedup": {"SCORES": "twins"},
    "semdedup_ask_llm": {"SCORES": "quality", "WITHIN": "untwinned"},
}
SETTINGS = {
    "top": {"SCORE": "column:quality"},
    "buckets": {"FIRST_SCORE": "column:quality", "SECOND_SCORE": "nll_mean"},
    "domain_quotas": {"SCORE": "nll_mean"},
    "quality_coverage": {"SCORE": "nll_mean"},
    "semdedup_ask_llm": {"SCORE": "column:quality"},
}
SMALL = {"ROW_LENGTH": 128, "BATCH_ROWS": 8, "DTYPE": "float32"}
WINDOWS = {"WINDOW": 64, "OVERLAP": 16} | SMALL
TRAIN = {
    "STEPS": 12, "Train.eval_every": 6, "Train.eval_batches": 1, "T5Config.d_model": 16,
    "T5Config.d_ff": 32, "T5Config.num_heads": 1,
}  # fmt: skip


def stage(command, file, settings=None, **inputs):
    return study.StagePlan(command, Recipe(f"configs/{file}.gin", settings or {}), inputs)


def config_of(output, files, samplers):
    pool = {"Score.within": "pool"}
    stages = {
        "likelihood": stage("score", "score/likelihood", WINDOWS, MODEL="scoring", **pool),
        "prior": stage("score", "score/likelihood", WINDOWS, MODEL="scoring", **pool),
        "judged": stage("score", "score/ask_llm", SMALL, MODEL="scoring", **pool),
        "embedding": stage(
            "score", "score/embedding", SMALL | {"MAX_TOKENS": 128}, MODEL="scoring", **pool
        ),
        "density": stage("density", "score/density", {"ROWS": 20}, EMBEDDINGS="embedding"),
        "clusters": stage("kmeans", "score/kmeans", {"CLUSTERS": 3}, EMBEDDINGS="embedding"),
        "twins": stage("semdedup", "score/semdedup", EMBEDDINGS="embedding", CLUSTERS="clusters"),
        "words": stage("entropy", "score/entropy", {"Entropy.workers": 1}, WITHIN="pool"),
        "dsir": stage("dsir", "score/dsir", {"DSIR.workers": 1}, TARGET="corpus", WITHIN="pool"),
        "quality": stage(
            "classifier", "score/classifier", {"Classifier.workers": 1},
            GOOD="corpus", GOOD_WITHIN="training", WITHIN="pool",
        ),
        "student": stage(
            "distill", "score/distill", {"SCORE": "nll_mean", "Distill.workers": 1},
            TEACHER="likelihood", WITHIN="pool",
        ),
        "untwinned": stage("select", "select/semdedup", {"KEEP": 0.8}, SCORES="twins",
                           WITHIN="pool"),
    }  # fmt: skip
    grid = {
        name: study.SamplerPlan(
            name,
            "A rule.",
            Recipe(f"configs/select/{name}.gin", SETTINGS.get(name, {})),
            inputs=INPUTS[name],
            within_share=0.8 if "WITHIN" in INPUTS[name] else 1.0,
        )
        for name in samplers
    }
    needed = {name for sampler in grid.values() for name in sampler.inputs.values()}
    while more := {n for k in needed for n in stages[k].inputs.values() if n in stages} - needed:
        needed |= more
    return study.StudyConfig(
        output=str(output),
        title="Every sampler",
        vocabulary="bytes",
        corpus=Recipe("configs/ingest/jsonl.gin", {"FILES": str(files), "METADATA": ("domain",)}),
        scoring_split=(0.0, 0.4),
        pool_split=(0.4, 0.9),
        scoring_model=Recipe("configs/pretrain/quickstart.gin", TRAIN),
        stages={name: made for name, made in stages.items() if name in needed},
        scorers={
            "length": study.ScorerPlan("Length", "tokens", (("", "corpus:n_tokens", 1.0),)),
        },
        samplers=grid,
        evaluations={"held_out": study.EvaluationPlan("held-out", "By hash.", split=(0.9, 1.0))},
        keep_rates=(0.5,),
        train=Recipe("configs/pretrain/quickstart.gin", TRAIN),
        perplexity=Recipe("configs/evaluate/perplexity.gin", WINDOWS),
    )


def test_every_sampler_is_planned_and_its_settings_are_taken(tmp_path):
    assert sorted(INPUTS) == SAMPLERS
    planned = plan(config_of("runs/every", "files", SAMPLERS))
    selections = {s.name: s for s in planned.stages if s.name.startswith("select/")}
    for name in SAMPLERS:
        (own,) = [s for key, s in selections.items() if key.startswith(f"select/{name}-")]
        arguments = own.argv[own.argv.index("select") + 1 :]
        files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
        bindings = recipes.bindings([a for a in arguments if "--gin." in a])
        files = [str(SELECT.parents[1] / file) for file in files]
        config = configuration.build(select.NAME, select.CONFIGURABLES, files, bindings)
        assert config.within and config.corpus == "runs/every/corpus"
        assert config.keep_tokens == pytest.approx(0.5 / (0.8 if name == "semdedup_ask_llm" else 1))
        select.validate(config)


# "judged" asks for a vocabulary in which yes and no are single tokens.
RUN = sorted(set(SAMPLERS) - {"ask_llm_sample"}) if os.environ.get("WINNOW_STUDY") else []


@pytest.mark.skipif(not RUN, reason="takes minutes: set WINNOW_STUDY=1")
def test_every_sampler_runs_in_a_study(tmp_path):
    words = random.Random(0)
    for part in range(2):
        lines = []
        for number in range(150):
            size, place = words.randint(4, 40), words.choice(["a.org", "b.org", "c.org"])
            text = " ".join(words.choice(["grain", "chaff", "wind", "sown"]) for _ in range(size))
            lines.append(json.dumps({"text": f"{number} {text}", "domain": place}))
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(lines))
    config = config_of(tmp_path / "study", tmp_path / "part-*.jsonl", RUN)
    names = [s.name for s in plan(config).stages]
    left = ("train/", "perplexity/", "report")
    study.run(config, only=[name for name in names if not name.startswith(left)])
    for name in RUN:
        (path,) = (tmp_path / "study").rglob(f"{name}-50-seed0/selection/manifest.json")
        summary = load_artifact(path.parent, "selection").manifest.summary
        assert 0.3 < summary["share"]["tokens"] <= 0.63, name
