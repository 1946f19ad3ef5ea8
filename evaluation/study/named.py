"""Samplers, scorers and stages that a study can name.

    Study.samplers = ("random", "likelihood_middle", "ask_llm", "dsir")

The inputs of a stage are names of other stages, or what `StagePlan.inputs` lists. "good" and
"target" are the corpus of good text and its part that is no evaluation set; completion.py finds
them among the evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.study.config import SamplerPlan, ScorerPlan, StagePlan
from evaluation.study.recipes import Recipe


def _score(file: str, model: str, **settings: Any) -> StagePlan:
    recipe = Recipe(f"configs/score/{file}.gin", settings)
    return StagePlan("score", recipe, {"MODEL": model, "Score.within": "pool"})


def _stage(command: str, settings: Mapping[str, Any] | None = None, **inputs: str) -> StagePlan:
    return StagePlan(command, Recipe(f"configs/score/{command}.gin", settings or {}), inputs)


# The report shows the values of tokens.
STAGES: Mapping[str, StagePlan] = {
    "likelihood": _score("likelihood", "scoring", TOKEN_NLL=True),
    "ask_llm": _score("ask_llm", "judge"),
    "words": _stage("entropy", {"Entropy.workers": 1}, WITHIN="pool"),
    "embedding": _score("embedding", "scoring"),
    # Embeddings of a model of this kind lie in a narrow cone: docs/study.md.
    "whitened": _stage("whiten", EMBEDDINGS="embedding"),
    "density": _stage("density", EMBEDDINGS="whitened"),
    "clusters": _stage("kmeans", {"CLUSTERS": 50}, EMBEDDINGS="whitened"),
    "twins": _stage("semdedup", EMBEDDINGS="whitened", CLUSTERS="clusters"),
    "dsir": _stage(
        "dsir", {"DSIR.workers": 1}, TARGET="good", TARGET_WITHIN="target", WITHIN="pool"
    ),
    "classifier": _stage(
        "classifier", {"Classifier.workers": 1}, GOOD="good", GOOD_WITHIN="target", WITHIN="pool"
    ),
    "student": _stage("distill", {"Distill.workers": 1}, TEACHER="ask_llm", WITHIN="pool"),
    # Its examples: Study.settings = {"quality": {"DATA": ...}}, see configs/score/quality.gin.
    "quality": StagePlan(
        "quality", Recipe("configs/score/quality.gin", {"Quality.workers": 1}), {"WITHIN": "pool"}
    ),
}

SCORERS: Mapping[str, ScorerPlan] = {
    "likelihood": ScorerPlan(
        "Log-likelihood",
        "nats per token, higher is likelier",
        (("likelihood", "nll_mean", -1.0),),
    ),
    "entropy": ScorerPlan(
        "Entropy",
        "H_q + H_f, nats per token",
        (("likelihood", "nll_mean", 1.0), ("words", "column:h_f", 1.0)),
    ),
    "ask_llm": ScorerPlan("Ask-LLM", "log-probability of yes", (("ask_llm", "ask_llm", 1.0),)),
    "student": ScorerPlan(
        "Distilled Ask-LLM", "predicted log-odds of yes", (("student", "column:student", 1.0),)
    ),
    "density": ScorerPlan(
        "Rarity", "minus the density of the neighborhood", (("density", "column:density", -1.0),)
    ),
    "prototypes": ScorerPlan(
        "Prototypes",
        "minus the similarity to the centroid",
        (("clusters", "column:centroid_similarity", -1.0),),
    ),
    "twins": ScorerPlan(
        "SemDeDup",
        "minus the similarity to the nearest twin",
        (("twins", "column:twin_similarity", -1.0),),
    ),
    "dsir": ScorerPlan("DSIR", "log importance weight", (("dsir", "column:dsir_sum", 1.0),)),
    "quality": ScorerPlan(
        "Quality",
        "sum of standardized length, main text, edited language and educational value",
        (("quality", "column:quality", 1.0),),
    ),
    "classifier": ScorerPlan(
        "Classifier", "log-odds of good", (("classifier", "column:quality", 1.0),)
    ),
}


def _sampler(title: str, file: str, scorer: str | None, rule: str, **inputs: str) -> SamplerPlan:
    recipe = Recipe(f"configs/select/{file}.gin")
    return SamplerPlan(title, rule, recipe, scorer, inputs)


SAMPLERS: Mapping[str, SamplerPlan] = {
    "random": _sampler("Random", "random", None, "Documents drawn uniformly."),
    "likelihood_low": _sampler(
        "Low likelihood",
        "likelihood_low",
        "likelihood",
        "The documents that the scoring model finds least likely per token (Kim and Baek 2024).",
        SCORES="likelihood",
    ),
    "likelihood_middle": _sampler(
        "Middle likelihood",
        "likelihood_middle",
        "likelihood",
        "The documents around the median token by likelihood (Marion et al. 2023).",
        SCORES="likelihood",
    ),
    "likelihood_high": _sampler(
        "High likelihood",
        "likelihood_high",
        "likelihood",
        "The documents that the scoring model finds likeliest per token: low perplexity (Sachdeva "
        "et al. 2024).",
        SCORES="likelihood",
    ),
    "likelihood_flat": _sampler(
        "Inverse propensity",
        "likelihood_flat",
        "likelihood",
        "Documents drawn with probabilities proportional to one over how frequent their likelihood "
        "is: rare likelihoods are kept, common ones thinned out.",
        SCORES="likelihood",
    ),
    "entropy": _sampler(
        "Entropy",
        "entropy",
        "entropy",
        "The highest H_q + H_f: surprising to the scoring model, and of rare words (Kim and Baek "
        "2024, later version).",
        PROBE="likelihood",
        WORDS="words",
    ),
    "density": _sampler(
        "Density",
        "inverse_propensity",
        "density",
        "Documents drawn with probabilities proportional to one over the density of their "
        "neighborhood (Sachdeva et al. 2024).",
        SCORES="density",
    ),
    "semdedup": _sampler(
        "SemDeDup",
        "semdedup",
        "twins",
        "Near twins are dropped, the most alike first, until the budget is met (Abbas et al. "
        "2023).",
        SCORES="twins",
    ),
    "prototypes": _sampler(
        "Prototypes",
        "prototypes",
        "prototypes",
        "The most prototypical documents of each cluster are dropped first (Sorscher et al. 2022).",
        SCORES="clusters",
    ),
    "dsir": _sampler(
        "DSIR",
        "dsir",
        "dsir",
        "Documents drawn by their n-grams' importance weights towards the good text (Xie et al. "
        "2023).",
        SCORES="dsir",
    ),
    "classifier": _sampler(
        "Classifier",
        "classifier",
        "classifier",
        "The documents most like the good text, by a linear model over n-grams.",
        SCORES="classifier",
    ),
    "ask_llm": _sampler(
        "Ask-LLM",
        "top",
        "ask_llm",
        "The documents for which the judge answers yes with the highest probability (Sachdeva et "
        "al. 2024).",
        SCORES="ask_llm",
    ),
    "distilled": _sampler(
        "Distilled Ask-LLM",
        "distilled",
        "student",
        "The highest scores of a student of Ask-LLM over n-grams.",
        SCORES="student",
    ),
    "quality": SamplerPlan(
        "Quality",
        "The documents of the highest sum of length, main text, edited language and educational "
        "value (docs/quality.md).",
        Recipe("configs/select/top.gin", {"SCORE": "column:quality"}),
        "quality",
        {"SCORES": "quality"},
    ),
}
