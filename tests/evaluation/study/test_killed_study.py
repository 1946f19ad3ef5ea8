"""A whole small study, killed again and again, ends with the table of one that was left in peace.

It takes minutes: run it with WINNOW_KILLS=20. What the scheduler does when it is killed is tested
with quick stages in test_scheduler.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("WINNOW_KILLS", "0"))
REPOSITORY = Path(__file__).resolve().parents[3]
TABLES = ("runs.csv", "headline.csv", "agreement.csv", "retention.csv", "curves.csv")

STUDY = """
Study.output = %OUTPUT
OUTPUT = "unset"
FILES = "unset"
Study.title = "Small"
Study.vocabulary = "bytes"
Study.corpus = @corpus/Recipe()
corpus/Recipe.file = "configs/ingest/jsonl.gin"
corpus/Recipe.settings = {"FILES": %FILES}
Study.scoring_split = (0.0, 0.4)
Study.pool_split = (0.4, 0.8)
Study.scoring_model = @train/Recipe()
train/Recipe.file = "configs/pretrain/quickstart.gin"
train/Recipe.settings = {"STEPS": 12, "Train.eval_every": 4, "Train.eval_batches": 1, "Train.checkpoint_every": 3, "T5Config.d_model": 16, "T5Config.d_ff": 32, "T5Config.num_heads": 1}
Study.stages = {"likelihood": @StudyStage()}
StudyStage.command = "score"
StudyStage.recipe = @score/Recipe()
StudyStage.inputs = {"MODEL": "scoring", "Score.within": "pool"}
score/Recipe.file = "configs/score/likelihood.gin"
score/Recipe.settings = {"WINDOW": 64, "OVERLAP": 16, "ROW_LENGTH": 128, "BATCH_ROWS": 8, "DTYPE": "float32"}
Study.scorers = {"likelihood": @Scorer()}
Scorer.title = "Log-likelihood"
Scorer.axis = "nats"
Scorer.terms = (("likelihood", "nll_mean", -1.0),)
Study.samplers = {"random": @random/Sampler(), "low": @low/Sampler()}
random/Sampler.title = "Random"
random/Sampler.rule = "Any."
random/Sampler.recipe = @random/Recipe()
random/Recipe.file = "configs/select/random.gin"
low/Sampler.title = "Low"
low/Sampler.rule = "Unlikely ones."
low/Sampler.scorer = "likelihood"
low/Sampler.inputs = {"SCORES": "likelihood"}
low/Sampler.recipe = @low/Recipe()
low/Recipe.file = "configs/select/likelihood_low.gin"
Study.keep_rates = (0.5,)
Study.seeds = (0, 1)
Study.train = @train/Recipe()
Study.perplexity = @perplexity/Recipe()
perplexity/Recipe.file = "configs/evaluate/perplexity.gin"
perplexity/Recipe.settings = {"WINDOW": 64, "OVERLAP": 16, "ROW_LENGTH": 128, "BATCH_ROWS": 8}
Study.evaluations = {"held_out": @Evaluation()}
Evaluation.title = "held-out"
Evaluation.rule = "By hash."
Evaluation.split = (0.8, 1.0)
"""  # noqa: E501


@pytest.mark.skipif(not KILLS, reason="takes minutes: set WINNOW_KILLS=20")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_a_study_killed_at_random_ends_with_the_same_table(tmp_path):
    words = ("grain", "chaff", "wind", "barn", "field", "harvest", "wheat", "keep", "sow", "reap")
    draw = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(20, 60))) + "."})
        for _ in range(400)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "study.gin").write_text(STUDY)

    def command(output: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "evaluation", "study"),
            f"--gin_file={tmp_path / 'study.gin'}",
            f"--gin.OUTPUT={output}",
            f"--gin.FILES={tmp_path / 'text.jsonl'}",
        ]

    killed = tmp_path / "killed"
    kills = finished = 0
    moments: list[float] = []
    while kills < KILLS and not finished:
        process = subprocess.Popen(command(killed), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        moment = draw.uniform(1, 9)
        try:
            finished = process.wait(moment) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            moments.append(moment)
            time.sleep(0.5)  # its children die with it
    subprocess.run(command(killed), cwd=REPOSITORY, check=True)
    subprocess.run(command(tmp_path / "peace"), cwd=REPOSITORY, check=True)
    print(f"killed {kills} times, after {', '.join(f'{m:.1f}' for m in moments)} s")
    assert kills >= min(KILLS, 3)
    for name in TABLES:
        one, other = (
            (root / "report" / name).read_bytes() for root in (killed, tmp_path / "peace")
        )
        assert one == other, name
    metrics = "runs/low-50-seed0/train/metrics.jsonl"
    losses = [
        [json.loads(line).get("loss") for line in (root / metrics).read_text().splitlines()]
        for root in (killed, tmp_path / "peace")
    ]
    assert losses[0] == losses[1]
