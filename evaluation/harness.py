"""Tasks of lm-evaluation-harness on Winnow's models.

    python -m evaluation harness --gin_file=configs/evaluate/harness.gin \\
        --gin.MODEL=runs/decoder --gin.TASKS=winnow_zero_shot --gin.OUTPUT=runs/decoder/harness

Choices
- Tasks have the harness's format and run in its code. Winnow is one of its models
  (harness_model.py).
- Tasks in evaluation/harness_tasks are YAML files that read local data, so they run offline. All
  other tasks of the harness run by name where their data is available.
- The harness's response cache is not used, because its keys hold requests but no checkpoint.
- Every named task or group is a result of its own, so an interrupted evaluation resumes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from evaluation import inference
from evaluation.inference import InferenceConfig
from evaluation.results_directory import ResultsDirectory
from evaluation.tasks import sources
from evaluation.tasks.suite import Names, listed
from pruning.scores.model.likelihood import Likelihood
from pruning.store.atomic import write_text
from pruning.store.manifest import config_of

NAME = "Harness"

OWN_TASKS = Path(__file__).resolve().parent / "harness_tasks"


class HarnessError(ValueError):
    """The harness cannot run this evaluation; the message says why and what to do."""


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
        """Return the task names without repetition."""
        return list(dict.fromkeys(listed(self.tasks)))


CONFIGURABLES: dict[str, type] = {
    NAME: HarnessConfig,
    "Inference": InferenceConfig,
    "Likelihood": Likelihood,
}


def run(config: HarnessConfig) -> list[str]:
    """Evaluate, or finish evaluating, and return a line for every metric of every task."""
    return [line for result in evaluate(config).values() for line in lines(result)]


def evaluate(config: HarnessConfig) -> dict[str, Any]:
    """Evaluate, or finish evaluating, and return results by requested name.

    Raises:
      HarnessError: lm-evaluation-harness is not installed, or knows no such task.
    """
    manager = task_manager(config)
    from evaluation.harness_model import WinnowLM

    model = inference.load(config.inference)
    lm = WinnowLM(model, config.rolling, config.special_tokens, config.seed)
    record = ResultsDirectory(config.output, identity(config, model))
    return record.each(config.names(), lambda name: _evaluate(config, name, lm, manager))


def identity(config: HarnessConfig, model: inference.Inference) -> dict[str, Any]:
    """Return all that the results depend on, except the task and its data."""
    import lm_eval

    names = ("few_shot", "limit", "special_tokens", "seed")
    settings = {name: getattr(config, name) for name in names}
    if model.has_encoder:
        settings["rolling"] = config_of(config.rolling)
    return {**model.identity(), **settings, "lm_eval": lm_eval.__version__}


def task_manager(config: HarnessConfig) -> Any:
    """Return the harness's task table: this project's tasks, given paths, and its own if needed.

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
    """Return the directory of the local tasks' files; "" where none is configured."""
    return given or os.environ.get(sources.DATA, "")


def _offline_where_asked() -> None:
    """Apply `HF_HUB_OFFLINE=1` to Hugging Face's datasets library too."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def _evaluate(config: HarnessConfig, name: str, lm: Any, manager: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    # Its pool of forked processes can deadlock, because JAX has started threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
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
    measured = {task: answer_log_likelihood(one) for task, one in found["samples"].items()}
    result["answer_log_likelihood"] = {k: v for k, v in measured.items() if v is not None}
    result["contexts_cut"] = lm.inference.cut - cut
    return json.loads(json.dumps(result, default=str))


def answer_log_likelihood(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean log-likelihood of the right answers, in nats per character.

    This is a continuous measure beside accuracy (Magnusson et al., arXiv 2504.11393). It exists for
    tasks whose requests are likelihoods of continuations: of all choices, the target's index being
    the right one, or of the right answer alone. Others give None.

    Args:
      samples: as the harness logs them.
    """
    values = []
    for sample in samples:
        answers = [argument for argument in sample["arguments"] if len(argument) == 2]
        replies = sample["filtered_resps"]
        place = sample["target"] if len(answers) > 1 else 0
        if len(answers) != len(replies) or not isinstance(place, int) or place >= len(answers):
            return None
        text, reply = answers[place][1], replies[place]
        if not isinstance(text, str) or not isinstance(reply, tuple | list):
            return None
        if characters := len(text.strip()):
            values.append(float(reply[0]) / characters)
    return sum(values) / len(values) if values else None


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return a line for every metric: task, metric, value, standard error, documents."""
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
    # Results of earlier versions have no such measure.
    for task, value in result.get("answer_log_likelihood", {}).items():
        found.append(f"{task}: {value:.4f} nats per character of the right answer")
    if result["contexts_cut"]:
        found.append(f"{result['contexts_cut']:,} contexts lost their beginning: raise row_length")
    return found
