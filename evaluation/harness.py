"""Tasks of lm-evaluation-harness on Winnow's models.

    python -m evaluation harness --gin_file=configs/evaluate/harness.gin \\
        --gin.MODEL=runs/decoder --gin.TASKS=winnow_zero_shot --gin.OUTPUT=runs/decoder/harness

Choices
- Tasks are the harness's own format and its own code; Winnow is a model of it (harness_model.py).
  What this project adds as tasks stands in evaluation/harness_tasks: YAML that reads local files,
  so that it runs offline. The harness's others run by their names, where their data can be had.
- The harness's response cache is not used: it knows requests, not checkpoints.
- Every named task or group is a result of its own: an evaluation that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from evaluation import inference
from evaluation.inference import InferenceConfig
from evaluation.record import Record
from evaluation.tasks.suite import Names, listed
from pruning.artefact import config_of, write_text
from pruning.scorers.likelihood import Likelihood

NAME = "Harness"

OWN_TASKS = Path(__file__).resolve().parent / "harness_tasks"
DATA = "WINNOW_EVALUATION_DATA"  # environment variable: where the local tasks' files are


class HarnessError(ValueError):
    """The harness cannot do what is asked; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class HarnessConfig:
    """Settings of `harness`.

    Attributes:
      inference: `@Inference()`, the model.
      output: directory of the results.
      tasks: names of tasks, groups or tags; or one text, separated by white space or commas.
      data: the directory in which the local tasks' files lie, as evaluation/harness_tasks/README.md
        lists them; by default the environment variable WINNOW_EVALUATION_DATA.
      task_paths: further directories with task files.
      few_shot: examples in the prompt, instead of the task's own number.
      limit: documents of each task, at most; None: all.
      samples: also write every document's requests and answers, as JSON lines.
      rolling: how a T5's rolling likelihood is estimated.
      special_tokens: give texts the tokens that a Hugging Face tokenizer adds by itself.
      seed: of few-shot examples and of sampling.
    """

    inference: InferenceConfig
    output: str
    tasks: Names
    data: str | None = None
    task_paths: tuple[str, ...] = ()
    few_shot: int | None = None
    limit: int | None = None
    samples: bool = True
    rolling: Likelihood = dataclasses.field(default_factory=lambda: Likelihood("span"))
    special_tokens: bool = True
    seed: int = 0

    def names(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(listed(self.tasks)))


CONFIGURABLES: dict[str, type] = {
    NAME: HarnessConfig,
    "Inference": InferenceConfig,
    "Likelihood": Likelihood,
}


def run(config: HarnessConfig) -> list[str]:
    """Evaluates, or finishes evaluating, and says a line for every metric of every task."""
    return [line for result in evaluate(config).values() for line in lines(result)]


def evaluate(config: HarnessConfig) -> dict[str, Any]:
    """Evaluates, or finishes evaluating. Returns results by the names that were asked for.

    Raises:
      HarnessError: lm-evaluation-harness is not installed, or knows no such task.
    """
    manager = task_manager(config)
    from evaluation.harness_model import WinnowLM

    model = inference.load(config.inference)
    lm = WinnowLM(model, config.rolling, config.special_tokens, config.seed)
    record = Record(config.output, identity(config, model))
    return record.each(config.names(), lambda name: _evaluate(config, name, lm, manager))


def identity(config: HarnessConfig, model: inference.Inference) -> dict[str, Any]:
    """All that the results depend on, beside the task and its data."""
    import lm_eval

    names = ("few_shot", "limit", "special_tokens", "seed")
    settings = {name: getattr(config, name) for name in names}
    if model.is_t5:
        settings["rolling"] = config_of(config.rolling)
    return {**model.identity(), **settings, "lm_eval": lm_eval.__version__}


def task_manager(config: HarnessConfig) -> Any:
    """The harness's table of tasks: ours, the given paths', and where needed its own.

    Raises HarnessError when a task is in none of them.
    """
    _offline_where_asked()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HarnessError(
            f"lm-evaluation-harness is not there ({error}): install winnow-lm[harness]."
        ) from error
    paths = [str(OWN_TASKS), *config.task_paths]
    if missing := [path for path in paths if not Path(path).is_dir()]:
        raise HarnessError(f"{missing[0]} is no directory of task files (Harness.task_paths).")
    metadata = {"data": data_directory(config.data)}
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if not set(config.names()) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths, metadata=metadata)
    if unknown := sorted(set(config.names()) - set(manager.all_tasks)):
        raise HarnessError(
            f"no task, group or tag {unknown[0]!r}: look into {OWN_TASKS}, or at "
            "`lm_eval ls tasks`, or name a directory in Harness.task_paths."
        )
    return manager


def data_directory(given: str | None) -> str:
    """Where the local tasks' files are; an empty text where nobody says."""
    return given or os.environ.get(DATA, "")


def _offline_where_asked() -> None:
    """`HF_HUB_OFFLINE=1` is for all of Hugging Face's libraries, also for datasets."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def _evaluate(config: HarnessConfig, name: str, lm: Any, manager: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    cut = lm.inference.cut
    found = simple_evaluate(
        model=lm,
        tasks=[name],
        num_fewshot=config.few_shot,
        limit=config.limit,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=1000,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    assert found is not None  # only the harness's other ranks get nothing
    if config.samples:
        for task, samples in found["samples"].items():
            file = epath.Path(config.output) / "samples" / f"{task.replace('::', '.')}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(one, default=str) + "\n" for one in samples))
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "task_hashes")
    result = {name: found[name] for name in kept if name in found}
    result["contexts_cut"] = lm.inference.cut - cut
    return json.loads(json.dumps(result, default=str))


def lines(result: Mapping[str, Any]) -> list[str]:
    """A line for every metric: task, metric, value, standard error, documents."""
    found = []
    for task, metrics in result["results"].items():
        for key, value in metrics.items():
            metric, _, rest = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not rest:
                continue
            error = metrics.get(f"{metric}_stderr,{rest}")
            spread = f" +- {error:.4f}" if isinstance(error, float) else ""
            filtered = "" if rest == "none" else f" ({rest})"
            documents = result["n-samples"].get(task, {}).get("effective")
            of = f", {documents:,} documents" if documents else ""
            found.append(f"{task}: {metric}{filtered} {value:.4f}{spread}{of}")
    if result["contexts_cut"]:
        found.append(f"{result['contexts_cut']:,} contexts lost their beginning: raise row_length")
    return found
