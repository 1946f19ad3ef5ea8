"""A study written out as stages: nothing is read before it is made, and nothing leaks."""

import dataclasses
import re
from pathlib import Path

import pytest

from evaluation.study import run as study
from evaluation.study.plan import plan
from evaluation.study.recipes import Recipe
from evaluation.study.stages import ordered
from pruning.cli import configuration

STAGE = study.StagePlan("select", Recipe("configs/select/random.gin"))
CONFIGS = Path(__file__).parents[3] / "configs"
QUICKSTART, REAL = str(CONFIGS / "quickstart.gin"), str(CONFIGS / "evaluate" / "study_real.gin")


def build(*bindings: str, file: str = QUICKSTART) -> study.StudyConfig:
    return configuration.build(
        "Study", study.CONFIGURABLES, [file], ["OUTPUT = 'runs/test'", *bindings]
    )


@pytest.fixture(scope="module")
def config():
    return build()


@pytest.fixture(scope="module")
def real():
    """Every sampler, a chain, and other sizes of the model."""
    return build(file=REAL)


def paths_in(argv) -> set[str]:
    return set(re.findall(r"runs/test/[\w/.-]+", " ".join(argv)))


@pytest.mark.parametrize("name", ["config", "real"])
def test_every_stage_reads_what_its_needs_have_made(name, request):
    stages = ordered(plan(request.getfixturevalue(name)).stages)
    made_by = {stage.result.rpartition("/")[0]: stage.name for stage in stages}
    for stage in stages:
        own = stage.result.rpartition("/")[0]
        for path in paths_in(stage.argv) - {own, "runs/test/compiled"}:
            assert made_by[path] in stage.needs, (stage.name, path)


def test_the_grid_is_complete_and_each_cell_differs_in_its_selection_alone(config):
    config = dataclasses.replace(config, seeds=(0, 1))
    planned = plan(config)
    cells = {(run["sampler"], run["keep_rate"], run["seed"]) for run in planned.places["runs"]}
    pruned = {(name, rate) for name in config.samplers for rate in config.keep_rates}
    assert cells == {(*pair, seed) for pair in [*pruned, ("full", 1.0)] for seed in (0, 1)}

    trained = [stage.argv for stage in planned.stages if stage.sort == "train"]
    assert len(trained) == len(cells)
    varying = ("--gin.SELECTION=", "--gin.OUTPUT=")
    for seed in (0, 1):
        of_seed = [argv for argv in trained if f"--gin.SEED={seed}" in argv]
        shared = {tuple(w for w in argv if not w.startswith(varying)) for argv in of_seed}
        assert len(of_seed) == len(cells) / 2 and len(shared) == 1


def test_other_sizes_train_on_the_same_selections(real):
    planned = plan(real)
    runs = planned.places["runs"]
    selections = {
        (run["sampler"], run["seed"]): run["selection"] for run in runs if not run["size"]
    }
    others = [run for run in runs if run["size"]]
    expected = {
        (sampler, size) for size, item in real.sizes.items() for sampler in ("full", *item.samplers)
    }
    assert {(run["sampler"], run["size"]) for run in others} == expected
    for run in others:
        assert run["selection"] == selections[run["sampler"], run["seed"]]
    made = [stage.result for stage in planned.stages if stage.sort == "select"]
    assert len(set(made)) == len(made)


def test_tasks_judge_every_model_after_fine_tuning(config):
    recipes = {
        "recipe": Recipe("configs/evaluate/tasks.gin"),
        "examples": Recipe("configs/evaluate/examples.gin"),
        "fine_tuning": Recipe("configs/pretrain/finetune.gin"),
    }
    planned = plan(dataclasses.replace(config, tasks={"glue": study.TasksPlan("GLUE", **recipes)}))
    stages = {stage.name: stage for stage in planned.stages}
    assert sum(stage.sort == "examples" for stage in planned.stages) == 3  # of the judge two
    for run in planned.places["runs"]:
        cell = run["train"].split("/")[-2]
        tuned, judged = stages[f"fine_tuning/{cell}-glue"], stages[f"tasks/{cell}-glue"]
        assert f"--gin.MODEL={run['train']}" in tuned.argv and f"train/{cell}" in tuned.needs
        assert "examples/glue" in tuned.needs and tuned.name in judged.needs
        assert run["tasks"]["glue"] == judged.result.rpartition("/")[0]
    with pytest.raises(ValueError, match="set both"):
        study.TasksPlan("GLUE", recipes["recipe"], recipes["examples"])


def test_a_chain_keeps_the_same_share_of_the_pool(real):
    stages = {stage.name: stage for stage in plan(real).stages}
    joint = stages["select/joint-20-seed0"]
    assert "--gin.WITHIN=runs/test/made/untwinned" in joint.argv and "--gin.KEEP=0.4" in joint.argv
    assert "select/untwinned" in joint.needs


def test_parts_of_the_corpus_that_overlap_are_refused(config):
    with pytest.raises(ValueError, match="pool_split and held_out"):
        plan(dataclasses.replace(config, pool_split=(0.35, 0.995)))


def test_what_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan(dataclasses.replace(config, keep_rates=(20.0,)))
    with pytest.raises(ValueError, match="uses the scorer 'nothing'"):
        sampler = dataclasses.replace(config.samplers["ask_llm"], scorer="nothing")
        plan(dataclasses.replace(config, samplers={"ask_llm": sampler}))
    with pytest.raises(ValueError, match="reads the stage 'nothing'"):
        scorer = study.ScorerPlan("Nothing", "none", (("nothing", "nll_mean", 1.0),))
        plan(dataclasses.replace(config, scorers={**config.scorers, "nothing": scorer}))
    with pytest.raises(ValueError, match="the stage 'pool' has the name"):
        plan(dataclasses.replace(config, stages={**config.stages, "pool": STAGE}))
    with pytest.raises(ValueError, match="x needs 'nothing', which is neither"):
        stage = dataclasses.replace(STAGE, inputs={"SCORES": "nothing"})
        plan(dataclasses.replace(config, stages={**config.stages, "x": stage}))
    with pytest.raises(ValueError, match="stages need each other: x -> y -> x"):
        pair = {"x": {"SCORES": "y"}, "y": {"SCORES": "x"}}
        circle = {k: dataclasses.replace(STAGE, inputs=v) for k, v in pair.items()}
        plan(dataclasses.replace(config, stages={**config.stages, **circle}))
    with pytest.raises(ValueError, match="of which its WITHIN leaves 30%"):
        chain = dataclasses.replace(config.samplers["ask_llm"], within_share=0.3)
        plan(dataclasses.replace(config, samplers={"chain": chain}))
    with pytest.raises(ValueError, match="names 'none', which is no sampler"):
        size = study.SizePlan("large", config.train, ("none",))
        plan(dataclasses.replace(config, sizes={"large": size}))
    with pytest.raises(ValueError, match="call the sampler something else"):
        plan(dataclasses.replace(config, samplers={"full": config.samplers["random"]}))


def test_published_weights_in_place_of_the_judge(config, tmp_path, t5_vocabulary_file):
    """One setting: the judge's own vocabulary tokenizes the corpus, and nothing is fine-tuned."""
    judge = tmp_path / "flan-t5-small"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    (judge / "spiece.model").write_bytes(t5_vocabulary_file.read_bytes())
    planned = plan(build(f"JUDGE = '{judge}'"))
    stages = {stage.name: stage for stage in planned.stages}
    assert not {"vocabulary", "examples/judge_examples", "model/judge"} & set(stages)
    assert f"--gin.VOCABULARY={judge / 'spiece.model'}" in stages["corpus"].argv
    assert f"--gin.MODEL={judge}" in stages["score/ask_llm"].argv
    assert "--gin.T5Config.vocab_size=32128" in stages["train/full-100-seed0"].argv


@pytest.mark.parametrize(
    ("samplers", "trained"),
    [
        ("('random',)", set()),
        ("('random', 'likelihood_middle')", {"model/scoring"}),
        ("('random', 'ask_llm')", {"model/scoring", "model/judge"}),
    ],
)
def test_models_are_trained_only_if_something_reads_them(samplers, trained):
    planned = plan(build(f"SAMPLERS = {samplers}", file="configs/study.gin"))
    names = {stage.name for stage in planned.stages}
    assert {name for name in names if name.startswith("model/")} == trained
    assert ("examples/judge_exam" in names) == ("model/judge" in trained)
    assert {f"model/{name}" for name in planned.places["models"]} == trained


def test_recipes_exist(config):
    files = {word for stage in plan(config).stages for word in stage.argv if "--gin_file=" in word}
    root = Path(QUICKSTART).parents[1]
    assert files
    for file in files:
        assert (root / file.removeprefix("--gin_file=")).exists()


def test_an_evaluation_set_must_come_from_somewhere():
    with pytest.raises(ValueError, match="set recipe, split or both"):
        study.EvaluationPlan("news", "by hand")
    assert study.EvaluationPlan("news", "by hand", recipe=Recipe("a.gin")).split is None


@pytest.mark.parametrize("file", [QUICKSTART, REAL, "configs/study.gin"])
def test_a_decoder_only_judge_reads_by_its_own_tokenizer(file, tmp_path):
    """One setting: the study keeps its vocabulary, and nothing is fine-tuned."""
    judge = tmp_path / "qwen"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer beside its weights"):
        plan(build(f"JUDGE = '{judge}'", file=file))
    (judge / "tokenizer.json").write_text("{}")
    stages = {stage.name: stage for stage in plan(build(f"JUDGE = '{judge}'", file=file)).stages}
    assert "vocabulary" in stages
    assert not {"examples/judge_examples", "model/judge"} & set(stages)
    assert f"--gin.MODEL={judge}" in stages["score/ask_llm"].argv


def test_published_scores_are_planned_as_stages_and_samplers():
    """Scores of every origin reach their samplers; that of the corpus needs no stage."""
    planned = plan(build(file=str(CONFIGS / "evaluate" / "study_scores.gin")))
    arguments = {stage.name: " ".join(stage.argv) for stage in planned.stages}
    column = arguments["select/column-20-seed0"]
    assert "--gin.SCORES=None" in column and "corpus:score" in column
    read = {
        "quality": ("SCORES=runs/test/made/quality",),
        "published": ("SCORES=runs/test/made/published",),
        "combined": ("SCORES=runs/test/made/combined",),
        "buckets": ("FIRST=runs/test/made/quality", "SECOND=runs/test/made/published"),
    }
    for sampler, sets in read.items():
        assert all(f"--gin.{one}" in arguments[f"select/{sampler}-20-seed0"] for one in sets)
    # The score of docs/quality.md, not the classifier of good text.
    assert "pruning quality" in arguments["quality/quality"]
